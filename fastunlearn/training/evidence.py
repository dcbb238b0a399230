"""How much of the concept is left while a training goes on, measured on rows that it does not train on.

    residual = sum |student(c) - target|^2 / sum |teacher(c) - target|^2

over held-out rows: the method's own forget rows, on trajectories from other noise, and also for prompts of the concept
that it does not train on.  It starts at 1, needs no judge and no unit, and a training ends once it is small enough:
a fixed number of steps cannot know when a concept is gone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import nn

from ..methods.recipe import NOISE, Recipe
from ..models.base import Model
from .bank import BankPlan, build_bank, plan_bank

_PURPOSE = "held-out"  # of the noise: no training and no evaluation draws it
_PROMPTS, _STEPS, _EVERY_NTH = 6, 8, 2  # of the held-out trajectories: one a prompt, and every other of their points
_SHARE = 0.1  # of the training's own work, at most, and at least 10 steps between two measurements


@dataclasses.dataclass(frozen=True)
class EvidencePlan:
    """What will be measured, and when a training ends.

    ``until``: the residual at which it ends.  ``every``: steps between two measurements.  ``unet_evaluations`` counts
    the making of the held-out rows.
    """

    recipe: Recipe
    bank: BankPlan
    until: float
    every: int

    @property
    def rows(self) -> int:
        return len(self.bank.assignments) * len(_points(self.bank.points))

    @property
    def unet_evaluations(self) -> int:
        return self.bank.unet_evaluations


def plan_evidence(
    model: Model, recipe: Recipe, *, until: float, step_evaluations: int, guidance_scale: float, seed: int
) -> EvidencePlan | None:
    """``recipe``: the method's, for the prompts to measure on; None where its forget rows have no target to reach.

    ``step_evaluations``: what a training step costs, in UNet evaluations of one sample.
    """
    rows = [row for row in recipe.rows if row.role == "forget" and NOISE not in row.target]
    if not rows or not recipe.rule.has_target:
        return None
    held = dataclasses.replace(recipe, rows=rows, start=None, inner=None, pursuit=None, elastic=0.0)
    bank = plan_bank(
        model,
        held,
        trajectories=min(len(rows), _PROMPTS),
        num_inference_steps=_STEPS,
        guidance_scale=guidance_scale,
        seed=seed,
    )
    count = len(bank.assignments) * len(_points(bank.points))
    every = max(10, 10 * math.ceil(count / (_SHARE * step_evaluations) / 10))
    return EvidencePlan(held, bank, until, every)


def _points(points: int) -> range:
    return range(1, points, _EVERY_NTH)


class Evidence:
    """The held-out rows, and how far a student is from their targets, beside how far the teacher was.

    Made while ``model`` is still the teacher, in batches as its bank is.  ``last``: the newest residual, None before
    the first.
    """

    def __init__(self, model: Model, plan: EvidencePlan, batch_size: int | None = None) -> None:
        self.model, self.until, self.every, self.rule = model, plan.until, plan.every, plan.recipe.rule
        self.bank = build_bank(model, plan.recipe, plan.bank, micro_batch_size=batch_size, purpose=_PURPOSE)
        rows = torch.arange(len(self.bank)).view(-1, plan.bank.points)
        self.index = rows[:, list(_points(plan.bank.points))].flatten().to(model.device)
        coefficients = self.bank.coefficients[self.index].T[..., None, None, None]
        self.target = (self.bank.teacher_preds[:, self.index] * coefficients).sum(0)
        self.before = self._error(model.denoiser, batch_size or 64)
        self.last: float | None = None

    @property
    def is_met(self) -> bool:
        return self.last is not None and self.last <= self.until

    def measure(self, student: nn.Module, state: Mapping[str, torch.Tensor], batch_size: int) -> float:
        """The student's residual, by the rule's ``state``; a forward has at most ``batch_size`` rows."""
        self.last = self.rule.residual(self._error(student, batch_size), self.before, state)
        return self.last

    @torch.no_grad()
    def _error(self, module: nn.Module, batch_size: int) -> float:
        """Mean squared distance of a network's predictions from the targets."""
        sums = []
        for rows in torch.arange(len(self.index), device=self.model.device).split(batch_size):
            index = self.index[rows]
            conditions = self.bank.conditions.rows(self.bank.condition[index])
            predicted = self.model.predict(self.bank.latents[index], self.bank.timesteps[index], conditions, module)
            sums.append((predicted - self.target[rows]).square().double().sum())
        return torch.stack(sums).sum().item() / self.target.numel()
