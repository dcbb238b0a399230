"""Trains a model on its rows as a plan says, and exports it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from ..methods.recipe import Edit
from ..models.base import Model
from ..progress import Reporter
from ..schema import Ending
from .bank import Bank
from .config import TrainConfig
from .engine import Engine, TorchEngine
from .engine_deepspeed import DeepSpeedEngine
from .evidence import Evidence
from .export import exported_to
from .plan import TrainPlan
from .saliency import fisher_information
from .selection import Selection
from .trainer import Interrupted, Schedule, Trainer


def fit(
    model: Model,
    plan: TrainPlan,
    bank: Bank,
    evidence: Evidence | None,
    selection: Selection,
    config: TrainConfig,
    folder: Path,
    reporter: Reporter,
) -> Ending:
    """Train ``model.denoiser`` on a bank, leave the trained weights in it, export them and return how it ended."""
    assert not isinstance(plan.recipe, Edit)
    torch.manual_seed(config.seed)
    settings = plan.settings
    curvature = _curvature(model, plan, bank, selection, config)
    model.hold_denoiser()
    engine = _engine(model, plan, selection, config)
    schedule = Schedule(
        steps=settings.steps,
        micro_batch_size=settings.micro_batch_size,
        seed=config.seed,
        log_every=config.log_every,
        checkpoint_every=config.checkpoint_every,
        lr_scheduler=settings.lr_scheduler,
        lands=plan.lands,
    )
    try:
        if curvature:
            engine.hold(curvature)
        trainer = Trainer(
            model, bank, plan.recipe.rule, engine, schedule, folder, evidence, plan.recipe.inner, plan.recipe.pursuit
        )
        if config.resume:
            trainer.resume()
        trainer.run(lambda step, metrics: reporter.training(step, settings.steps, metrics))
        exported = exported_to(config, folder)
        engine.export(model, exported, config.save)
    except BaseException as error:
        # So that this process can train again.  One of several ends, and waits for nobody, unless all stop together.
        if plan.world.size == 1 or isinstance(error, Interrupted):
            engine.close()
        raise
    engine.close()
    return trainer.ending()


def _curvature(
    model: Model, plan: TrainPlan, bank: Bank, selection: Selection, config: TrainConfig
) -> dict[str, torch.Tensor]:
    """How hard each weight is held to where training starts; empty where none is."""
    assert not isinstance(plan.recipe, Edit)
    if not plan.recipe.elastic:
        return {}
    fisher = fisher_information(
        model,
        bank,
        selection.names,
        points=plan.bank.points,
        micro_batch_size=plan.settings.micro_batch_size,
        mixed_precision=config.mixed_precision,
    )
    return {name: plan.recipe.elastic * values for name, values in fisher.items()}


def _engine(model: Model, plan: TrainPlan, selection: Selection, config: TrainConfig) -> Engine:
    options: dict[str, Any] = {
        "learning_rate": plan.settings.learning_rate,
        "weight_decay": config.weight_decay,
        "mixed_precision": config.mixed_precision,
        "clip_scope": config.clip_scope,
    }
    if plan.deepspeed is not None:
        return DeepSpeedEngine(model.denoiser, selection, settings=plan.deepspeed, world=plan.world, **options)
    options["max_grad_norm"] = config.max_grad_norm or math.inf
    return TorchEngine(model.denoiser, selection, accumulation=plan.accumulation, **options)
