"""Deterministic sampling: the one denoising loop, used both for trajectories (`bank`) and for images (`generators`)."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

import torch

from .base import Model, Tensors
from .schedulers import check_deterministic, step_options


@dataclasses.dataclass(frozen=True)
class SamplerSpec:
    """How images are made; the same for every model that is compared.  A guidance scale of 0 or 1 means none.

    ``decode_batch_size``: images per forward of the VAE, None for all of a batch.
    """

    num_inference_steps: int = 20
    guidance_scale: float = 3.0
    micro_batch_size: int = 32
    mixed_precision: str = "no"
    decode_batch_size: int | None = None


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


def initial_noise(
    prompts: Sequence[str], seeds: Sequence[int], shape: tuple[int, int, int], purpose: str = ""
) -> torch.Tensor:
    """Standard normal noise (B, C, H, W), float32 on the CPU, a function of each (prompt, seed) and the purpose alone.

    Every row has a generator of its own, keyed by SHA-256, so it does not depend on the batch that it is drawn in.
    ``purpose``: what it is drawn for, if not for an evaluation; no two purposes share noise.
    """
    version = f"fastunlearn-noise-1/{purpose}" if purpose else "fastunlearn-noise-1"
    rows = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        key = hashlib.sha256(f"{version}|{prompt}|{seed}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
        rows.append(torch.randn(shape, generator=generator))
    return torch.stack(rows)


@torch.no_grad()
def sample(
    model: Model,
    noise: torch.Tensor,
    branches: Sequence[Tensors],
    *,
    num_inference_steps: int,
    guidance_scale: float,
    recorded: torch.Tensor | None = None,
) -> Iterator[Point]:
    """Run the model's own sampler from ``noise`` (B, C, H, W), guided as its family is.

    ``branches`` are the denoiser's conditions: first what ``model.guided_from`` names, if it does, then the prompts
    that guide, then any further ones whose predictions are wanted at the same points.  All branches of a step share
    one forward.  ``recorded``: (T, K, B, C, H, W), what another model predicted at the first T points from this noise;
    there the sampler takes these, and no forward is run.
    """
    check_deterministic(model.pipeline.scheduler)
    scheduler = model.new_scheduler(num_inference_steps)
    scale_input = getattr(scheduler, "scale_model_input", lambda latents, timestep: latents)  # flow has none
    further = step_options(scheduler, noise)
    is_guided = bool(model.guided_from(guidance_scale))
    count, batch = len(branches), len(noise)
    conditions = {name: torch.cat([branch[name] for branch in branches]) for name in branches[0]}
    conditions = model.with_guidance(conditions, guidance_scale)
    latents = noise.to(model.device) * getattr(scheduler, "init_noise_sigma", 1.0)
    for number, timestep in enumerate(scheduler.timesteps):
        latent_model_input = scale_input(latents, timestep)
        if recorded is not None and number < len(recorded):
            predictions = recorded[number].to(latents)
        else:
            predictions = model.predict(latent_model_input.repeat(count, 1, 1, 1), timestep, conditions)
            predictions = predictions.view(count, batch, *latents.shape[1:])
        noise_pred = model.guide(predictions, guidance_scale) if is_guided else predictions[0]
        latents = scheduler.step(noise_pred, timestep, latents, return_dict=False, **further)[0]
        yield Point(timestep, latent_model_input, predictions, latents)


def denoise(
    model: Model,
    branches: Sequence[Tensors],
    noise: torch.Tensor,
    spec: SamplerSpec,
    recorded: torch.Tensor | None = None,
) -> torch.Tensor:
    """Final latents (B, C, H, W) of a batch from its noise, guided by ``branches`` as in :func:`sample`.

    ``recorded``: as for :func:`sample`.
    """
    with repeatable(model, spec):
        for point in sample(
            model,
            noise,
            branches,
            num_inference_steps=spec.num_inference_steps,
            guidance_scale=spec.guidance_scale,
            recorded=recorded,
        ):
            latents = point.next_latents
    return latents


def decode(model: Model, latents: torch.Tensor, spec: SamplerSpec) -> torch.Tensor:
    """Images (B, 3, H, W) uint8 of a batch of final latents."""
    with repeatable(model, spec):
        return model.decode(latents, spec.decode_batch_size)


@contextlib.contextmanager
def repeatable(model: Model, spec: SamplerSpec) -> Iterator[None]:
    """Within it the same input gives the same bits, in the precision of ``spec``."""
    with (
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
        torch.autocast(model.device.type, torch.bfloat16, enabled=spec.mixed_precision == "bf16"),
    ):
        yield
