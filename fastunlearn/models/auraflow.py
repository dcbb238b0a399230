"""AuraFlow: a flow whose transformer has joint layers of text and image, and a T5 that reads many languages."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import nn

from .base import Model, Tensors
from .sd3 import MMDIT_GROUPS

T5_TOKENS = 256  # the pipeline's default
PIXELS = 1024  # likewise


class AuraFlow(Model):
    """States beyond a prompt's end are zeros; the denoiser takes no mask."""

    family = "auraflow"
    pipelines = ("AuraFlowPipeline",)
    parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer", "transformer", "vae", "scheduler")
    groups = MMDIT_GROUPS
    default_group = "text-attention"
    text_readers = "context_embedder.weight"

    @property
    def sample_size(self) -> int:
        """The pipeline's default size, as far as the denoiser has positions; its ``sample_size`` is another."""
        return min(PIXELS // self.pixels_per_latent, self.largest_size)

    @property
    def largest_size(self) -> int:
        return self.patch * math.isqrt(self._config.pos_embed_max_size)

    @property
    def reader(self) -> tuple[Any, int]:
        return self.pipeline.tokenizer, T5_TOKENS

    def encode_texts(self, texts: list[str]) -> Tensors:
        states, *_ = self.pipeline.encode_prompt(
            texts, do_classifier_free_guidance=False, device=self.device, max_sequence_length=T5_TOKENS
        )
        return {"encoder_hidden_states": states}

    def predict(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Tensors, denoiser: nn.Module | None = None
    ) -> torch.Tensor:
        network = self.denoiser if denoiser is None else denoiser
        inputs = {name: values.to(self.dtype) for name, values in conditions.items()}
        timestep = timesteps.expand(len(latents)) / 1000
        return network(latents.to(self.dtype), timestep=timestep, return_dict=False, **inputs)[0].float()
