"""Whether a statistic tells a model from models after harmless training, with what power, and how often it errs.

A resample draws prompts anew and leaves one harmless training out.  The others give a limit: what one more harmless
training stays below with a chance of :data:`LEVEL`, by Student's t over trainings, on equal prompts.  A model is seen
where its statistic lies above, and so is, in error, the training that was left out.  So the variation between trainings
is in the limit, that between prompts in the shares; whether the level holds is measured, by the share of errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
from scipy import stats

RESAMPLES, LEVEL, POWER = 200, 0.95, 0.8

#: One row per image, by what was measured, and the images' indices to the statistic; more is more damage.
Statistic = Callable[[Mapping[str, npt.NDArray[np.float64]], npt.NDArray[np.int64]], float]


def resampled(prompts: int, draws: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Indices (RESAMPLES, draws * prompts) of images, and RESAMPLES numbers in [0, 1) that choose a training.

    Images lie draw after draw, each with all prompts in their order; an image of a prompt comes with its other draws.
    """
    chance = np.random.default_rng(0)
    places = chance.integers(prompts, size=(RESAMPLES, prompts))
    return np.concatenate([places + draw * prompts for draw in range(draws)], axis=1), chance.random(RESAMPLES)


def limits(harmless: npt.NDArray[np.float64], chance: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], float]:
    """Each resample's limit (R,) and the share of them in which the training that was left out lies above it.

    ``harmless``: a statistic's values (trainings, R); at least three trainings.
    """
    trainings, resamples = harmless.shape
    left_out = (chance * trainings).astype(int)
    kept = np.stack([np.delete(harmless[:, r], left_out[r]) for r in range(resamples)])
    count = trainings - 1
    reach = stats.t.ppf(LEVEL, count - 1) * math.sqrt(1 + 1 / count)
    limit = kept.mean(axis=1) + reach * kept.std(axis=1, ddof=1)
    return limit, float((harmless[left_out, np.arange(resamples)] > limit).mean())


def power(values: npt.NDArray[np.float64], limit: npt.NDArray[np.float64]) -> float:
    """The share of resamples in which a model's statistic, (R,), lies above the limit."""
    return float((values > limit).mean())
