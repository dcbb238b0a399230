"""Lumina-Image 2.0: one stream of text and image tokens, a flow, and a language model that reads the prompt."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from .base import Group, Model, Tensors
from .schedulers import flow_timesteps

TOKENS = 256  # the pipeline's default


class Lumina2(Model):
    """A prompt is read after a system prompt; one to lead away from is not.

    The denoiser's time runs from noise, 0, to the image, 1, so its velocity has the other sign.
    """

    family = "lumina2"
    pipelines = ("Lumina2Pipeline",)
    parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer", "transformer", "vae", "scheduler")
    groups: ClassVar[dict[str, Group]] = {
        "joint-attention": Group("the attention that text and image share", only=("layers.*.attn.*",)),
        "text-refiner": Group("what the text alone passes", only=("context_refiner", "caption_embedder")),
        "all": Group("every parameter"),
    }
    default_group = "joint-attention"
    text_readers = "caption_embedder.1.weight"

    @property
    def reader(self) -> tuple[Any, int]:
        """What the system prompt leaves."""
        tokenizer = self.pipeline.tokenizer
        before = f"{self.pipeline.system_prompt} <Prompt Start> "
        return tokenizer, TOKENS - len(tokenizer(before, add_special_tokens=False).input_ids)

    def encode_texts(self, texts: list[str]) -> Tensors:
        states, mask, _, _ = self.pipeline.encode_prompt(
            texts, do_classifier_free_guidance=False, device=self.device, max_sequence_length=TOKENS
        )
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}

    def encode_negative(self, texts: list[str]) -> Tensors:
        *_, states, mask = self.pipeline.encode_prompt(
            [""] * len(texts), negative_prompt=texts, device=self.device, max_sequence_length=TOKENS
        )
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}

    def predict(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Tensors, denoiser: nn.Module | None = None
    ) -> torch.Tensor:
        network = self.denoiser if denoiser is None else denoiser
        steps = self.pipeline.scheduler.config.num_train_timesteps
        prediction = network(
            hidden_states=latents.to(self.dtype),
            timestep=1 - timesteps.expand(len(latents)) / steps,
            encoder_hidden_states=conditions["encoder_hidden_states"].to(self.dtype),
            encoder_attention_mask=conditions["encoder_attention_mask"],
            return_dict=False,
        )
        return -prediction[0].float()

    def guide(self, predictions: torch.Tensor, scale: float) -> torch.Tensor:
        """Classifier-free guidance, every line of it as long as the prompt's was."""
        guided = super().guide(predictions, scale)
        return guided * (predictions[1].norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    @property
    def largest_size(self) -> int | None:
        return min(self._config.axes_lens[1:]) * self.patch

    def timestep_options(self, num_inference_steps: int) -> dict[str, Any]:
        # The pipeline takes the number of channels for that of tokens.
        return flow_timesteps(self.pipeline.scheduler, num_inference_steps, self.latent_shape[0])
