"""Deterministic sampling: the one denoising loop, used both for trajectories (`bank`) and for images (`generate`)."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

import torch

from ..errors import UserError
from .loading import Model

_STOCHASTIC = ("Ancestral", "SDE", "DDPM", "LCM", "TCD", "KDPM2Ancestral")


@dataclasses.dataclass
class Point:
    """One step of a batch of trajectories.

    ``timestep``: scalar tensor.  ``latents``: (B, C, H, W), the denoiser's input.  ``predictions``: (K, B, C, H, W),
    the denoiser's raw outputs, branch by branch.  ``next_latents``: (B, C, H, W), after the sampler's step.
    """

    timestep: torch.Tensor
    latents: torch.Tensor
    predictions: torch.Tensor
    next_latents: torch.Tensor


def initial_noise(prompts: Sequence[str], seeds: Sequence[int], shape: tuple[int, int, int]) -> torch.Tensor:
    """Standard normal noise (B, C, H, W), float32 on the CPU, a function of each (prompt, seed) alone.

    Every row has a generator of its own, keyed by SHA-256, so it does not depend on the batch that it is drawn in.
    """
    rows = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        key = hashlib.sha256(f"fastunlearn-noise-1|{prompt}|{seed}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
        rows.append(torch.randn(shape, generator=generator))
    return torch.stack(rows)


def check_deterministic(scheduler: object) -> None:
    """ValueError for a sampler that draws noise at every step: pairs made by it would differ by chance."""
    name = type(scheduler).__name__
    if any(word in name for word in _STOCHASTIC):
        raise UserError(f"{name} adds noise at every step, so pairs cannot be compared. Use DDIM, PNDM or Euler.")


@torch.no_grad()
def sample(
    model: Model,
    noise: torch.Tensor,
    branches: Sequence[dict[str, torch.Tensor]],
    *,
    num_inference_steps: int,
    guidance_scale: float,
) -> Iterator[Point]:
    """Run the model's own sampler from ``noise`` (B, C, H, W) with classifier-free guidance.

    ``branches`` are the denoiser's conditions: first the unconditional, then the prompts that guide, then any further
    ones whose predictions are wanted at the same points.  All branches of a step share one forward.
    """
    check_deterministic(model.pipeline.scheduler)
    scheduler = model.new_scheduler(num_inference_steps)
    count, batch = len(branches), len(noise)
    conditions = {name: torch.cat([branch[name] for branch in branches]) for name in branches[0]}
    latents = noise.to(model.device) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        latent_model_input = scheduler.scale_model_input(latents, timestep)
        predictions = model.predict(latent_model_input.repeat(count, 1, 1, 1), timestep, conditions)
        predictions = predictions.view(count, batch, *latents.shape[1:])
        noise_pred = torch.lerp(predictions[0], predictions[1], guidance_scale)
        latents = scheduler.step(noise_pred, timestep, latents, return_dict=False)[0]
        yield Point(timestep, latent_model_input, predictions, latents)
