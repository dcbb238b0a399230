"""The function :func:`attack`: from what the caller has to a plan, its journal and ranks, and the files of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from ..config import to_yaml
from ..errors import UserError
from ..evaluation.generators import PipelineSource, Source, as_source
from ..evaluation.inputs import check_runs, description, folder_name, is_name, pipeline_of, run_of, whole_name
from ..evaluation.ranks import Ranks
from ..evaluation.records import FOLDER as JOURNAL
from ..files.run_folder import check_output, claimed, clear_output, own
from ..files.weights import hash_module
from ..judges.base import Judge
from ..methods.recipe import UNCONDITIONAL
from ..models.sampling import SamplerSpec
from ..progress import Reporter
from ..prompts import PromptGroups
from ..schema import Evaluation, read_evaluation
from . import parse_attacks
from .attempts import Attempts
from .base import Attempt
from .config import ATTACKS, AttackConfig
from .inputs import concept_of, judge_for, prompts_for, unrelated_for
from .pictures import Pictures
from .plan import GOLD, ORIGINAL, PLACEBO, UNLEARNED, AttackPlan, Unit
from .results import AttackReport, write_results
from .summary import summarize
from .target import Target


def attack(
    original: Any,
    unlearned: Any,
    concept: str | None = None,
    *,
    attacks: str | Sequence[str] = ATTACKS,
    judge: str | Judge | Callable[..., Any] | None = None,
    output: str | Path | None = None,
    gold: Any = None,
    placebo: Any = None,
    prompts: str | Path | Sequence[str] | Sequence[tuple[str, str]] | None = None,
    max_prompts: int = 16,
    unrelated: str | Path | Sequence[str] | None = None,
    budget: int | None = None,
    evaluation: str | Path | None = None,
    batch_size: int = 32,
    num_inference_steps: int = 20,
    guidance_scale: float = 3.0,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    num_processes: int = 1,
    dry_run: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    noise_shape: tuple[int, int, int] | None = None,
    reporter: Reporter | None = None,
) -> AttackReport:
    """Try to bring a concept back in an unlearned model, and in the models that tell what success is worth.

    ``original``, ``unlearned``, ``gold``, ``placebo``: a folder or name as for :func:`load_model`, or a diffusers
    pipeline; for attacks that only ask, also a function as for :func:`evaluate`, with ``noise_shape``.  ``concept``:
    what to look for; by default what the unlearned run's record says.  ``attacks``: names, ``NAME:OPTION`` among them.
    ``judge``, ``prompts``: as for :func:`evaluate`; without prompts the bundled world's, or such as templates make.
    ``budget``: denoiser forwards per prompt, a backward counted as two, the same for every attack and model; by default
    each attack has its own.  The control, best of as many seeds as the largest budget pays for, always runs.

    With ``output``, attempts go to a journal there as they come, so that an attack that was stopped continues with
    ``resume``.  Started by ``torchrun``, or with ``num_processes``, each rank takes a share of them; the results are
    the same to the last bit.  Every model has its weights, to the last bit, at the end.

    Raises UserError for anything wrong in settings, prompts, models or the judge.
    """
    labels = attacks if isinstance(attacks, str) else ",".join(attacks)
    config = _reloadable({**locals(), "attacks": labels})
    reporter = reporter or Reporter()
    asked = parse_attacks(labels)
    ranks = Ranks.from_environment(num_processes)
    folder = Path(output).expanduser() if output is not None else None
    if folder is None and (resume or overwrite or ranks.world_size > 1):
        raise UserError("`output` is missing: resuming, replacing and several processes need a folder.")
    models = {ORIGINAL: original, UNLEARNED: unlearned}
    models |= {name: model for name, model in ((GOLD, gold), (PLACEBO, placebo)) if model is not None}
    if ranks.world_size > 1 and not all(map(is_name, [*models.values(), judge])):
        raise UserError("several processes need models and judge by name, since they cannot share objects.")
    with contextlib.ExitStack() as stack:
        if folder and ranks.rank == 0:
            check_output(folder, "attack", overwrite=overwrite, resume=resume)
            if overwrite and ranks.launched:
                raise UserError("`--overwrite`: launched ranks would not wait for it. Empty the folder first.")
            if not dry_run:
                stack.enter_context(claimed(folder))
        reporter.stage("loading")
        run = run_of(unlearned)
        concept = concept_of(concept, run)
        spec = SamplerSpec(num_inference_steps, guidance_scale, batch_size)
        sources: dict[str, Source] = {}
        for name, model in models.items():
            shape = sources[ORIGINAL].noise_shape if sources else noise_shape
            where = ranks.device(device)
            sources[name] = as_source(pipeline_of(model), spec, name=name, device=where, noise_shape=shape)
        check_runs({name: run_of(model) for name, model in models.items()}, sources)
        worded = any(one.name == "prompts" for one, _ in asked.values())
        world = sources[ORIGINAL].world
        asking, others, notes = prompts_for(prompts, concept, world, max_prompts, worded=worded)
        plan = AttackPlan(
            models=sources,
            judge=judge_for(judge, sources[ORIGINAL], concept),
            concept=concept,
            prompts=asking,
            worded=others,
            unrelated=unrelated_for(unrelated, concept, world),
            asked=asked,
            budget=budget,
            seed=seed,
            notes=notes,
        )
        beside = _evaluation(evaluation, unlearned, concept)
        if ranks.rank == 0:
            reporter.plan("attack", plan.lines(_seconds_per_forward(sources[ORIGINAL]) if dry_run else None))
        if dry_run:
            return AttackReport(None)
        reporter.stage("attack")
        journal = None
        if folder:
            journal = stack.enter_context(contextlib.closing(Attempts(folder, ranks.rank, ranks.world_size)))
            if ranks.rank == 0:
                own(folder, "attack")
                journal.begin(plan.spec(), to_yaml(config), _prompt_rows(plan), resume=resume)
                stack.callback(ranks.stop)
                ranks.start(journal)
            else:
                journal.join(plan.spec())
        stack.enter_context(_unchanged(sources))
        done = _work(plan, journal, ranks, reporter)
        if journal is not None:
            ranks.done(journal.folder)
            if ranks.rank > 0:
                return AttackReport(None)
            ranks.wait(journal.folder)
            done = journal.finished()
        found = _by_attack(plan, done)
        groups = PromptGroups((), ("a", "b"), concept)
        described = description(UNLEARNED, unlearned, run, groups, None) | {"name": _name(unlearned)}
        record = summarize(plan, found, described | {"model": sources[ORIGINAL].name})
        report = AttackReport(record, found, beside)
        if folder and journal:
            clear_output(folder, but=[JOURNAL])  # only now: old results stay until there are new
            write_results(folder, report)
            journal.remove()
    return report


def _work(plan: AttackPlan, journal: Attempts | None, ranks: Ranks, reporter: Reporter) -> dict[str, list[Attempt]]:
    """Do what is left of this rank's share."""
    done: dict[str, list[Attempt]] = journal.finished() if journal else {}
    units = plan.units()[ranks.rank :: ranks.world_size]
    left = [unit for unit in units if unit.key not in done]
    total, spent = sum(unit.cost for unit in left), 0
    targets = _targets(plan)
    reporter.attacking(0, total)
    for unit in left:
        ranks.check()
        attempts = unit.task.attack.run(targets[unit.model], unit.order)
        if [one.prompt for one in attempts] != list(unit.order.prompts):
            raise UserError(f"the attack {unit.task.label} must return one attempt per prompt, in their order.")
        done[unit.key] = attempts
        if journal:
            journal.append(unit.key, attempts)
        spent += unit.cost
        reporter.attacking(spent, total)
    return done


def _targets(plan: AttackPlan) -> dict[str, Target]:
    original, pictures = plan.models[ORIGINAL], None
    if isinstance(original, PipelineSource):
        pictures = Pictures(original.model, original.spec, plan.judge, plan.concept, plan.seed)
    return {
        name: Target(name, source, pictures, plan.judge, plan.concept, plan.costs, plan.unrelated, plan.seed)
        for name, source in plan.models.items()
    }


def _by_attack(plan: AttackPlan, done: Mapping[str, list[Attempt]]) -> dict[str, dict[str, list[Attempt]]]:
    """attack -> model -> attempts in the prompts' order."""
    found: dict[str, dict[str, list[Attempt]]] = {}
    units: list[Unit] = plan.units()
    if missing := [unit.key for unit in units if unit.key not in done]:
        raise UserError(f"{len(missing)} of {len(units)} parts were not recorded. Use `--resume`.")
    for task in plan.tasks:
        found[task.label] = {name: [] for name in task.models}
    for unit in units:  # of one task and model in the order of their prompts
        found[unit.task.label][unit.model] += done[unit.key]
    return found


@contextlib.contextmanager
def _unchanged(sources: Mapping[str, Source]) -> Iterator[None]:
    """An attack that leaves a model other than it was is a bug, of ours or of a plug-in."""
    before = {name: _hashes(one) for name, one in sources.items()}
    yield
    changed = [name for name, one in sources.items() if _hashes(one) != before[name]]
    if changed:
        raise RuntimeError(f"an attack has changed the weights of {', '.join(changed)}")


def _hashes(source: Source) -> list[str]:
    """Of every network of a pipeline; none of what is no pipeline."""
    if not isinstance(source, PipelineSource):
        return []
    model = source.model
    networks = {id(one): one for one in (model.denoiser, *model.pipeline.components.values())}
    return [hash_module(one) for one in networks.values() if isinstance(one, torch.nn.Module)]


def _seconds_per_forward(source: Source) -> float | None:
    """Measured on a full batch; None for what is no pipeline."""
    if not isinstance(source, PipelineSource):
        return None
    model, size = source.model, source.batch_size
    conditions = model.with_guidance(source.text.of([UNCONDITIONAL] * size), source.spec.guidance_scale)
    timestep = model.new_scheduler(source.spec.num_inference_steps).timesteps[0]
    latents = torch.zeros(size, *model.latent_shape, device=model.device)
    with torch.no_grad():
        model.predict(latents, timestep, conditions)  # the first one warms up
        started = time.monotonic()
        model.predict(latents, timestep, conditions).sum().item()
    return (time.monotonic() - started) / size


def _evaluation(folder: str | Path | None, unlearned: Any, concept: str) -> Evaluation | None:
    """The evaluation of the same model: of the folder that was named, else of its run, where there is one."""
    if folder is not None:
        path = Path(folder).expanduser() / "evaluation.json"
        if not path.is_file():
            raise UserError(f"`--evaluation`: {folder} holds no evaluation.json. Name the folder of an evaluation.")
        found = read_evaluation(path)
        if not isinstance(found, Evaluation) or found.concept != concept:
            raise UserError(
                f"`--evaluation`: {path} is no evaluation of a model that forgot {concept!r}. Leave it out."
            )
        return found
    if not is_name(unlearned) or unlearned is None:
        return None
    path = Path(str(pipeline_of(unlearned))).parent / "evaluation.json"
    if run_of(unlearned) is None or not path.is_file():
        return None
    found = read_evaluation(path)
    return found if isinstance(found, Evaluation) and found.concept == concept else None


def _name(model: Any) -> str:
    if not is_name(model):
        return str(getattr(model, "__name__", type(model).__name__))
    return folder_name(str(model))


def _prompt_rows(plan: AttackPlan) -> list[tuple[str, str]]:
    """A table of the prompts, with its header, from which other ranks and a later attack read the same."""
    return [("prompt", "group"), *plan.prompts, *plan.worded]


def _reloadable(given: dict[str, Any]) -> AttackConfig:
    """The arguments of :func:`attack`, checked, as the config that repeats it from any working folder."""
    fields = AttackConfig.__dataclass_fields__
    output = Path(given["output"] or ".").expanduser().resolve()
    values = {key: given[key] for key in fields}
    values |= {key: whole_name(given[key]) for key in (ORIGINAL, UNLEARNED, GOLD, PLACEBO, "judge", "evaluation")}
    if values["prompts"] is not None:
        values["prompts"] = str(output / JOURNAL / "prompts.csv")
    if values["unrelated"] is not None and not isinstance(values["unrelated"], str):
        values["unrelated"] = ";".join(values["unrelated"])
    return AttackConfig(**values | {"output": str(output), "resume": False, "overwrite": False, "dry_run": False})
