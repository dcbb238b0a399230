"""The function :func:`evaluate`: from what the caller has to a plan, its journal and ranks, and the files of it."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from .. import prompts as prompt_lists
from ..config import from_yaml, to_yaml
from ..errors import UserError
from ..files.run_folder import check_output, claimed, clear_output, own
from ..metrics.lpips import PerceptualDistance, load_perceptual
from ..models.generate import SamplerSpec
from ..progress import Reporter
from ..prompts import PromptGroups
from ..training.config import TrainConfig
from ..worlds import World, get_world, world_with_model
from .config import EvaluateConfig
from .evaluator import CONTROL_PAIRS, Evaluator, Plan, default_metric, file_groups, world_groups
from .generators import Source, as_source
from .image_cache import ImageCache
from .journal import FOLDER as JOURNAL
from .journal import Batch, Journal
from .ranks import Ranks
from .results import EvaluationReport, write_results


def evaluate(
    original: Any,
    unlearned: Any,
    prompts: str | Path | Sequence[str] | Sequence[tuple[str, str]] = "shapes",
    *,
    output: str | Path | None = None,
    placebo: Any = None,
    forget: str | None = None,
    metric: str | PerceptualDistance | None = None,
    trunk_weights: str | Path | None = None,
    metrics: str | Sequence[Any] | None = None,
    seeds_per_prompt: int = 1,
    batch_size: int = 32,
    num_inference_steps: int = 20,
    guidance_scale: float = 3.0,
    mixed_precision: Literal["no", "bf16"] = "no",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    control_pairs: int = CONTROL_PAIRS,
    cache: str | Path | None = None,
    cache_limit_gib: float = 4.0,
    num_processes: int = 1,
    resume: bool = False,
    overwrite: bool = False,
    noise_shape: tuple[int, int, int] | None = None,
    reporter: Reporter | None = None,
) -> EvaluationReport:
    """Score unlearned models against their original: the same prompts, the same noise, one record per pair.

    ``original``, ``placebo``: a folder or name as for :func:`load_model`, a diffusers pipeline, or a function that maps
    B prompts (list) and noise (B, C, H, W) float32 on the CPU to images (B, 3, H, W) uint8; functions need
    ``noise_shape``, (C, H, W).  ``unlearned``: one such, a list of them, or a dict of them by name.  ``prompts``: as on
    the command line, or a list of prompts or of (prompt, group); groups named ``forget...`` ask for the concept.
    ``metric``, ``metrics``: names, or objects like what :func:`load_perceptual` and ``load_metric`` return.
    ``trunk_weights``: safetensors file for an LPIPS trunk, as in :func:`load_perceptual`.

    With ``output``, records go to a journal there as they come, so that an evaluation that was stopped continues with
    ``resume``; at the end the folder holds records, summary, grid and report.  Started by ``torchrun``, or with
    ``num_processes``, each rank takes a share of the prompts; the results are the same to the last bit.  Ranks other
    than the first return a report without results.

    Raises UserError for anything wrong in settings, prompts, models or images, RuntimeError for an original that
    does not repeat itself or a rank that failed.
    """
    names = {field.name for field in dataclasses.fields(EvaluateConfig)}
    config = _reloadable({name: value for name, value in locals().items() if name in names})
    reporter = reporter or Reporter()
    ranks = Ranks.from_environment(num_processes)
    folder = Path(output) if output is not None else None
    if folder is None and (resume or overwrite or ranks.world_size > 1):
        raise UserError("`output` is missing: resuming, replacing and several processes need a folder.")
    if ranks.world_size > 1 and not all(map(_is_name, _given_models(original, unlearned, placebo, metric, metrics))):
        raise UserError("several processes need models and metrics by name, since they cannot share objects.")
    with contextlib.ExitStack() as stack:
        if folder and ranks.rank == 0:
            check_output(folder, "evaluate", overwrite=overwrite, resume=resume)
            if overwrite and ranks.launched:
                raise UserError("`--overwrite`: launched ranks would not wait for it. Empty the folder first.")
            stack.enter_context(claimed(folder))
        models = _named_models(unlearned)
        if placebo is not None:
            models[_placebo_name(models)] = placebo
        runs = {name: config_of_run(model) for name, model in models.items()}
        spec = SamplerSpec(num_inference_steps, guidance_scale, batch_size, mixed_precision)
        where = ranks.device(device)
        source = as_source(original, spec, device=where, noise_shape=noise_shape)
        sources = {
            name: as_source(pipeline_of(model), spec, name=name, device=where, noise_shape=source.noise_shape)
            for name, model in models.items()
        }
        groups = _groups(prompts, forget, models, runs, source.world)
        plan = Plan(
            source,
            sources,
            groups,
            _perceptual(metric, source, trunk_weights),
            seeds_per_prompt,
            list(models)[-1] if placebo is not None else None,
            _metrics(metrics, source),
            control_pairs,
        )
        images = _image_cache(cache, cache_limit_gib, source)
        reporter.stage("evaluation")
        journal = None
        if folder:
            journal = stack.enter_context(contextlib.closing(Journal(folder, ranks.rank, ranks.world_size)))
            if ranks.rank == 0:
                own(folder, "evaluate", _result_files(models))
                journal.begin(plan.spec(), to_yaml(config), plan.grouped, resume=resume)
                stack.callback(ranks.stop)
                ranks.start(journal.folder)
            else:
                journal.join(plan.spec())
        evaluator = stack.enter_context(Evaluator(plan, cache=images, on_progress=reporter.scoring))
        if journal is None:
            records = Batch.merge(list(evaluator.run(plan.keys())))
        else:
            _record(plan, evaluator, journal, ranks)
            if ranks.rank > 0:
                return EvaluationReport(None, groups)
            ranks.wait(journal.folder)
            records = Batch.merge(list(journal.batches()))
        if records.keys != plan.keys():
            raise UserError(f"{len(records.keys)} of {len(plan.keys())} pairs were recorded. Use `--resume`.")
        describe = {name: _description(name, model, runs[name], plan) for name, model in models.items()}
        report = EvaluationReport(evaluator.conclude(records, describe), groups, placebo=plan.placebo)
        if images and images.rejected:
            reporter.note(f"{images.rejected} entries of the cache were damaged or foreign and were made anew")
        if folder and journal:
            clear_output(folder, but=[JOURNAL])  # only now: old results stay until there are new
            write_results(folder, report)
            journal.remove()
    return report


def _result_files(models: Mapping[str, Any]) -> list[str]:
    """The files of single models, each in a folder of its name."""
    return [f"{name}/{file}" for name in models for file in ("pairs.jsonl", "evaluation.json")]


def _record(plan: Plan, evaluator: Evaluator, journal: Journal, ranks: Ranks) -> None:
    """Generate, score and record what is left of this rank's share."""
    finished = journal.finished()
    left = [key for key in plan.keys_of(ranks.rank, ranks.world_size) if key not in finished]
    for _ in evaluator.run(left, journal):
        ranks.check()
    ranks.done(journal.folder)


def _reloadable(given: dict[str, Any]) -> EvaluateConfig:
    """The arguments of :func:`evaluate`, checked, as the config that repeats it from any working folder."""

    def name(one: Any) -> str | None:
        if one is None:
            return None
        path = Path(str(one)).expanduser()
        is_folder = isinstance(one, str | Path) and world_with_model(str(one)) is None and path.is_dir()
        return str(path.resolve()) if is_folder else str(one)

    output = str(Path(given["output"] or ".").expanduser().resolve())
    values = given | {key: name(given[key]) for key in ("original", "placebo", "metric", "metrics")}
    values["unlearned"] = tuple(str(name(model)) for model in _named_models(given["unlearned"]).values())
    for key in ("trunk_weights", "cache"):
        if given[key] is not None:
            values[key] = str(Path(given[key]).expanduser().resolve())
    of_world = get_world(str(given["prompts"])) is not None
    values["prompts"] = given["prompts"] if of_world else str(Path(output, JOURNAL, "prompts.csv"))
    return EvaluateConfig(**values | {"output": output, "resume": False, "overwrite": False})


def _is_name(one: Any) -> bool:
    return one is None or isinstance(one, str | Path)


def _given_models(original: Any, unlearned: Any, *others: Any) -> list[Any]:
    # A dict's names would be lost on the way to another process.
    models = list(unlearned) if isinstance(unlearned, list | tuple) else [unlearned]
    return [original, *models, *others]


def _named_models(unlearned: Any) -> dict[str, Any]:
    """The models to evaluate, each by a short name of its own that can be a folder's."""
    if isinstance(unlearned, Mapping):
        return {_folder_name(str(name)): model for name, model in unlearned.items()}
    models = list(unlearned) if isinstance(unlearned, list | tuple) else [unlearned]
    if not models:
        raise UserError("`--unlearned` is empty: name at least one unlearned pipeline.")
    labels = [_label(model) for model in models]
    named: dict[str, Any] = {}
    for model, label in zip(models, labels, strict=True):
        if labels.count(label) > 1 and _is_name(model):
            path = Path(model).expanduser().resolve()
            label = (path.parent if path.name == "model" else path).name
        name = _folder_name(label)
        while name in named:
            name += "-again"
        named[name] = model
    return named


def _folder_name(label: str) -> str:
    return re.sub(r"[^\w.-]+", "-", label).strip(".-") or "model"


def _label(model: Any) -> str:
    """The method of a run, else the folder's or the function's name."""
    if _is_name(model):
        run = config_of_run(model)
        return run.method if run else _gold(model) or Path(str(model)).expanduser().resolve().name
    return str(getattr(model, "__name__", type(model).__name__))


def _gold(model: Any) -> str | None:
    return "gold" if str(model).startswith("shapes-gold") else None


def _placebo_name(models: Mapping[str, Any]) -> str:
    return "placebo" if "placebo" not in models else "placebo-control"


def pipeline_of(model: Any) -> Any:
    """A run's folder stands for the pipeline in it."""
    if not isinstance(model, str | Path):
        return model
    folder = Path(model).expanduser()
    if (folder / "model" / "model_index.json").is_file():
        return str(folder / "model")
    return str(folder) if folder.is_dir() else str(model)


def config_of_run(model: Any) -> TrainConfig | None:
    """The config of the run that a folder, or the model folder in it, is of; None where there is none of ours."""
    if not isinstance(model, str | Path):
        return None
    try:
        return from_yaml(Path(pipeline_of(model)).parent / "config.yaml", TrainConfig)
    except (ValueError, TypeError):
        return None


def _description(name: str, model: Any, run: TrainConfig | None, plan: Plan) -> dict[str, Any]:
    method = "placebo" if name == plan.placebo else run.method if run else _gold(model) or name
    return {"method": method, "concept": plan.groups.concept or "the concept", "model": plan.original.name}


def _groups(
    given: Any,
    forget: str | None,
    models: Mapping[str, Any],
    runs: Mapping[str, TrainConfig | None],
    world: World | None,
) -> PromptGroups:
    forgotten = sorted({run.forget for run in runs.values() if run})
    if forget is None and len(forgotten) > 1:
        raise UserError(f"the runs forgot different things ({', '.join(forgotten)}). Evaluate each alone.")
    concept = forget or next(iter(forgotten), None)
    if not isinstance(given, str | Path):
        return PromptGroups.of(prompt_lists.check_grouped_prompts(given), concept)
    if (asked := get_world(str(given))) is None:
        return file_groups(str(given), concept)
    if asked is not world:
        raise UserError(f"`--prompts {given}` are the bundled model's. Give a prompt file for other models.")
    if concept is None:
        raise UserError(f"{next(iter(models))} does not say what was forgotten. Name it with `--forget`.")
    return world_groups(asked, concept)


def _perceptual(
    metric: str | PerceptualDistance | None, source: Source, trunk_weights: str | Path | None
) -> PerceptualDistance:
    if metric is not None and not isinstance(metric, str):
        if trunk_weights is not None:
            raise UserError("`trunk_weights` belongs to a metric by name: leave it out beside an object.")
        return metric
    return load_perceptual(metric or default_metric(source), source.device, trunk_weights=trunk_weights)


def _metrics(given: str | Sequence[Any] | None, source: Source) -> list[Any]:
    if not given:
        return []
    asked: list[Any] = given.split(",") if isinstance(given, str) else list(given)
    result = []
    for one in asked:
        if isinstance(one, str):
            metrics = importlib.import_module("..metrics.field", __package__)
            result.append(metrics.load_metric(one.strip(), source.device, bundled=source.world is not None))
        else:
            result.append(one)
    names = [one.name for one in result]
    if len(set(names)) < len(names):
        raise UserError(f"`--metrics` names {max(names, key=names.count)} twice.")
    return result


def _image_cache(folder: str | Path | None, limit_gib: float, source: Source) -> ImageCache | None:
    if folder is None:
        return None
    if source.state() is None:
        raise UserError("`cache` names images by a hash of what makes them, which a function has not: leave it out.")
    return ImageCache(Path(folder).expanduser(), int(limit_gib * 2**30))
