"""RACE: robust adversarial concept erasure (Kim, Min, Yang, ECCV 2024, arXiv 2405.16341).

ESD's target, asked with an attacked condition: in each step sign descent looks for the offset d of the concept's text
states, at most ``attack_radius``, with which the student shows the concept best, and the step is made there:

    |S(x_t, t, c + d) - [T(c) - eta (T(c) - T(r))]|^2,   d = argmin |S(x_t, t, c + d) - T(x_t, t, c)|^2

r is the empty prompt, or with ``reference`` "without" the prompt without the concept's words, as in ``esd``.

It starts from an erased model: the first ``attack_warm_up`` share of the steps is ESD without an attack.

Differs from the authors' code: the attack aims at the teacher's prediction for the concept, theirs at the noise that
the trajectory began with; ``attack_radius`` is in units of the states' root mean square, which is about 1 for CLIP's,
where theirs is absolute; states are not clamped to their own range; ``eta`` is that of their ESD plus one, as in
``esd``. A public re-implementation loads the erased model and drops it, so that its attack trains the original; here
it is one run.

Defaults for Stable Diffusion: ESD's, with the authors' radius of 0.1 and 10 steps; untried with a warm-up in one run.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from . import Method
from .recipe import Concept, Defaults, Inner, Recipe, Row, mix, option, reference_option
from .rules import Sum


@dataclasses.dataclass(frozen=True)
class Options:
    negative_guidance: float = option("eta: how far the prediction is guided away from the concept", 2.0)
    reference: Literal["empty", "without"] = reference_option("r, what it is guided to")
    attack_steps: int = option("steps of the attack in each training step", 10, at_least=0)
    attack_radius: float = option("the largest offset, in units of the states' root mean square", 0.1, at_least=0)
    attack_warm_up: float = option("share of the steps that are not attacked", 0.5, at_least=0, at_most=1)


def recipe(concept: Concept) -> Recipe:
    options, eta = concept.options, concept.options.negative_guidance
    rows = []
    for c in concept.forget_prompts:
        rows.append(Row("forget", c, c, mix((c, 1 - eta), (concept.reference(c, options.reference), eta))))
    return Recipe(rows, Sum(), inner=Inner(options.attack_steps, options.attack_radius, options.attack_warm_up))


RACE = Method(
    name="race",
    paper="Kim et al. 2024, arXiv 2405.16341",
    needs="the concept",
    summary="guides away from the concept where an attack on the text states shows it most",
    recipe=recipe,
    options=Options,
    defaults={
        "shapes": Defaults(
            *(300, 7e-4, 16, 40, "cross-attention-kv", "linear"),
            options=Options(reference="without", attack_steps=3),
            stop_residual=0.12,
        ),
        "stable-diffusion": Defaults(1000, 1e-5, 1, 16, "cross-attention"),
    },
)
