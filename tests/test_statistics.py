"""Known answers, coverage where prompts cluster, independence of row order, and errors that say what to do."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fastunlearn.metrics import statistics
from fastunlearn.metrics.statistics import (
    Estimate,
    clustered_mean,
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
        ends = [statistics._t_interval(column.mean(), column - column.mean(), 0.95) for column in means.T]
        low, high = np.array(ends).T
    else:
        replicates = statistics._bootstrap(means, resamples, 0)
        low, high = np.quantile(replicates, [0.025, 0.975], axis=0)
    flat = values.reshape(-1, rounds)
    half_width = 1.96 * flat.std(axis=0, ddof=1) / np.sqrt(len(flat))
    naive = np.abs(flat.mean(axis=0) - TRUE_MEAN) <= half_width
    return float(((low <= TRUE_MEAN) & (high >= TRUE_MEAN)).mean()), float(naive.mean())


def test_the_simulation_asks_what_users_ask():
    """One round by the public function gives the interval that the columns give."""
    values = simulated(60, 4, np.random.default_rng(1))
    estimate = clustered_mean(values.ravel(), np.repeat(np.arange(60), 4), resamples=500)
    replicates = statistics._bootstrap(np.stack([values.mean(axis=1)] * 2, axis=1), 500, 0)
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


def test_the_ratios_interval_covers_the_retention():
    """Numerator and denominator vary together with the prompt, as images do."""
    generator = np.random.default_rng(3)
    covered, rounds = 0, 300
    truth = 1 - TRUE_MEAN / (5 * TRUE_MEAN)
    for _ in range(rounds):
        distances = simulated(200, 2, generator)
        ceiling = 4 * distances.mean(axis=1, keepdims=True) + simulated(200, 2, generator)
        clusters = np.repeat(np.arange(200), 2)
        estimate = retention(distances.ravel(), clusters, ceiling.ravel(), clusters, resamples=300)
        covered += estimate.low <= truth <= estimate.high
    assert 0.91 <= covered / rounds <= 0.985


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

    assert score(np.zeros(prompts)).mean == 1
    # A distance that is the same share of the ceiling on every prompt leaves nothing to be unsure about.
    third = score(ceiling / 4)
    assert (third.mean, third.low, third.high) == pytest.approx((0.75, 0.75, 0.75))
    assert score(ceiling).mean == pytest.approx(0)
    assert score(2 * ceiling).mean == pytest.approx(-1)
    assert score(np.full(prompts, 0.1), floor=0.1).mean == pytest.approx(1)
    # Ratio of means, not mean of ratios.
    spread = score(np.full(prompts, 0.1))
    assert spread.mean == pytest.approx(1 - 0.1 / 0.4)
    assert spread.low < spread.mean < spread.high


@pytest.mark.parametrize("prompts", [49, 50])
def test_retention_intervals_agree_across_the_switch(prompts):
    generator = np.random.default_rng(3)
    ceiling = generator.uniform(0.3, 0.5, prompts)
    distances = ceiling * generator.uniform(0.02, 0.1, prompts)
    estimate = retention(distances, range(prompts), ceiling, range(prompts))
    assert ("bootstrap" in estimate.method) == (prompts == 50)
    effects = (1 - estimate.mean) * ceiling - distances
    half_width = 1.96 * effects.std() / np.sqrt(prompts) / ceiling.mean()
    assert estimate.high - estimate.low == pytest.approx(2 * half_width, rel=0.1)


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


def test_a_floor_measured_pair_by_pair_is_resampled_with_the_rest():
    clusters = np.arange(60)
    floor = np.linspace(0, 0.2, 60)
    ceiling = floor + 0.5
    # The same share of the span above the floor on every prompt: certain, however the floor varies.
    estimate = retention(floor + 0.125, clusters, ceiling, clusters, floor)
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((0.75, 0.75, 0.75))
    constant = retention(floor + 0.125, clusters, ceiling, clusters, float(floor.mean()))
    assert constant.mean == pytest.approx(0.75)
    assert constant.high - constant.low > 0.01


def test_below_the_floor_everything_is_kept():
    for prompts in (10, 60):
        estimate = retention(np.full(prompts, 0.01), np.arange(prompts), np.ones(prompts), np.arange(prompts), 0.02)
        assert (estimate.mean, estimate.low, estimate.high) == (1, 1, 1)


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
    result = compare(0.3 * scale, 0.1 * scale, range(prompts), margin=0.25, scale=scale)
    assert (result.difference.mean, result.difference.low, result.difference.high) == pytest.approx((0.2, 0.2, 0.2))
    assert result.equivalent


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
    ceiling = retention(VALUES, PROMPTS, 9 * VALUES, PROMPTS, resamples=200)
    assert retention(shuffled, prompts, 9 * VALUES, PROMPTS, resamples=200) == ceiling


def test_seed_decides_the_interval():
    first = clustered_mean(VALUES, PROMPTS, resamples=500)
    assert first == clustered_mean(VALUES, PROMPTS, resamples=500)
    other = clustered_mean(VALUES, PROMPTS, resamples=500, seed=1)
    assert other.mean == first.mean
    assert (other.low, other.high) != (first.low, first.high)


def test_chunks_change_nothing_but_rounding(monkeypatch):
    whole = clustered_mean(VALUES, PROMPTS, resamples=500)
    monkeypatch.setattr("fastunlearn.metrics.statistics._CHUNK_ELEMENTS", 60 * 7)
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
    ceiling[0] = 1  # redrawing changes one prompt of sixty: many resamples miss it
    with pytest.raises(ValueError, match="not reliably above the floor"):
        retention(np.zeros(60), range(60), ceiling, range(60))


def test_estimate_is_frozen():
    with pytest.raises(AttributeError):
        Estimate(0, 0, 0, 1, 1, "").mean = 1
