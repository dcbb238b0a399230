"""Saddle (Schioppa, Hoogeboom, Heek, arXiv 2411.02068), as we reconstruct it.

Known of the paper's method: it needs no supervision of the forget prompts' distribution, and its objective balances a
forget and an integrity loss.  Ours: minimise over the weights and maximise over lambda >= 0

    L_int + lambda * (margin - D_forget)

where L_int is the squared distance between student and teacher on retain prompts, and for the unconditional beside
them (:func:`~fastunlearn.methods.recipe.rows_to_keep`), and D_forget that on the concept's own
trajectories; no replacement is named.  Measured from ``T(c)`` itself, D_forget has no gradient at the start, where
student and teacher agree; so it is measured from the *guided* prediction ``T(c) + g (T(c) - T(r))``, r being the empty
prompt, or with ``reference`` "without" the forget prompt without the concept's words, so that the rest of a caption is
not pushed away with the concept.  ``kappa`` sets the margin in units of D_forget before the first step.

With g > 0 that point lies beyond the concept and D_forget must grow: with g = 1 it starts at 1 and would be 4 where the
student answers the concept like r.  A distance grows fastest where it is large already, and in any direction, so that
the margin may be reached with the concept still shown.  With g < 0 and ``kappa`` < 1 the point lies on the other side,
where ESD's target is, and D_forget must fall to the margin; the objective is then L_int + lambda * (D_forget - margin).
The bundled model's defaults are of this kind.  The paper's full text was not available: the exact losses, data and
hyper-parameters are ours.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from ..errors import UserError
from . import Method
from .recipe import Concept, Defaults, Recipe, Row, option, reference_option, rows_to_keep
from .rules import Saddle


@dataclasses.dataclass(frozen=True)
class Options:
    reference_guidance: float = option("g: how far beyond the concept the distance is measured from", 1.0)
    kappa: float = option("the margin, in units of that distance before the first step", 3.0, above=0)
    dual_rate: float = option("how fast lambda, the price of missing the margin, moves", 0.1, above=0)
    lambda_start: float = option("lambda before the first step", 0.1, at_least=0)
    lambda_max: float = option("the largest lambda", 1.0, above=0)
    reference: Literal["empty", "without"] = reference_option("r of the guided prediction")


def recipe(concept: Concept) -> Recipe:
    options = dataclasses.asdict(concept.options)
    kind, g = options.pop("reference"), options.pop("reference_guidance")
    if g == 0 or (g > 0) != (options["kappa"] > 1):
        raise UserError(
            "the method saddle leaves a margin behind, with `reference_guidance` and `kappa` above 0 and 1, or gets "
            "to one, with `reference_guidance` and `kappa` below 0 and 1."
        )
    rows = [Row("forget", c, c, {c: 1.0 + g, concept.reference(c, kind): -g}) for c in concept.forget_prompts]
    rows += rows_to_keep(concept)
    return Recipe(rows, Saddle(**options))


SADDLE = Method(
    name="saddle",
    paper="Schioppa et al. 2024, arXiv 2411.02068 (our reconstruction)",
    needs="the concept, retain prompts",
    summary="pushes away from the concept up to a margin, priced against integrity",
    recipe=recipe,
    options=Options,
    defaults={
        "shapes": Defaults(
            *(500, 1e-3, 16, 88, "cross-attention-kv", "linear"),
            options=Options(reference_guidance=-2.0, kappa=0.03, lambda_max=0.5, reference="without"),
            stop_residual=0.08,
            trajectory_steps=15,
        ),
        "gallery": Defaults(
            *(800, 2e-3, 8, 144, "context_embedder,text_embedder", "linear"),
            options=Options(reference_guidance=-2.0, kappa=0.03, lambda_max=0.5, reference="without"),
            stop_residual=0.06,
            trajectory_steps=12,
        ),
        "stable-diffusion": Defaults(200, 1e-5, 8, 32, "cross-attention"),
    },
    needs_retain=True,
    is_reconstruction=True,
)
