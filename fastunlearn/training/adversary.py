"""Attacks that are part of a method: an embedding found before training, an offset found in every step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from ..errors import UserError
from ..methods.recipe import STATES, Inner, Pursuit, Recipe, Row, Search, found
from ..methods.rules import Sum
from ..models.base import Model, Tensors
from ..progress import OnProgress, untold
from .bank import Bank, BankBudget, Batch, build_bank
from .engine import Engine


def with_found(model: Model, recipe: Recipe, budget: BankBudget, on_progress: OnProgress = untold) -> Recipe:
    """The recipe with the embeddings that its searches have found.  ``on_progress`` counts their steps."""
    total, done = sum(search.steps for search in recipe.searches), 0
    embeddings: dict[str, Mapping[str, torch.Tensor]] = {}
    for search in recipe.searches:
        embeddings[found(search.name)] = _found(model, search, budget, partial(_told, on_progress, done, total))
        done += search.steps
    return dataclasses.replace(recipe, embeddings={**recipe.embeddings, **embeddings}, searches=())


def _told(on_progress: OnProgress, before: int, total: int, step: int) -> None:
    on_progress(before + step, total)


def _found(
    model: Model, search: Search, budget: BankBudget, on_step: Callable[[int], None]
) -> Mapping[str, torch.Tensor]:
    # A row that stores both predictions at each point: the concept's as its own prompt's, then the neutral one's.
    target = {search.concept: 1.0} if search.neutral is None else {search.concept: 2.0, search.neutral: -1.0}
    recipe = Recipe([Row("forget", search.concept, search.concept, target)], Sum())
    plan = budget.plan(model, recipe)
    branches = plan.branch_prompts(recipe.rows[0])
    bank = build_bank(model, recipe, plan, micro_batch_size=budget.bank_batch_size)
    start = model.with_guidance(model.encode([search.start]).of([search.start]), budget.guidance_scale)
    offset = torch.zeros_like(start[STATES]).requires_grad_(True)
    optimizer = torch.optim.Adam([offset], lr=search.learning_rate)
    for step in range(search.steps):
        batch = bank.batch([("forget", min(budget.micro_batch_size, len(bank)))], step, budget.seed)
        count = len(batch.timesteps)
        conditions = {name: values.expand(count, *values.shape[1:]) for name, values in start.items()}
        conditions[STATES] = conditions[STATES] + _behind_first(offset)
        predicted = model.predict(batch.latents, batch.timesteps, conditions)
        concept = batch.teacher_preds[batch.own, batch.row_index]
        if search.neutral is not None:
            neutral = batch.teacher_preds[branches.index(search.neutral), batch.row_index]
            predicted, concept = predicted - neutral, concept - neutral
        agreement = (predicted * concept).mean()
        if agreement < 0:
            break
        (gradient,) = torch.autograd.grad(agreement, [offset])
        offset.grad = gradient  # only this step's: gradients do not add up
        optimizer.step()
        on_step(step + 1)
    if not offset.isfinite().all():
        raise UserError("the search for an embedding leads to no finite numbers. Use a smaller rate of the search.")
    states = (start[STATES] + _behind_first(offset)).detach()
    return {name: (states if name == STATES else values)[0] for name, values in start.items()}


def _behind_first(offset: torch.Tensor) -> torch.Tensor:
    """The offset without the first position's, which says nothing of the prompt."""
    return torch.cat([torch.zeros_like(offset[:, :1]), offset[:, 1:]], dim=1)


def attacked(model: Model, engine: Engine, batch: Batch, inner: Inner, seeds: tuple[int, int, int, int]) -> Tensors:
    """The batch's conditions, those of the forget rows moved to where the student shows the most of the concept.

    ``seeds``: the run's, the step, and which part of how many the batch is: the rows of a step start from the same
    offsets in however many parts they are taken.
    """
    count = batch.forget_rows
    if not count:
        return batch.conditions
    seed, step, part, parts = seeds
    conditions = {name: values[:count] for name, values in batch.conditions.items()}
    states = conditions[STATES]
    radius = inner.radius * states.square().mean(dim=(1, 2), keepdim=True).sqrt()
    wanted = batch.teacher_preds[batch.own[:count], batch.row_index[:count]]
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    drawn = torch.rand((count * parts, *states.shape[1:]), generator=generator)[part::parts]
    offset = radius * (2 * drawn.to(states) - 1)
    for _ in range(inner.steps):
        offset.requires_grad_(True)
        moved = conditions | {STATES: states + offset}
        with engine.autocast():
            predicted = model.predict(batch.latents[:count], batch.timesteps[:count], moved, engine.module)
        loss = (predicted - wanted).square().sum()
        (gradient,) = torch.autograd.grad(loss, [offset])
        offset = (offset.detach() - radius / 4 * gradient.sign()).clamp(-radius, radius)
    result = dict(batch.conditions)
    result[STATES] = torch.cat([states + offset.detach(), batch.conditions[STATES][count:]])
    return result


class Chase:
    """The offsets of a :class:`Pursuit`, on their way: K vectors of the states' width, with Adam's moments and an age.

    A step is ``moved``, ``look`` for each of its parts, then ``advance``.
    """

    def __init__(self, model: Model, pursuit: Pursuit, bank: Bank) -> None:
        self.pursuit = pursuit
        states = bank.conditions.tensors[STATES]
        self.rate = pursuit.rate * float(states[:, 1:].float().square().mean().sqrt())
        self.values = {
            name: torch.zeros(pursuit.offsets, width, device=model.device)
            for name, width in (("offset", states.shape[-1]), ("mean", states.shape[-1]), ("square", states.shape[-1]))
        }
        # Staggered, so that offsets of every age are there at any time.
        ages = [index * pursuit.lifetime // pursuit.offsets for index in range(pursuit.offsets)]
        self.left = [pursuit.lifetime - age for age in ages]  # steps until an offset begins again
        self.age = [0] * pursuit.offsets
        self._asked: torch.Tensor | None = None
        self._rows: list[int] = []
        self._gradient = torch.zeros_like(self.values["offset"])
        self._counts = [0] * pursuit.offsets

    def moved(self, batch: Batch, part: int, parts: int) -> Tensors:
        """The batch's conditions, the forget rows' at their offsets.  ``part`` of ``parts``: which rows they are."""
        count = batch.forget_rows
        taken = self.pursuit.offsets + 1
        self._rows = [(part + index * parts) % taken for index in range(count)]
        if not count:
            return batch.conditions
        nothing = torch.zeros_like(self.values["offset"][:1])
        self._asked = self.values["offset"].clone().requires_grad_(True)
        offset = torch.cat([self._asked, nothing])[self._rows][:, None]
        states = batch.conditions[STATES]
        behind = states[:count, 1:] + offset.to(states.dtype)
        return {**batch.conditions, STATES: torch.cat([torch.cat([states[:count, :1], behind], 1), states[count:]])}

    def look(self, batch: Batch, predicted: torch.Tensor) -> None:
        """Keep what the batch says of the offsets; the graph of ``predicted`` stays for the weights' own gradient."""
        asked, count = self._asked, len(self._rows)
        if asked is None or not count:
            return
        wanted = batch.teacher_preds[batch.own[:count], batch.row_index[:count]]
        errors = (predicted[:count] - wanted).square().mean(dim=(1, 2, 3))
        is_attacked = torch.tensor(self._rows, device=errors.device) < self.pursuit.offsets
        if is_attacked.any():
            (gradient,) = torch.autograd.grad(errors[is_attacked].sum(), [asked], retain_graph=True)
            self._gradient += gradient
        for row in self._rows:
            if row < self.pursuit.offsets:
                self._counts[row] += 1
        self._asked = None

    def advance(self) -> None:
        """One step of Adam for each offset that had rows, then those whose time is over begin again."""
        offset, mean, square = (self.values[name] for name in ("offset", "mean", "square"))
        for index, count in enumerate(self._counts):
            if count:
                self.age[index] += 1
                gradient, age = self._gradient[index] / count, self.age[index]
                mean[index] = 0.9 * mean[index] + 0.1 * gradient
                square[index] = 0.999 * square[index] + 0.001 * gradient.square()
                ahead = mean[index] / (1 - 0.9**age)
                offset[index] -= self.rate * ahead / ((square[index] / (1 - 0.999**age)).sqrt() + 1e-8)
            self.left[index] -= 1
            if self.left[index] <= 0:
                self.left[index], self.age[index] = self.pursuit.lifetime, 0
                for values in self.values.values():
                    values[index] = 0
        self._gradient.zero_()
        self._counts = [0] * self.pursuit.offsets

    def saved(self) -> dict[str, list[Any]]:
        """What :meth:`restore` reads, as JSON holds it: a float32 comes back as it was."""
        return {"left": self.left, "age": self.age} | {name: one.tolist() for name, one in self.values.items()}

    def restore(self, saved: Mapping[str, list[Any]]) -> None:
        self.left, self.age = list(saved["left"]), list(saved["age"])
        for name, values in self.values.items():
            values.copy_(torch.tensor(saved[name]))
