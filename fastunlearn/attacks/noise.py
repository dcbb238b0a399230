"""Noise probe: a sampler that draws noise at every step, more of it than it should (eta and variance above 1).

What a deterministic sampler never reaches from the initial noise, a noisy one may; best of all settings and seeds.
"""

from __future__ import annotations

import torch

from ..batching import chunks, filled
from ..models.base import Model
from ..models.noising import check_levels, noisy_latents
from ..models.sampling import decode, initial_noise
from .base import Attack, Attempt, Bouts, Order, Verdict
from .target import Target

#: (eta, factor of the noise's standard deviation), the mildest first.
SETTINGS = ((1.0, 1.0), (1.0, 1.02), (1.4, 1.0), (1.4, 1.02), (1.85, 1.0), (1.85, 1.02))
_ROUNDS = 4  # of seeds, by default: 24 images


def run(target: Target, order: Order) -> list[Attempt]:
    bouts, image, number = Bouts(order), target.costs.image, 0
    while left := bouts.left(image):
        setting = SETTINGS[number % len(SETTINGS)]
        seen = _drawn(target, [order.prompts[index] for index in left], number, *setting)
        for index, verdict in zip(left, seen, strict=True):
            bouts.judged(index, verdict, f"eta {setting[0]:g}, noise x {setting[1]:g}", image)
        number += 1
    return bouts.attempts()


@torch.no_grad()
def _drawn(target: Target, prompts: list[str], seed: int, eta: float, factor: float) -> list[Verdict]:
    model, spec, size = target.model, target.pipeline.spec, target.batch_size
    images = []
    for part in chunks(prompts, size):
        rows = filled(part, size)

        def drawn(step: int, rows: list[str] = rows) -> torch.Tensor:
            return initial_noise(rows, [seed] * size, model.latent_shape, f"attack noise {step}")

        latents = noisy_latents(
            model,
            drawn(-1),
            [*target.guided_from, target.encode(rows)],
            spec,
            eta=eta,
            factor=factor,
            drawn=drawn,
        )
        images.append(decode(model, latents, spec)[: len(part)])
    return target.look(torch.cat(images))


def _check(model: Model, concept: str, option: str) -> None:
    check_levels(model)


NOISE = Attack(
    name="noise",
    summary="samples with more noise than the sampler should add",
    unknown="the noise of every step",
    source="noise probes; DDIM's eta, arXiv 2010.02502",
    cost="an image per setting and seed",
    run=run,
    default=lambda costs: _ROUNDS * len(SETTINGS) * costs.image,
    least=lambda costs: costs.image,
    check=_check,
)
