"""Stable Diffusion 3 and 3.5: a transformer that image and text pass side by side (MMDiT), a flow, two CLIPs and T5."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from .base import Group, Model, Tensors
from .schedulers import dynamic_shift

T5_TOKENS = 256  # the pipeline's default

# The image's tokens and the text's have weights of their own; `attn2`, where 3.5 has it, is the image's alone.
MMDIT_GROUPS = {
    "text-attention": Group(
        "the text's projections into joint attention and out of it",
        only=("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    ),
    "text-attention-kv": Group("the text's keys and values in joint attention", only=("add_k_proj", "add_v_proj")),
    "all": Group("every parameter"),
}


class StableDiffusion3(Model):
    """T5 may be missing: its states are then zeros, as in diffusers."""

    family = "stable-diffusion-3"
    pipelines = ("StableDiffusion3Pipeline",)
    parts: ClassVar[tuple[str, ...]] = (
        *("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        *("transformer", "vae", "scheduler"),
    )
    groups = MMDIT_GROUPS
    default_group = "text-attention"
    text_readers = "context_embedder.weight,text_embedder.linear_1.weight"

    @property
    def reader(self) -> tuple[Any, int]:
        """T5, which reads further than the CLIPs; without it, these."""
        tokenizer = self.pipeline.tokenizer_3
        return (tokenizer, self.t5_tokens) if self.pipeline.text_encoder_3 is not None else super().reader

    @property
    def t5_tokens(self) -> int:
        """How many places the text has for T5's tokens, also where it is missing."""
        own = self.world.t5_tokens if self.world else None
        return T5_TOKENS if own is None else own

    def encode_texts(self, texts: list[str]) -> Tensors:
        states, _, pooled, _ = self.pipeline.encode_prompt(
            *(texts, texts, texts),
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.t5_tokens,
        )
        return {"encoder_hidden_states": states, "pooled_projections": pooled}

    def predict(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Tensors, denoiser: nn.Module | None = None
    ) -> torch.Tensor:
        network = self.denoiser if denoiser is None else denoiser
        inputs = {name: values.to(self.dtype) for name, values in conditions.items()}
        timestep = timesteps.expand(len(latents))
        return network(hidden_states=latents.to(self.dtype), timestep=timestep, return_dict=False, **inputs)[0].float()

    def timestep_options(self, num_inference_steps: int) -> dict[str, Any]:
        options: dict[str, Any] = {"num_inference_steps": num_inference_steps}
        if self.pipeline.scheduler.config.get("use_dynamic_shifting"):
            _, height, width = self.latent_shape
            patch = self.pipeline.transformer.config.patch_size
            tokens = (height // patch) * (width // patch)
            options["mu"] = dynamic_shift(self.pipeline.scheduler, tokens, max_shift=1.16)
        return options
