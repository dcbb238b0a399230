"""Scissorhands (Wu and Harandi, ECCV 2024, arXiv 2401.06187): cut the weights that the concept hangs on, then mend.

First the ``redrawn_share`` of all trainable weights w whose connection sensitivity ``|g w|`` is largest, g being the
gradient of the concept's denoising loss, is drawn anew where it lies in an attention that reads the text, or in a layer
named ``redrawn_within``: truncated normal of deviation 0.02, biases 0.  Then the student, asked for the concept, learns
the teacher's prediction for the anchor, with weight ``forget_weight``, and on images to keep the noise:

    forget_weight * |S(x_t, t, c) - T(x_t, t, a)|^2 + |S(x_t, t, r) - noise|^2

Differs from the authors' code (as UnlearnCanvas has it): g is the mean over all the concept's rows, theirs is of the
first batch alone; rows are the frozen teacher's generations and T the frozen teacher, theirs images of a data set and
the student of the moment, *after* the cut; their loop reads the first batch of images in every step.  Where no
trainable weight lies there, all of them may be drawn anew.  Their projection of gradients, which is
off by default, is not built.

Defaults for Stable Diffusion: the authors' share, rate, batch and weight; steps in place of their 2 epochs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from . import Method
from .recipe import NOISE, Concept, Defaults, Edit, Recipe, Row, Weights, option
from .rules import Sum

if TYPE_CHECKING:
    from torch import Tensor

DEVIATION = 0.02


@dataclasses.dataclass(frozen=True)
class Options:
    redrawn_share: float = option("share of the weights that are drawn anew, at most", 0.01, above=0, at_most=1)
    redrawn_within: str = option("a part of the names of the layers in which they are; empty: those of the text", "")
    forget_weight: float = option("weight of the concept's rows", 0.1, at_least=0)


def recipe(concept: Concept) -> Recipe:
    options = concept.options
    rows = [Row("forget", c, c, {a: 1.0}) for c, a in concept.anchors.items()]
    rows += [Row("retain", r, r, {NOISE: 1.0}) for r in concept.retain_prompts]
    rule = Sum(concept.settings.retain_weight, forget_weight=options.forget_weight)
    return Recipe(rows, rule, start=Edit(lambda weights: cut(weights, options)))


def cut(weights: Weights, options: Options) -> Mapping[str, Tensor]:
    """The parameters with their most sensitive elements drawn anew."""
    import torch

    gradient = weights.gradient()
    scores = {name: (gradient[name] * values).abs() for name, values in weights.parameters.items()}
    threshold = _threshold(list(scores.values()), options.redrawn_share)
    inside = [name for name in scores if _is_within(name, options.redrawn_within, weights.text)] or list(scores)
    generator = torch.Generator().manual_seed(0)
    new = {}
    for name in inside:
        values = weights.parameters[name]
        drawn = torch.zeros(values.shape)
        if values.ndim > 1:
            torch.nn.init.trunc_normal_(drawn, std=DEVIATION, generator=generator)
        new[name] = torch.where(scores[name] >= threshold, drawn.to(values), values)
    return new


def _is_within(name: str, part: str, text: Sequence[str]) -> bool:
    """Whether a parameter is in a layer with ``part`` in its name, or in an attention that reads the text states."""
    if part:
        return f".{part}." in f".{name}."
    return any(name.startswith(matrix.rsplit(".", 2)[0] + ".") for matrix in text)


def _threshold(scores: list[Tensor], share: float) -> float:
    """A value that a ``redrawn_share`` of all scores reaches, by bisection, so that nothing is sorted or copied."""
    wanted = share * sum(values.numel() for values in scores)
    low, high = 0.0, max(float(values.max()) for values in scores)
    for _ in range(64):
        middle = (low + high) / 2
        if sum(int((values >= middle).sum()) for values in scores) > wanted:
            low = middle
        else:
            high = middle
    return high


SCISSORHANDS = Method(
    name="scissorhands",
    paper="Wu and Harandi 2024, arXiv 2401.06187",
    needs="the concept, an anchor, retain prompts",
    summary="draws the weights that the concept hangs on anew, then trains on what is kept",
    recipe=recipe,
    options=Options,
    anchor="needed",
    defaults={
        "shapes": Defaults(
            *(300, 5e-4, 16, 40, "cross-attention-kv", "linear"), options=Options(forget_weight=1.0), stop_residual=0.08
        ),
        "stable-diffusion": Defaults(500, 1e-5, 4, 32, "all"),
    },
    needs_retain=True,
)
