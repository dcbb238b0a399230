"""What a training will do, known and said before its first step, and every check that it would fail by later."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .. import concepts, prompts
from ..distributed import ALONE, World
from ..errors import UserError
from ..methods import Method
from ..methods.recipe import EMPTY, UNCONDITIONAL, Concept, Defaults, Edit, Recipe
from ..methods.rules import Sum
from ..models.base import Model
from ..models.runtime import resolve_device
from ..models.schedulers import check_deterministic
from ..models.sketch import Blueprint, is_sketch
from ..worlds import get_world, world_with_model
from .bank import BankBudget, BankPlan, images_of, plan_bank
from .budget import Budget, plan_memory
from .concept import AUTO, held_out_concept, make_concept
from .config import TrainConfig
from .deepspeed_config import read_deepspeed
from .edit import check_readers, pooled_inputs
from .engine_deepspeed import DeepSpeedEngine, check_deepspeed
from .evidence import EvidencePlan, plan_evidence
from .export import check_export, unread_files
from .low_rank import AdapterPlan, with_default_adapter
from .memory import Workload
from .pictures import check_pictures
from .price import AUTO_WEIGHT, BOUND, priced
from .selection import GROUPS, Selection, load_mask, select_parameters
from .suppression import watched_layers


@dataclasses.dataclass(frozen=True)
class TrainPlan:
    """What a training will do, known before its first step.  Sizes in bytes, work in UNet evaluations of one sample.

    ``selection``: what may change; of it a saliency mask, where the settings ask for one, takes its share later.
    ``adapter``: what is trained in the place of the selected weights; None where they are.
    ``bank``: without rows for an edit.
    """

    method: Method
    settings: Defaults
    settings_of: str  # the family or bundled world whose defaults the method takes
    untried_on: str  # the one that the method has no defaults of its own for; empty where it has
    concept: Concept
    recipe: Recipe | Edit
    selection: Selection
    adapter: AdapterPlan | None
    has_mask_file: bool
    world: World
    deepspeed: Mapping[str, Any] | None  # the checked configuration
    accumulation: int
    memory: Budget | None  # only for a dry run, which it is for
    is_uncounted: bool  # whether a dry run could not count it
    trainable_parameters: int
    total_parameters: int
    bank: BankPlan
    is_priced: bool  # whether the retain weight is found while training
    search_trajectories: int  # of each embedding that is found first
    search_evaluations: int  # of what is found before training, or inside an edit
    loop_forwards: int
    seconds_per_evaluation: float | None  # None for a model without weights, and for an edit
    evidence: EvidencePlan | None  # None where the training ends by its steps alone
    cut: tuple[str, ...]  # prompts that take part and are longer than the model reads
    left_out: tuple[str, ...]  # files that hold the denoiser a second time and are not read
    pooled: tuple[str, ...] = ()  # of an edit: arguments by which text enters beside its states, which stay as they are

    @property
    def loop_evaluations(self) -> int:
        """Forward and backward of the student, a backward counted as two forwards."""
        return 3 * self.loop_forwards

    @property
    def trainable_bytes(self) -> int:
        return 4 * self.trainable_parameters

    def prompts(self) -> frozenset[str]:
        """Every prompt of the method; the empty one always: guidance leads away from it, and edits hold it."""
        return frozenset(_prompts_of(self.concept, self.recipe)) | {EMPTY}

    @property
    def lands(self) -> bool:
        """Whether the rate gets to 0 before the training ends on evidence.

        The steps in which it does are for what is held, so without such rows there are none.
        """
        holds = any(row.role == "retain" for row, _ in self.bank.assignments)
        return self.settings.lr_scheduler == "linear" and holds


def plan_training(config: TrainConfig, method: Method, model: Model, world: World = ALONE) -> TrainPlan:
    """Resolve settings and prompts, check them, count the work, and time one forward for the estimate.

    Raises UserError for all that can be known now: also for what only the export would fail by.
    """
    config = with_default_adapter(config, method)
    settings = _settings(config, method, model)
    is_priced = config.retain_weight == AUTO_WEIGHT
    accumulation = config.gradient_accumulation_steps or 1
    deepspeed = None
    if config.deepspeed is not None:
        deepspeed = read_deepspeed(
            Path(config.deepspeed).expanduser(),
            world_size=world.size,
            micro_batch_size=config.micro_batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            max_grad_norm=config.max_grad_norm,
            default_micro_batch_size=settings.micro_batch_size,
        )
        check_deepspeed(deepspeed, model.device)
        _check_placement(config, deepspeed)
        accumulation = deepspeed["gradient_accumulation_steps"]
        settings = dataclasses.replace(settings, micro_batch_size=deepspeed["train_micro_batch_size_per_gpu"])
    concept = make_concept(config, method, model, settings)
    recipe = method.recipe(concept)
    if is_priced:
        recipe = priced(method.name, recipe, settings.stop_residual)
    _check_engine(config, method, recipe, settings)
    if isinstance(recipe, Recipe):
        check_pictures(model, recipe.pictures)
    elif recipe.suppressions and not is_sketch(model):
        watched_layers(model)  # else only the edit itself would say so
    is_edit = isinstance(recipe, Edit)
    rows = Recipe([], Sum()) if isinstance(recipe, Edit) else recipe
    if config.trajectories is None:
        forget = sum(row.role == "forget" for row in rows.rows)
        settings = dataclasses.replace(settings, trajectories=max(settings.trajectories, forget))
    edit = recipe if isinstance(recipe, Edit) else recipe.start
    if edit is not None and edit.reads and config.trainable is None:
        settings = _with_readers(settings, model, is_alone=is_edit)
    names = select_parameters(model, settings.trainable)
    low_rank = AdapterPlan.of(config, method, model, names, drops_mask=settings.mask_density is not None)
    selection = Selection.of(model.denoiser, low_rank.adapter.weights if low_rank else names)
    trainable = low_rank.adapter.total if low_rank else selection.total
    if low_rank is not None:
        settings = dataclasses.replace(settings, mask_density=None)
    elif config.mask is not None:
        selection = load_mask(Path(config.mask).expanduser(), model)
        selection = selection.restrict(names) if config.trainable else selection
        trainable = selection.total
        settings = dataclasses.replace(settings, mask_density=None)
    elif settings.mask_density is not None:
        trainable = round(settings.mask_density * trainable)
    model.settle_denoiser(() if low_rank else selection.names)
    if edit is not None:
        check_readers(model, edit, selection.names, method.name, by=_selected_by(config))
    if config.gradient_checkpointing:
        model.checkpoint_gradients()
    check_export(model, selection)
    check_deterministic(model.pipeline.scheduler)
    settings = dataclasses.replace(settings, steps=settings.steps if rows.rows else 0)
    bank = plan_bank(
        model,
        rows,
        trajectories=settings.trajectories,
        num_inference_steps=settings.trajectory_steps,
        guidance_scale=config.trajectory_guidance_scale,
        seed=config.seed,
        precision=config.bank_precision,
    )
    if rows.rows and bank.trained_rows < world.size:
        raise UserError(
            f"there are more processes, {world.size}, than rows, {bank.trained_rows}. Use more `--trajectories`."
        )
    evidence = None
    if rows.rows and settings.steps and settings.stop_residual:
        measured = held_out_concept(config, method, model, concept)
        held = rows if measured is concept or rows.searches else method.recipe(measured)
        assert isinstance(held, Recipe)
        evidence = plan_evidence(
            model,
            held,
            until=settings.stop_residual,
            step_evaluations=3 * rows.rule.passes * settings.micro_batch_size * accumulation,
            guidance_scale=config.trajectory_guidance_scale,
            seed=config.seed,
        )
        if evidence is None and config.stop_residual:
            raise UserError(f"the method {method.name} has no target to reach. Leave `--stop-residual` out.")
    search_trajectories = -(-settings.trajectories // 8)
    rows_per_step = settings.micro_batch_size * accumulation
    loop_forwards = settings.steps * rows.rule.passes * rows_per_step
    if rows.inner:
        share = len({row.role for row in rows.rows})
        attacked = settings.steps - math.ceil(rows.inner.warm_up * settings.steps)
        loop_forwards += attacked * rows.inner.steps * -(-rows_per_step // share)
    search_evaluations = _search_evaluations(rows, bank, search_trajectories, settings.micro_batch_size)
    inside: list[BankPlan] = []
    if isinstance(recipe, Edit) and recipe.suppressions:
        inside = _inside_edit(config, model, recipe, settings)
        search_evaluations = sum(images.unet_evaluations for images in inside)
        loop_forwards = sum(one.steps for one in recipe.suppressions) * settings.micro_batch_size
    if rows.pursuit:  # a second backward of the forget rows, two thirds of a pass
        share = len({row.role for row in rows.rows})
        loop_forwards += math.ceil(settings.steps * -(-rows_per_step // share) * 2 / 3)
    memory = None
    if config.dry_run:
        device = resolve_device(config.device) if is_sketch(model) else model.device
        largest = max(inside, key=lambda images: images.rows, default=bank)
        work = _workload(config, device, selection, trainable, recipe, largest, evidence, settings, world, deepspeed)
        work = dataclasses.replace(work, rank=low_rank.adapter.rank if low_rank else None)
        memory = plan_memory(Blueprint.of_model(model), work, device, config.device_memory_gib)
    return TrainPlan(
        method=method,
        settings=settings,
        settings_of=method.key_of(*model.defaults_keys),
        untried_on="" if model.defaults_keys[0] in method.defaults else model.defaults_keys[0],
        concept=concept,
        recipe=recipe,
        selection=selection,
        adapter=low_rank,
        has_mask_file=config.mask is not None,
        world=world,
        deepspeed=deepspeed,
        accumulation=accumulation,
        memory=memory,
        is_uncounted=config.dry_run and memory is None,
        trainable_parameters=trainable,
        total_parameters=sum(parameter.numel() for parameter in model.denoiser.parameters()),
        bank=bank,
        is_priced=is_priced,
        search_trajectories=search_trajectories,
        search_evaluations=search_evaluations,
        loop_forwards=loop_forwards,
        seconds_per_evaluation=(
            None if is_edit or is_sketch(model) else _time_evaluation(model, settings.micro_batch_size)
        ),
        evidence=evidence,
        cut=tuple(model.too_long(sorted(_prompts_of(concept, recipe, bank)))),
        left_out=tuple(path.name for path in unread_files(model.source / model.denoiser_folder, model.variant)),
        pooled=(
            tuple(pooled_inputs(model, concept.forget_prompts[0], selection.names))
            if is_edit and not is_sketch(model)
            else ()
        ),
    )


def _inside_edit(config: TrainConfig, model: Model, edit: Edit, settings: Defaults) -> list[BankPlan]:
    """The images of everything that an edit has trained on the way."""
    budget = BankBudget.of(config, settings)
    return [budget.plan(model, images_of(one.places)) for one in edit.suppressions]


def _search_evaluations(recipe: Recipe, bank: BankPlan, trajectories: int, micro_batch_size: int) -> int:
    """What the searches cost at most: their trajectories, then forwards with a backward."""
    return sum(
        bank.points * trajectories * (2 + (search.neutral is not None)) + 3 * search.steps * micro_batch_size
        for search in recipe.searches
    )


def resolved(config: TrainConfig, plan: TrainPlan) -> TrainConfig:
    """The config with every default filled in and every path whole, as it is saved with the run.

    It makes the same run from any working folder.
    """
    settings = dataclasses.asdict(plan.settings)
    settings |= {"anchor": plan.concept.anchor, "options": _options(plan.settings.options)}
    settings |= {"dry_run": False, "resume": False, "overwrite": False}
    if plan.is_priced:
        settings["retain_weight"] = AUTO_WEIGHT
    if plan.adapter is not None:
        settings |= {"rank": plan.adapter.adapter.rank, "lora_alpha": plan.adapter.adapter.alpha}
    for name in ("output", "model", "lora", "parts", "mask", "deepspeed"):
        value = getattr(config, name)
        is_bundled = name == "model" and world_with_model(value) is not None
        if value is not None and not is_bundled and (name == "output" or Path(value).expanduser().exists()):
            settings[name] = str(Path(value).expanduser().resolve())
    settings["forget"] = concepts.from_anywhere(config.forget)
    for name in ("forget_prompts", "retain_prompts", "evaluation_prompts"):
        value = getattr(config, name)
        if value is not None and value not in ("none", AUTO) and get_world(value) is None:
            settings[name] = prompts.from_anywhere(value)
    return dataclasses.replace(config, **settings)


def _options(options: Any) -> dict[str, Any]:
    """A method's options as they are saved: paths whole."""
    fields = dataclasses.fields(options) if options is not None else ()
    values = {field.name: getattr(options, field.name) for field in fields}
    paths = [field.name for field in fields if field.metadata.get("path") and values[field.name]]
    return values | {name: str(Path(values[name]).expanduser().resolve()) for name in paths}


def _prompts_of(concept: Concept, recipe: Recipe | Edit, bank: BankPlan | None = None) -> set[str]:
    """The prompts of a method, not the unconditional; with ``bank``, those that have a trajectory in it."""
    if isinstance(recipe, Edit):
        return {*concept.forget_prompts, *concept.anchors.values(), *concept.retain_prompts}
    rows = recipe.rows if bank is None else [row for row, _ in bank.assignments]
    return set(dataclasses.replace(recipe, rows=rows).prompts()) - {UNCONDITIONAL}


def _settings(config: TrainConfig, method: Method, model: Model) -> Defaults:
    """The method's defaults for this model, overridden by what the user set."""
    defaults = method.defaults_for(*model.defaults_keys)
    names = [field.name for field in dataclasses.fields(Defaults) if field.name != "options"]
    chosen = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    if config.retain_weight == AUTO_WEIGHT:
        if config.stop_residual == 0:
            raise UserError("`--retain-weight auto` keeps no more of the concept than `--stop-residual`: above 0.")
        bound = config.stop_residual or defaults.stop_residual or BOUND
        chosen = {name: value for name, value in chosen.items() if name != "retain_weight"} | {"stop_residual": bound}
    if defaults.trainable in GROUPS and defaults.trainable not in model.groups:
        defaults = dataclasses.replace(defaults, trainable=model.default_group)
    return method.with_options(dataclasses.replace(defaults, **chosen), config.options)


def _with_readers(settings: Defaults, model: Model, is_alone: bool) -> Defaults:
    """Defaults of another family may select nothing that reads the text: then what does in this one.

    ``is_alone``: in the place of what they select, not beside it.
    """
    if not model.text_readers:
        return settings
    readers = select_parameters(model, model.text_readers)
    if not set(readers).isdisjoint(select_parameters(model, settings.trainable)):
        return settings
    wanted = model.text_readers if is_alone else f"{settings.trainable},{model.text_readers}"
    return dataclasses.replace(settings, trainable=wanted)


def _selected_by(config: TrainConfig) -> str:
    """The flags that select what may change; the mask's share of what both hold where both are given."""
    flags = {"`--mask`": config.mask, "`--trainable`": config.trainable}
    return " within ".join(flag for flag, value in flags.items() if value is not None) or "`--trainable`"


def _check_placement(config: TrainConfig, deepspeed: Mapping[str, Any]) -> None:
    """UserError where DeepSpeed's file and our flags both say where weights lie, or disagree on their type."""
    zero = deepspeed["zero_optimization"]
    own = [name for name in ("offload_param", "offload_optimizer") if zero.get(name, {}).get("device") == "cpu"]
    if config.offload and own:
        raise UserError(
            f"`--offload` and `{own[0]}` of {config.deepspeed} both move weights to the host and back. Give one."
        )
    if config.weights_dtype == "bf16" and not deepspeed.get("bf16", {}).get("enabled"):
        raise UserError(
            f'`--weights-dtype bf16` with DeepSpeed needs `"bf16": {{"enabled": true}}` in {config.deepspeed}: '
            "else DeepSpeed makes the weights float32 again."
        )


def _check_engine(config: TrainConfig, method: Method, recipe: Recipe | Edit, settings: Defaults) -> None:
    """UserError for settings that the method's kind has no use for, and for a rule that the engine cannot do."""
    if isinstance(recipe, Edit):
        if config.deepspeed is not None:
            raise UserError(
                f"the method {method.name} computes its weights and trains nothing. Leave `--deepspeed` out."
            )
        if config.is_adapted:
            raise UserError(
                f"the method {method.name} computes whole weights, not factors of them. Leave `--adapter` out."
            )
        if settings.steps:
            raise UserError(f"the method {method.name} computes its weights in no steps. Leave `--steps` out.")
    elif config.is_adapted and (recipe.start is not None or recipe.elastic):
        what = "holds each weight to where it started" if recipe.elastic else "edits whole weights before it trains"
        raise UserError(f"the method {method.name} {what}, which an adapter has not. Leave `--adapter` out.")
    elif config.deepspeed is not None and (recipe.elastic or recipe.inner or recipe.pursuit):
        what = "holds each weight to where it started" if recipe.elastic else "attacks the student in every step"
        raise UserError(
            f"the method {method.name} {what}, which is not possible with DeepSpeed. Leave `--deepspeed` out."
        )
    elif recipe.rule.projects and config.deepspeed is not None and not DeepSpeedEngine.can_project:
        raise UserError(
            f"the method {method.name} projects gradients on each other, which is not possible with DeepSpeed. Leave "
            "`--deepspeed` out."
        )


def _workload(
    config: TrainConfig,
    device: torch.device,
    selection: Selection,
    selected: int,
    recipe: Recipe | Edit,
    bank: BankPlan,
    evidence: EvidencePlan | None,
    settings: Defaults,
    world: World,
    deepspeed: Mapping[str, Any] | None,
) -> Workload:
    rule = None if isinstance(recipe, Edit) else recipe.rule
    on_gpu = device.type == "cuda" or config.device_memory_gib is not None  # there is one, or one is planned for
    used = len(recipe.prompts()) if isinstance(recipe, Recipe) else 2
    if evidence is not None:
        used += len(evidence.recipe.prompts())
    return Workload(
        trained=tuple(selection.names),
        selected=selected,
        is_masked=bool(selection.bits) or settings.mask_density is not None,
        makes_mask=settings.mask_density is not None,
        is_edit=rule is None,
        micro_batch_size=settings.micro_batch_size,
        bank_batch_size=config.bank_batch_size,
        trajectories=len(bank.assignments),
        branches=bank.branches,
        rows=bank.rows + (evidence.bank.rows if evidence is not None else 0),
        prompts=used,
        gradients=2 if rule is not None and rule.projects else 1,
        is_held=isinstance(recipe, Recipe) and bool(recipe.elastic),
        mixed_precision=config.mixed_precision,
        bank_precision=config.bank_precision,
        weights_dtype=config.weights_dtype,
        gradient_checkpointing=config.gradient_checkpointing,
        offload=config.offload and on_gpu,
        overlaps=on_gpu,
        evaluation_batch_size=config.evaluation_batch_size,
        decode_batch_size=config.decode_batch_size,
        world_size=world.size,
        deepspeed=deepspeed,
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
