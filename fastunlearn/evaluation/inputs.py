"""From what a caller of :func:`evaluate` has to what a plan needs: models by name, their runs, prompts, measures."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import prompts as prompt_lists
from ..concepts import read_concepts
from ..errors import UserError
from ..files.run_folder import RECORD
from ..files.weights import pipeline_in
from ..judges import Judge, as_judge, load_judge
from ..metrics.distances import Distance, check_distance, load_perceptual
from ..models.adapter_files import is_adapter_run
from ..models.options import ModelOptions
from ..prompts import PromptGroups
from ..record import read_json
from ..schema import RunRecord
from ..worlds import World, get_world, world_with_model
from .generators import PipelineSource, Source
from .image_cache import ImageCache
from .journal import FOLDER as JOURNAL
from .plan import default_judge, default_metric, file_groups, world_groups

#: Names in an output folder that are ours, so that no model's folder may have them.
_TAKEN = (JOURNAL, "pairs.jsonl", "evaluation.json", "grid.png", "report.html")
_LONGEST = 48  # characters of a folder's name, which may have 255 bytes


def is_name(one: Any) -> bool:
    return one is None or isinstance(one, str | Path)


def whole_name(one: Any) -> str | None:
    """A model's name as it holds in any working folder: a folder by its whole path."""
    if one is None:
        return None
    path = Path(str(one)).expanduser()
    is_folder = isinstance(one, str | Path) and world_with_model(str(one)) is None and path.is_dir()
    return str(path.resolve()) if is_folder else str(one)


def folder_name(model: str | Path) -> str:
    """What a model's folder is called; that of its run where it is the model in one."""
    path = Path(model).expanduser().resolve()
    return (path.parent if path.name == "model" else path).name


def named_models(unlearned: Any, placebo: Any = None) -> tuple[dict[str, Any], str | None]:
    """The models to evaluate, each by a short name of its own that can be a folder's, and the placebo's name.

    No two get one name, and none gets that of a file of ours: what comes later has ``-again`` or ``-model`` added.
    """
    if isinstance(unlearned, Mapping):
        labels, models = [str(name) for name in unlearned], list(unlearned.values())
    else:
        models = list(unlearned) if isinstance(unlearned, list | tuple) else [unlearned]
        labels = [_label(model) for model in models]
        given = list(labels)
        for index, (model, label) in enumerate(zip(models, given, strict=True)):
            if given.count(label) > 1 and is_name(model):
                labels[index] = folder_name(model)
    if not models:
        raise UserError("`--unlearned` is empty: name at least one unlearned pipeline.")
    if placebo is not None:
        labels, models = [*labels, "placebo"], [*models, placebo]
    names = _different(labels)
    return dict(zip(names, models, strict=True)), names[-1] if placebo is not None else None


def _different(labels: Iterable[str]) -> list[str]:
    """A folder's name for each label, no two alike; file systems may not tell capitals apart."""
    names: list[str] = []
    taken = {name.casefold() for name in _TAKEN}
    for label in labels:
        name = re.sub(r"[^\w.-]+", "-", label).strip(".-")[:_LONGEST].strip(".-") or "model"
        if name.casefold() in _TAKEN:
            name += "-model"
        while name.casefold() in taken:
            name += "-again"
        names.append(name)
        taken.add(name.casefold())
    return names


def _label(model: Any) -> str:
    """The method of a run, else the folder's or the function's name."""
    if is_name(model):
        run = run_of(model)
        return run.method if run else _gold(model) or Path(str(model)).expanduser().resolve().name
    return str(getattr(model, "__name__", type(model).__name__))


def _gold(model: Any) -> str | None:
    """A bundled model that was trained anew without a concept."""
    return "gold" if world_with_model(str(model)) and "-gold" in str(model) else None


def pipeline_of(model: Any) -> Any:
    """A run's folder stands for the pipeline in it."""
    if not isinstance(model, str | Path):
        return model
    folder = Path(model).expanduser()
    return str(pipeline_in(folder)) if folder.is_dir() else str(model)


def of_unlearned(options: ModelOptions, model: Any) -> ModelOptions:
    """The options for an unlearned model: those of the original, but for files that only a single file needs.

    A variant is then found out: a run has the one that it was made from.
    """
    is_file = isinstance(model, str | Path) and Path(model).expanduser().is_file()
    is_run = run_of(model) is not None
    parts, variant = options.parts if is_file else None, None if is_run else options.variant
    return dataclasses.replace(options, parts=parts, variant=variant)


def run_of(model: Any) -> RunRecord | None:
    """The record of the run that a folder, or the model folder in it, is of; None where there is none of ours.

    Raises UserError for a record of ours that is damaged or of another version.
    """
    if not isinstance(model, str | Path):
        return None
    folder = Path(pipeline_of(model))
    path = (folder if is_adapter_run(folder) else folder.parent) / "run.json"
    if not path.is_file():
        return None
    is_ours = (path.parent / RECORD).is_file()
    try:
        content = read_json(path, RunRecord.command)
    except UserError:
        if is_ours:
            raise
        return None  # another program's
    if not is_ours and not (isinstance(content, dict) and "fastunlearn" in content):
        return None
    return RunRecord.from_dict(content, str(path))


def check_runs(runs: Mapping[str, RunRecord | None], sources: Mapping[str, Source]) -> None:
    """UserError where the model of a run is no longer what the run wrote."""
    for name, run in runs.items():
        source = sources[name]
        if run is None or not isinstance(source, PipelineSource):
            continue
        is_its_own = source.model.source.name == "model" or source.model.adapter_files
        if is_its_own and source.content() != run.hashes["unlearned"]:
            where = source.model.adapter_files[0] if source.model.adapter_files else source.model.source
            raise UserError(
                f"the model in {where} has changed since its run wrote it: its hash is "
                f"{source.content()[:12]}, and run.json says {run.hashes['unlearned'][:12]}. Train it again, or "
                "evaluate a copy outside the run."
            )


def description(
    name: str,
    model: Any,
    run: RunRecord | None,
    groups: PromptGroups,
    placebo: str | None,
    forgotten: Sequence[str] = (),
) -> dict[str, Any]:
    """What a model's result says of how it was made; ``forgotten``: what its run was to forget."""
    method = "placebo" if name == placebo else run.method if run else _gold(model) or name
    known = {"method": method, "is_reconstruction": run is not None and name != placebo and run.is_reconstruction}
    if forgotten and len(groups.concepts) > 1:
        mine = {concept.lower() for concept in forgotten}
        known["forgotten"] = tuple(one for one in groups.concepts if one.lower() in mine) or groups.concepts
    return known | {"concept": groups.concept or "the concept"}


def forgotten_by(run: RunRecord | None, original: str | None) -> tuple[str, ...]:
    """What a run's model was to forget since it was the model whose files have the hash ``original``, one by one.

    A run on a run has forgotten what both were to forget, unless the original is the first one's result.
    """
    if run is None:
        return ()
    forgotten, start = list(run.forgotten), run.hashes["original"]
    for ancestor in reversed(run.ancestors):
        if start == original:
            break
        forgotten[:0] = ancestor.concepts
        start = ancestor.hashes["original"]
    return tuple(dict.fromkeys(forgotten))


def prompt_groups(
    given: Any,
    forget: str | None,
    models: Mapping[str, Any],
    forgotten: Mapping[str, Sequence[str]],
    world: World | None,
) -> PromptGroups:
    """The prompts and the concepts: those of ``forget``, or all that the runs, by name, say that they forgot."""
    if forget is not None:
        concepts = [one.concept for one in read_concepts(forget)]
    else:
        concepts = list({one.lower(): one for own in forgotten.values() for one in own}.values())
    concept = concepts or None
    if given is not None and not isinstance(given, str | Path):
        return PromptGroups.of(prompt_lists.check_grouped_prompts(given), concept)
    asked = world if given is None else get_world(str(given))
    if given is None and world is None:
        raise UserError("`--prompts` is missing: only the bundled model has prompts of its own. Name a prompt file.")
    if asked is None:
        return file_groups(str(given), concept)
    if asked is not world:
        raise UserError(f"`--prompts {given}` are the bundled model's. Give a prompt file for other models.")
    if concept is None:
        raise UserError(f"{next(iter(models))} does not say what was forgotten. Name it with `--forget`.")
    return world_groups(asked, concept)


def judge_of(given: Any, source: Source, concept: str | None) -> Judge | None:
    """The judge that was asked for: a name, ``none``, an object or a function; by default that of a bundled world."""
    if given is None:
        return default_judge(source, concept)
    if given == "none":
        return None
    return load_judge(given, source.device) if isinstance(given, str) else as_judge(given)


def perceptual(metric: str | Distance | None, source: Source, trunk_weights: str | Path | None) -> Distance:
    if metric is not None and not isinstance(metric, str):
        if trunk_weights is not None:
            raise UserError("`trunk_weights` belongs to a metric by name: leave it out beside an object.")
        return check_distance(metric)
    return load_perceptual(metric or default_metric(source), source.device, trunk_weights=trunk_weights)


def image_cache(folder: str | Path | None, limit_gib: float, source: Source) -> ImageCache | None:
    if folder is None:
        return None
    if source.state() is None:
        raise UserError("`cache` names images by a hash of what makes them, which a function has not: leave it out.")
    return ImageCache(Path(folder).expanduser(), int(limit_gib * 2**30))
