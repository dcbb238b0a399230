"""Stable Diffusion 1.x and 2.x: a UNet, a VAE and one CLIP text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from .base import Group, Model, Tensors

# The groups of the field, with ESD's names in brackets.
UNET_GROUPS = {
    "cross-attention": Group("every parameter of the attn2 blocks (esd-x)", only=("attn2",)),
    "cross-attention-kv": Group("attn2.to_k and attn2.to_v (esd-x-strict)", only=("attn2.to_k", "attn2.to_v")),
    "non-cross-attention": Group("everything outside the attn2 blocks (esd-u)", without=("attn2",)),
    "all": Group("every parameter (esd-all)"),
}


class StableDiffusion(Model):
    """Epsilon, v and sample prediction, zero terminal SNR: the scheduler says which."""

    family = "stable-diffusion"
    pipelines = ("StableDiffusionPipeline",)
    parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer", "unet", "vae", "scheduler")
    groups = UNET_GROUPS
    text_readers = "cross-attention-kv"
    denoiser_folder = "unet"
    original_encoders: ClassVar[Mapping[str, str]] = {"text_encoder": "cond_stage_model."}
    # The checker blacks images out, which would be mistaken for damage: it is never part of a comparison.
    load_options: ClassVar[Mapping[str, Any]] = {
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }

    def encode_texts(self, texts: list[str]) -> Tensors:
        encoded = self.pipeline.encode_prompt(
            texts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": encoded[0]}

    def with_guidance(self, conditions: Tensors, scale: float) -> Tensors:
        """UNets distilled to consistency models take an embedding of ``scale - 1``, 0 where there is no guidance."""
        if (width := self._guidance_width) is None:
            return conditions
        weights = torch.full((len(conditions["encoder_hidden_states"]),), max(float(scale), 1.0) - 1)
        embedded = self.pipeline.get_guidance_scale_embedding(weights, embedding_dim=width)
        return conditions | {"timestep_cond": embedded.to(self.device)}

    @property
    def is_guided(self) -> bool:
        return self._guidance_width is None

    @property
    def _guidance_width(self) -> int | None:
        return self.pipeline.unet.config.time_cond_proj_dim

    def predict(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Tensors, denoiser: nn.Module | None = None
    ) -> torch.Tensor:
        inputs = {name: values.to(self.dtype) for name, values in conditions.items()}
        network = self.denoiser if denoiser is None else denoiser
        prediction = network(
            latents.to(self.dtype),
            timesteps,
            encoder_hidden_states=inputs.pop("encoder_hidden_states"),
            timestep_cond=inputs.pop("timestep_cond", None),
            added_cond_kwargs=inputs or None,
            return_dict=False,
        )
        return prediction[0].float()
