"""What follows a training: the run's record, and its evaluation.  The one place where training calls evaluation."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..concepts import read_concepts, title
from ..errors import UserError
from ..evaluation.cards import write_card
from ..evaluation.evaluator import evaluate_models
from ..evaluation.plan import default_metric, file_groups, world_groups
from ..evaluation.results import EvaluationReport, write_results
from ..files.weights import hash_adapted, hash_pipeline
from ..judges import Judge, check_concept, load_judge
from ..methods import get_method
from ..metrics.distances import Distance, load_perceptual
from ..models.base import Model
from ..models.loading import load_frozen
from ..models.placement import Placement
from ..models.runtime import versions
from ..models.sampling import SamplerSpec
from ..progress import Reporter
from ..prompts import PromptGroups
from ..schema import AdapterRecord, Ancestor, Ending, RunRecord
from ..worlds import get_world, world_with_model
from .config import TrainConfig
from .export import apply_delta
from .plan import TrainPlan


@dataclasses.dataclass(frozen=True)
class Scoring:
    """What a run is evaluated on, and by which distance."""

    groups: PromptGroups
    metric: Distance
    judge: Judge | None = None

    @classmethod
    def of(cls, config: TrainConfig, model: Model) -> Scoring | None:
        """As the settings say, None where they want no evaluation.  Raises UserError for prompts that do not do."""
        groups = _evaluation_groups(config, model)
        if groups is None:
            if config.judge is not None:
                raise UserError("`--judge` judges the evaluation: give `--evaluation-prompts` FILE too.")
            return None
        judge = load_judge(config.judge, model.device) if config.judge is not None else None
        if judge is not None:
            for concept in groups.concepts:
                check_concept(judge, concept)
        return cls(groups, load_perceptual(default_metric(model), model.device), judge)


@dataclasses.dataclass(frozen=True)
class Work:
    """What a run did, for its record.

    ``original``: the hash of the files that its model was read from, and ``ancestors`` the runs that these are the
    result of.  ``ending``: how the training ended; None for an edit, of which ``facts`` are.
    """

    original: str
    ancestors: tuple[Ancestor, ...]
    seconds: Mapping[str, float]
    ending: Ending | None
    facts: Mapping[str, float]


def conclude(
    config: TrainConfig,
    plan: TrainPlan,
    model: Model,
    exported: Path,
    work: Work,
    scoring: Scoring | None,
    reporter: Reporter,
) -> RunRecord:
    """Write run.json and the card beside what was exported, and, with ``scoring``, the evaluation: the record."""
    folder, unlearned, evaluation = exported.parent, exported, None
    with contextlib.ExitStack() as scratch:
        if config.save == "delta":
            unlearned = Path(scratch.enter_context(tempfile.TemporaryDirectory()))
            apply_delta(model.source, exported, unlearned)
        if plan.adapter is None:
            hashes = {"original": work.original, "unlearned": hash_pipeline(unlearned)}
        else:
            hashes = {"original": work.original, "unlearned": hash_adapted(work.original, [exported])}
            unlearned = folder
        record = _run_record(config, plan, model, hashes, work)
        record.write(folder / "run.json")
        if scoring is not None:
            reporter.stage("evaluation")
            # The original is loaded afresh: the model in memory had changed, and is gone.
            placement = Placement.of(config.weights_dtype, model.device, offload=config.offload)
            base, changed = (
                load_frozen(str(path), model.device, model.options, placement=placement)
                for path in (model.source, unlearned)
            )
            base.name = model.name
            spec = SamplerSpec(
                micro_batch_size=config.evaluation_batch_size,
                mixed_precision=config.mixed_precision,
                decode_batch_size=config.decode_batch_size,
            )
            result = evaluate_models(
                base,
                {config.method: changed},
                scoring.groups,
                scoring.metric,
                spec,
                judge=scoring.judge,
                describe={config.method: describe_run(config, plan.concept.concepts) | {"model": model.name}},
                on_progress=reporter.scoring,
            )
            seen = plan.prompts() & set(scoring.groups.retain)
            write_results(folder, EvaluationReport(result, scoring.groups, seen=seen))
            evaluation = result.results[0].evaluation
    write_card(folder, record, evaluation)
    return record


def _evaluation_groups(config: TrainConfig, model: Model) -> PromptGroups | None:
    choice = config.evaluation_prompts or (model.world.name if model.world else "none")
    if choice == "none":
        return None
    words = [one.concept for one in read_concepts(config.forget)]
    if (world := get_world(choice)) is None:
        return file_groups(choice, words if model.world or config.judge else None)
    if world is not model.world:
        raise UserError(f"`--evaluation-prompts {choice}` are the bundled model's. Give a prompt file, or none.")
    return world_groups(world, words)


def _run_record(config: TrainConfig, plan: TrainPlan, model: Model, hashes: dict[str, str], work: Work) -> RunRecord:
    return RunRecord(
        **(describe_run(config, plan.concept.concepts) | {"model": model.name}),
        versions=versions(),
        device=model.device.type,
        threads=torch.get_num_threads(),
        hashes=hashes,
        trainable_parameters=plan.trainable_parameters,
        total_parameters=plan.total_parameters,
        rows=plan.bank.rows,
        unet_evaluations={"bank": plan.search_evaluations + plan.bank.unet_evaluations, "loop": plan.loop_evaluations},
        seconds=dict(work.seconds),
        ending=work.ending,
        edit=dict(work.facts),
        concepts=plan.concept.concepts,
        ancestors=work.ancestors,
        adapter=_adapter_record(config, plan, model),
    )


def _adapter_record(config: TrainConfig, plan: TrainPlan, model: Model) -> AdapterRecord | None:
    if plan.adapter is None:
        return None
    adapter = plan.adapter.adapter
    given = Path(config.model).expanduser()
    if world_with_model(config.model) is not None:
        base = config.model
    else:
        base = str(given.resolve() if given.is_file() else model.source)
    parts = None if config.parts is None else str(Path(config.parts).expanduser().resolve())
    return AdapterRecord(
        base=base,
        rank=adapter.rank,
        alpha=adapter.alpha,
        layers=len(adapter.layers),
        parts=parts,
        variant=model.variant,
    )


def describe_run(config: TrainConfig, concepts: Sequence[str]) -> dict[str, Any]:
    """What a run's evaluation says of the run."""
    return {
        "method": config.method,
        "concept": title(concepts),
        "model": config.model,
        "is_reconstruction": get_method(config.method).is_reconstruction,
    }
