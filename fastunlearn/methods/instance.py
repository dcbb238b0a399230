"""Forgetting given pictures (Lee et al. 2026, arXiv 2603.10445), as we reconstruct it.

For what no prompt names: one person's picture, one drawing.  Each picture x_f has a surrogate x_s, the same picture
edited so that it no longer shows what is to be forgotten.  At x_t, the *picture* with noise, the student learns the
noise that leads to the surrogate, for epsilon ``n = (x_t - a_t x_s) / s_t`` and for other models what they predict
with it:

    s_t^2 |S(x_t, t, c) - n|^2        with surgery: its gradient loses the part against that of |S(x_t, t, r) - T(r)|^2

The weight s_t^2 takes 1 / s_t out of the error, which else grows without bound near the image.  ``window_start`` and
``window_end`` keep a window of the sampler's points: near pure noise x_t is no longer this picture, and the rows only
fight what is kept.  What is kept are the teacher's predictions for the retain prompts and for the pictures' own
prompts, on its own generations.

The paper's full text was not at hand: the target and what it is for are known, the weights' form, the window and
which surgery are ours (Yu et al. 2020, 2001.06782).  Its surrogates come from an editor of images; here they are
files.

Defaults for Stable Diffusion: those of a neighbour (SISS: AdamW at 5e-6, 60 steps), untried.
"""

from __future__ import annotations

import dataclasses

from ..errors import UserError
from . import Method
from .recipe import Concept, Defaults, Recipe, Row, option, picture
from .rules import Project


@dataclasses.dataclass(frozen=True)
class Options:
    picture_folder: str = option("folder of the pictures to forget, of the model's size", "", path=True)
    surrogate_folder: str = option("folder of what each becomes, by the same names", "", path=True)
    window_start: float = option(
        "where the window of the sampler's points begins; 0: pure noise", 0.0, at_least=0, at_most=1
    )
    window_end: float = option("where it ends; 1: the image", 1.0, at_least=0, at_most=1)


def recipe(concept: Concept) -> Recipe:
    options = concept.options
    if not options.picture_folder or not options.surrogate_folder:
        raise UserError("the method instance needs `--set picture_folder=FOLDER` and `--set surrogate_folder=FOLDER`.")
    if not options.window_start < options.window_end:
        raise UserError(f"the window from {options.window_start} to {options.window_end} is empty. Let it end later.")
    images, surrogates = concept.pictures(options.picture_folder), concept.pictures(options.surrogate_folder)
    if missing := [name for name in images if name not in surrogates]:
        lacking = f"{len(missing)} of {len(images)} pictures have none"
        raise UserError(f"{options.surrogate_folder} holds no surrogate named {missing[0]}; {lacking}. Add it.")
    rows = []
    for name in images:
        shown, wanted = picture(f"image/{name}"), picture(f"surrogate/{name}")
        for c in concept.forget_prompts:
            window = (options.window_start, options.window_end)
            rows.append(Row("forget", shown, c, {wanted: 1.0}, timesteps=window, noise_power=2))
    rows += [Row("retain", r, r, {r: 1.0}) for r in (*concept.forget_prompts, *concept.retain_prompts)]
    pictures = {f"image/{name}": path for name, path in images.items()}
    pictures |= {f"surrogate/{name}": surrogates[name] for name in images}
    return Recipe(rows, Project(concept.settings.retain_weight), pictures=pictures)


INSTANCE = Method(
    name="instance",
    paper="Lee et al. 2026, arXiv 2603.10445 (our reconstruction)",
    needs="pictures, a surrogate of each, their prompt",
    summary="turns given pictures into their surrogates, without harm to what is kept",
    recipe=recipe,
    options=Options,
    defaults={
        "shapes": Defaults(60, 5e-4, 16, 16, "all", "linear"),
        "stable-diffusion": Defaults(60, 5e-6, 8, 32, "all"),
    },
    is_reconstruction=True,
)
