"""AdvUnlearn (Zhang et al., NeurIPS 2024, arXiv 2405.15234), on the denoiser.

ESD's target under attack, and the prompts to keep beside it:

    |S(x_t, t, c + d) - [T(n) - eta (T(c) - T(n))]|^2 + retain_weight |S(x_t, t, r) - T(x_t, t, r)|^2
    d = argmin |S(x_t, t, c + d) - T(x_t, t, c)|^2

n is the empty prompt, or with ``reference`` "without" the prompt without the concept's words, as in ``esd``.

Differs from the authors' code: theirs trains the text encoder, and attacks by a token put before the prompt, 30 steps
of Adam at 1e-3; here the denoiser trains and the attack is an offset of the text states, at most ``attack_radius``,
by sign descent of as many steps.  x_t is a point of the frozen teacher's trajectories from the bank, where theirs
samples one from noise for each step of the attack (about 2000 UNet evaluations a training step).  The first
``attack_warm_up`` share of the steps has no attack (theirs: 200 of 1000).

Defaults for Stable Diffusion: the authors' weights and steps; untried on a denoiser.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from . import Method
from .recipe import Concept, Defaults, Inner, Recipe, Row, mix, option, reference_option
from .rules import Sum


@dataclasses.dataclass(frozen=True)
class Options:
    negative_guidance: float = option("eta: how far the prediction is guided away from the concept", 1.0)
    reference: Literal["empty", "without"] = reference_option("n, what it is guided to")
    attack_steps: int = option("steps of the attack in each training step", 30, at_least=0)
    attack_radius: float = option("the largest offset, in units of the states' root mean square", 0.1, at_least=0)
    attack_warm_up: float = option("share of the steps that are not attacked", 0.2, at_least=0, at_most=1)


def recipe(concept: Concept) -> Recipe:
    options, eta = concept.options, concept.options.negative_guidance
    rows = []
    for c in concept.forget_prompts:
        rows.append(Row("forget", c, c, mix((concept.reference(c, options.reference), 1 + eta), (c, -eta))))
    rows += [Row("retain", r, r, {r: 1.0}) for r in concept.retain_prompts]
    inner = Inner(options.attack_steps, options.attack_radius, options.attack_warm_up)
    return Recipe(rows, Sum(concept.settings.retain_weight), inner=inner)


ADVUNLEARN = Method(
    name="advunlearn",
    paper="Zhang et al. 2024, arXiv 2405.15234",
    needs="the concept, retain prompts",
    summary="guides away from the concept under attack, and keeps the rest",
    recipe=recipe,
    options=Options,
    defaults={
        "shapes": Defaults(
            *(400, 1e-3, 16, 88, "cross-attention-kv", "linear", 5.0),
            options=Options(reference="without", attack_steps=3),
            stop_residual=0.12,
        ),
        "stable-diffusion": Defaults(1000, 1e-5, 6, 32, "cross-attention", retain_weight=0.3),
    },
    needs_retain=True,
)
