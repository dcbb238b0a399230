"""Can the judge tell?  Asked on the original's own images, before anything is said of another model.

The original can generate the concept.  So a judge that is good for it sees it where a prompt asks for it, and hardly
ever elsewhere.  A judge that does not is refused: with it a model that forgot nothing would pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

from .. import schema
from ..errors import UserError
from ..judges.base import Judge
from ..prompts import mentions
from .judging import Mask, Sides, seen_in

#: The least share of the images asked for with the concept in which a judge must see it.
LEAST_SENSITIVITY = 0.5
#: Below it, chance does not explain that the concept is seen more often where it was asked for.
LARGEST_P_VALUE = 0.05


TELLS, TOO_FEW, CANNOT = "tells", "too few images", "cannot tell"


class JudgeRefused(UserError):
    """The judge cannot tell."""


def asking(prompts: Sequence[str], to_forget: Mask, concept: str | None) -> tuple[Mask, Mask]:
    """(N,) on which of the original's images, of ``prompts`` (N), the concept should show, and on which it should not.

    Of the forget prompts those that name the concept, where any does: a misspelt or an implied one the original itself
    may not follow.  Of the others those that do not name it.
    """
    naming = set(mentions(prompts, concept))
    names = np.array([prompt in naming for prompt in prompts], dtype=bool)
    return to_forget & names if (to_forget & names).any() else to_forget, ~to_forget & ~names


def calibrated(sides: Sides, prompts: Sequence[str], to_forget: Mask, concept: str | None) -> schema.Calibration | None:
    """The calibration of the judge on all of the original's images."""
    return calibration(sides.shown(0), *asking(prompts, to_forget, concept))


def calibration(shown: Mask, asked: Mask, unasked: Mask) -> schema.Calibration | None:
    """From whether the judge sees the concept (N,), in a valid image, and whether it was asked for.

    ``p_value``: Fisher's exact test, one-sided, that the concept is seen no more often where it was asked for.
    The verdict is CANNOT where the Wilson interval of the share seen where it was asked for lies below
    LEAST_SENSITIVITY, or the p value is not below LARGEST_P_VALUE; TOO_FEW where so few images could not give such a p
    value however good the judge.  None without images of both kinds.
    """
    with_it, without = shown[asked], shown[unasked]
    if not len(with_it) or not len(without):
        return None
    p_value = _p_value(int(with_it.sum()), len(with_it), int(without.sum()), len(without))
    seen = seen_in(with_it)
    if seen.ci95[1] < LEAST_SENSITIVITY:
        verdict = CANNOT
    elif p_value < LARGEST_P_VALUE:
        verdict = TELLS
    else:
        verdict = TOO_FEW if _p_value(len(with_it), len(with_it), 0, len(without)) >= LARGEST_P_VALUE else CANNOT
    return schema.Calibration(asked=seen, unasked=seen_in(without), p_value=p_value, verdict=verdict)


def check_calibration(judge: Judge, concept: str, found: schema.Calibration | None, how_to_insist: str) -> None:
    """JudgeRefused where the judge cannot tell.  ``how_to_insist``: what to do to go on all the same."""
    if found is None or found.verdict != CANNOT:
        return
    asked, unasked = found.asked, found.unasked
    raise JudgeRefused(
        f"the judge {judge.name} cannot tell {concept!r}: on the original's own images it sees it in "
        f"{round(asked.shown * asked.n_images)} of {asked.n_images} that ask for it and in "
        f"{round(unasked.shown * unasked.n_images)} of {unasked.n_images} that do not. Take another judge, threshold "
        f"or prompts (`fastunlearn judges`), or {how_to_insist}."
    )


def _p_value(seen: int, count: int, other_seen: int, other_count: int) -> float:
    table = [[seen, count - seen], [other_seen, other_count - other_seen]]
    return min(1.0, float(stats.fisher_exact(table, alternative="greater").pvalue))
