"""FLUX.1 dev and schnell: a flow whose guidance, if it takes any, is an input; CLIP's pooled state and T5."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from .base import Model, Tensors
from .schedulers import flow_timesteps
from .sd3 import MMDIT_GROUPS

T5_TOKENS = 512  # the pipeline's default


class Flux(Model):
    """Latents are (C, H, W) outside; inside :meth:`predict` squares of 2 x 2 are packed into tokens.

    The denoiser's settings name no resolution, so it is the pipeline's default; ``sample_size`` in them is another.
    """

    family = "flux"
    pipelines = ("FluxPipeline",)
    parts: ClassVar[tuple[str, ...]] = (
        *("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        *("transformer", "vae", "scheduler"),
    )
    groups = MMDIT_GROUPS
    default_group = "text-attention"
    text_readers = "context_embedder.weight,text_embedder.linear_1.weight"
    is_guided = False  # dev is told the scale, schnell knows none
    patch = 2

    @property
    def sample_size(self) -> Any:
        return super().sample_size or self.pipeline.default_sample_size

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        packed, height, width = super().latent_shape
        return packed // 4, height, width

    @property
    def reader(self) -> tuple[Any, int]:
        """T5; CLIP reads less and gives one pooled state."""
        return self.pipeline.tokenizer_2, T5_TOKENS

    def encode_texts(self, texts: list[str]) -> Tensors:
        states, pooled, _ = self.pipeline.encode_prompt(texts, texts, device=self.device, max_sequence_length=T5_TOKENS)
        return self.with_guidance({"encoder_hidden_states": states, "pooled_projections": pooled}, 1.0)

    def with_guidance(self, conditions: Tensors, scale: float) -> Tensors:
        if not self.pipeline.transformer.config.guidance_embeds:
            return conditions
        states = conditions["encoder_hidden_states"]
        return conditions | {"guidance": torch.full((len(states),), max(float(scale), 1.0), device=states.device)}

    def predict(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Tensors, denoiser: nn.Module | None = None
    ) -> torch.Tensor:
        network = self.denoiser if denoiser is None else denoiser
        inputs = {name: values.to(self.dtype) for name, values in conditions.items()}
        count, _, height, width = latents.shape
        rows, columns = height // 2, width // 2
        places = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns))
        prediction = network(
            hidden_states=packed(latents.to(self.dtype)),
            timestep=timesteps.expand(count) / 1000,
            img_ids=places.to(self.device, self.dtype),
            txt_ids=torch.zeros(inputs["encoder_hidden_states"].shape[1], 3, device=self.device, dtype=self.dtype),
            return_dict=False,
            **inputs,
        )[0]
        return unpacked(prediction, latents.shape).float()

    def timestep_options(self, num_inference_steps: int) -> dict[str, Any]:
        _, height, width = self.latent_shape
        return flow_timesteps(self.pipeline.scheduler, num_inference_steps, (height // 2) * (width // 2))


def packed(latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, H, W) as tokens (B, H / 2 * W / 2, 4 C), each a square of 2 x 2."""
    count, channels, height, width = latents.shape
    squares = latents.reshape(count, channels, height // 2, 2, width // 2, 2)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(count, height * width // 4, channels * 4)


def unpacked(tokens: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The latents of such tokens, of the shape (B, C, H, W)."""
    count, channels, height, width = shape
    squares = tokens.view(count, height // 2, width // 2, channels, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(shape)
