"""Do correlated rows hurt?  The same training with rows from few and from many trajectories, judged by the evaluator.

200 rows per role in batches of 8.  The reference takes every row from a trajectory of its own, as the usual loop does.

    python benchmarks/bank_quality.py --output benchmarks/results/bank_quality.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastunlearn.evaluation.evaluator import evaluate_models
from fastunlearn.evaluation.plan import world_groups
from fastunlearn.files.atomic import write_json
from fastunlearn.methods import get_method
from fastunlearn.methods.recipe import Recipe
from fastunlearn.metrics.distances import load_perceptual
from fastunlearn.metrics.statistics import difference
from fastunlearn.models.loading import load_model
from fastunlearn.models.sampling import SamplerSpec
from fastunlearn.progress import Reporter
from fastunlearn.training.bank import build_bank
from fastunlearn.training.config import TrainConfig
from fastunlearn.training.fit import fit
from fastunlearn.training.plan import plan_training
from fastunlearn.worlds.shapes import SHAPES_WORLD

ROWS, BATCH_SIZE = 200, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--methods", default="esd,ovw")
    parser.add_argument("--trajectories", default="4,8,16,50")
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    results = {
        method: compare(method, [int(n) for n in args.trajectories.split(",")], args.seeds)
        for method in args.methods.split(",")
    }
    write_json(args.output, {"threads": torch.get_num_threads(), "torch": torch.__version__, "methods": results})
    print(json.dumps(results, indent=1))


def compare(method: str, trajectories: list[int], seeds: int) -> list[dict]:
    """One row a number of trajectories, ``fresh`` first, over ``seeds`` training seeds on the same evaluation pairs."""
    with tempfile.TemporaryDirectory() as scratch:
        models = {}
        counts: list[int | str] = ["fresh", *trajectories]
        for seed, count in itertools.product(range(seeds), counts):
            name = f"{count}-{seed}"
            train_one(method, count, seed, Path(scratch) / name)
            models[name] = load_model(str(Path(scratch) / name / "model"), "cpu")
        found = evaluate_models(
            load_model("shapes", "cpu"),
            models,
            world_groups(SHAPES_WORLD, "star"),
            load_perceptual("shapes", "cpu"),
            SamplerSpec(),
        )
    by_name = {result.name: result for result in found.results}
    rows = []
    for count in counts:
        group = [by_name[f"{count}-{seed}"] for seed in range(seeds)]
        row: dict[str, Any] = {
            "trajectories": count,
            "shown": float(np.mean([r.evaluation.erasure.shown for r in group if r.evaluation.erasure])),
            "valid": float(np.mean([r.evaluation.erasure.valid for r in group if r.evaluation.erasure])),
            "retention": [round(r.evaluation.integrity.retention, 4) for r in group],
            "retention_ci95": [r.evaluation.integrity.retention_ci95 for r in group],
            "distance": float(np.mean([r.evaluation.integrity.mean for r in group])),
        }
        if count != "fresh":
            ours, theirs = (
                [
                    pair
                    for seed in range(seeds)
                    for pair in by_name[f"{which}-{seed}"].pairs
                    if pair["group"] == "retain"
                ]
                for which in (count, "fresh")
            )
            gap = difference(
                [pair["distance"] for pair in ours],
                [pair["distance"] for pair in theirs],
                [pair["prompt"] for pair in ours],
            )
            row["distance_minus_fresh"] = {"mean": gap.mean, "ci95": [gap.low, gap.high]}
        rows.append(row)
    return rows


def train_one(method: str, trajectories: int | str, seed: int, folder: Path) -> None:
    """Train with a bank of so many trajectories per role; ``fresh`` gives every row of the run its own trajectory."""
    folder.mkdir()
    model = load_model("shapes", "cpu")
    count = ROWS if trajectories == "fresh" else int(trajectories)
    config = TrainConfig(
        forget="star",
        method=method,
        output=str(folder),
        seed=seed,
        steps=ROWS // BATCH_SIZE,
        micro_batch_size=BATCH_SIZE,
        trajectories=count,
        trajectory_steps=50,
        stop_residual=0.0,  # the same rows for every bank
        checkpoint_every=0,
    )
    plan = plan_training(config, get_method(method), model)
    assert isinstance(plan.recipe, Recipe)
    bank = build_bank(model, plan.recipe, plan.bank)
    if trajectories == "fresh":
        for role, kept in bank.role_rows.items():
            # One point of each trajectory, at a step drawn at random.
            points = kept.view(-1, plan.bank.points)
            draws = torch.randint(points.shape[1], (len(points),), generator=torch.Generator().manual_seed(seed))
            bank.role_rows[role] = points[torch.arange(len(points)), draws]
    fit(model, plan, bank, None, plan.selection, config, folder, Reporter())


if __name__ == "__main__":
    main()
