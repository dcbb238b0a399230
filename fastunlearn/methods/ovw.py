"""OVW (Schioppa, Hoogeboom, Heek, arXiv 2411.02068), as we reconstruct it.

Known of the paper's method: it applies when the target distribution is supervised, and it is a two-step gradient
descent that treats the forget loss and the other loss separately.  Ours: the forget prompt's prediction is overwritten
by the teacher's prediction for the prompt with the anchor in the concept's place (a step on that loss), then a step on
the integrity loss, the squared distance between student and teacher on retain prompts, and for the unconditional
beside them (:func:`~fastunlearn.methods.recipe.rows_to_keep`).  Both losses share one optimizer; Adam scales a step by
the larger of the two gradients, so the retain weight says how much the second step may correct.
The paper's full text was not available: the exact losses, data and hyper-parameters are ours.
"""

from __future__ import annotations

from . import Method
from .recipe import Concept, Defaults, Recipe, Row, rows_to_keep
from .rules import Alternate


def recipe(concept: Concept) -> Recipe:
    rows = [Row("forget", c, c, {concept.anchors[c]: 1.0}) for c in concept.forget_prompts]
    rows += rows_to_keep(concept)
    return Recipe(rows, Alternate(concept.settings.retain_weight))


OVW = Method(
    name="ovw",
    paper="Schioppa et al. 2024, arXiv 2411.02068 (our reconstruction)",
    needs="the concept, an anchor, retain prompts",
    summary="overwrites the concept by the anchor, then a step for integrity",
    recipe=recipe,
    anchor="needed",
    defaults={
        "shapes": Defaults(
            *(400, 5e-4, 16, 88, "cross-attention-kv", "linear"),
            retain_weight=20.0,
            stop_residual=0.08,
            trajectory_steps=15,
        ),
        "gallery": Defaults(
            *(800, 1e-3, 8, 144, "context_embedder,text_embedder", "linear"),
            retain_weight=160.0,
            stop_residual=0.08,
            trajectory_steps=12,
        ),
        "stable-diffusion": Defaults(200, 1e-5, 4, 32, "cross-attention"),
    },
    needs_retain=True,
    is_reconstruction=True,
)
