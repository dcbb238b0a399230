"""Makes a model forget: :func:`unlearn` is what other tools and the command line call.

It plans, makes the training rows, trains and exports, or edits and exports, and evaluates, in one output folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..config import to_yaml
from ..distributed import World, device_of, join, take_share_of_cores, world_of_environment
from ..errors import UserError
from ..files.atomic import write_json, write_text
from ..files.run_folder import check_output, claimed, own, prepare_output
from ..files.weights import pipeline_files
from ..methods import get_method
from ..methods.recipe import Edit, Recipe, Suppression
from ..models.base import Model
from ..models.loading import load_model
from ..models.options import ModelOptions
from ..models.placement import NOTHING_TO_OFFLOAD, Placement
from ..progress import Reporter
from .adversary import with_found
from .ancestors import ancestors_of
from .bank import Bank, BankBudget, build_bank
from .budget import sketch_of_large
from .conclude import Scoring, Work, conclude
from .config import TrainConfig
from .edit import edit_weights, put_weights
from .evidence import Evidence
from .export import export, exported_to
from .fit import fit
from .inputs import config_of, kept_folder, named_source
from .low_rank import with_default_adapter
from .plan import TrainPlan, plan_training, resolved
from .plan_words import plan_lines
from .result import UnlearnResult
from .resume import KEY, check_same_run, check_settings, run_key
from .saliency import concept_gradient, make_mask
from .selection import Selection, load_mask, save_mask
from .suppression import suppressed


def unlearn(
    model: Any,
    concept: str | None = None,
    method: str = "ovw",
    *,
    output: str | Path | None = None,
    reporter: Reporter | None = None,
    **settings: Any,
) -> UnlearnResult:
    """Make a model forget ``concept`` and write the run's folder.

    ``model``: a name or folder as for :func:`load_model`; or a loaded diffusers pipeline, which stays as it is; or a
    :class:`TrainConfig`, which says everything, so that nothing but ``reporter`` may stand beside it.  ``output``: the
    run's folder; without it a temporary one is made, which is kept.  ``settings``: the fields of :class:`TrainConfig`,
    and the method's own options by their names.

    Raises UserError for anything wrong in the settings, the prompts or the model, and :class:`.trainer.Interrupted`
    when asked to stop.
    """
    reporter = reporter or Reporter()
    with contextlib.ExitStack() as stack:
        if isinstance(model, TrainConfig):
            if concept is not None or output is not None or settings:
                raise UserError("the config says everything: give nothing but `reporter` beside it.")
            config = model
        else:
            output = stack.enter_context(kept_folder()) if output is None else output
            config = config_of(model, concept, method, output, settings)
        config = with_default_adapter(config, get_method(config.method))
        source, name = stack.enter_context(named_source(model, config))
        folder = Path(config.output).expanduser()
        world = world_of_environment()
        take_share_of_cores(world)
        if config.dry_run and config.num_processes is not None:
            world = World(size=config.num_processes)  # planned, not started
        if config.device_memory_gib is not None and not config.dry_run:
            raise UserError("`--device-memory-gib` is what `--dry-run` plans for: give both.")
        if world.size > 1 and config.deepspeed is None:
            raise UserError(f"{world.size} processes need `--deepspeed FILE`, which says how they divide the work.")
        if world.is_main:
            check_output(folder, "train", overwrite=config.overwrite, resume=config.resume)
            if not config.dry_run:
                stack.enter_context(claimed(folder))
        return _Run(config, world, folder, reporter, source, name).unlearn()


@dataclasses.dataclass
class _Run:
    """One run.  ``source``: what to load; ``name``: what it is called in records."""

    config: TrainConfig
    world: World
    folder: Path
    reporter: Reporter
    source: str
    name: str
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    def unlearn(self) -> UnlearnResult:
        config, folder = self.config, self.folder
        method = get_method(config.method)
        if config.resume:
            check_settings(config, folder)
        device = device_of(self.world, config.device)
        self.reporter.stage("loading")
        model = self._model(device)
        model.name = self.name
        plan = plan_training(config, method, model, self.world)
        scoring = Scoring.of(config, model)  # fails early or not at all
        self.reporter.plan(method.name, plan_lines(plan))
        if config.offload and device.type == "cpu" and config.device_memory_gib is None:
            self.reporter.note(NOTHING_TO_OFFLOAD)
        if config.dry_run:
            return UnlearnResult(folder, None, None, prompts=plan.prompts())
        original = model.hash_files()
        ancestors = ancestors_of(model, original)
        key = run_key(config, plan, original)
        if config.resume:
            check_same_run(key, folder)
        selection = self._selection(plan, model)
        bank, evidence, edited = None, None, None
        if isinstance(plan.recipe, Edit):
            with self._stage("edit"):
                gradient, attention = partial(self._gradient, plan, model), partial(self._suppressed, plan, model)
                edited = edit_weights(model, plan.recipe, selection, gradient, attention)
            self.reporter.edited(edited.facts)
        else:
            bank, evidence = self._bank(plan.recipe, plan, model)
            self._start(plan.recipe, plan, model, selection)
        self._begin(plan, model, selection, key)
        exported = exported_to(config, folder)
        ending = None
        if edited is not None:
            dtypes = export(model, exported, config.save, edited.values, edited.selection)
            put_weights(model, edited.values, edited.selection, dtypes)
        else:
            assert bank is not None
            if plan.adapter is not None:  # only now: the bank is the teacher's
                about = {"base": original, "method": config.method, "concept": config.forget}
                selection = plan.adapter.begin(model, seed=config.seed, **about)
            with self._stage("training"):
                ending = fit(model, plan, bank, evidence, selection, config, folder, self.reporter)
        bank = evidence = None
        model.discard()
        if not self.world.is_main:
            return UnlearnResult(folder, exported, None, prompts=plan.prompts())
        facts = edited.facts if edited is not None else {}
        work = Work(original, ancestors, self.seconds, ending, facts)
        record = conclude(config, plan, model, exported, work, scoring, self.reporter)
        return UnlearnResult(folder, exported, record, str(model.source), plan.prompts())

    def _model(self, device: torch.device) -> Model:
        config = self.config
        options = ModelOptions.of(config)
        if self.source != config.model:  # a folder that was made of it
            options = dataclasses.replace(options, parts=None)
        if config.dry_run and (sketch := sketch_of_large(self.source, options, config.weights_dtype)):
            return sketch
        placement = Placement.of(config.weights_dtype, device, offload=config.offload)
        return load_model(self.source, device, options, placement=placement)

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        self.reporter.stage(name)
        started = time.monotonic()
        yield
        self.seconds[f"{name}_s"] = round(time.monotonic() - started, 3)

    def _bank(self, recipe: Recipe, plan: TrainPlan, model: Model) -> tuple[Bank, Evidence | None]:
        """The rows, and those that are held out, after what must be found for them."""
        config, held = self.config, plan.evidence
        if recipe.searches:
            budget = dataclasses.replace(BankBudget.of(config, plan.settings), trajectories=plan.search_trajectories)
            with self._stage("search"):
                recipe = with_found(model, recipe, budget, partial(self.reporter.working, "search"))
            if held is not None:
                found = dataclasses.replace(held.recipe, embeddings=recipe.embeddings, searches=())
                held = dataclasses.replace(held, recipe=found)
        with self._stage("bank"):
            batch = config.bank_batch_size
            told = partial(self.reporter.working, "bank")
            bank = build_bank(model, recipe, plan.bank, micro_batch_size=batch, on_progress=told)
            return bank, Evidence(model, held, batch) if held else None

    def _start(self, recipe: Recipe, plan: TrainPlan, model: Model, selection: Selection) -> None:
        """Edit the weights that training starts from.  A function of the model, so the same for a run that resumes."""
        if recipe.start is None:
            return
        with self._stage("edit"):
            start = edit_weights(model, recipe.start, selection, lambda: self._gradient(plan, model))
            put_weights(model, start.values, start.selection, dict.fromkeys(start.values, torch.float32))

    def _gradient(self, plan: TrainPlan, model: Model) -> Mapping[str, torch.Tensor]:
        names, budget = plan.selection.names, BankBudget.of(self.config, plan.settings)
        told = partial(self.reporter.working, "edit")
        return concept_gradient(model, plan.concept.forget_prompts, names, budget, guidance=0.0, on_progress=told)

    def _suppressed(
        self, plan: TrainPlan, model: Model, values: Mapping[str, torch.Tensor], wanted: Suppression
    ) -> Mapping[str, torch.Tensor]:
        budget = BankBudget.of(self.config, plan.settings)
        return suppressed(model, values, wanted, budget, partial(self.reporter.working, "edit"))

    def _selection(self, plan: TrainPlan, model: Model) -> Selection:
        """What may change: as planned, or of it what a saliency mask selects, the one of a run that is resumed."""
        config, settings = self.config, plan.settings
        if settings.mask_density is None:
            return plan.selection
        path = self.folder / "mask.safetensors"
        if config.resume and path.is_file():
            return load_mask(path, model)
        with self._stage("mask"):
            return make_mask(
                model,
                plan.concept.forget_prompts,
                plan.selection.names,
                BankBudget.of(config, settings),
                density=settings.mask_density,
                granularity=config.mask_granularity,
                on_progress=partial(self.reporter.working, "mask"),
            )

    def _begin(self, plan: TrainPlan, model: Model, selection: Selection, key: Mapping[str, Any]) -> None:
        """Write what the run is of.  Only now, so that nothing is left, or lost, where a bank cannot be made."""
        config, folder = self.config, self.folder
        if plan.deepspeed is not None:
            join(self.world, model.device)
            self.world.barrier()  # until all have looked at the folder
        if not self.world.is_main:
            return
        prepare_output(folder, "train", overwrite=config.overwrite, resume=config.resume)
        names = (path.relative_to(model.source).as_posix() for path in pipeline_files(model.source))
        own(folder, "train", [f"model/{name}" for name in names])
        write_text(folder / "config.yaml", to_yaml(resolved(config, plan)))
        write_json(folder / KEY, key)
        if selection.bits:
            save_mask(selection, folder / "mask.safetensors", model)
