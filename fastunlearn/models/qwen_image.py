"""Qwen-Image: a transformer that image and text pass side by side, a flow, and a language model as the reader."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from ..methods.recipe import MASK, STATES
from .base import Model, Tensors
from .flux import packed, unpacked
from .schedulers import flow_timesteps
from .sd3 import MMDIT_GROUPS

TOKENS = 512  # the pipeline's default


class QwenImage(Model):
    """Prompts are read within a template, of which the denoiser sees nothing; all are padded to one length.

    Its VAE is one of videos: an image is one frame.
    """

    family = "qwen-image"
    pipelines = ("QwenImagePipeline",)
    parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer", "transformer", "vae", "scheduler")
    groups = MMDIT_GROUPS
    default_group = "text-attention"
    text_readers = "txt_in.weight"
    patch = 2
    masks_attention = True

    @property
    def sample_size(self) -> Any:
        return super().sample_size or self.pipeline.default_sample_size

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        channels, height, width = super().latent_shape
        return channels // 4, height, width

    @property
    def max_tokens(self) -> int:
        """What the template's end leaves: it stands behind the prompt and is read with it."""
        around = self.pipeline.tokenizer(self.pipeline.prompt_template_encode.format("")).input_ids
        return TOKENS - max(0, len(around) - self.pipeline.prompt_template_encode_start_idx)

    def encode_texts(self, texts: list[str]) -> Tensors:
        states, mask = self.pipeline.encode_prompt(texts, device=self.device, max_sequence_length=TOKENS)
        if mask is None:  # all prompts are equally long
            mask = torch.ones(states.shape[:2], device=self.device)
        missing = TOKENS - states.shape[1]
        return {
            STATES: nn.functional.pad(states, (0, 0, 0, missing)),
            MASK: nn.functional.pad(mask.float(), (0, missing)),
        }

    def predict(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Tensors, denoiser: nn.Module | None = None
    ) -> torch.Tensor:
        network = self.denoiser if denoiser is None else denoiser
        count, _, height, width = latents.shape
        prediction = network(
            hidden_states=packed(latents.to(self.dtype)),
            timestep=timesteps.expand(count).to(self.dtype) / 1000,
            encoder_hidden_states=conditions[STATES].to(self.dtype),
            encoder_hidden_states_mask=conditions[MASK].bool(),
            img_shapes=[[(1, height // 2, width // 2)]] * count,
            return_dict=False,
        )[0]
        return unpacked(prediction, latents.shape).float()

    def guide(self, predictions: torch.Tensor, scale: float) -> torch.Tensor:
        """Classifier-free guidance, every token of it as long as the prompt's was."""
        guided = super().guide(predictions, scale)
        lengths = [packed(one).norm(dim=-1, keepdim=True) for one in (predictions[1], guided)]
        return unpacked(packed(guided) * (lengths[0] / lengths[1]), guided.shape)

    def timestep_options(self, num_inference_steps: int) -> dict[str, Any]:
        _, height, width = self.latent_shape
        return flow_timesteps(self.pipeline.scheduler, num_inference_steps, (height // 2) * (width // 2))

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        vae = self.pipeline.vae
        mean, spread = (
            torch.as_tensor(values, dtype=latents.dtype, device=latents.device).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        return vae.decode(latents[:, :, None] * spread + mean, return_dict=False)[0][:, :, 0]
