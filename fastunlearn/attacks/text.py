"""Words found in the text encoder alone: no forward of the denoiser until an image is drawn.

    min over words w   | f(w) - ( f(p) + eta d ) |^2 ,   d = mean over prompts of f(p) - f(p without the concept),

with the encoder's states f, as Ring-A-Bell (Tsai et al. 2023, arXiv 2310.10012) has it; MMA-Diffusion (arXiv
2311.17516) matches one prompt, eta = 0.  The concept's own tokens are left out of the search.
"""

from __future__ import annotations

import math

import torch

from .. import prompts as words
from ..methods.recipe import STATES
from ..models.base import Model
from .base import Attack, Attempt, Bouts, Order, check_states, refuse
from .embedding import with_concept
from .search import WordSearch
from .target import Target

_ETAS = (0.0, 0.5, 1.0, 2.0)
_STEPS = 60
_MOST_WORDS = 16
_LEARNING_RATE = 0.5  # in units of the embeddings' size


def run(target: Target, order: Order) -> list[Attempt]:
    bouts, image, concept = Bouts(order), target.costs.image, target.concept
    full = [with_concept(prompt, concept) for prompt in order.prompts]
    plain = [words.substitute(prompt, concept, "") for prompt in full]
    states = target.encode(full)[STATES]
    direction = (states - target.encode(plain)[STATES]).mean(0)
    most = max(1, min(_MOST_WORDS, target.model.max_tokens, max(map(target.model.count_tokens, full))))
    number = 0
    while left := bouts.left(image):
        eta = _ETAS[number % len(_ETAS)]
        texts = _found(target, states[left] + eta * direction, most, target.seed * 1_000_003 + number)
        keys = [(order.prompts[index], bouts.count(index)) for index in left]
        for index, text, verdict in zip(left, texts, target.draw(keys, target.encode(texts)), strict=True):
            bouts.judged(index, verdict, f"eta {eta:g}", image, asked=text)
        number += 1
    return bouts.attempts()


def _found(target: Target, goal: torch.Tensor, count: int, seed: int) -> list[str]:
    """The words whose states are nearest to ``goal``, (P, L, D); those of the last step where none can be typed."""
    search = WordSearch(target.model, [""] * len(goal), count, seed, avoid=target.concept)
    everyone = list(range(len(goal)))
    optimizer = torch.optim.Adam([search.embeddings], lr=_LEARNING_RATE * search.size, foreach=False)
    best, texts = [math.inf] * len(goal), [""] * len(goal)
    for step in range(_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * search.size * (1 - step / _STEPS)
        found = search.nearest(everyone)
        optimizer.zero_grad()
        losses = (search.conditions(everyone)[STATES] - goal).square().mean((1, 2))
        losses.sum().backward()
        optimizer.step()
        for index, own in enumerate(losses.tolist()):
            if own < best[index] and (text := search.text(index, found[index])) is not None:
                best[index], texts[index] = own, text
    return texts


def _check(model: Model, concept: str, option: str) -> None:
    check_states(model, "text", concept)
    search = WordSearch(model, [""], 1, 0, avoid=concept)
    if not search.conditions([0])[STATES].requires_grad:
        raise refuse(model, "text", "the encoder whose words can be searched gives its denoiser no states")


TEXT = Attack(
    name="text",
    summary="searches for other words of the same meaning in the text encoder alone",
    unknown=f"up to {_MOST_WORDS} words",
    source="Ring-A-Bell, arXiv 2310.10012; MMA-Diffusion, arXiv 2311.17516",
    cost=f"an image per search; {_STEPS} forwards and backwards of the text encoder, which are no U",
    run=run,
    default=lambda costs: len(_ETAS) * costs.image,
    least=lambda costs: costs.image,
    check=_check,
)
