"""PixArt-Sigma: a transformer with cross-attention to T5's states."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from .base import Model, Tensors
from .sd import UNET_GROUPS

T5_TOKENS = 300  # the pipeline's default


class PixArtSigma(Model):
    """Prompts are read in lower case, not cleaned further: what diffusers does there depends on what is installed."""

    family = "pixart-sigma"
    pipelines = ("PixArtSigmaPipeline",)
    parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer", "transformer", "vae", "scheduler")
    groups = UNET_GROUPS  # its blocks have the names of a UNet's
    text_readers = "caption_projection.linear_1.weight"

    @property
    def reader(self) -> tuple[Any, int]:
        return self.pipeline.tokenizer, T5_TOKENS

    def count_tokens(self, prompt: str) -> int:
        return super().count_tokens(prompt.lower().strip())

    def encode_texts(self, texts: list[str]) -> Tensors:
        states, mask, _, _ = self.pipeline.encode_prompt(
            texts,
            do_classifier_free_guidance=False,
            device=self.device,
            clean_caption=False,
            max_sequence_length=T5_TOKENS,
        )
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}

    def predict(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Tensors, denoiser: nn.Module | None = None
    ) -> torch.Tensor:
        network = self.denoiser if denoiser is None else denoiser
        prediction = network(
            latents.to(self.dtype),
            timestep=timesteps.expand(len(latents)),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
            **{name: values.to(self.dtype) for name, values in conditions.items()},
        )
        # What follows the latents' channels is a variance, which no sampler uses.
        return prediction[0][:, : latents.shape[1]].float()
