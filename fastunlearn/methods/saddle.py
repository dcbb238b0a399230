"""Saddle (Schioppa, Hoogeboom, Heek, arXiv 2411.02068), as we reconstruct it.

Known of the paper's method: it needs no supervision of the forget prompts' distribution, and its objective balances a
forget and an integrity loss.  Ours: minimise over the weights and maximise over lambda >= 0

    L_int + lambda * (margin - D_forget)

where L_int is the squared distance between student and teacher on retain prompts and D_forget that on the concept's
own trajectories; no replacement is named.  Measured from ``T(c)`` itself, D_forget has no gradient at the start, where
student and teacher agree; so it is measured from the *guided* prediction ``T(c) + (T(c) - T(""))``, whose distance
grows first in the direction away from the concept.  In units of ``E|T(c) - T("")|^2`` D_forget then starts at 1 and
would be 4 where the student answers the concept like the empty prompt; ``kappa`` sets the margin in these units.  With
``reference`` "without" the forget prompt without the concept's words stands where the empty prompt does, so that the
rest of a caption is not pushed away with the concept.  The paper's full text was not available: the exact losses, data
and hyper-parameters are ours.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from . import Method
from .recipe import Concept, Defaults, Recipe, Row, option
from .rules import Saddle


@dataclasses.dataclass(frozen=True)
class Options:
    kappa: float = option("the margin, in units of the concept's strength", 3.0, above=0)
    dual_rate: float = option("how fast lambda, the price of missing the margin, moves", 0.1, above=0)
    lambda_start: float = option("lambda before the first step", 0.1, at_least=0)
    lambda_max: float = option("the largest lambda", 1.0, above=0)
    reference: Literal["empty", "without"] = option(
        "r of the guided prediction: the empty prompt, or the prompt without the concept", "empty"
    )


def recipe(concept: Concept) -> Recipe:
    options = dataclasses.asdict(concept.options)
    kind = options.pop("reference")
    rows = [Row("forget", c, c, {c: 2.0, concept.reference(c, kind): -1.0}) for c in concept.forget_prompts]
    rows += [Row("retain", r, r, {r: 1.0}) for r in concept.retain_prompts]
    return Recipe(rows, Saddle(**options))


SADDLE = Method(
    name="saddle",
    paper="Schioppa et al. 2024, arXiv 2411.02068 (our reconstruction)",
    needs="the concept, retain prompts",
    summary="pushes away from the concept up to a margin, priced against integrity",
    recipe=recipe,
    options=Options,
    defaults={
        "shapes": Defaults(60, 1e-3, 32, 16, "cross-attention-kv", "linear"),
        "stable-diffusion": Defaults(200, 1e-5, 8, 32, "cross-attention"),
    },
    needs_retain=True,
    is_reconstruction=True,
)
