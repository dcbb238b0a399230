"""NegGrad: gradient ascent on the concept's training loss, descent on what is kept.

    -|S(x_t, t, c) - noise|^2 + alpha * |S(x_t, t, r) - noise|^2

The form of SalUn's ``gradient_ascent.py`` (Fan et al. 2024, arXiv 2310.12508), on images that the frozen teacher
generates.  Nothing bounds the first term: more steps or a larger rate forget more, and in the end destroy the model.
"""

from __future__ import annotations

from . import Method
from .recipe import NOISE, Concept, Defaults, Recipe, Row
from .rules import Sum


def recipe(concept: Concept) -> Recipe:
    rows = [Row("forget", c, c, {NOISE: 1.0}) for c in concept.forget_prompts]
    rows += [Row("retain", r, r, {NOISE: 1.0}) for r in concept.retain_prompts]
    return Recipe(rows, Sum(concept.settings.retain_weight, forget_weight=-1.0))


NEGGRAD = Method(
    name="neggrad",
    paper="as in Fan et al. 2024, arXiv 2310.12508",
    needs="the concept, retain prompts",
    summary="unlearns by gradient ascent; the simplest baseline",
    recipe=recipe,
    defaults={
        "shapes": Defaults(30, 1e-3, 32, 16, "cross-attention", "linear", retain_weight=1.0),
        "stable-diffusion": Defaults(100, 1e-5, 8, 32, "all", retain_weight=1.0),
    },
    needs_retain=True,
)
