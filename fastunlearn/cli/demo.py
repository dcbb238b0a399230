"""The demonstration: forget one concept of the bundled model in several ways and show them side by side.

Each method is an ordinary run in a folder of its own; all are evaluated in one pass on the same prompts and noise.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ..config import DEMO_METHODS as METHODS
from ..config import DemoConfig, TrainConfig
from ..evaluation.evaluator import evaluate_models, shapes_groups
from ..evaluation.results import EvaluationReport, write_results
from ..files.run_folder import prepare_output, write_json
from ..metrics.lpips import load_perceptual
from ..models.generate import SamplerSpec
from ..models.loading import load_model
from ..training.unlearn import Reporter, describe_run, unlearn

CONCEPT = "star"


def demo(config: DemoConfig, reporter: Reporter | None = None) -> list[dict[str, Any]]:
    """Run the demonstration and return the content of each method's evaluation.json, in order."""
    reporter = reporter or Reporter()
    folder = Path(config.output)
    started = time.monotonic()
    prepare_output(folder, overwrite=config.overwrite)
    runs = {
        method: TrainConfig(
            forget=CONCEPT, method=method, output=str(folder / method), seed=config.seed, evaluation_prompts="none"
        )
        for method in METHODS
    }
    for run in runs.values():
        unlearn(run, reporter)
    reporter.stage("evaluation")
    groups = shapes_groups(CONCEPT)
    results = evaluate_models(
        load_model("shapes"),
        {method: load_model(str(folder / method / "model")) for method in METHODS},
        groups,
        load_perceptual("shapes"),
        SamplerSpec(),
        placebo="placebo",
        describe={method: describe_run(run) for method, run in runs.items()},
        on_progress=reporter.scoring,
    )
    write_results(folder, EvaluationReport(results, groups, placebo="placebo", unseen=True))
    summaries = [result.summary for result in results.results]
    write_json(folder / "demo.json", {"seconds": round(time.monotonic() - started, 1), "evaluations": summaries})
    return summaries
