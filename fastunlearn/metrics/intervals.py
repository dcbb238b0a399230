"""Intervals and tests of a ratio of means over prompts: by t, or by resampling prompts.  numpy and scipy only."""

from __future__ import annotations

import functools
import math
from typing import Protocol

import numpy as np
import numpy.typing as npt
from scipy import stats

_CHUNK_ELEMENTS = 4_000_000  # multinomial counts held at once: 32 MB

Float64s = npt.NDArray[np.float64]


class Ratio(Protocol):
    """Mean of numerators (P,) over mean of denominators (P,), and what a sample says of it."""

    mean: float

    def interval(self, level: float) -> tuple[float, float]: ...

    def tails(self, limit: float) -> tuple[float, float]:
        """P values against the ratio being at most, and at least, ``limit``."""


class TRatio:
    """By t on the linearized ratio.

    ``unseen``: adds one prompt whose denominator is the mean one, and whose numerator is ``unseen`` times that.
    """

    def __init__(self, numerators: Float64s, denominators: Float64s, *, unseen: float | None = None) -> None:
        if unseen is not None:
            usual = float(denominators.mean())
            numerators, denominators = np.append(numerators, unseen * usual), np.append(denominators, usual)
        self.mean = float(numerators.mean() / denominators.mean())
        # First-order effect of each prompt on the ratio; they sum to zero.
        self.error = standard_error((numerators - self.mean * denominators) / float(denominators.mean()))
        self.freedom = len(numerators) - 1

    def interval(self, level: float) -> tuple[float, float]:
        half_width = _t_quantile((1 + level) / 2, self.freedom) * self.error
        return self.mean - half_width, self.mean + half_width

    def tails(self, limit: float) -> tuple[float, float]:
        if self.error == 0:
            return float(self.mean <= limit), float(self.mean >= limit)
        t = (self.mean - limit) / self.error
        return float(stats.t.sf(t, self.freedom)), float(stats.t.cdf(t, self.freedom))


class BootstrapRatio:
    """By percentiles over resampled prompts."""

    def __init__(self, numerators: Float64s, denominators: Float64s, resamples: int, seed: int) -> None:
        replicates = bootstrap(np.stack([numerators, denominators], axis=1), resamples, seed)
        self.mean = float(numerators.mean() / denominators.mean())
        self.ratios = replicates[:, 0] / replicates[:, 1]

    def interval(self, level: float) -> tuple[float, float]:
        return percentiles(self.ratios, level)

    def tails(self, limit: float) -> tuple[float, float]:
        beyond = np.count_nonzero(self.ratios <= limit), np.count_nonzero(self.ratios >= limit)
        return (beyond[0] + 1) / (len(self.ratios) + 1), (beyond[1] + 1) / (len(self.ratios) + 1)


def bootstrap(means: Float64s, resamples: int, seed: int) -> Float64s:
    """Means (resamples, K) of the columns of ``means`` (P, K) over prompts drawn with replacement."""
    count = len(means)
    generator = np.random.default_rng(seed)
    chance = np.full(count, 1 / count)
    chunk = max(1, _CHUNK_ELEMENTS // count)
    chunks = [min(chunk, resamples - start) for start in range(0, resamples, chunk)]
    return np.concatenate([generator.multinomial(count, chance, size=size) @ means for size in chunks]) / count


@functools.lru_cache
def _t_quantile(share: float, freedom: int) -> float:
    """scipy takes a tenth of a millisecond for it."""
    return float(stats.t.ppf(share, freedom))


def percentiles(replicates: Float64s, level: float) -> tuple[float, float]:
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def standard_error(effects: Float64s) -> float:
    """Of the mean of ``effects`` (P,), deviations that sum to zero."""
    count = len(effects)
    return math.sqrt(float(np.square(effects).sum()) / (count - 1) / count)
