"""Sampling with noise drawn at every step, by any model whose latents are alpha times the image and sigma times noise.

From the prediction follow the image x0 and the noise e; the next latents are (DDIM, Song et al. 2020, arXiv 2010.02502,
equation 12, written for any alpha and sigma)

    x'  = alpha' x0 + sqrt(sigma'^2 - tau^2) e + factor tau z,
    tau = eta sigma' sqrt( 1 - (alpha sigma')^2 / (alpha' sigma)^2 ).

eta = 0 is DDIM, eta = 1 DDPM; above 1 the root is cut at 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..errors import UserError
from .base import Model, Tensors
from .sampling import SamplerSpec, repeatable
from .schedulers import levels, split


def check_levels(model: Model) -> None:
    """UserError for a sampler whose latents are of another kind."""
    scheduler = model.pipeline.scheduler
    if hasattr(scheduler, "precondition_outputs"):
        raise UserError(
            f"{model.name}'s {type(scheduler).__name__} scales its latents in a way of its own, which sampling with "
            "noise at every step does not serve. Leave the attack `noise` out."
        )
    levels(scheduler, model.new_scheduler(2).timesteps[:1].float())


@torch.no_grad()
def noisy_latents(
    model: Model,
    noise: torch.Tensor,
    branches: Sequence[Tensors],
    spec: SamplerSpec,
    *,
    eta: float,
    factor: float,
    drawn: Callable[[int], torch.Tensor],
) -> torch.Tensor:
    """Final latents (B, C, H, W) of a batch from its noise; ``drawn(n)``: the noise z of step n, of the same shape.

    ``branches``: as for :func:`.sampling.denoise`.
    """
    timesteps = model.new_scheduler(spec.num_inference_steps).timesteps
    timesteps = timesteps[torch.cat([timesteps.new_ones(1, dtype=torch.bool), timesteps[1:] != timesteps[:-1]])]
    alphas, sigmas = levels(model.pipeline.scheduler, timesteps.float())
    conditions = {name: torch.cat([branch[name] for branch in branches]) for name in branches[0]}
    conditions = model.with_guidance(conditions, spec.guidance_scale)
    latents = noise.to(model.device)
    is_guided = bool(model.guided_from(spec.guidance_scale))
    with repeatable(model, spec):
        for number, timestep in enumerate(timesteps):
            predictions = model.predict(latents.repeat(len(branches), 1, 1, 1), timestep, conditions)
            predictions = predictions.view(len(branches), *latents.shape)
            guided = model.guide(predictions, spec.guidance_scale) if is_guided else predictions[0]
            alpha, sigma = alphas[number], sigmas[number]
            clean, added = split(model.pipeline.scheduler, latents, guided, alpha, sigma)
            last = number + 1 == len(timesteps)
            to_alpha, to_sigma = (
                (alphas.new_ones(()), alphas.new_zeros(())) if last else (alphas[number + 1], sigmas[number + 1])
            )
            share = 1 - (alpha * to_sigma / (to_alpha * sigma)).square()
            tau = eta * to_sigma * share.clamp(min=0).sqrt()
            kept = (to_sigma.square() - tau.square()).clamp(min=0).sqrt()
            latents = to_alpha * clean + kept * added
            if not last:
                latents = latents + factor * tau * drawn(number).to(latents)
    return latents
