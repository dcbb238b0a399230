"""benchmarks/metrics_power.py: harmless trainings are rarely taken for damage, and damage is seen."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

PATH = Path(__file__).parents[1] / "benchmarks" / "metrics_power.py"


@pytest.fixture(scope="module")
def metrics_power():
    spec = importlib.util.spec_from_file_location("metrics_power", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def values(chance, means, spread):
    """A statistic's resamples (models, R): every model's own mean, and what the prompts add to all models alike."""
    prompts = chance.normal(0, 0.2, 200)
    return np.asarray(means)[:, None] + prompts + chance.normal(0, spread, (len(means), 200))


def test_a_harmless_training_is_taken_for_damage_as_often_as_the_level_says(metrics_power):
    """Over 300 sets of six trainings, which differ by more than their prompts do."""
    chance = np.random.default_rng(0)
    errors = []
    for _ in range(300):
        _, left_out = metrics_power.resampled(40, 2)
        errors.append(metrics_power.limits(values(chance, chance.normal(1, 0.1, 6), 0.01), left_out)[1])
    assert np.mean(errors) == pytest.approx(1 - metrics_power.LEVEL, abs=0.02)


def test_damage_is_seen_and_what_is_harmless_is_not(metrics_power):
    chance = np.random.default_rng(1)
    _, left_out = metrics_power.resampled(40, 2)
    everything = values(chance, [0.9, 1.0, 1.1, 0.95, 1.05, 1.0, 1.0, 2.0], 0.01)
    limit, _ = metrics_power.limits(everything[:6], left_out)
    assert metrics_power.power(everything[6], limit) < 0.2
    assert metrics_power.power(everything[7], limit) == 1


def test_an_image_comes_with_its_other_draws(metrics_power):
    draws, left_out = metrics_power.resampled(5, 3)
    assert draws.shape == (metrics_power.RESAMPLES, 15)
    assert (draws % 5 == np.tile(draws[:, :5], 3)).all()
    assert (np.sort(draws // 5, axis=1) == np.repeat([0, 1, 2], 5)).all()
    assert left_out.min() >= 0
    assert left_out.max() < 1
