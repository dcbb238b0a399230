"""Means with honest intervals: values that share a prompt are not independent, so prompts are what is resampled.

All estimates weigh every prompt the same (a mean over prompts of the prompt's mean) and depend neither on the order
of the rows nor on anything but the seed.  numpy and scipy only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy import stats

from ..errors import UserError

#: Below this many prompts the bootstrap is too narrow and a t interval is used instead.
MIN_CLUSTERS_FOR_BOOTSTRAP = 50
#: Above this many the two agree, and the bootstrap would only take minutes.
MAX_CLUSTERS_FOR_BOOTSTRAP = 2000

_CHUNK_ELEMENTS = 4_000_000  # multinomial counts held at once: 32 MB

Floats = npt.NDArray[np.float64]
Clusters = Sequence[str] | Sequence[int] | npt.NDArray[np.generic]


@dataclass(frozen=True)
class Estimate:
    """A mean and its interval.

    ``n`` values in ``n_clusters`` independent groups (prompts); ``method`` says in words how the interval was made.
    """

    mean: float
    low: float
    high: float
    n: int
    n_clusters: int
    method: str


def clustered_mean(
    values: npt.ArrayLike,
    clusters: Clusters,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Mean over prompts of the prompt's mean value, with an interval for the population the prompts stand for.

    ``values``: (N,) finite numbers; ``clusters``: (N,) strings or integers, the prompt of each value.  With 50 to 2000
    prompts the interval is a percentile bootstrap that resamples prompts; else a t interval on the prompt means.
    Raises ``ValueError`` for empty, non-finite or unequal input and for fewer than two prompts.
    """
    _, means, n = _cluster_means(values, clusters, "values")
    count = len(means)
    _check_options(level, resamples, count)
    mean = float(means.mean())
    if not _bootstraps(count):
        low, high = _t_interval(mean, means - mean, level)
        return Estimate(mean, low, high, n, count, _t_method(level, count))
    low, high = _percentiles(_bootstrap(means[:, None], resamples, seed)[:, 0], level)
    return Estimate(mean, low, high, n, count, _bootstrap_method(level, resamples))


def retention(
    distances: npt.ArrayLike,
    clusters: Clusters,
    ceiling_distances: npt.ArrayLike,
    ceiling_clusters: Clusters,
    floor: float | npt.ArrayLike = 0.0,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Calibrated retention R = 1 - (D - floor)_+ / (ceiling - floor), a ratio of means.

    ``distances``: (N,) original against unlearned model, ``clusters``: (N,) their prompts; ``ceiling_distances``:
    (M,) original against itself redrawn from other noise, over the same prompts.  ``floor``: what numerics alone
    change, one number, or (N,) measured on the same pairs and then resampled with them.  R is 1 at the floor and
    below it, 0 when images are as good as redrawn, negative beyond.  All terms are resampled together, prompt by
    prompt; where :func:`clustered_mean` takes a t interval, so does this, on the linearised ratio and cut at 1.
    ``n`` counts the distances, not the ceiling's.  Raises ``ValueError`` like :func:`clustered_mean`, when the
    prompts differ, and when the ceiling is not above the floor.
    """
    keys, means, n = _cluster_means(distances, clusters, "distances")
    ceiling_keys, ceilings, _ = _cluster_means(ceiling_distances, ceiling_clusters, "ceiling_distances")
    _check_same_prompts(keys, ceiling_keys)
    floors = _floor_means(floor, clusters, len(means))
    count = len(means)
    _check_options(level, resamples, count)
    bottom = float(floors.mean())
    span = float(ceilings.mean()) - bottom
    if span <= 0:
        raise UserError(
            f"the ceiling must be above the floor, got a mean redrawn distance of {span + bottom:.6g} and a floor of "
            f"{bottom:.6g}: check that the redrawn images use other seeds"
        )
    mean = 1 - max(float(means.mean()) - bottom, 0.0) / span
    if not _bootstraps(count):
        # First-order effect of each prompt on the ratio.
        effects = ((1 - mean) * (ceilings - floors) - (means - floors)) / span
        low, high = _t_interval(mean, effects - effects.mean(), level)
        method = _t_method(level, count) + ", ratio of means linearised"
        return Estimate(mean, low, min(high, 1.0), n, count, method)
    replicates = _bootstrap(np.stack([means, ceilings, floors], axis=1), resamples, seed)
    spans = replicates[:, 1] - replicates[:, 2]
    if spans.min() <= 0:
        raise UserError(
            f"the ceiling is not reliably above the floor of {bottom:.6g} (a resample of the prompts fell to "
            f"{spans.min() + bottom:.6g}): use more prompts, or prompts whose images vary with the seed"
        )
    low, high = _percentiles(1 - np.maximum(replicates[:, 0] - replicates[:, 2], 0) / spans, level)
    return Estimate(
        mean, low, high, n, count, _bootstrap_method(level, resamples) + ", ratio of means resampled jointly"
    )


def difference(
    values_a: npt.ArrayLike,
    values_b: npt.ArrayLike,
    clusters: Clusters,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Paired difference a - b: ``values_a[i]`` and ``values_b[i]`` are two models' (N,) values for one (prompt, seed).

    Pairing removes what both models share, so it is far sharper than comparing two intervals.
    Raises ``ValueError`` like :func:`clustered_mean`.
    """
    a, b = _finite(values_a, "values_a"), _finite(values_b, "values_b")
    if len(a) != len(b):
        raise ValueError(f"values_a and values_b must be paired, got {len(a)} and {len(b)} values: match them by key")
    estimate = clustered_mean(a - b, clusters, level=level, resamples=resamples, seed=seed)
    return replace(estimate, method="paired difference, " + estimate.method)


@dataclass(frozen=True)
class Comparison:
    """Two models on the same pairs: ``difference`` is a - b with its interval, ``p_value`` tests that it is 0.

    ``equivalence_p_value`` tests the opposite claim, that |a - b| reaches ``margin`` (two one-sided tests); ``inner``
    is the interval of level 1 - 2 alpha that must lie within the margins for ``equivalent`` to hold.
    """

    difference: Estimate
    p_value: float
    margin: float
    inner: tuple[float, float]
    equivalence_p_value: float
    equivalent: bool


def compare(
    values_a: npt.ArrayLike,
    values_b: npt.ArrayLike,
    clusters: Clusters,
    margin: float,
    *,
    scale: npt.ArrayLike | None = None,
    alpha: float = 0.05,
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Paired difference a - b of two models' (N,) values, tested for being 0 and for lying within ``margin``.

    ``scale``: (N,) values whose mean divides the difference, resampled with it: with redrawn distances for it the
    difference and the margin are in units of retention.  Equivalence is claimed when the two one-sided tests (TOST)
    reject at ``alpha`` that the difference lies at or beyond either margin.  Bootstrap clustered by prompt; where
    :func:`clustered_mean` takes a t interval, t tests on the prompt means (with ``scale``, of the linearised ratio).
    Raises ``ValueError`` like :func:`difference`, and for a margin or a mean scale that is not above 0.
    Source: Schuirmann (1987), J. Pharmacokinetics and Biopharmaceutics 15, 657-680.
    """
    a, b = _finite(values_a, "values_a"), _finite(values_b, "values_b")
    if len(a) != len(b):
        raise ValueError(f"values_a and values_b must be paired, got {len(a)} and {len(b)} values: match them by key")
    if not (math.isfinite(margin) and margin > 0):
        raise ValueError(f"the margin must be a number above 0, got {margin}: it is the largest harmless difference")
    _, gaps, n = _cluster_means(a - b, clusters, "values_a - values_b")
    _, scales, _ = _cluster_means(np.ones(len(a)) if scale is None else scale, clusters, "scale")
    if scales.mean() <= 0:
        raise ValueError(f"the mean scale must be above 0, got {scales.mean():.6g}: give redrawn distances")
    count, level = len(gaps), 1 - alpha
    _check_options(level, resamples, count)
    mean = float(gaps.mean() / scales.mean())
    if not _bootstraps(count):
        effects = (gaps - mean * scales) / float(scales.mean())
        outer, inner = (_t_interval(mean, effects, wanted) for wanted in (level, 1 - 2 * alpha))
        error, method = _standard_error(effects), _t_method(level, count)

        def tails(limit: float) -> tuple[float, float]:
            if error == 0:
                return float(mean <= limit), float(mean >= limit)
            t = (mean - limit) / error
            return float(stats.t.sf(t, count - 1)), float(stats.t.cdf(t, count - 1))
    else:
        replicates = _bootstrap(np.stack([gaps, scales], axis=1), resamples, seed)
        ratios, method = replicates[:, 0] / replicates[:, 1], _bootstrap_method(level, resamples)
        outer, inner = (_percentiles(ratios, wanted) for wanted in (level, 1 - 2 * alpha))

        def tails(limit: float) -> tuple[float, float]:
            beyond = np.count_nonzero(ratios <= limit), np.count_nonzero(ratios >= limit)
            return (beyond[0] + 1) / (resamples + 1), (beyond[1] + 1) / (resamples + 1)

    # ``tails(limit)``: p values against the difference being at most, and at least, the limit.
    p_value = min(1.0, 2 * min(tails(0.0)))
    equivalence = max(tails(-margin)[0], tails(margin)[1])
    estimate = Estimate(mean, *outer, n, count, "paired difference, " + method)
    return Comparison(estimate, p_value, margin, inner, equivalence, -margin < inner[0] and inner[1] < margin)


def holm(p_values: Sequence[float]) -> list[float]:
    """P values adjusted for being several, in their order.  Source: Holm (1979), Scand. J. Statistics 6, 65-70."""
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = running
    return adjusted


def wilson(successes: int, n: int, *, level: float = 0.95) -> Estimate:
    """Share of ``successes`` in ``n`` images with Wilson's score interval, which is sound at 0 and at ``n`` too.

    It takes the images as independent; ``n_clusters`` is therefore ``n``.
    Raises ``ValueError`` unless ``0 <= successes <= n`` and ``n >= 1``.  Source: Wilson (1927), JASA 22, 209-212.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"wilson needs 0 <= successes <= n and n >= 1, got successes={successes}, n={n}: count images")
    _check_level(level)
    interval = stats.binomtest(int(successes), int(n)).proportion_ci(confidence_level=level, method="wilson")
    method = f"{100 * level:g} % Wilson score interval over {n} images taken as independent"
    return Estimate(successes / n, float(interval.low), float(interval.high), int(n), int(n), method)


def quantiles(values: npt.ArrayLike) -> dict[str, float]:
    """The tail of ``values`` (N,): ``q50``, ``q90``, ``q95``, ``q99``, linearly interpolated.

    Raises ``ValueError`` for empty or non-finite input.
    """
    levels = (50, 90, 95, 99)
    result = np.quantile(_finite(values, "values"), np.array(levels) / 100)
    return {f"q{level}": float(value) for level, value in zip(levels, result, strict=True)}


def _finite(values: npt.ArrayLike, name: str) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(
            f"{name} must be a non-empty list of numbers, got shape {array.shape}: measure at least one pair"
        )
    bad = int((~np.isfinite(array)).sum())
    if bad:
        raise ValueError(
            f"{name} must be finite, got {bad} NaN or infinite of {len(array)}: find the pairs that failed"
        )
    return array


def _cluster_means(values: npt.ArrayLike, clusters: Clusters, name: str) -> tuple[npt.NDArray[np.generic], Floats, int]:
    """Sorted keys (P,), the mean of each (P,), and how many values there were."""
    array, labels = _finite(values, name), np.asarray(clusters)
    if labels.shape != array.shape:
        raise ValueError(f"{name} and its clusters must have one length, got {array.shape} and {labels.shape}")
    if labels.dtype.kind not in "Uiu":
        raise ValueError(f"clusters must be strings or integers, got dtype {labels.dtype}: name each value's prompt")
    keys, codes = np.unique(labels, return_inverse=True)
    # Values are sorted inside a prompt too: floating-point sums depend on their order.
    order = np.lexsort((array, codes))
    sums = np.bincount(codes[order], weights=array[order])
    return keys, sums / np.bincount(codes), len(array)


def _check_same_prompts(keys: npt.NDArray[np.generic], ceiling_keys: npt.NDArray[np.generic]) -> None:
    if np.array_equal(keys, ceiling_keys):
        return
    only = sorted({str(key) for key in keys} ^ {str(key) for key in ceiling_keys})
    raise ValueError(
        f"distances and ceiling_distances must cover the same prompts, but {len(only)} are in one of them only "
        f"(such as {only[0]!r}): measure both on the same prompts"
        if only
        else "clusters and ceiling_clusters must have the same type: give strings or integers for both"
    )


def _floor_means(floor: float | npt.ArrayLike, clusters: Clusters, count: int) -> Floats:
    """The floor of each of ``count`` prompts."""
    if np.ndim(floor) > 0:
        return _cluster_means(floor, clusters, "floor")[1]
    number = float(np.asarray(floor))
    if not math.isfinite(number):
        raise ValueError(f"floor must be a finite distance, got {number}: use 0.0 if repeats are bit-identical")
    return np.full(count, number)


def _bootstraps(count: int) -> bool:
    return MIN_CLUSTERS_FOR_BOOTSTRAP <= count <= MAX_CLUSTERS_FOR_BOOTSTRAP


def _bootstrap(means: Floats, resamples: int, seed: int) -> Floats:
    """Means (resamples, K) of the columns of ``means`` (P, K) over prompts drawn with replacement."""
    count = len(means)
    generator = np.random.default_rng(seed)
    chance = np.full(count, 1 / count)
    chunk = max(1, _CHUNK_ELEMENTS // count)
    chunks = [min(chunk, resamples - start) for start in range(0, resamples, chunk)]
    return np.concatenate([generator.multinomial(count, chance, size=size) @ means for size in chunks]) / count


def _percentiles(replicates: Floats, level: float) -> tuple[float, float]:
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _t_interval(mean: float, effects: Floats, level: float) -> tuple[float, float]:
    """``effects``: (P,) deviations that sum to zero."""
    half_width = float(stats.t.ppf((1 + level) / 2, len(effects) - 1)) * _standard_error(effects)
    return mean - half_width, mean + half_width


def _standard_error(effects: Floats) -> float:
    """Of the mean of ``effects`` (P,), deviations that sum to zero."""
    count = len(effects)
    return math.sqrt(float(np.square(effects).sum()) / (count - 1) / count)


def _bootstrap_method(level: float, resamples: int) -> str:
    return f"{100 * level:g} % percentile bootstrap clustered by prompt, {resamples} resamples"


def _t_method(level: float, count: int) -> str:
    return f"{100 * level:g} % t interval on prompt means, {count - 1} degrees of freedom"


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}: 0.95 is usual")


def _check_options(level: float, resamples: int, count: int) -> None:
    _check_level(level)
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}: 10000 is usual")
    if count < 2:
        raise UserError(f"an interval over prompts needs at least 2 prompts, got {count}: add prompts, not seeds")
