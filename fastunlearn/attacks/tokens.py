"""Adversarial words in front of the prompt, found through the denoiser.

The loss is that of :mod:`.rows` on the same few rows in every step, so that losses of different words compare: an image
is drawn only for words whose loss is the best so far, which is most of what UnlearnDiffAtk (Zhang et al. 2023, arXiv
2310.11868; P4D, arXiv 2309.06135, is of the kind) spends.  Its published budget is 40 steps of a forward and a backward
and an image at each of up to 50 timesteps, about 92 times the forwards of an image.
"""

from __future__ import annotations

import math

import torch

from ..models.base import Model
from .base import BACKWARD, Attack, Attempt, Bouts, Order
from .rows import RowLoss
from .search import WordSearch
from .target import Target

WORDS = 5  # as UnlearnDiffAtk has for styles and objects
_ROWS = 4
_STEP = _ROWS * (1 + BACKWARD)
_LOOK_EVERY = 10  # steps
_BETTER = 0.98  # of the loss of the words drawn last, at most
_LEARNING_RATE = 0.5  # in units of the embeddings' size
#: Half of the published budget, in images.
PUBLISHED = 92


def run(target: Target, order: Order) -> list[Attempt]:
    search = WordSearch(target.model, order.prompts, WORDS, target.seed)
    loss = RowLoss(target, target.pictures.of(order.prompts), per_step=_ROWS, fixed=True)
    bouts, image = Bouts(order), target.costs.image
    found: list[str | None] = [None] * len(order.prompts)  # the best words that no image was drawn for
    best, drawn = [math.inf] * len(found), [math.inf] * len(found)  # their loss, and that of the words drawn last
    optimizer = torch.optim.Adam([search.embeddings], lr=_LEARNING_RATE * search.size, foreach=False)

    def look(indices: list[int]) -> None:
        texts = [found[index] or order.prompts[index] for index in indices]
        with torch.no_grad():
            keys = [(order.prompts[index], bouts.count(index)) for index in indices]
            seen = target.draw(keys, target.encode(texts)) if keys else []
        for index, text, verdict in zip(indices, texts, seen, strict=True):
            bouts.judged(index, verdict, "best words so far", image, asked=text)
            drawn[index], found[index] = best[index], None

    step = 0
    while left := bouts.left(_STEP + image):
        step += 1
        words = search.nearest(left)
        optimizer.zero_grad()
        value, losses = loss(search.conditions(left), left)
        value.backward()
        optimizer.step()
        bouts.spend(left, _STEP)
        for index, row, own in zip(left, words, losses.tolist(), strict=True):
            if own < best[index] and (text := search.text(index, row)) is not None:
                best[index], found[index] = own, text
        if step % _LOOK_EVERY == 0:
            look([i for i in left if found[i] is not None and best[i] < _BETTER * drawn[i]])
    look([index for index in bouts.left(image) if found[index] is not None or not bouts.count(index)])
    return bouts.attempts()


def _check(model: Model, concept: str, option: str) -> None:
    WordSearch(model, [concept], WORDS, 0)


TOKENS = Attack(
    name="tokens",
    summary="searches for words in front of the prompt that bring the concept back, through the denoiser",
    unknown=f"{WORDS} words",
    source="UnlearnDiffAtk, arXiv 2310.11868; P4D, arXiv 2309.06135",
    cost=f"{_STEP} U a step, an image where the loss is the best so far; half of the published budget",
    run=run,
    default=lambda costs: PUBLISHED // 2 * costs.image,
    least=lambda costs: costs.image + _STEP,
    needs_pictures=True,
    check=_check,
)
