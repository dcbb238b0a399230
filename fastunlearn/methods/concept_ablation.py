"""Concept Ablation (Kumari et al., ICCV 2023, arXiv 2303.13516).

On images of the anchor a ("a grumpy cat" becomes "a cat") the student, asked for the concept c, learns what

- the anchor is answered with, ``|S(x_t, t, c) - T(x_t, t, a)|^2``;
- with ``noise_based``, they were made of, ``|S(x_t, t, c) - noise|^2``: usual training under another caption.

``prior_weight`` adds the usual training loss of the anchor on the same images.  What else hangs on the weights it does
not see; with ``prior`` "retain" the squared distance between student and teacher stands in its place, on retain prompts
and for the unconditional beside them (:func:`~fastunlearn.methods.recipe.rows_to_keep`), which is ours.

Differs from the authors' code: x_t lies on the frozen teacher's own trajectories for the anchor, in latents (theirs:
a thousand generated files, encoded anew and noised; the noise variant is noised here, too); T is the frozen teacher,
where theirs is the student of the moment; no first token is detached and no border masked out, since no image is
resized. Their noise variant computes T(a) and throws it away; here it is never asked.

Defaults for Stable Diffusion: the authors' 100 steps of batch 4 on 2 GPUs at 2e-6, scaled by both.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from ..errors import UserError
from . import Method
from .recipe import NOISE, Concept, Defaults, Recipe, Row, option, rows_to_keep
from .rules import Sum


@dataclasses.dataclass(frozen=True)
class Options:
    noise_based: bool = option("learn the noise of the anchor's images, not the prediction for the anchor", False)
    prior_weight: float = option("weight of the prior loss; 0: without", 0.0, at_least=0)
    prior: Literal["anchor", "retain"] = option(
        "the prior loss: of the anchor, its own training loss; of the retain prompts, the distance from the original",
        "anchor",
    )


def recipe(concept: Concept) -> Recipe:
    options = concept.options
    rows = []
    for c, a in concept.anchors.items():
        rows.append(Row("forget", a, c, {NOISE if options.noise_based else a: 1.0}))
    if options.prior_weight and options.prior == "retain":
        if not concept.retain_prompts:
            raise UserError("`prior` retain needs retain prompts: give `--retain-prompts` a FILE, 'TEXT;TEXT' or auto.")
        rows += rows_to_keep(concept)
    elif options.prior_weight:
        rows += [Row("retain", a, a, {NOISE: 1.0}) for a in dict.fromkeys(concept.anchors.values())]
    return Recipe(rows, Sum(options.prior_weight))


CONCEPT_ABLATION = Method(
    name="concept-ablation",
    paper="Kumari et al. 2023, arXiv 2303.13516",
    needs="the concept, an anchor",
    summary="answers the concept like the anchor, on the anchor's images",
    recipe=recipe,
    options=Options,
    anchor="needed",
    defaults={
        "shapes": Defaults(
            *(400, 1e-3, 16, 88, "cross-attention-kv", "linear"),
            options=Options(prior_weight=10.0, prior="retain"),
            stop_residual=0.02,
            trajectory_steps=15,
        ),
        "gallery": Defaults(
            *(800, 2e-3, 8, 144, "context_embedder,text_embedder", "linear"),
            options=Options(prior_weight=10.0, prior="retain"),
            stop_residual=0.04,
            trajectory_steps=12,
        ),
        "stable-diffusion": Defaults(100, 1.6e-5, 8, 32, "cross-attention-kv"),
    },
)
