"""Stable Diffusion XL and what is built like it: Turbo, Lightning, v-prediction, Playground v2.5, CosXL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from .base import Tensors
from .sd import StableDiffusion


class StableDiffusionXL(StableDiffusion):
    """Two text encoders, a pooled state, and the image's size as an input."""

    family = "stable-diffusion-xl"
    pipelines = ("StableDiffusionXLPipeline",)
    parts = (*StableDiffusion.parts, "text_encoder_2", "tokenizer_2")
    load_options: ClassVar[Mapping[str, Any]] = {}
    original_encoders: ClassVar[Mapping[str, str]] = {
        "text_encoder": "conditioner.embedders.0.",
        "text_encoder_2": "conditioner.embedders.1.",
    }

    def encode_texts(self, texts: list[str]) -> Tensors:
        states, _, pooled, _ = self.pipeline.encode_prompt(
            texts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        _, height, width = self.latent_shape
        scale = self.pipeline.vae_scale_factor
        size = [height * scale, width * scale]
        time_ids = torch.tensor([[*size, 0, 0, *size]], dtype=pooled.dtype, device=self.device)
        return {"encoder_hidden_states": states, "text_embeds": pooled, "time_ids": time_ids.expand(len(texts), -1)}

    def unconditional(self, count: int) -> Tensors:
        """Zeros, unless the pipeline says that it was trained on the encoded empty prompt."""
        encoded = super().unconditional(count)
        if self.pipeline.config.force_zeros_for_empty_prompt:
            for name in ("encoder_hidden_states", "text_embeds"):
                encoded[name] = torch.zeros_like(encoded[name])
        return encoded
