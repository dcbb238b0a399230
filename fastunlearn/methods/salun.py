"""SalUn: saliency unlearning (Fan et al., ICLR 2024, arXiv 2310.12508, equations 3 to 6).

The student, asked for the concept, learns the teacher's prediction for another class, ``T(a)``; on images to keep it
learns the noise, as in training, with weight alpha.  Only the elements of a saliency mask change: the share of all
weights on which the gradient of the concept's denoising loss, summed over its rows, is largest (``saliency.py``).
With ``retain_noise`` false the images to keep are answered as the teacher does, which on its own generations is about
what the noise is on average, without the noise; and the unconditional is held beside them
(:func:`~fastunlearn.methods.recipe.rows_to_keep`).

Differs from the authors' code: both kinds of rows lie on the frozen teacher's own generations, not on a data set's
images; the target is the frozen teacher's prediction, not the student's of the moment; the other class is the anchor,
or, where ``--anchor`` lists several, one drawn for every prompt (theirs is the next class of ten); the optimizer is
AdamW without decay, and what the mask leaves out is not written at all, where they multiply gradients by zeros.
"""

from __future__ import annotations

import dataclasses

from . import Method
from .recipe import NOISE, Concept, Defaults, Recipe, Row, option, rows_to_keep
from .rules import Sum


@dataclasses.dataclass(frozen=True)
class Options:
    retain_noise: bool = option("learn the noise of the images to keep, not the original's prediction on them", True)


def recipe(concept: Concept) -> Recipe:
    rows = [Row("forget", c, c, {concept.anchors[c]: 1.0}) for c in concept.forget_prompts]
    if concept.options.retain_noise:
        rows += [Row("retain", r, r, {NOISE: 1.0}) for r in concept.retain_prompts]
    else:
        rows += rows_to_keep(concept)
    return Recipe(rows, Sum(concept.settings.retain_weight))


SALUN = Method(
    name="salun",
    paper="Fan et al. 2024, arXiv 2310.12508",
    needs="the concept, an anchor (or several), retain prompts",
    summary="relabels the concept, changing only its most salient weights",
    recipe=recipe,
    options=Options,
    anchor="needed",
    defaults={
        "shapes": Defaults(
            *(400, 5e-4, 16, 44, "cross-attention-kv", "linear"),
            retain_weight=20.0,
            mask_density=0.5,
            options=Options(retain_noise=False),
            stop_residual=0.1,
            trajectory_steps=15,
        ),
        "gallery": Defaults(
            *(800, 3e-3, 8, 96, "context_embedder,text_embedder", "linear"),
            retain_weight=10.0,
            mask_density=0.5,
            options=Options(retain_noise=False),
            stop_residual=0.06,
            trajectory_steps=12,
        ),
        "stable-diffusion": Defaults(500, 1e-5, 8, 32, "all", retain_weight=0.1, mask_density=0.5),
    },
    needs_retain=True,
)
