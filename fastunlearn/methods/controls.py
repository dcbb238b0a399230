"""Controls: what fine-tuning does without any forgetting.

``placebo`` and ``placebo-noise`` train on the retain rows alone, ``identity`` changes nothing.  Their distances to
the original are the lower rungs of the ladder that a method is read against.  The placebo's rows ask the student for
what the teacher predicts, which it does already, so all that can move it is rounding: it shows that the retain term
by itself does no harm, not what training on other data would do.  That is what ``placebo-noise`` shows: as many steps
at the same rate on the same prompts, whose target is the noise, as in any fine-tuning on the model's own images.
"""

from __future__ import annotations

from . import Method
from .recipe import NOISE, Concept, Defaults, Recipe, Row
from .rules import Sum


def placebo_recipe(concept: Concept) -> Recipe:
    return Recipe([Row("retain", r, r, {r: 1.0}) for r in concept.retain_prompts], Sum(concept.settings.retain_weight))


def placebo_noise_recipe(concept: Concept) -> Recipe:
    return Recipe([Row("retain", r, r, {NOISE: 1.0}) for r in concept.retain_prompts], Sum())


def identity_recipe(concept: Concept) -> Recipe:
    return Recipe([], Sum())


PLACEBO = Method(
    name="placebo",
    paper="control",
    needs="retain prompts",
    summary="the same training on retain prompts only, nothing forgotten",
    recipe=placebo_recipe,
    defaults={
        "shapes": Defaults(40, 1e-3, 16, 16, "cross-attention-kv", "linear", retain_weight=20.0),
        "stable-diffusion": Defaults(200, 1e-5, 4, 32, "cross-attention"),
    },
    needs_retain=True,
    is_control=True,
)
PLACEBO_NOISE = Method(
    name="placebo-noise",
    paper="control",
    needs="retain prompts",
    summary="as many steps of ordinary fine-tuning on retain prompts, nothing forgotten",
    recipe=placebo_noise_recipe,
    defaults={
        "shapes": Defaults(40, 1e-3, 16, 16, "cross-attention-kv", "linear"),
        "stable-diffusion": Defaults(200, 1e-5, 4, 32, "cross-attention"),
    },
    needs_retain=True,
    is_control=True,
)
IDENTITY = Method(
    name="identity",
    paper="control",
    needs="nothing",
    summary="an unchanged copy",
    recipe=identity_recipe,
    defaults={
        "shapes": Defaults(0, 1e-3, 16, 1, "cross-attention"),
        "stable-diffusion": Defaults(0, 1e-5, 1, 1, "cross-attention"),
    },
    is_control=True,
)
