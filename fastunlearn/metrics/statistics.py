"""Means with honest intervals: values that share a prompt are not independent, so prompts are what is resampled.

All estimates weigh every prompt the same (a mean over prompts of the prompt's mean) and depend neither on the order
of the rows nor on anything but the seed.  numpy and scipy only.

How often the intervals hold the truth is measured by ``benchmarks/coverage.py``, into
``benchmarks/results/coverage.json``.  The hard case are rare switches: a few prompts in a hundred give another image
altogether, and a sample of ten or twenty shows none of them.  What a sample does not show it cannot estimate, so
:func:`retention` and :func:`compare` count one prompt more, whose images are redrawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy import stats

from ..errors import UserError
from .intervals import BootstrapRatio, Float64s, Ratio, TRatio, bootstrap, percentiles, standard_error

#: Below this many prompts the bootstrap is too narrow and a t interval is used instead.
MIN_CLUSTERS_FOR_BOOTSTRAP = 50
#: Above this many the two agree, and the bootstrap would only take minutes.
MAX_CLUSTERS_FOR_BOOTSTRAP = 2000

_LEAST_CEILING = 3.0  # standard errors that the ceiling must lie above the floor

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
    prompts the interval is a percentile bootstrap that resamples prompts; else a t interval on the prompt means.  Of
    skewed values it holds less than it says at few prompts; nothing bounds what a prompt not seen may measure.
    Raises ``ValueError`` for empty, non-finite or unequal input and for fewer than two prompts.
    """
    _, means, n = _cluster_means(values, clusters, "values")
    count = len(means)
    _check_options(level, resamples, count)
    mean = float(means.mean())
    if not _bootstraps(count):
        low, high = TRatio(means, np.ones(count)).interval(level)
        return Estimate(mean, low, high, n, count, _t_method(level, count))
    low, high = percentiles(bootstrap(means[:, None], resamples, seed)[:, 0], level)
    return Estimate(mean, low, high, n, count, _bootstrap_method(level, resamples))


def clustered_share(flags: npt.ArrayLike, clusters: Clusters, *, level: float = 0.95) -> Estimate:
    """Share of the (N,) ``flags`` (booleans) that are true, with an interval that is sound at 0 and at 1 too.

    ``clusters``: (N,) strings or integers, the prompt of each.  Each end is that of a t interval on the prompt means
    with one prompt more, all of whose flags are false for the low end and true for the high one.  So n prompts of
    which none is true still allow about 3 / n.  Raises ``ValueError`` like :func:`clustered_mean`.
    """
    _, means, n = _cluster_means(np.asarray(flags, dtype=np.float64), clusters, "flags")
    count = len(means)
    _check_options(level, 1, count)
    ones = np.ones(count)
    low, high = (TRatio(means, ones, unseen=end).interval(level)[side] for side, end in enumerate((0.0, 1.0)))
    method = _t_method(level, count + 1) + ", at each end with one prompt more of that kind"
    return Estimate(float(means.mean()), max(low, 0.0), min(high, 1.0), n, count, method)


def retention(
    distances: npt.ArrayLike,
    clusters: Clusters,
    ceiling_distances: npt.ArrayLike,
    ceiling_clusters: Clusters,
    floor: float | npt.ArrayLike = 0.0,
    *,
    level: float = 0.95,
) -> Estimate:
    """Calibrated retention R = 1 - (D - floor)_+ / (ceiling - floor), a ratio of means.

    ``distances``: (N,) original against unlearned model, ``clusters``: (N,) their prompts; ``ceiling_distances``:
    (M,) original against itself redrawn from other noise, over the same prompts.  ``floor``: what numerics alone
    change, one number, or (N,) measured on the same pairs and then varying with them.  R is 1 at the floor and below
    it, 0 when images are as good as redrawn, negative beyond.  ``n`` counts the distances, not the ceiling's.

    The interval is one of t on the linearized ratio of prompt means, with two changes.  The high end is taken on the
    logarithm of 1 - R, because distances are skewed; so it never exceeds 1.  The low end is that of the sample with
    one prompt more, whose images are redrawn: n prompts of which none was redrawn cannot exclude that 3 in n are (the
    rule of three), and the end says so.

    Coverage, measured: the least over eleven populations, nominal 0.95; in brackets a plain t interval.

    prompts   no switches     5 % switches
     10       0.96 (0.73)     0.97 (0.40)
     20       0.96 (0.77)     0.96 (0.64)
     56       0.95 (0.83)     0.92 (0.87)
    112       0.94 (0.86)     0.94 (0.91)

    It is paid for in width where nothing is redrawn: 0.065 in place of 0.027 on the 56 prompts of OVW on the bundled
    model.  It claims nothing for a heavy tail far beyond redrawn images, which no perceptual distance has: there it
    holds 0.86 at 10 prompts and 0.89 at 56.  All figures are in ``benchmarks/results/coverage.json``.

    Raises ``ValueError`` like :func:`clustered_mean`, when the prompts differ, and when the ceiling is not reliably
    above the floor.
    """
    keys, means, n = _cluster_means(distances, clusters, "distances")
    ceiling_keys, ceilings, _ = _cluster_means(ceiling_distances, ceiling_clusters, "ceiling_distances")
    _check_same_prompts(keys, ceiling_keys)
    floors = _floor_means(floor, clusters, len(means))
    count = len(means)
    _check_options(level, 1, count)
    bottom = float(floors.mean())
    gaps, spans = means - floors, ceilings - floors
    span = float(ceilings.mean()) - bottom
    if span <= 0:
        raise UserError(
            f"the ceiling must be above the floor, got a mean redrawn distance of {span + bottom:.6g} and a floor of "
            f"{bottom:.6g}: check that the redrawn images use other seeds"
        )
    error = standard_error(spans - spans.mean())
    if count >= MIN_CLUSTERS_FOR_BOOTSTRAP and span < _LEAST_CEILING * error:
        raise UserError(
            f"the ceiling is not reliably above the floor of {bottom:.6g} (a mean redrawn distance of "
            f"{span + bottom:.6g} with a standard error of {error:.2g}): use more prompts, or prompts whose images "
            "vary with the seed"
        )
    lost = max(float(means.mean()) - bottom, 0.0) / span
    seen, with_redrawn = TRatio(gaps, spans), TRatio(gaps, spans, unseen=1.0)
    most = max(lost, seen.interval(level)[1], with_redrawn.interval(level)[1])
    least = lost * math.exp((seen.interval(level)[0] - seen.mean) / lost) if lost > 0 else 0.0
    return Estimate(1 - lost, 1 - most, 1 - least, n, count, _retention_method(level, count))


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
    difference and the margin are in units of retention.  Bootstrap clustered by prompt; where :func:`clustered_mean`
    takes a t interval, t tests on the prompt means (with ``scale``, of the linearized ratio).

    Equivalence is claimed when two one-sided t tests (TOST) reject at ``alpha`` that the difference lies at or beyond
    either margin.  With ``scale``, each of them is that of the sample with one prompt more, which the model in
    question redraws: else ten to thirty prompts, none of which happens to be among the 5 % that differ, would pass for
    equivalent.  It takes somewhat more than 3 / ``margin`` prompts to show an equivalence so, 60 for 0.05.

    Claims of equivalence, measured at a margin of 0.05, nominal 0.05 where false; in brackets without ``scale``.

    prompts   false, 5 % of prompts redrawn  true, equal models
     10       0.00 (0.51)                    0.00 (0.79)
     20       0.00 (0.38)                    0.00 (1.00)
     56       0.01 (0.13)                    0.15 (1.00)
     80       0.03 (0.08)                    1.00 (1.00)
    112       0.03 (0.06)                    1.00 (1.00)
    200       0.05 (0.09)                    1.00 (1.00)

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
    plain: Ratio = BootstrapRatio(gaps, scales, resamples, seed) if _bootstraps(count) else TRatio(gaps, scales)
    method = _bootstrap_method(level, resamples) if _bootstraps(count) else _t_method(level, count)
    estimate = Estimate(plain.mean, *plain.interval(level), n, count, "paired difference, " + method)
    # Without a scale nothing says how far a prompt that was not seen could differ.
    unseen = [] if scale is None else [TRatio(gaps, scales, unseen=side) for side in (-1.0, 1.0)]
    ends = [one.interval(1 - 2 * alpha) for one in (plain, *unseen)]
    inner = min(low for low, _ in ends), max(high for _, high in ends)
    p_value = min(1.0, 2 * min(plain.tails(0.0)))
    equivalence = max(max(one.tails(-margin)[0], one.tails(margin)[1]) for one in (plain, *unseen))
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


def _finite(values: npt.ArrayLike, name: str) -> Float64s:
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


def _cluster_means(
    values: npt.ArrayLike, clusters: Clusters, name: str
) -> tuple[npt.NDArray[np.generic], Float64s, int]:
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


def _floor_means(floor: float | npt.ArrayLike, clusters: Clusters, count: int) -> Float64s:
    """The floor of each of ``count`` prompts."""
    if np.ndim(floor) > 0:
        return _cluster_means(floor, clusters, "floor")[1]
    number = float(np.asarray(floor))
    if not math.isfinite(number):
        raise ValueError(f"floor must be a finite distance, got {number}: use 0.0 if repeats are bit-identical")
    return np.full(count, number)


def _bootstraps(count: int) -> bool:
    return MIN_CLUSTERS_FOR_BOOTSTRAP <= count <= MAX_CLUSTERS_FOR_BOOTSTRAP


def _bootstrap_method(level: float, resamples: int) -> str:
    return f"{100 * level:g} % percentile bootstrap clustered by prompt, {resamples} resamples"


def _t_method(level: float, count: int) -> str:
    return f"{100 * level:g} % t interval on prompt means, {count - 1} degrees of freedom"


def _retention_method(level: float, count: int) -> str:
    return (
        f"{_t_method(level, count)}, ratio of means linearized; high end on a log scale, low end with one redrawn "
        "prompt more"
    )


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}: 0.95 is usual")


def _check_options(level: float, resamples: int, count: int) -> None:
    _check_level(level)
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}: 10000 is usual")
    if count < 2:
        raise UserError(f"an interval over prompts needs at least 2 prompts, got {count}: add prompts, not seeds")
