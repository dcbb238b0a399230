"""Z-Image: one stream of text and image tokens, a flow, and a language model that reads the prompt as a chat."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from ..methods.recipe import MASK, STATES
from .base import Group, Model, Tensors
from .schedulers import flow_timesteps

TOKENS = 512  # the pipeline's default
PIXELS = 1024  # likewise


class ZImage(Model):
    """The denoiser takes lists: each prompt's states are as long as it is; between the verbs they are padded.

    Its time runs from noise, 0, to the image, 1, so its velocity has the other sign.
    """

    family = "z-image"
    pipelines = ("ZImagePipeline",)
    parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer", "transformer", "vae", "scheduler")
    groups: ClassVar[dict[str, Group]] = {
        "joint-attention": Group("the attention that text and image share", only=("layers.*.attention.*",)),
        "text-refiner": Group("what the text alone passes", only=("context_refiner", "cap_embedder")),
        "all": Group("every parameter"),
    }
    default_group = "joint-attention"
    text_readers = "cap_embedder.1.weight"
    patch = 2
    masks_attention = True

    @property
    def sample_size(self) -> Any:
        return super().sample_size or PIXELS // self.pixels_per_latent

    def _as_read(self, prompt: str) -> str:
        """The prompt within its chat."""
        chat = [{"role": "user", "content": prompt}]
        return str(
            self.pipeline.tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True, enable_thinking=True
            )
        )

    @property
    def max_tokens(self) -> int:
        """What the chat around a prompt leaves."""
        return TOKENS - len(self.pipeline.tokenizer(self._as_read("")).input_ids)

    def encode_texts(self, texts: list[str]) -> Tensors:
        # The pipeline writes the chats into the list that it is given.
        states, _ = self.pipeline.encode_prompt(
            list(texts), device=self.device, do_classifier_free_guidance=False, max_sequence_length=TOKENS
        )
        padded = [nn.functional.pad(one, (0, 0, 0, TOKENS - len(one))) for one in states]
        lengths = torch.tensor([len(one) for one in states], device=self.device)
        is_read = torch.arange(TOKENS, device=self.device) < lengths[:, None]
        return {STATES: torch.stack(padded), MASK: is_read.float()}

    def predict(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Tensors, denoiser: nn.Module | None = None
    ) -> torch.Tensor:
        network = self.denoiser if denoiser is None else denoiser
        states, lengths = conditions[STATES].to(self.dtype), conditions[MASK].sum(1).int().tolist()
        predictions = network(
            list(latents.to(self.dtype)[:, :, None]),
            (1000 - timesteps.expand(len(latents))) / 1000,
            [one[:length] for one, length in zip(states, lengths, strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack([one.float()[:, 0] for one in predictions])

    def guide(self, predictions: torch.Tensor, scale: float) -> torch.Tensor:
        """diffusers counts from the prompt's prediction here, so that its scale is one less than elsewhere."""
        return super().guide(predictions, scale + 1)

    def timestep_options(self, num_inference_steps: int) -> dict[str, Any]:
        _, height, width = self.latent_shape
        return flow_timesteps(self.pipeline.scheduler, num_inference_steps, (height // 2) * (width // 2))
