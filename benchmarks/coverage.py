"""How often the intervals of R hold the true R, and how often an equivalence test errs, at few prompts and at many.

    python benchmarks/coverage.py --output benchmarks/results/coverage.json

Every round draws prompts from a population whose R is known, and asks :func:`fastunlearn.metrics.statistics.retention`
for an interval.  Some populations are drawn from distributions, the others from pairs that were measured: the 56
retain prompts of the bundled model, for models that forgot "star".  Into each, rare switches are mixed: prompts that
give another image altogether.  The interval was chosen on the populations marked ``chosen``, and not on the others.
Measured pairs are kept in the results file; ``--measure`` trains and evaluates the models once more.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastunlearn.files.atomic import write_json
from fastunlearn.metrics.intervals import BootstrapRatio, TRatio
from fastunlearn.metrics.statistics import compare, retention

RESULTS = Path(__file__).resolve().parent / "results" / "coverage.json"
PROMPTS, SWITCHES = (5, 10, 20, 35, 56, 112), (0.0, 0.01, 0.05, 0.1)
METHODS = ("esd", "ovw", "saddle")
MARGIN = 0.05

Float64s = npt.NDArray[np.float64]
#: (generator, prompts, share of switches) -> each prompt's mean distance and mean redrawn distance, (P,) both.
Sample = Callable[[np.random.Generator, int, float], tuple[Float64s, Float64s]]


@dataclasses.dataclass(frozen=True)
class Population:
    name: str
    chosen: bool  # whether the interval was chosen on it
    sample: Sample
    retention: Callable[[float], float]  # share of switches -> the true R


def synthetic(
    name: str, loss: float, bulk: str, *, chosen: bool = False, images: int = 1, beyond: float = 1.0
) -> Population:
    """Distances of mean ``loss`` times the redrawn ones, distributed as ``bulk`` says, ``images`` per prompt.

    ``beyond``: the distance of switched images, as a multiple of the redrawn distance.
    """
    ceiling, spread = 0.61, 0.15

    def redrawn(generator: np.random.Generator, prompt: Float64s) -> Float64s:
        return prompt * np.exp(generator.normal(-(spread**2) / 2, spread, (len(prompt), images)))

    def bulks(generator: np.random.Generator, count: int) -> Float64s:
        size = (count, images)
        if bulk == "gamma":
            return generator.gamma(1.0, 1.0, size)
        if bulk == "uniform":
            return generator.uniform(0, 2, size)
        sigma = float(bulk.removeprefix("lognormal "))
        # A bit more than a quarter of the variance is the prompt's.
        parts = generator.normal(0, sigma * 0.28**0.5, (count, 1)) + generator.normal(0, sigma * 0.72**0.5, size)
        return np.exp(parts - sigma**2 / 2)

    def sample(generator: np.random.Generator, count: int, switches: float) -> tuple[Float64s, Float64s]:
        prompt = generator.uniform(ceiling - 0.2, ceiling + 0.2, (count, 1))
        switched = generator.random((count, images)) < switches
        other = beyond * redrawn(generator, prompt)
        distances = np.where(switched, other, loss * ceiling * bulks(generator, count))
        return distances.mean(axis=1), redrawn(generator, prompt).mean(axis=1)

    return Population(name, chosen, sample, lambda p: 1 - ((1 - p) * loss + p * beyond))


def measured(name: str, distances: list[float], redrawn: list[float]) -> Population:
    """Prompts drawn with replacement from those measured; a switched one is redrawn."""
    pairs = np.array([distances, redrawn])

    def sample(generator: np.random.Generator, count: int, switches: float) -> tuple[Float64s, Float64s]:
        drawn, ceiling = pairs[:, generator.integers(pairs.shape[1], size=count)]
        return np.where(generator.random(count) < switches, ceiling, drawn), ceiling

    loss = pairs[0].mean() / pairs[1].mean()
    return Population(f"measured, {name}", False, sample, lambda p: float(1 - ((1 - p) * loss + p)))


def populations(pairs: dict[str, dict[str, list[float]]]) -> list[Population]:
    drawn = [
        synthetic("lognormal, R .95", 0.05, "lognormal 1.0", chosen=True),
        synthetic("lognormal, R .87", 0.13, "lognormal 0.7", chosen=True),
        synthetic("wide lognormal, R .90", 0.10, "lognormal 1.5", chosen=True),
        synthetic("uniform, R .99", 0.01, "uniform", chosen=True),
        synthetic("gamma, R .92", 0.08, "gamma"),
        synthetic("gamma, R .60", 0.40, "gamma"),
        synthetic("lognormal, R .95, 4 images", 0.05, "lognormal 1.0", images=4),
        synthetic("gamma, R .95, beyond redrawn", 0.05, "gamma", beyond=1.3),
    ]
    return drawn + [measured(name, one["distance"], one["redrawn"]) for name, one in pairs.items()]


def unbounded() -> Population:
    """What the interval does not claim to hold for: most of the loss in a tail far beyond redrawn images.

    A perceptual distance has no such tail, since it saturates near that of redrawn images.
    """
    return synthetic("lognormal, R .20", 0.80, "lognormal 1.0")


# ---- intervals -------------------------------------------------------------------------------------------------------


def ours(distances: Float64s, redrawn: Float64s) -> tuple[float, float]:
    clusters = np.arange(len(distances))
    estimate = retention(distances, clusters, redrawn, clusters)
    return estimate.low, estimate.high


def plain_t(distances: Float64s, redrawn: Float64s) -> tuple[float, float]:
    low, high = TRatio(distances, redrawn).interval(0.95)
    return 1 - high, 1 - low


def percentile(distances: Float64s, redrawn: Float64s) -> tuple[float, float]:
    low, high = BootstrapRatio(distances, redrawn, 1000, 0).interval(0.95)
    return 1 - high, 1 - low


def studentized(distances: Float64s, redrawn: Float64s) -> tuple[float, float]:
    """Bootstrap-t of the linearized ratio.  Source: Efron and Tibshirani (1993), section 12.5."""
    count, seen = len(distances), TRatio(distances, redrawn)
    weights = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), 1000) / count
    below = weights @ redrawn
    ratios = weights @ distances / below
    squares = weights @ np.stack([distances**2, distances * redrawn, redrawn**2], axis=1)
    variances = (
        squares @ [1, 0, 0] - 2 * ratios * (squares @ [0, 1, 0]) + ratios**2 * (squares @ [0, 0, 1])
    ) / below**2
    errors = np.sqrt(np.maximum(variances, 0) / (count - 1))
    certain = errors <= 1e-9 * seen.mean  # a resample of one prompt alone
    scores = np.where(certain, np.sign(ratios - seen.mean) * 1e9, (ratios - seen.mean) / np.where(certain, 1, errors))
    low, high = np.quantile(scores, [0.025, 0.975])
    return 1 - (seen.mean - low * seen.error), 1 - (seen.mean - high * seen.error)


WAYS = {"retention": ours, "t": plain_t, "percentile bootstrap": percentile, "bootstrap-t": studentized}


def cover(population: Population, prompts: int, switches: float, rounds: int, way: str = "retention") -> dict[str, Any]:
    """Shares of ``rounds`` in which the 95 % interval holds the true R, lies below it and above it; median width."""
    generator = np.random.default_rng(7)
    ends = np.array([WAYS[way](*population.sample(generator, prompts, switches)) for _ in range(rounds)])
    truth = population.retention(switches)
    below, above = float((ends[:, 1] < truth).mean()), float((ends[:, 0] > truth).mean())
    width = float(np.median(ends[:, 1] - ends[:, 0]))
    return {
        "held": round(1 - below - above, 4),
        "too_low": round(below, 4),
        "too_high": round(above, 4),
        "width": round(width, 4),
    }


# ---- equivalence -----------------------------------------------------------------------------------------------------


def claims(prompts: int, kind: str, rounds: int, *, on_redrawn: bool = True) -> float:
    """Share of ``rounds`` in which two models are called equivalent within 0.05 of R.

    ``kind``: ``equal`` models; one that loses the margin ``evenly``; one that redraws as many prompts (``switches``).
    ``on_redrawn``: the test as ``compare`` makes it; else without the redrawn distances, as plain TOST.
    """
    generator = np.random.default_rng(9)
    claimed = 0
    for _ in range(rounds):
        redrawn = generator.uniform(0.41, 0.81, prompts)
        gaps = generator.normal(0, 0.03, prompts)
        if kind == "evenly":
            gaps = gaps + MARGIN * redrawn
        if kind == "switches":
            gaps = np.where(generator.random(prompts) < MARGIN, redrawn, gaps)
        scale = redrawn if on_redrawn else None
        values = gaps if on_redrawn else gaps / redrawn.mean()
        one = compare(values, np.zeros(prompts), np.arange(prompts), MARGIN, scale=scale, resamples=1000)
        claimed += one.equivalent
    return round(claimed / rounds, 4)


# ---- the command -----------------------------------------------------------------------------------------------------


def measure() -> dict[str, dict[str, list[float]]]:
    """Distances of the retain pairs of freshly unlearned models, by the commands that users have."""
    with tempfile.TemporaryDirectory() as folder:

        def run(*words: str) -> None:
            subprocess.run([sys.executable, "-m", "fastunlearn", *words], check=True, stdout=subprocess.DEVNULL)

        for method in METHODS:
            run("train", "--forget", "star", "--method", method, "--output", f"{folder}/{method}")
        models = [f"--unlearned={folder}/{method}" for method in METHODS]
        run("evaluate", "--original", "shapes", *models, "--forget", "star", "--output", f"{folder}/evaluation")
        return {method: read_pairs(Path(folder, "evaluation", method)) for method in METHODS}


def read_pairs(folder: Path) -> dict[str, list[float]]:
    """Of an evaluation's folder: distance and redrawn distance of every pair that is to be kept."""
    lines = (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for line in lines if (record := json.loads(line)).get("redrawn") is not None]
    return {key: [round(record[key], 6) for record in records] for key in ("distance", "redrawn")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--measure", action="store_true", help="train and evaluate models for the measured pairs")
    parser.add_argument("--pairs", type=Path, nargs="+", help="folders of evaluated models to take the pairs from")
    args = parser.parse_args()
    started = time.monotonic()
    if args.pairs:
        pairs = {folder.name: read_pairs(folder) for folder in args.pairs}
    elif args.measure or not RESULTS.exists():
        pairs = measure()
    else:
        pairs = json.loads(RESULTS.read_text(encoding="utf-8"))["pairs"]
    rows = []
    for population in populations(pairs):
        for switches in SWITCHES:
            for prompts in PROMPTS:
                # The resampling ways cost a hundred times as much.
                results = {
                    way: cover(population, prompts, switches, args.rounds if way in ("retention", "t") else 300, way)
                    for way in (WAYS if prompts in (10, 20, 56) else ("retention", "t"))
                }
                rows.append(
                    {"population": population.name, "chosen": population.chosen, "switches": switches}
                    | {"prompts": prompts, "true_retention": round(population.retention(switches), 4)}
                    | results
                )
        print(f"{population.name}: done after {time.monotonic() - started:.0f} s", flush=True)
    tests = [
        {"prompts": prompts, "kind": kind}
        | {"claimed": claims(prompts, kind, args.rounds), "plain_tost": claims(prompts, kind, 300, on_redrawn=False)}
        for kind in ("equal", "evenly", "switches")
        for prompts in (10, 20, 30, 56, 80, 112, 200)
    ]
    beyond = [
        {"population": unbounded().name, "prompts": prompts}
        | {way: cover(unbounded(), prompts, 0.0, args.rounds, way) for way in ("retention", "t")}
        for prompts in (10, 20, 56, 112)
    ]
    content = {
        "level": 0.95,
        "rounds": args.rounds,
        "rounds_of_resampling_ways": 300,
        "least": least(rows),
        "retention": rows,
        "unbounded": beyond,
        "equivalence": {"margin": MARGIN, "tests": tests},
        "pairs": pairs,
    }
    write_json(args.output, content)
    for row in content["least"]:
        print(row)


def least(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The smallest coverage over populations, by number of prompts and share of switches."""
    result = []
    for prompts in PROMPTS:
        for switches in SWITCHES:
            cells = [row for row in rows if (row["prompts"], row["switches"]) == (prompts, switches)]
            ways = {way: min(cell[way]["held"] for cell in cells) for way in WAYS if way in cells[0]}
            unseen = min(cell["retention"]["held"] for cell in cells if not cell["chosen"])
            result.append({"prompts": prompts, "switches": switches} | ways | {"retention_not_chosen_on": unseen})
    return result


if __name__ == "__main__":
    main()
