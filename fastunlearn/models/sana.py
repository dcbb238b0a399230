"""Sana: a transformer with linear attention, a VAE that shrinks 32-fold, and a language model that reads the prompt."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import nn

from .base import Model, Tensors
from .sd import UNET_GROUPS

TOKENS = 300  # the pipeline's default


class Sana(Model):
    """A prompt is read after an instruction to enhance it, which is diffusers' own; one to lead away from is not."""

    family = "sana"
    pipelines = ("SanaPipeline",)
    parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer", "transformer", "vae", "scheduler")
    groups = UNET_GROUPS  # its blocks have the names of a UNet's
    text_readers = "caption_projection.linear_1.weight"

    def count_tokens(self, prompt: str) -> int:
        return super().count_tokens(prompt.lower().strip())  # as the pipeline reads it

    @property
    def max_tokens(self) -> int:
        """Two fewer than the states' length, whatever the instruction's."""
        return TOKENS - 2

    def encode_texts(self, texts: list[str]) -> Tensors:
        parameters = inspect.signature(type(self.pipeline).__call__).parameters
        return self._encode(texts, parameters["complex_human_instruction"].default)

    def encode_negative(self, texts: list[str]) -> Tensors:
        return self._encode(texts, None)

    def _encode(self, texts: list[str], instruction: Any) -> Tensors:
        states, mask, _, _ = self.pipeline.encode_prompt(
            texts,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=TOKENS,
            complex_human_instruction=instruction,
        )
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}

    def predict(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Tensors, denoiser: nn.Module | None = None
    ) -> torch.Tensor:
        network = self.denoiser if denoiser is None else denoiser
        prediction = network(
            latents.to(self.dtype),
            timestep=timesteps.expand(len(latents)) * self.pipeline.transformer.config.timestep_scale,
            return_dict=False,
            **{name: values.to(self.dtype) for name, values in conditions.items()},
        )
        return prediction[0][:, : latents.shape[1]].float()  # a variance, where there is one, is not used
