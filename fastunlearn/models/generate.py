"""Paired images: the same (prompt, seed) starts every model from the same noise, in batches of one fixed size."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import torch

from ..methods.recipe import EMPTY
from .loading import Model
from .sampling import initial_noise, sample


@dataclasses.dataclass(frozen=True)
class SamplerSpec:
    """How images are made; the same for every model that is compared."""

    num_inference_steps: int = 20
    guidance_scale: float = 3.0
    micro_batch_size: int = 32
    mixed_precision: str = "no"


def generate(model: Model, prompts: Sequence[str], seeds: Sequence[int], spec: SamplerSpec) -> torch.Tensor:
    """Images (N, 3, H, W) uint8 for N (prompt, seed) keys.

    Every forward has exactly ``spec.micro_batch_size`` rows, the last batch being filled up with its last key: results
    of a network may change in the last bit with the size of a batch, not with a row's place in it.
    """
    conditions = model.encode([EMPTY, *prompts], spec.micro_batch_size)
    images = []
    for start in range(0, len(prompts), spec.micro_batch_size):
        chunk = list(prompts[start : start + spec.micro_batch_size])
        keys = list(seeds[start : start + spec.micro_batch_size])
        filler = spec.micro_batch_size - len(chunk)
        padded = chunk + chunk[-1:] * filler
        noise = initial_noise(padded, keys + keys[-1:] * filler, model.latent_shape)
        branches = [conditions.of([EMPTY] * len(padded)), conditions.of(padded)]
        images.append(decode(model, denoise(model, branches, noise, spec), spec)[: len(chunk)])
    return torch.cat(images)


def denoise(
    model: Model, branches: Sequence[dict[str, torch.Tensor]], noise: torch.Tensor, spec: SamplerSpec
) -> torch.Tensor:
    """Final latents (B, C, H, W) of a batch from its noise, guided by two branches: unconditional, prompts."""
    with _repeatable(model, spec):
        for point in sample(
            model,
            noise,
            branches,
            num_inference_steps=spec.num_inference_steps,
            guidance_scale=spec.guidance_scale,
        ):
            latents = point.next_latents
    return latents


def decode(model: Model, latents: torch.Tensor, spec: SamplerSpec) -> torch.Tensor:
    """Images (B, 3, H, W) uint8 of a batch of final latents."""
    with _repeatable(model, spec):
        return model.decode(latents)


@contextlib.contextmanager
def _repeatable(model: Model, spec: SamplerSpec) -> Iterator[None]:
    with (
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
        torch.autocast(model.device.type, torch.bfloat16, enabled=spec.mixed_precision == "bf16"),
    ):
        yield
