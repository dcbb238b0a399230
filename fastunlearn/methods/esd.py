"""ESD: Erased Stable Diffusion (Gandikota et al., ICCV 2023, arXiv 2303.07345, equation 7).

At points of the concept's own trajectories the student, asked for the concept c, learns the teacher's prediction
guided *away* from it:  ``T(c) - eta * (T(c) - T(""))``.  This is the form and the sign of eta in the authors' current
code, where eta = 2 by default; the paper writes the same with eta one smaller.  With an anchor the first term is the
anchor's, which is their ``--erase_from``.

Of a caption that says more than the concept, ``T(c) - T("")`` is all of the caption, and guiding away from it takes the
rest along.  With ``reference`` "without" the empty prompt is replaced by the caption without the concept's words, r:
``T(c) - eta * (T(c) - T(r))``.  On the bare word, the authors' only prompt, both are the same.

Differs from the authors' code: trajectories come from the bank (the frozen teacher, as in their code; the paper samples
from the student); where a world brings prompts that name the concept, all of them are forget prompts, since what is
learned on the bare word does not carry to captions (theirs is the bare word, as ours is for a user's model without
``--forget-prompts``); weights are kept in float32 (their bfloat16 weights lose most updates of 5e-5 to rounding), and
the resolution is the model's native one.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from . import Method
from .recipe import Concept, Defaults, Recipe, Row, mix, option, reference_option
from .rules import Sum


@dataclasses.dataclass(frozen=True)
class Options:
    negative_guidance: float = option("eta: how far the prediction is guided away from the concept", 2.0)
    reference: Literal["empty", "without"] = reference_option("r, what it is guided to")


def recipe(concept: Concept) -> Recipe:
    eta = concept.options.negative_guidance
    rows = []
    for c in concept.forget_prompts:
        r = concept.reference(c, concept.options.reference)
        rows.append(Row("forget", c, c, mix((concept.anchors.get(c, c), 1.0), (c, -eta), (r, eta))))
    return Recipe(rows, Sum())


ESD = Method(
    name="esd",
    paper="Gandikota et al. 2023, arXiv 2303.07345",
    needs="the concept (an anchor if wanted)",
    summary="guides the prediction for the concept away from it",
    recipe=recipe,
    options=Options,
    anchor="optional",
    defaults={
        "shapes": Defaults(
            *(800, 7e-4, 16, 44, "cross-attention-kv", "linear"),
            options=Options(2.0, "without"),
            stop_residual=0.1,
            trajectory_steps=15,
        ),
        "gallery": Defaults(
            *(400, 7e-4, 8, 64, "context_embedder,text_embedder", "linear"),
            options=Options(2.0, "without"),
            stop_residual=0.1,
            trajectory_steps=12,
        ),
        "stable-diffusion": Defaults(200, 5e-5, 1, 16, "cross-attention"),
    },
)
