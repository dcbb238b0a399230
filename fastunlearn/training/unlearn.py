"""What other tools call, and what the command line calls, to train: :func:`unlearn`.

It takes a config, does its job in one output folder, and reports progress to a :class:`Reporter`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .. import prompts
from ..config import from_yaml, to_yaml
from ..distributed import ALONE, World, join, world_of_environment
from ..errors import UserError
from ..evaluation.evaluator import evaluate_models
from ..evaluation.plan import default_metric, file_groups, world_groups
from ..evaluation.results import EvaluationReport, write_results
from ..files.atomic import whole_folder, write_text
from ..files.run_folder import check_output, claimed, claimed_file, files_below, own, prepare_output
from ..files.weights import hash_pipeline, pipeline_files
from ..methods import Method, get_method
from ..methods.recipe import Alternate, Concept, Defaults
from ..metrics.distances import Distance, load_perceptual
from ..models.base import Model
from ..models.loading import load_model, resolve_source
from ..models.runtime import resolve_device, versions
from ..models.sampling import SamplerSpec
from ..models.schedulers import check_deterministic
from ..progress import Reporter
from ..prompts import PromptGroups
from ..schema import RunRecord
from ..worlds import get_world
from .bank import Bank, BankPlan, build_bank, plan_bank
from .config import ApplyConfig, MaskConfig, TrainConfig
from .deepspeed_config import read_deepspeed
from .engine import Engine, TorchEngine
from .engine_deepspeed import DeepSpeedEngine, check_deepspeed
from .export import apply_delta
from .memory import MemoryEstimate, estimate_memory, measure_activations
from .plan import TrainPlan, plan_lines
from .selection import GROUPS, GradMask, load_mask, make_mask, select_parameters
from .trainer import Schedule, Trainer


def unlearn(config: TrainConfig, reporter: Reporter | None = None) -> Path | None:
    """Train as configured and write the run's folder.

    Returns the folder of the unlearned pipeline, or the file of its delta, or None after a dry run.  Raises UserError
    for anything wrong in the settings, the prompts or the model, and :class:`.trainer.Interrupted` when
    asked to stop.
    """
    reporter = reporter or Reporter()
    folder = Path(config.output).expanduser()
    world = world_of_environment()
    if config.dry_run and config.num_processes is not None:
        world = World(size=config.num_processes)  # planned, not started
    if world.size > 1 and config.deepspeed is None:
        raise UserError(f"{world.size} processes need `--deepspeed FILE`, which says how they divide the work.")
    with contextlib.ExitStack() as stack:
        if world.is_main:
            check_output(folder, "train", overwrite=config.overwrite, resume=config.resume)
            if not config.dry_run:
                stack.enter_context(claimed(folder))
        return _unlearn(config, world, folder, reporter)


def _unlearn(config: TrainConfig, world: World, folder: Path, reporter: Reporter) -> Path | None:
    method = get_method(config.method)
    model = load_model(config.model, _device_of(config, world))
    plan = plan_training(config, method, model, world)
    groups = _evaluation_groups(config, model)
    metric = load_perceptual(default_metric(model), model.device) if groups else None  # fails early or not at all
    reporter.plan(plan.method.name, plan_lines(plan))
    if config.dry_run:
        return None
    if config.resume:
        _check_same_run(config, folder)
    seconds = {}

    mask = plan.mask or _mask_of_run(config, folder, model)
    if mask is None and plan.settings.mask_density is not None:
        reporter.stage("mask")
        started = time.monotonic()
        mask = _make_mask(config, plan, model)
        seconds["mask_s"] = round(time.monotonic() - started, 3)

    reporter.stage("bank")
    started = time.monotonic()
    bank = build_bank(model, plan.recipe, plan.bank)
    seconds["bank_s"] = round(time.monotonic() - started, 3)

    # Only now, so that nothing is left, or lost, where a bank cannot be made or is not waited for.
    if plan.deepspeed is not None:
        join(world, model.device)
        world.barrier()  # until all have looked at the folder
    if world.is_main:
        prepare_output(folder, "train", overwrite=config.overwrite, resume=config.resume)
        names = (path.relative_to(model.source).as_posix() for path in pipeline_files(model.source))
        own(folder, "train", [f"model/{name}" for name in names])
        write_text(folder / "config.yaml", to_yaml(_resolved(config, plan)))
        if mask is not None:
            mask.save(folder / "mask.safetensors")

    reporter.stage("training")
    started = time.monotonic()
    exported = train(model, plan, bank, mask, config, folder, reporter)
    seconds["training_s"] = round(time.monotonic() - started, 3)
    if not world.is_main:
        return exported
    unlearned = folder / "model"
    with contextlib.ExitStack() as scratch:
        if config.save == "delta":
            unlearned = Path(scratch.enter_context(tempfile.TemporaryDirectory()))
            apply_delta(model.source, exported, unlearned)
        _run_record(config, plan, model, unlearned, seconds).write(folder / "run.json")
        _evaluate_run(config, plan, groups, metric, unlearned, folder, reporter)
    return exported


def _evaluate_run(
    config: TrainConfig,
    plan: TrainPlan,
    groups: PromptGroups | None,
    metric: Distance | None,
    unlearned: Path,
    folder: Path,
    reporter: Reporter,
) -> None:
    if groups and metric:
        reporter.stage("evaluation")
        # The original is loaded afresh: the model in memory has been trained.
        result = evaluate_models(
            load_model(config.model, config.device),
            {config.method: load_model(str(unlearned), config.device)},
            groups,
            metric,
            SamplerSpec(mixed_precision=config.mixed_precision),
            describe={config.method: describe_run(config)},
            on_progress=reporter.scoring,
        )
        write_results(folder, EvaluationReport(result, groups, unseen=_unseen(plan, groups)))


def mask(config: MaskConfig, reporter: Reporter | None = None) -> GradMask:
    """Find the weights that matter most for a concept and write their mask to a file; see :func:`masks.make_mask`."""
    reporter = reporter or Reporter()
    path = Path(config.output).expanduser()
    if path.is_dir() or (path.exists() and not config.overwrite):
        kind = "is a folder. Name a file" if path.is_dir() else "exists. Use another name or `--overwrite`"
        raise UserError(f"`--output` {path} {kind}.")
    if not path.parent.is_dir():
        raise UserError(f"`--output` {path}: the folder {path.parent} does not exist. Make it first.")
    with claimed_file(path):
        return _mask(config, path, reporter)


def _mask(config: MaskConfig, path: Path, reporter: Reporter) -> GradMask:
    model = load_model(config.model, config.device)
    defaults = get_method("salun").defaults_for(model.defaults_key)
    forget = _forget_prompts(config, model)
    names = select_parameters(model, config.trainable)
    check_deterministic(model.pipeline.scheduler)
    reporter.stage("mask")
    result = make_mask(
        model,
        forget,
        names,
        density=config.density,
        granularity=config.granularity,
        trajectories=config.trajectories or defaults.trajectories,
        num_inference_steps=config.trajectory_steps,
        trajectory_guidance_scale=config.trajectory_guidance_scale,
        micro_batch_size=config.micro_batch_size or defaults.micro_batch_size,
        seed=config.seed,
        mixed_precision=config.mixed_precision,
    )
    result.save(path)
    return result


def apply(config: ApplyConfig) -> Path:
    """Rebuild an unlearned pipeline from its original and a delta; returns its folder."""
    folder = Path(config.output).expanduser().resolve()
    source = resolve_source(config.model)
    if folder == source:
        raise UserError(f"`--output` {folder} is the original itself. Name another folder.")
    check_output(folder, "apply", overwrite=config.overwrite)
    with claimed(folder), whole_folder(folder) as unfinished:
        apply_delta(source, Path(config.delta).expanduser(), unfinished)
        own(unfinished, "apply", files_below(unfinished))
    return folder


def plan_training(config: TrainConfig, method: Method, model: Model, world: World = ALONE) -> TrainPlan:
    """Resolve settings and prompts, check them, count the work, and time one forward for the estimate."""
    settings = _settings(config, method, model)
    accumulation = config.gradient_accumulation_steps or 1
    deepspeed = None
    if config.deepspeed is not None:
        deepspeed = read_deepspeed(
            Path(config.deepspeed),
            world_size=world.size,
            micro_batch_size=config.micro_batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            max_grad_norm=config.max_grad_norm,
            default_micro_batch_size=settings.micro_batch_size,
        )
        check_deepspeed(deepspeed, model.device)
        accumulation = deepspeed["gradient_accumulation_steps"]
        settings = dataclasses.replace(settings, micro_batch_size=deepspeed["train_micro_batch_size_per_gpu"])
    concept = _concept(config, method, model, settings)
    recipe = method.recipe(concept)
    names = select_parameters(model, settings.trainable)
    parameters = dict(model.denoiser.named_parameters())
    trainable = sum(parameters[name].numel() for name in names)
    mask = None
    if config.mask is not None:
        mask = load_mask(Path(config.mask), model)
        mask = mask.restrict(names if config.trainable else mask.names)
        names = mask.names
        trainable = sum(mask.count(name) for name in names)
        settings = dataclasses.replace(settings, mask_density=None)
    elif settings.mask_density is not None:
        trainable = round(settings.mask_density * trainable)
    steps = settings.steps if recipe.rows else 0
    check_deterministic(model.pipeline.scheduler)
    updates = 2 if isinstance(recipe.rule, Alternate) else 1
    bank = plan_bank(
        model,
        recipe,
        trajectories=settings.trajectories,
        num_inference_steps=config.trajectory_steps,
        guidance_scale=config.trajectory_guidance_scale,
        seed=config.seed,
    )
    if recipe.rows and bank.rows < world.size:
        raise UserError(f"there are more processes, {world.size}, than rows, {bank.rows}. Use more `--trajectories`.")
    return TrainPlan(
        method=method,
        settings=dataclasses.replace(settings, steps=steps),
        untried_on="" if model.defaults_key in method.defaults else model.family,
        concept=concept,
        recipe=recipe,
        names=tuple(names),
        mask=mask,
        world=world,
        deepspeed=deepspeed,
        accumulation=accumulation,
        memory=_memory(config, model, names, trainable, bank, settings, world, deepspeed) if config.dry_run else None,
        trainable_parameters=trainable,
        total_parameters=sum(parameter.numel() for parameter in parameters.values()),
        trainable_bytes=4 * trainable,
        bank=bank,
        loop_forwards=steps * updates * settings.micro_batch_size * accumulation,
        seconds_per_evaluation=_time_evaluation(model, settings.micro_batch_size),
    )


def _memory(
    config: TrainConfig,
    model: Model,
    names: list[str],
    selected: int,
    bank: BankPlan,
    settings: Defaults,
    world: World,
    deepspeed: Mapping[str, Any] | None,
) -> MemoryEstimate:
    parameters = dict(model.denoiser.named_parameters())
    in_bf16 = deepspeed is not None and deepspeed.get("bf16", {}).get("enabled", False)
    precision = "bf16" if in_bf16 else config.mixed_precision
    parts = [part for part in model.pipeline.components.values() if isinstance(part, torch.nn.Module)]
    rows = settings.micro_batch_size
    return estimate_memory(
        total=sum(parameter.numel() for parameter in parameters.values()),
        trainable=sum(parameters[name].numel() for name in names),
        selected=selected,
        is_masked=config.mask is not None or settings.mask_density is not None,
        world_size=world.size,
        deepspeed=deepspeed,
        other_parts=sum(p.numel() for part in parts if part is not model.denoiser for p in part.parameters()),
        activations=rows * measure_activations(model, names, precision),
        bank=bank.rows * (1 + bank.branches) * math.prod(model.latent_shape) * 4,
    )


@torch.no_grad()
def _time_evaluation(model: Model, batch_size: int) -> float:
    """Seconds per sample of one forward, the second of two."""
    latents = torch.zeros(batch_size, *model.latent_shape, device=model.device)
    timesteps = torch.zeros(batch_size, dtype=torch.int64, device=model.device)
    conditions = model.encode([""]).rows([0] * batch_size)
    for _ in range(2):
        started = time.monotonic()
        model.predict(latents, timesteps, conditions).sum().item()
        seconds = time.monotonic() - started
    return seconds / batch_size


def train(
    model: Model,
    plan: TrainPlan,
    bank: Bank,
    mask: GradMask | None,
    config: TrainConfig,
    folder: Path,
    reporter: Reporter,
) -> Path:
    """Train ``model.denoiser`` on a bank, leave the trained weights in it, export them and return where to."""
    torch.manual_seed(config.seed)
    settings = plan.settings
    engine = _engine(model, plan, mask, config)
    schedule = Schedule(
        steps=settings.steps,
        micro_batch_size=settings.micro_batch_size,
        seed=config.seed,
        log_every=config.log_every,
        checkpoint_every=config.checkpoint_every,
        lr_scheduler=settings.lr_scheduler,
    )
    trainer = Trainer(model, bank, plan.recipe.rule, engine, schedule, folder)
    if config.resume:
        trainer.resume()
    trainer.run(lambda step, metrics: reporter.training(step, settings.steps, metrics))
    exported = folder / ("delta.safetensors" if config.save == "delta" else "model")
    engine.export(model, exported, config.save)
    engine.close()
    return exported


def _engine(model: Model, plan: TrainPlan, mask: GradMask | None, config: TrainConfig) -> Engine:
    names = list(plan.names) if mask is None else mask.names
    options: dict[str, Any] = {
        "learning_rate": plan.settings.learning_rate,
        "weight_decay": config.weight_decay,
        "mixed_precision": config.mixed_precision,
        "bits": None if mask is None else mask.bits,
        "clip_scope": config.clip_scope,
    }
    if plan.deepspeed is not None:
        return DeepSpeedEngine(model.denoiser, names, settings=plan.deepspeed, world=plan.world, **options)
    return TorchEngine(
        model.denoiser, names, max_grad_norm=config.max_grad_norm, accumulation=plan.accumulation, **options
    )


def _device_of(config: TrainConfig, world: World) -> torch.device:
    """This process' device: of several CUDA devices, that of its number on the machine."""
    device = resolve_device(config.device)
    if device.type == "cuda" and world.size > 1:
        if world.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {world.local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}. "
                "Start fewer processes."
            )
        device = torch.device("cuda", world.local_rank)
        torch.cuda.set_device(device)
    return device


def _mask_of_run(config: TrainConfig, folder: Path, model: Model) -> GradMask | None:
    """The mask that a run to be resumed has made, if it came that far."""
    path = folder / "mask.safetensors"
    return load_mask(path, model) if config.resume and path.is_file() else None


def _make_mask(config: TrainConfig, plan: TrainPlan, model: Model) -> GradMask:
    settings = plan.settings
    assert settings.mask_density is not None
    return make_mask(
        model,
        plan.concept.forget_prompts,
        plan.names,
        density=settings.mask_density,
        granularity=config.mask_granularity,
        trajectories=settings.trajectories,
        num_inference_steps=config.trajectory_steps,
        trajectory_guidance_scale=config.trajectory_guidance_scale,
        micro_batch_size=settings.micro_batch_size,
        seed=config.seed,
        mixed_precision=config.mixed_precision,
    )


def _settings(config: TrainConfig, method: Method, model: Model) -> Defaults:
    """The method's defaults for this model, overridden by what the user set."""
    defaults = method.defaults_for(model.defaults_key)
    names = [field.name for field in dataclasses.fields(Defaults)]
    chosen = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    for name in ("negative_guidance", "kappa"):
        if name in chosen and getattr(defaults, name) is None:
            raise UserError(f"`--{name.replace('_', '-')}` is no setting of the method {method.name}. Leave it out.")
    if defaults.trainable in GROUPS and defaults.trainable not in model.groups:
        defaults = dataclasses.replace(defaults, trainable=model.default_group)
    return dataclasses.replace(defaults, **chosen)


def _concept(config: TrainConfig, method: Method, model: Model, settings: Defaults) -> Concept:
    """What to forget, what takes its place, what to keep: from the user, else from the bundled world."""
    word = config.forget.strip()
    forget = _forget_prompts(config, model, alone=method.concept_alone)
    if config.retain_prompts:
        retain = prompts.parse_prompts(config.retain_prompts)
    else:
        retain = model.world.prompts_to_train(word)[1] if model.world else []
    prompts.check_disjoint(forget, retain)
    if method.needs_retain and not retain:
        raise UserError(
            f"the method {method.name} needs retain prompts: give `--retain-prompts` a FILE or 'TEXT;TEXT'."
        )
    anchor = config.anchor
    if anchor is not None and method.anchor == "none":
        raise UserError(f"the method {method.name} takes no `--anchor`. Leave it out.")
    if anchor is None and method.anchor == "needed":
        anchor = model.world.anchor(word) if model.world else ""
    anchors = {}
    if anchor is not None:
        choices = [text.strip() for text in anchor.split(";") if text.strip()] or [""]
        draw = random.Random(config.seed)
        anchors = {prompt: prompts.substitute(prompt, word, draw.choice(choices)) for prompt in forget}
    same = [prompt for prompt, replaced in anchors.items() if replaced.lower() == prompt.lower()]
    if same:
        raise UserError(f"`--anchor` {anchor!r} leaves the forget prompt {same[0]!r} as it is. Name something else.")
    return Concept(anchor, tuple(forget), anchors, tuple(retain), settings)


def _forget_prompts(config: TrainConfig | MaskConfig, model: Model, *, alone: bool = False) -> list[str]:
    """The user's prompts that show the concept, else the bundled world's, else, or if ``alone``, the bare word."""
    word = config.forget.strip()
    if config.forget_prompts:
        forget = prompts.parse_prompts(config.forget_prompts)
    else:
        own = model.world.prompts_to_train(word)[0] if model.world else []  # refuses a word it does not know
        forget = [word] if alone or not own else own
    for prompt in forget:
        tokens = model.count_tokens(prompt)
        if tokens == 0:
            raise UserError(f"the tokenizer turns the forget prompt {prompt!r} into nothing. Use other words.")
        if tokens > model.max_tokens:
            raise UserError(
                f"the forget prompt {prompt!r} has {tokens} tokens and the model reads {model.max_tokens}. Shorten it."
            )
    return forget


def _evaluation_groups(config: TrainConfig, model: Model) -> PromptGroups | None:
    choice = config.evaluation_prompts or (model.world.name if model.world else "none")
    if choice == "none":
        return None
    if (world := get_world(choice)) is None:
        return file_groups(choice, config.forget if model.world else None)
    if world is not model.world:
        raise UserError(f"`--evaluation-prompts {choice}` are the bundled model's. Give a prompt file, or none.")
    return world_groups(world, config.forget)


def _unseen(plan: TrainPlan, groups: PromptGroups) -> bool:
    """Whether no retain prompt of the evaluation took part in training."""
    return not set(groups.retain) & set(plan.recipe.prompts())


def _resolved(config: TrainConfig, plan: TrainPlan) -> TrainConfig:
    """The config with every default filled in, as it is saved with the run."""
    settings = dataclasses.asdict(plan.settings)
    settings |= {"anchor": plan.concept.anchor, "dry_run": False, "resume": False, "overwrite": False}
    return dataclasses.replace(config, **settings)


def _check_same_run(config: TrainConfig, folder: Path) -> None:
    """A resumed run must be asked for the same thing; how often it logs or saves may change."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"`--resume`: {folder} holds no run. Leave the flag out to start one.")
    before = from_yaml(path, TrainConfig)
    free = {"resume", "overwrite", "dry_run", "output", "log_every", "checkpoint_every", "evaluation_prompts", "device"}
    # How the rows of a step are divided may change; how many they are, a checkpoint knows.
    free |= {"num_processes", "deepspeed", "micro_batch_size", "gradient_accumulation_steps"}
    for field in dataclasses.fields(TrainConfig):
        now, then = getattr(config, field.name), getattr(before, field.name)
        if field.name not in free and now is not None and now != then:
            raise UserError(
                f"`--resume`: the run in {folder} has {field.name} = {then!r}, now it is {now!r}. "
                "Give the same settings, or another `--output`."
            )


def _run_record(
    config: TrainConfig, plan: TrainPlan, model: Model, exported: Path, seconds: dict[str, float]
) -> RunRecord:
    return RunRecord(
        **describe_run(config),
        versions=versions(),
        device=model.device.type,
        threads=torch.get_num_threads(),
        hashes={"original": hash_pipeline(model.source), "unlearned": hash_pipeline(exported)},
        trainable_parameters=plan.trainable_parameters,
        total_parameters=plan.total_parameters,
        rows=plan.bank.rows,
        unet_evaluations={"bank": plan.bank.unet_evaluations, "loop": plan.loop_evaluations},
        seconds=seconds,
    )


def describe_run(config: TrainConfig) -> dict[str, Any]:
    """What a run's evaluation says of the run."""
    return {
        "method": config.method,
        "concept": config.forget,
        "model": config.model,
        "is_reconstruction": get_method(config.method).is_reconstruction,
    }
