"""Relearning: k steps of ordinary training of all weights, on pictures of the concept or on unrelated ones.

The loss is the usual one, noise added to a picture of the original, asked with its prompt; so the concept may come back
from few pictures of it, or from none at all (concept resurgence, arXiv 2410.08074).  The gold reference tells how fast
any model learns it anew.  All prompts share one training and its cost.  Afterwards the model has its weights back, bit
for bit.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from fastunlearn_kernels import noise_pred_loss
from torch import nn

from ..batching import chunks
from ..errors import UserError
from .base import BACKWARD, Attack, Attempt, Bouts, Costs, Order
from .pictures import COUNT, noised_rows
from .target import Target

_BATCH = 4
_STEP = _BATCH * (1 + BACKWARD)
_STEPS = 50
#: After which shares of the steps the judge looks.
_LOOKS = (0.2, 0.4, 1.0)
#: Of AdamW: for the bundled models, and for those of the usual size.
_LEARNING_RATES = (1e-4, 1e-5)
UNRELATED = 16  # prompts about other things, at most


def run(target: Target, order: Order) -> list[Attempt]:
    bouts, image, count = Bouts(order), target.costs.image, len(order.prompts)
    looks = _LOOKS if order.budget >= len(_LOOKS) * image + _STEP else _LOOKS[-1:]
    steps = (order.budget - len(looks) * image) * count // _STEP
    at = [max(1, round(share * steps)) for share in looks]
    final, timesteps, names = _pictures(target, order)
    conditions = target.model.encode(names, target.batch_size)
    generator = torch.Generator().manual_seed(target.seed * 1_000_003 + 23)
    paid = 0
    with _trainable(target.model.denoiser) as parameters:
        rate = _LEARNING_RATES[0 if target.model.world else 1]
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, foreach=False)
        for step in range(1, steps + 1):
            if not (left := bouts.left()):
                break
            picks = torch.randint(len(final), (_BATCH,), generator=generator)
            when = timesteps[torch.randint(len(timesteps), (_BATCH,), generator=generator)].to(target.model.device)
            latents, truth = noised_rows(target.model, final[picks], when, f"relearn {step}")
            rows = conditions.of([names[pick] for pick in picks.tolist()])
            guided = target.model.with_guidance(rows, target.pipeline.spec.guidance_scale)
            prediction = target.model.predict(latents, when, guided)
            one = torch.ones(_BATCH, 1, device=latents.device)
            loss, _ = noise_pred_loss(prediction, truth[None].contiguous(), one, one[:, 0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for _ in range(at.count(step)):
                owed = math.floor(step * _STEP / count) - paid
                paid += owed
                bouts.spend(left, owed)
                keys = [(order.prompts[index], bouts.count(index)) for index in left]
                asked = target.encode([prompt for prompt, _ in keys])
                for index, verdict in zip(left, target.draw(keys, asked), strict=True):
                    bouts.judged(index, verdict, f"after {step} steps", image)
    return bouts.attempts()


def _pictures(target: Target, order: Order) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Final latents (N, C, H, W) of the original, the trajectory's timesteps, and each picture's prompt."""
    final, names, prompts, each = [], [], order.prompts, COUNT
    if order.option == "unrelated":
        prompts, each = target.unrelated[:UNRELATED], 1
    for part in chunks(prompts, target.prompts_at_once):
        made = target.pictures.of(part, each)
        kept = torch.ones_like(made.shown) if order.option == "unrelated" else made.shown
        index = kept.flatten().nonzero()[:, 0]
        final.append(made.final[index.to(made.final.device)])
        names += [part[place // each] for place in index.tolist()]
    if not names:
        raise UserError(
            f"the judge {target.judge.name} sees {target.concept!r} in none of the pictures that the original makes of "
            "these prompts, so there is nothing to learn from. Use other prompts, or another judge."
        )
    return torch.cat(final), made.bank.timesteps[: made.points].cpu(), names


@contextlib.contextmanager
def _trainable(network: nn.Module) -> Iterator[list[nn.Parameter]]:
    """All weights of the network, to be trained; what they were comes back at the end, however that comes."""
    parameters = list(network.parameters())
    before = [(one.detach().cpu().clone(), one.requires_grad) for one in parameters]
    try:
        for one in parameters:
            one.requires_grad_(True)
        yield parameters
    finally:
        with torch.no_grad():
            for one, (values, required) in zip(parameters, before, strict=True):
                one.copy_(values)
                one.requires_grad_(required)
                one.grad = None


def _default(costs: Costs) -> int:
    return len(_LOOKS) * costs.image + math.ceil(_STEPS * _STEP / costs.prompts)


RELEARN = Attack(
    name="relearn",
    summary="trains the weights a little, on the concept's pictures or on unrelated ones",
    unknown="the weights",
    source="relearning; concept resurgence, arXiv 2410.08074",
    cost=f"{_STEP} U a step, shared by all prompts, and {len(_LOOKS)} images per prompt",
    run=run,
    default=_default,
    least=lambda costs: costs.image + math.ceil(_STEP / costs.prompts),
    needs_pictures=True,
    options=("concept", "unrelated"),
    takes_all=True,
)
