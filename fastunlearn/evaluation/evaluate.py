"""The function :func:`evaluate`: from what the caller has to a plan, its journal and ranks, and the files of it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ..config import to_yaml
from ..errors import UserError
from ..files.run_folder import check_output, claimed, clear_output, own
from ..judges import Judge
from ..metrics.base import Metric, load_metrics
from ..metrics.distances import Distance
from ..models.options import ModelOptions
from ..models.placement import NOTHING_TO_OFFLOAD, Placement
from ..models.runtime import resolve_device
from ..models.sampling import SamplerSpec
from ..progress import Reporter
from ..worlds import get_world
from .calibration import JudgeRefused
from .config import EvaluateConfig
from .evaluator import Evaluator
from .generators import as_source
from .inputs import (
    check_runs,
    description,
    forgotten_by,
    image_cache,
    is_name,
    judge_of,
    named_models,
    of_unlearned,
    perceptual,
    pipeline_of,
    prompt_groups,
    run_of,
    whole_name,
)
from .journal import FOLDER as JOURNAL
from .journal import Journal, PairScores
from .plan import CONTROL_PAIRS, Plan
from .ranks import Ranks
from .results import EvaluationReport, write_results


def evaluate(
    original: Any,
    unlearned: Any,
    prompts: str | Path | Sequence[str] | Sequence[tuple[str, str]] | None = None,
    *,
    output: str | Path | None = None,
    placebo: Any = None,
    lora: str | Path | None = None,
    forget: str | None = None,
    judge: str | Judge | Callable[..., Any] | None = None,
    trust_judge: bool = False,
    metric: str | Distance | None = None,
    trunk_weights: str | Path | None = None,
    metrics: str | Sequence[str | Metric] | None = None,
    seeds_per_prompt: int = 1,
    batch_size: int = 32,
    num_inference_steps: int = 20,
    guidance_scale: float = 3.0,
    mixed_precision: Literal["no", "bf16"] = "no",
    weights_dtype: Literal["fp32", "bf16"] = "fp32",
    decode_batch_size: int | None = None,
    offload: bool = False,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    control_pairs: int = CONTROL_PAIRS,
    cache: str | Path | None = None,
    cache_limit_gib: float = 4.0,
    num_processes: int = 1,
    resume: bool = False,
    overwrite: bool = False,
    variant: str | None = None,
    parts: str | Path | None = None,
    scheduler: str | None = None,
    resolution: str | int | None = None,
    negative_prompt: str | None = None,
    attention: Literal["native", "sdpa", "xformers", "flash"] | None = None,
    noise_shape: tuple[int, int, int] | None = None,
    reporter: Reporter | None = None,
) -> EvaluationReport:
    """Score unlearned models against their original: the same prompts, the same noise, one record per pair.

    ``original``, ``placebo``: a folder or name as for :func:`load_model`, a diffusers pipeline, or a function that maps
    B prompts (list) and noise (B, C, H, W) float32 on the CPU to images (B, 3, H, W) uint8; functions need
    ``noise_shape``, (C, H, W).  ``unlearned``: one such, a list of them, or a dict of them by name.  ``prompts``: as on
    the command line, or a list of prompts or of (prompt, group); groups named ``forget...`` ask for the concept.
    ``lora``: a file that is merged into the original, which is then given by name.
    ``judge``: who says whether an image shows the concept: a name, ``"none"``, a :class:`~fastunlearn.judges.Judge`, or
    a function that maps images (B, 3, H, W) uint8 and the concept to B scores from 0 to 1; by default the bundled
    world's, and none for other models.  One that cannot tell the original's own images apart is refused, unless
    ``trust_judge``; every result begins with what it sees on them.
    ``metric``, ``metrics``: names, or objects like what :func:`load_perceptual` and :func:`load_metric` return.
    ``trunk_weights``: safetensors file for an LPIPS trunk, as in :func:`load_perceptual`.
    ``variant`` to ``attention``: how models are loaded and sampled, all alike, as in :class:`ModelOptions`.

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
    folder = Path(output).expanduser() if output is not None else None
    if folder is None and (resume or overwrite or ranks.world_size > 1):
        raise UserError("`output` is missing: resuming, replacing and several processes need a folder.")
    given = _given_models(original, unlearned, placebo, judge, metric, metrics)
    if ranks.world_size > 1 and not all(map(is_name, given)):
        raise UserError("several processes need models, judge and metrics by name, since they cannot share objects.")
    with contextlib.ExitStack() as stack:
        if folder and ranks.rank == 0:
            check_output(folder, "evaluate", overwrite=overwrite, resume=resume)
            if overwrite and ranks.launched:
                raise UserError("`--overwrite`: launched ranks would not wait for it. Empty the folder first.")
            stack.enter_context(claimed(folder))
        reporter.stage("loading")
        models, placebo_name = named_models(unlearned, placebo)
        runs = {name: run_of(model) for name, model in models.items()}
        spec = SamplerSpec(num_inference_steps, guidance_scale, batch_size, mixed_precision, decode_batch_size)
        where = resolve_device(ranks.device(device))
        options, placement = ModelOptions.of(config), Placement.of(weights_dtype, where, offload=offload)
        if offload and placement.shelf is None:
            reporter.note(NOTHING_TO_OFFLOAD)
        kept: dict[str, Any] = {"device": where, "placement": placement}
        source = as_source(original, spec, noise_shape=noise_shape, options=options, lora=lora, **kept)
        kept["noise_shape"] = source.noise_shape
        sources = {
            name: as_source(pipeline_of(model), spec, name=name, options=of_unlearned(options, model), **kept)
            for name, model in models.items()
        }
        forgotten = {name: forgotten_by(run, source.content()) for name, run in runs.items()}
        groups = prompt_groups(prompts, forget, models, forgotten, source.world)
        plan = Plan(
            source,
            sources,
            groups,
            perceptual(metric, source, trunk_weights),
            seeds_per_prompt,
            placebo_name,
            load_metrics(metrics, source.device, world=source.world),
            control_pairs,
            judge_of(judge, source, groups.concept),
        )
        check_runs(runs, sources)
        images = image_cache(cache, cache_limit_gib, source)
        for note in plan.notes() if ranks.rank == 0 else ():
            reporter.note(note)
        reporter.stage("evaluation")
        journal = None
        if folder:
            journal = stack.enter_context(contextlib.closing(Journal(folder, ranks.rank, ranks.world_size)))
            if ranks.rank == 0:
                own(folder, "evaluate", _result_files(models))
                journal.begin(plan.spec(), to_yaml(config), _prompt_rows(plan), resume=resume)
                stack.callback(ranks.stop)
                ranks.start(journal)
            else:
                journal.join(plan.spec())
        # The first rank tries the judge for all.
        trust = trust_judge or ranks.rank > 0
        evaluator = Evaluator(plan, cache=images, on_progress=reporter.scoring, trust_judge=trust)
        stack.enter_context(evaluator)
        if journal is None:
            scores = PairScores.merge(list(evaluator.run(plan.keys())))
        else:
            try:
                _record(plan, evaluator, journal, ranks)
            except JudgeRefused:
                if ranks.world_size == 1 and not journal.finished():  # there is nothing to continue
                    journal.remove()
                raise
            if ranks.rank > 0:
                return EvaluationReport(None, groups)
            ranks.wait(journal.folder)
            scores = PairScores.merge(list(journal.batches()))
        if scores.keys != plan.keys():
            raise UserError(f"{len(scores.keys)} of {len(plan.keys())} pairs were recorded. Use `--resume`.")
        describe = {
            name: description(name, model, runs[name], groups, placebo_name, forgotten[name])
            for name, model in models.items()
        }
        report = EvaluationReport(evaluator.conclude(scores, describe), groups, placebo=plan.placebo)
        if images and images.rejected:
            reporter.note(f"{images.rejected} entries of the cache were damaged or foreign and were made anew")
        if images and images.unwritten:
            reporter.note(f"{images.unwritten} images could not be added to the cache ({images.reason})")
        if folder and journal:
            clear_output(folder, but=[JOURNAL])  # only now: old results stay until there are new
            write_results(folder, report)
            journal.remove()
    return report


def _result_files(models: Mapping[str, Any]) -> list[str]:
    """The files of single models, each in a folder of its name."""
    return [f"{name}/{file}" for name in models for file in ("pairs.jsonl", "evaluation.json")]


def _prompt_rows(plan: Plan) -> list[tuple[Any, ...]]:
    """A table of the prompts, with its header, from which other ranks and a later evaluation read the same."""
    if not plan.groups.seeds:
        return [("prompt", "group"), *plan.grouped]
    rows = [(prompt, group, seed) for prompt, group in plan.grouped for seed in plan.seeds_of(prompt)]
    return [("prompt", "group", "seed"), *rows]


def _record(plan: Plan, evaluator: Evaluator, journal: Journal, ranks: Ranks) -> None:
    """Generate, score and record what is left of this rank's share."""
    finished = journal.finished()
    left = [key for key in plan.keys_of(ranks.rank, ranks.world_size) if key not in finished]
    for _ in evaluator.run(left, journal):
        ranks.check()
    ranks.done(journal.folder)


def _reloadable(given: dict[str, Any]) -> EvaluateConfig:
    """The arguments of :func:`evaluate`, checked, as the config that repeats it from any working folder."""
    output = str(Path(given["output"] or ".").expanduser().resolve())
    values = given | {key: whole_name(given[key]) for key in ("original", "placebo", "judge", "metric", "metrics")}
    values["unlearned"] = tuple(str(whole_name(model)) for model in named_models(given["unlearned"])[0].values())
    for key in ("trunk_weights", "cache", "parts", "lora"):
        if given[key] is not None:
            values[key] = str(Path(given[key]).expanduser().resolve())
    of_world = given["prompts"] is None or get_world(str(given["prompts"])) is not None
    values["prompts"] = given["prompts"] if of_world else str(Path(output, JOURNAL, "prompts.csv"))
    return EvaluateConfig(**values | {"output": output, "resume": False, "overwrite": False})


def _given_models(original: Any, unlearned: Any, *others: Any) -> list[Any]:
    # A dict's names would be lost on the way to another process.
    models = list(unlearned) if isinstance(unlearned, list | tuple) else [unlearned]
    return [original, *models, *others]
