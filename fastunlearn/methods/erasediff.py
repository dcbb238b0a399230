"""EraseDiff (Wu et al., arXiv 2401.05779): keep, subject to having forgotten, as a bilevel problem.

    min over weights  L_r = |S(x_t, t, r) - noise|^2   subject to the weights being a minimum of
                      L_f = |S(x_t, t, c) - T(x_t, t, a)|^2

By the first-order bilevel step that the paper takes from Liu et al. 2022 (BOME, 2209.08709) the constraint's gradient
is that of ``q = L_f(w) - L_f(w_K)``, w_K being the weights after K inner steps, held constant; so it is the gradient
of L_f, and the step is along ``g_r + lambda g_f`` with ``lambda = max(forget_rate - <g_r, g_f> / <g_f, g_f>, 0)``:
forgetting goes on at ``forget_rate`` times its own pace at least, and keeping has the rest.  ``constant_weight`` puts
a constant in lambda's place.

The inner steps have no effect on that gradient, so none are made here: that is the method, not a saving.  The
authors' code has a constant lambda (0.1; 1 in its README), does the outer update inside the inner loop from the same
weights each time, so that only the last of K counts, and reads the first batch of images in every step; what it
computes is ``L_r + lambda L_f``, SalUn's sum without a mask, at 2K times the price: that is ``constant_weight``. Rows
are the frozen teacher's own generations, T is the frozen teacher (theirs: the student of the moment), every row takes
part.

Defaults for Stable Diffusion: the authors' rate and batch; steps in place of their 5 epochs; lambda's rule is
untried.
"""

from __future__ import annotations

import dataclasses

from . import Method
from .recipe import NOISE, Concept, Defaults, Recipe, Row, option
from .rules import Bilevel, Sum


@dataclasses.dataclass(frozen=True)
class Options:
    forget_rate: float = option("the least pace of forgetting, in units of its own gradient step", 1.0, at_least=0)
    constant_weight: float | None = option("a constant for lambda, as in the authors' code", None)


def recipe(concept: Concept) -> Recipe:
    options = concept.options
    rows = [Row("forget", c, c, {a: 1.0}) for c, a in concept.anchors.items()]
    rows += [Row("retain", r, r, {NOISE: 1.0}) for r in concept.retain_prompts]
    constant = options.constant_weight
    return Recipe(rows, Bilevel(options.forget_rate) if constant is None else Sum(1.0, forget_weight=constant))


ERASEDIFF = Method(
    name="erasediff",
    paper="Wu et al. 2024, arXiv 2401.05779",
    needs="the concept, an anchor, retain prompts",
    summary="keeps by training on noise, at no less than a given pace of relabelling the concept",
    recipe=recipe,
    options=Options,
    anchor="needed",
    defaults={
        "shapes": Defaults(300, 5e-4, 16, 40, "cross-attention-kv", "linear", stop_residual=0.08),
        "stable-diffusion": Defaults(500, 1e-5, 8, 32, "all"),
    },
    needs_retain=True,
)
