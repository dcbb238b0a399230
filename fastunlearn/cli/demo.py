"""The demonstration: forget one concept of the bundled model in several ways and show them side by side.

Each method is an ordinary run in a folder of its own; all are evaluated in one pass on the same prompts and noise.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import at_least, expand_home, setting
from ..errors import UserError
from ..progress import Reporter

if TYPE_CHECKING:
    from ..schema import Demo

CONTROL = "placebo"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What `demo` does: forget one concept of a bundled model in several ways and show them side by side."""

    output: str = setting("folder of the runs and the report", "demo", path=True)
    model: str = setting("a bundled model: `shapes` or `gallery`", "shapes")
    forget: str | None = setting("a word that the model knows; default: star, of the gallery the style twemoji", None)
    methods: str | None = setting(
        "two methods or more, by commas; a placebo goes with them; default: esd,uce,ovw; the gallery has others", None
    )
    judge: str | None = setting(
        "who says whether an image shows the concept: NAME or NAME:OPTION; default: the bundled model's", None
    )
    seed: int = setting("of trajectories and row order", 0)
    overwrite: bool = setting("replace an earlier demo", False)

    def __post_init__(self) -> None:
        expand_home(self)
        at_least(self, 0, "seed")

    def compared(self, usual: Sequence[str]) -> tuple[str, ...]:
        """The methods, each once, in order; ``usual``: where none is chosen.

        Raises UserError for fewer than two and for unknown ones.
        """
        from ..methods import get_method

        if self.methods is None:
            return tuple(usual)
        names = dict.fromkeys(name.strip() for name in self.methods.split(",") if name.strip())
        names.pop(CONTROL, None)
        if len(names) < 2:
            raise UserError(f"`--methods {self.methods}`: a demonstration compares two or more. Use `esd,ovw`.")
        return tuple(get_method(name).name for name in names)


def demo(config: DemoConfig, reporter: Reporter | None = None) -> Demo:
    """Run the demonstration and return what it found."""
    from ..evaluation.cards import write_card
    from ..evaluation.compare import comparison, read_run
    from ..evaluation.evaluator import evaluate_models
    from ..evaluation.plan import world_groups
    from ..evaluation.results import EvaluationReport, write_results
    from ..files.run_folder import check_output, claimed, own, prepare_output
    from ..judges import check_concept, load_judge
    from ..metrics.distances import default_distance, load_perceptual
    from ..models.loading import load_model
    from ..models.sampling import SamplerSpec
    from ..schema import Demo, RunRecord
    from ..training.conclude import describe_run
    from ..training.config import TrainConfig
    from ..training.unlearn import unlearn
    from ..worlds import check_installed, world_with_model

    reporter = reporter or Reporter()
    folder = Path(config.output).expanduser()
    started = time.monotonic()
    check_output(folder, "demo", overwrite=config.overwrite)
    world = world_with_model(config.model)
    if world is None:
        check_installed(config.model)
        raise UserError(f"`--model {config.model}` is no bundled model. For others there are `train` and `evaluate`.")
    compared_methods = config.compared(world.demo_methods)
    methods = (*compared_methods, CONTROL)
    concept = world.find(config.forget or world.default_concept)[1]
    judge = load_judge(config.judge) if config.judge is not None else None
    if judge is not None:
        check_concept(judge, concept)
    with claimed(folder):
        prepare_output(folder, "demo", overwrite=config.overwrite)
        own(folder, "demo", [f"{method}/{file}" for method in methods for file in ("pairs.jsonl", "evaluation.json")])
        runs = {
            method: TrainConfig(
                model=config.model,
                forget=concept,
                method=method,
                output=str(folder / method),
                seed=config.seed,
                evaluation_prompts="none",
            )
            for method in methods
        }
        seen: set[str] = set()
        for run in runs.values():
            seen |= unlearn(run, reporter=reporter).prompts
        reporter.stage("evaluation")
        original = load_model(config.model)
        groups = world_groups(world, concept)
        result = evaluate_models(
            original,
            {method: load_model(str(folder / method / "model")) for method in methods},
            groups,
            load_perceptual(default_distance(world)),
            SamplerSpec(),
            placebo=CONTROL,
            judge=judge,
            describe={method: describe_run(run, [concept]) for method, run in runs.items()},
            on_progress=reporter.scoring,
        )
        write_results(folder, EvaluationReport(result, groups, placebo=CONTROL, seen=seen & set(groups.retain)))
        evaluations = [model.evaluation for model in result.results]
        for one in evaluations:
            write_card(folder / one.name, RunRecord.read(folder / one.name / "run.json"), one)
        seconds = round(time.monotonic() - started, 1)
        compared = comparison([read_run(folder / method) for method in compared_methods]).comparisons[0]
        found = Demo(seconds=seconds, evaluations=tuple(evaluations), comparison=compared)
        found.write(folder / "demo.json")
    return found
