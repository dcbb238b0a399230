"""Known answers, coverage where prompts cluster, independence of row order, and errors that say what to do."""

import importlib.util
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fastunlearn.metrics import statistics
from fastunlearn.metrics.intervals import TRatio, bootstrap
from fastunlearn.metrics.statistics import (
    Estimate,
    clustered_mean,
    clustered_share,
    compare,
    difference,
    holm,
    quantiles,
    retention,
    wilson,
)


def simulated(prompts: int, seeds: int, generator: np.random.Generator) -> np.ndarray:
    """(prompts, seeds) distances: a lognormal bulk with a share per prompt (ICC about 0.15) and 5 % mode switches."""
    prompt = generator.normal(0, np.sqrt(0.28), (prompts, 1))
    bulk = 0.06 * np.exp(prompt + generator.normal(0, np.sqrt(0.72), (prompts, seeds)))
    return bulk + 0.3 * (generator.random((prompts, seeds)) < 0.05)


TRUE_MEAN = 0.06 * np.exp(0.5) + 0.3 * 0.05


def coverage(prompts: int, seeds: int, rounds: int, resamples: int = 1000) -> tuple[float, float]:
    """Shares of ``rounds`` in which the clustered and the naive 95 % interval hold the true mean.

    The rounds are columns of one bootstrap, so that thousands take a second; see the next test for that it is the same.
    """
    generator = np.random.default_rng(7)
    values = np.stack([simulated(prompts, seeds, generator) for _ in range(rounds)], axis=2)
    means = values.mean(axis=1)
    if prompts < statistics.MIN_CLUSTERS_FOR_BOOTSTRAP:
        ends = [TRatio(column, np.ones(prompts)).interval(0.95) for column in means.T]
        low, high = np.array(ends).T
    else:
        replicates = bootstrap(means, resamples, 0)
        low, high = np.quantile(replicates, [0.025, 0.975], axis=0)
    flat = values.reshape(-1, rounds)
    half_width = 1.96 * flat.std(axis=0, ddof=1) / np.sqrt(len(flat))
    naive = np.abs(flat.mean(axis=0) - TRUE_MEAN) <= half_width
    return float(((low <= TRUE_MEAN) & (high >= TRUE_MEAN)).mean()), float(naive.mean())


def test_the_simulation_asks_what_users_ask():
    """One round by the public function gives the interval that the columns give."""
    values = simulated(60, 4, np.random.default_rng(1))
    estimate = clustered_mean(values.ravel(), np.repeat(np.arange(60), 4), resamples=500)
    replicates = bootstrap(np.stack([values.mean(axis=1)] * 2, axis=1), 500, 0)
    assert np.quantile(replicates[:, 1], [0.025, 0.975]) == pytest.approx([estimate.low, estimate.high])


def test_intervals_cover_what_they_claim_at_200_prompts_of_5_seeds():
    clustered, _ = coverage(prompts=200, seeds=5, rounds=1500)
    assert 0.93 <= clustered <= 0.97


def test_few_prompts_of_many_seeds_still_cover_where_a_naive_interval_does_not():
    clustered, naive = coverage(prompts=20, seeds=50, rounds=1500)
    assert clustered >= 0.85
    assert naive < 0.55


@pytest.mark.slow
@pytest.mark.parametrize(("prompts", "seeds"), [(50, 20), (1000, 1)])
def test_coverage_long(prompts, seeds):
    clustered, naive = coverage(prompts, seeds, rounds=2000)
    assert 0.90 <= clustered <= 0.98
    assert naive < clustered or seeds == 1


# ---- R: see benchmarks/coverage.py for all of it ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench():
    """The benchmark's module, and the pairs that its results file keeps."""
    folder = Path(__file__).resolve().parents[1] / "benchmarks"
    spec = importlib.util.spec_from_file_location("coverage_of_intervals", folder / "coverage.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    kept = json.loads(module.RESULTS.read_text(encoding="utf-8"))
    module.PAIRS = kept["pairs"]
    return module


@pytest.mark.parametrize("prompts", [10, 20, 56])
@pytest.mark.parametrize("switches", [0.0, 0.05])
def test_the_interval_of_r_holds_the_truth_as_often_as_it_says(bench, prompts, switches):
    """On every population, also those with 5 % of switches, of which ten prompts mostly show none."""
    for population in bench.populations(bench.PAIRS):
        held = bench.cover(population, prompts, switches, rounds=150)["held"]
        assert held >= 0.9, population.name  # three standard errors of 150 rounds below 0.95


def test_a_plain_t_interval_does_not(bench):
    held = [bench.cover(one, 10, 0.05, rounds=150, way="t")["held"] for one in bench.populations(bench.PAIRS)]
    assert min(held) < 0.6


def test_the_docstrings_state_what_was_measured(bench):
    kept = json.loads(bench.RESULTS.read_text(encoding="utf-8"))
    least = {(row["prompts"], row["switches"]): row for row in kept["least"]}
    for prompts in (10, 20, 56, 112):
        cells = [f"{least[prompts, p]['retention']:.2f} ({least[prompts, p]['t']:.2f})" for p in (0.0, 0.05)]
        assert f"{prompts} {' '.join(cells)}" in " ".join(retention.__doc__.split())
    tests = {(row["prompts"], row["kind"]): row for row in kept["equivalence"]["tests"]}
    for prompts in (10, 20, 56, 80, 112, 200):
        rows = [tests[prompts, kind] for kind in ("switches", "equal")]
        cells = [f"{row['claimed']:.2f} ({row['plain_tost']:.2f})" for row in rows]
        assert f"{prompts} {' '.join(cells)}" in " ".join(compare.__doc__.split())


def test_equivalence_is_not_claimed_of_a_model_that_redraws_as_many_prompts_as_the_margin(bench):
    assert bench.claims(20, "switches", 100) <= 0.08
    assert bench.claims(112, "switches", 100) <= 0.1
    assert bench.claims(112, "evenly", 100) <= 0.1
    assert bench.claims(112, "equal", 50) >= 0.9
    assert bench.claims(20, "switches", 100, on_redrawn=False) > 0.2


def test_shares_of_nothing_and_of_everything_have_an_interval():
    generator = np.random.default_rng(11)
    for prompts, truth in ((10, 0.05), (10, 0.5), (20, 0.05), (56, 0.97)):
        estimates = [clustered_share(generator.random(prompts) < truth, np.arange(prompts)) for _ in range(300)]
        assert np.mean([one.low <= truth <= one.high for one in estimates]) >= 0.93
        assert all(0 <= one.low <= one.mean <= one.high <= 1 for one in estimates)
    none = clustered_share(np.zeros(60, bool), np.repeat(np.arange(20), 3))
    assert (none.mean, none.low, none.n, none.n_clusters) == (0, 0, 60, 20)
    assert none.high == pytest.approx((1 + stats.t.ppf(0.975, 20)) / 21)


def test_t_interval_known_answer():
    # Prompt means 1, 2, 6 whatever the number of seeds: mean 3, s = sqrt(7), t(2) = 4.3027.
    estimate = clustered_mean([0, 2, 2, 6, 6, 6], ["a", "a", "b", "c", "c", "c"])
    expected = stats.t.interval(0.95, 2, loc=3, scale=stats.sem([1, 2, 6]))
    assert estimate.mean == pytest.approx(3)
    assert (estimate.low, estimate.high) == pytest.approx(expected)
    assert (estimate.n, estimate.n_clusters) == (6, 3)
    assert estimate.method == "95 % t interval on prompt means, 2 degrees of freedom"


def test_bootstrap_matches_the_normal_approximation():
    means = np.random.default_rng(0).normal(2, 0.5, 400)
    estimate = clustered_mean(means, range(400))
    half_width = 1.96 * means.std() / np.sqrt(400)
    assert estimate.mean == pytest.approx(means.mean())
    assert estimate.low == pytest.approx(means.mean() - half_width, abs=0.005)
    assert estimate.high == pytest.approx(means.mean() + half_width, abs=0.005)
    assert estimate.method == "95 % percentile bootstrap clustered by prompt, 10000 resamples"


@pytest.mark.parametrize("prompts", [10, 50])
def test_constant_values_have_a_point_interval(prompts):
    estimate = clustered_mean(np.full(prompts * 3, 0.25), np.repeat(np.arange(prompts), 3))
    assert estimate.mean == estimate.low == estimate.high == 0.25


@pytest.mark.parametrize("prompts", [10, 60])
def test_retention_known_answers(prompts):
    clusters = np.arange(prompts)
    ceiling = np.linspace(0.2, 0.6, prompts)

    def score(distances, floor=0.0):
        return retention(distances, clusters, ceiling, clusters, floor)

    assert (score(np.zeros(prompts)).mean, score(np.zeros(prompts)).high) == (1, 1)
    # A distance that is the same share of the ceiling on every prompt leaves nothing to be unsure about but a prompt
    # that was not seen: one more of R = 0 beside so many of 0.75.
    same = score(ceiling / 4)
    values = np.append(np.full(prompts, 0.75), 0)
    weights = np.append(ceiling, ceiling.mean())
    mean = np.average(values, weights=weights)
    error = np.sqrt(np.square((values - mean) * weights / weights.mean()).sum() / prompts / (prompts + 1))
    low = mean - stats.t.ppf(0.975, prompts) * error
    assert (same.mean, same.low, same.high) == pytest.approx((0.75, low, 0.75))
    assert score(ceiling).mean == pytest.approx(0)
    assert score(2 * ceiling).mean == pytest.approx(-1)
    assert score(np.full(prompts, 0.1), floor=0.1).mean == pytest.approx(1)
    # Ratio of means, not mean of ratios.
    spread = score(np.full(prompts, 0.1))
    assert spread.mean == pytest.approx(1 - 0.1 / 0.4)
    assert spread.low < spread.mean < spread.high


@pytest.mark.parametrize("prompts", [10, 500])
def test_the_high_end_of_r_is_of_t_on_the_logarithm(prompts):
    generator = np.random.default_rng(3)
    ceiling = generator.uniform(0.3, 0.5, prompts)
    distances = ceiling * generator.uniform(0.02, 0.3, prompts)
    estimate = retention(distances, range(prompts), ceiling, range(prompts))
    lost = distances.mean() / ceiling.mean()
    error = (distances - lost * ceiling).std(ddof=1) / np.sqrt(prompts) / ceiling.mean()
    assert estimate.high == pytest.approx(1 - lost * np.exp(-stats.t.ppf(0.975, prompts - 1) * error / lost))
    assert estimate.low < estimate.mean - stats.t.ppf(0.975, prompts - 1) * error
    assert estimate.method == (
        f"95 % t interval on prompt means, {prompts - 1} degrees of freedom, ratio of means linearized; high end on a "
        "log scale, low end with one redrawn prompt more"
    )


def test_collapse_is_no_better_for_a_prompt_that_was_not_seen():
    """With R below 0 a redrawn prompt more would raise it: the low end is never above that of the sample itself."""
    generator = np.random.default_rng(2)
    ceiling = generator.uniform(0.4, 0.6, 30)
    distances = 1.5 * ceiling * generator.uniform(0.5, 1.5, 30)
    estimate = retention(distances, range(30), ceiling, range(30))
    assert estimate.mean < -0.3
    assert estimate.low <= 1 - TRatio(distances, ceiling).interval(0.95)[1]


def test_the_interval_of_r_takes_milliseconds():
    clusters = np.arange(2000)
    ceiling = np.linspace(0.4, 0.6, 2000)
    retention(ceiling / 9, clusters, ceiling, clusters)
    started = time.perf_counter()
    for _ in range(5):
        retention(ceiling / 9, clusters, ceiling, clusters)
    assert (time.perf_counter() - started) / 5 < 0.05


def test_retention_allows_other_seed_counts_for_the_ceiling():
    estimate = retention([0.1, 0.1, 0.2], ["a", "a", "b"], [0.5, 0.5], ["b", "a"])
    assert estimate.mean == pytest.approx(1 - 0.15 / 0.5)
    assert (estimate.n, estimate.n_clusters) == (3, 2)


def test_paired_difference_is_sharper_than_two_intervals():
    generator = np.random.default_rng(1)
    clusters = np.repeat(np.arange(100), 4)
    shared = generator.lognormal(0, 1, 400)
    a, b = shared + 0.05 + 0.01 * generator.normal(size=400), shared
    estimate = difference(a, b, clusters)
    assert estimate.mean == pytest.approx(np.mean(a - b))
    assert 0 < estimate.low < 0.05 < estimate.high
    alone = clustered_mean(a, clusters)
    assert estimate.high - estimate.low < (alone.high - alone.low) / 20
    assert estimate.method.startswith("paired difference, 95 %")


def test_a_floor_measured_pair_by_pair_varies_with_the_rest():
    clusters = np.arange(60)
    floor = np.linspace(0, 0.2, 60)
    ceiling = floor + 0.5
    # The same share of the span above the floor on every prompt: certain from above, however the floor varies.
    estimate = retention(floor + 0.125, clusters, ceiling, clusters, floor)
    assert (estimate.mean, estimate.high) == pytest.approx((0.75, 0.75))
    constant = retention(floor + 0.125, clusters, ceiling, clusters, float(floor.mean()))
    assert constant.mean == pytest.approx(0.75)
    assert constant.high > 0.76
    assert constant.low < estimate.low < 0.72


def test_below_the_floor_everything_that_was_seen_is_kept():
    for prompts in (10, 60):
        estimate = retention(np.full(prompts, 0.01), np.arange(prompts), np.ones(prompts), np.arange(prompts), 0.02)
        assert (estimate.mean, estimate.high) == (1, 1)
        assert 1 - 4 / prompts < estimate.low < 1 - 2 / prompts


@pytest.mark.parametrize("prompts", [2000, 2001])
def test_intervals_agree_where_the_bootstrap_gives_way(prompts):
    values = np.random.default_rng(2).lognormal(-2, 1, prompts)
    estimate = clustered_mean(values, range(prompts), resamples=2000)
    assert ("bootstrap" in estimate.method) == (prompts == 2000)
    half_width = 1.96 * values.std() / np.sqrt(prompts)
    assert estimate.high - estimate.low == pytest.approx(2 * half_width, rel=0.07)


@pytest.mark.parametrize("prompts", [30, 200])
def test_equivalence_is_claimed_only_within_the_margin(prompts):
    generator = np.random.default_rng(4)
    base = generator.lognormal(-2, 0.5, prompts)
    close = base + generator.normal(0, 0.01, prompts)
    near = compare(close, base, range(prompts), margin=0.02)
    assert near.equivalent
    assert near.equivalence_p_value < 0.05
    assert -0.02 < near.inner[0] < near.inner[1] < 0.02
    assert near.difference.low < near.inner[0] < near.inner[1] < near.difference.high
    strict = compare(close, base, range(prompts), margin=1e-4)
    assert not strict.equivalent
    assert strict.equivalence_p_value > 0.05
    apart = compare(base + 0.1, base, range(prompts), margin=0.02)
    assert (apart.difference.mean, apart.p_value < 0.05, apart.equivalent) == (pytest.approx(0.1), True, False)
    assert compare(base, base + 0.1, range(prompts), margin=0.02).difference.mean == pytest.approx(-0.1)


def test_t_tests_of_a_difference_known_answers():
    gaps = np.array([0.1, 0.3, 0.2, 0.4])
    result = compare(gaps, np.zeros(4), range(4), margin=0.5)
    assert result.p_value == pytest.approx(stats.ttest_1samp(gaps, 0).pvalue)
    upper = stats.ttest_1samp(gaps, 0.5, alternative="less").pvalue
    lower = stats.ttest_1samp(gaps, -0.5, alternative="greater").pvalue
    assert result.equivalence_p_value == pytest.approx(max(upper, lower))
    nothing = compare(np.ones(4), np.ones(4), range(4), margin=0.1)
    assert (nothing.p_value, nothing.equivalence_p_value, nothing.equivalent) == (1.0, 0.0, True)


@pytest.mark.parametrize("prompts", [30, 200])
def test_a_difference_on_the_scale_of_redrawing(prompts):
    scale = np.random.default_rng(6).uniform(0.3, 0.5, prompts)
    result = compare(0.3 * scale, 0.1 * scale, range(prompts), margin=0.3, scale=scale)
    assert (result.difference.mean, result.difference.low, result.difference.high) == pytest.approx((0.2, 0.2, 0.2))
    assert result.equivalent
    # One prompt more that differs by all of redrawing: what n prompts cannot exclude.
    assert result.inner[1] == pytest.approx(0.2 + 0.8 * (1 + stats.t.ppf(0.95, prompts)) / (prompts + 1), abs=0.003)
    assert not compare(0.3 * scale, 0.1 * scale, range(prompts), margin=0.205, scale=scale).equivalent


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [30, 200])
def test_the_equivalence_test_errs_as_rarely_as_it_claims(prompts):
    """With the true difference on the margin, equivalence is claimed in at most some 5 % of the rounds."""
    generator = np.random.default_rng(8)
    claimed = 0
    for _ in range(400):
        base = generator.lognormal(-2, 0.5, prompts)
        result = compare(base + 0.05 + generator.normal(0, 0.1, prompts), base, range(prompts), 0.05, resamples=400)
        claimed += result.equivalent
    assert claimed / 400 <= 0.08


def test_holm_known_answers():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_wilson_known_answers():
    # Closed form at the ends: z^2 / (n + z^2).
    z2 = stats.norm.ppf(0.975) ** 2
    none, all_, some = wilson(0, 40), wilson(40, 40), wilson(1, 10)
    assert (none.mean, none.low) == (0, 0)
    assert none.high == pytest.approx(z2 / (40 + z2))
    assert (all_.mean, all_.high) == (1, 1)
    assert all_.low == pytest.approx(1 - z2 / (40 + z2))
    assert (some.mean, some.low, some.high) == pytest.approx((0.1, 0.017876, 0.404150), abs=1e-6)


def test_quantiles_known_answers():
    assert quantiles(np.arange(101)) == {"q50": 50, "q90": 90, "q95": 95, "q99": 99}


PROMPTS = [f"prompt {index % 60}" for index in range(180)]
VALUES = np.random.default_rng(5).lognormal(-2, 1, 180)


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(180)))
def test_order_of_rows_changes_no_bit(order):
    shuffled, prompts = VALUES[order], [PROMPTS[index] for index in order]
    assert clustered_mean(shuffled, prompts, resamples=200) == clustered_mean(VALUES, PROMPTS, resamples=200)
    ceiling = retention(VALUES, PROMPTS, 9 * VALUES, PROMPTS)
    assert retention(shuffled, prompts, 9 * VALUES, PROMPTS) == ceiling


def test_seed_decides_the_interval():
    first = clustered_mean(VALUES, PROMPTS, resamples=500)
    assert first == clustered_mean(VALUES, PROMPTS, resamples=500)
    other = clustered_mean(VALUES, PROMPTS, resamples=500, seed=1)
    assert other.mean == first.mean
    assert (other.low, other.high) != (first.low, first.high)


def test_chunks_change_nothing_but_rounding(monkeypatch):
    whole = clustered_mean(VALUES, PROMPTS, resamples=500)
    monkeypatch.setattr("fastunlearn.metrics.intervals._CHUNK_ELEMENTS", 60 * 7)
    chunked = clustered_mean(VALUES, PROMPTS, resamples=500)
    assert (chunked.low, chunked.high) == pytest.approx((whole.low, whole.high), rel=1e-12)


def test_higher_level_is_wider():
    narrow, wide = (clustered_mean(VALUES, PROMPTS, level=level, resamples=2000) for level in (0.8, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


NAN = float("nan")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: clustered_mean([], []), "non-empty"),
        (lambda: clustered_mean([[1.0]], [["a"]]), "shape"),
        (lambda: clustered_mean([1, NAN], ["a", "b"]), "1 NaN or infinite of 2"),
        (lambda: clustered_mean([1, float("inf")], ["a", "b"]), "1 NaN or infinite of 2"),
        (lambda: clustered_mean([1, 2], ["a"]), "one length"),
        (lambda: clustered_mean([1, 2], [0.5, 1.5]), "strings or integers"),
        (lambda: clustered_mean([1, 2], ["a", "a"]), "at least 2 prompts, got 1"),
        (lambda: clustered_mean([1, 2], ["a", "b"], level=95), "level must lie between 0 and 1, got 95"),
        (lambda: clustered_mean([1, 2], ["a", "b"], resamples=0), "resamples must be at least 1"),
        (lambda: retention([1, 2], ["a", "b"], [3, 4], ["a", "c"]), "2 are in one of them only"),
        (lambda: retention([1, 2], [1, 2], [3, 4], ["1", "2"]), "same type"),
        (lambda: retention([1, 2], ["a", "b"], [0, 0], ["a", "b"]), "ceiling must be above the floor"),
        (lambda: retention([1, 2], ["a", "b"], [1, 1], ["a", "b"], floor=1.0), "ceiling must be above the floor"),
        (lambda: retention([1, 2], ["a", "b"], [3, 4], ["a", "b"], floor=NAN), "finite"),
        (lambda: retention([1, 2], ["a", "b"], [3], ["a"]), "1 are in one of them only"),
        (lambda: difference([1, 2], [1], ["a", "b"]), "got 2 and 1 values"),
        (lambda: difference([1, NAN], [1, 2], ["a", "b"]), "values_a must be finite"),
        (lambda: compare([1, 2], [1], ["a", "b"], 0.1), "got 2 and 1 values"),
        (lambda: compare([1, 2], [1, 2], ["a", "b"], 0.0), "margin must be a number above 0"),
        (lambda: compare([1, 2], [1, 2], ["a", "b"], NAN), "margin must be a number above 0"),
        (lambda: compare([1, 2], [1, 2], ["a", "b"], 1, scale=[0, 0]), "mean scale must be above 0"),
        (lambda: compare([1, 2], [1, 2], ["a", "a"], 1), "at least 2 prompts, got 1"),
        (lambda: retention([1, 2], ["a", "b"], [3, 4], ["a", "b"], floor=[0.1]), "one length"),
        (lambda: wilson(5, 4), "successes=5, n=4"),
        (lambda: wilson(0, 0), "n >= 1"),
        (lambda: wilson(-1, 4), "successes=-1"),
        (lambda: quantiles([]), "non-empty"),
        (lambda: quantiles([NAN]), "1 NaN"),
    ],
)
def test_bad_input_says_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_unreliable_ceiling_is_refused():
    ceiling = np.zeros(60)
    ceiling[0] = 1  # redrawing changes one prompt of sixty
    with pytest.raises(ValueError, match="not reliably above the floor"):
        retention(np.zeros(60), range(60), ceiling, range(60))


def test_estimate_is_frozen():
    with pytest.raises(AttributeError):
        Estimate(0, 0, 0, 1, 1, "").mean = 1
