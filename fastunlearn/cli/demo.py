"""The demonstration: forget one concept of the bundled model in several ways and show them side by side.

Each method is an ordinary run in a folder of its own; all are evaluated in one pass on the same prompts and noise.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import at_least, expand_home, setting
from ..progress import Reporter

if TYPE_CHECKING:
    from ..schema import Demo

CONCEPT = "star"
METHODS = ("esd", "ovw", "uce", "placebo")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What `demo` does: forget "star" in three ways, beside a control, and show them side by side."""

    output: str = setting("folder of the runs and the report", "demo", path=True)
    judge: str | None = setting(
        "who says whether an image shows a star: NAME or NAME:OPTION; default: the bundled model's", None
    )
    seed: int = setting("of trajectories and row order", 0)
    overwrite: bool = setting("replace an earlier demo", False)

    def __post_init__(self) -> None:
        expand_home(self)
        at_least(self, 0, "seed")


def demo(config: DemoConfig, reporter: Reporter | None = None) -> Demo:
    """Run the demonstration and return what it found."""
    from ..evaluation.cards import write_card
    from ..evaluation.compare import comparison, read_run
    from ..evaluation.evaluator import evaluate_models
    from ..evaluation.plan import world_groups
    from ..evaluation.results import EvaluationReport, write_results
    from ..files.run_folder import check_output, claimed, own, prepare_output
    from ..judges import check_concept, load_judge
    from ..metrics.distances import load_perceptual
    from ..models.loading import load_model
    from ..models.sampling import SamplerSpec
    from ..schema import Demo, RunRecord
    from ..training.conclude import describe_run
    from ..training.config import TrainConfig
    from ..training.unlearn import unlearn

    reporter = reporter or Reporter()
    folder = Path(config.output).expanduser()
    started = time.monotonic()
    check_output(folder, "demo", overwrite=config.overwrite)
    judge = load_judge(config.judge) if config.judge is not None else None
    if judge is not None:
        check_concept(judge, CONCEPT)
    with claimed(folder):
        prepare_output(folder, "demo", overwrite=config.overwrite)
        own(folder, "demo", [f"{method}/{file}" for method in METHODS for file in ("pairs.jsonl", "evaluation.json")])
        runs = {
            method: TrainConfig(
                forget=CONCEPT, method=method, output=str(folder / method), seed=config.seed, evaluation_prompts="none"
            )
            for method in METHODS
        }
        for run in runs.values():
            unlearn(run, reporter=reporter)
        reporter.stage("evaluation")
        original = load_model("shapes")
        assert original.world is not None
        groups = world_groups(original.world, CONCEPT)
        result = evaluate_models(
            original,
            {method: load_model(str(folder / method / "model")) for method in METHODS},
            groups,
            load_perceptual("shapes"),
            SamplerSpec(),
            placebo="placebo",
            judge=judge,
            describe={method: describe_run(run, [CONCEPT]) for method, run in runs.items()},
            on_progress=reporter.scoring,
        )
        write_results(folder, EvaluationReport(result, groups, placebo="placebo", unseen=True))
        evaluations = [model.evaluation for model in result.results]
        for one in evaluations:
            write_card(folder / one.name, RunRecord.read(folder / one.name / "run.json"), one)
        seconds = round(time.monotonic() - started, 1)
        compared = comparison([read_run(folder / method) for method in METHODS if method != "placebo"]).comparisons[0]
        found = Demo(seconds=seconds, evaluations=tuple(evaluations), comparison=compared)
        found.write(folder / "demo.json")
    return found
