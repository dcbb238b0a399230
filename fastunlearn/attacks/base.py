"""The vocabulary of attacks: what is attacked, what an attack tries, and what it costs.

An attack looks for the concept in a model that is said to have forgotten it.  It works on prompts, several at once, and
shows the judge one image after another until one shows the concept or the budget is spent.  The budget is counted in
forwards of the denoiser for one sample (U); a backward counts as two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from ..errors import UserError
from ..methods.recipe import STATES

if TYPE_CHECKING:
    from ..models.base import Model
    from .target import Target

#: What a backward of one sample costs, in forwards.
BACKWARD = 2
#: Rows of a prompt in each step of an optimization, unless an attack says otherwise.
ROWS = 2


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the judge says of one image (3, H, W) uint8.  ``shown``: it sees the concept, in a valid image."""

    image: torch.Tensor
    score: float
    valid: float | None
    shown: bool


@dataclasses.dataclass(frozen=True)
class Try:
    """One image that the judge saw.  ``cost``: in U, of its prompt until then.  ``what`` was tried, in words."""

    cost: int
    what: str
    score: float
    valid: float | None
    shown: bool


@dataclasses.dataclass(frozen=True)
class Attempt:
    """What an attack tried for one prompt.  It ends with the first image that shows the concept.

    ``kind``: of the prompt.  ``asked``: the words that were found, where the attack looks for words.  ``image``: that
    of the best try, (3, H, W) uint8.
    """

    prompt: str
    kind: str
    tries: tuple[Try, ...]
    asked: str | None
    image: torch.Tensor

    @property
    def broken_at(self) -> int | None:
        """The U at which the concept came back; None where it did not."""
        return self.tries[-1].cost if self.tries[-1].shown else None


@dataclasses.dataclass(frozen=True)
class Costs:
    """What an attack plans with, in U.

    ``image``: one image.  ``points``: of a trajectory, ``branches`` forwards each.  ``prompts``: how many there are.
    """

    image: int
    points: int
    prompts: int

    @property
    def branches(self) -> int:
        return self.image // self.points


@dataclasses.dataclass(frozen=True)
class Order:
    """An attack's task: some prompts with their kinds, U for each of them, and the option of ``NAME:OPTION``."""

    prompts: Sequence[str]
    kinds: Sequence[str]
    budget: int
    option: str = ""


@dataclasses.dataclass(frozen=True)
class Attack:
    """An attack and what a user must know of it.

    ``summary``: what it tells.  ``unknown``: what it looks for.  ``source``: who described it.  ``run``: the attempts
    on a target, one per prompt.  ``default``, ``least``: U per prompt, unless the user says, and of the first image.
    ``needs_pictures``: the original's trajectories, made once.  ``options``: what may stand behind the colon of
    ``NAME:OPTION``, the first of them by default; empty where any text may, or none.  ``asks_only``: it needs nothing
    but a model's answers to prompts.  ``takes_all``: all prompts belong to one attempt, and share its cost.
    ``check``: raises UserError where the model, or the concept, does not serve; called before anything is computed.
    """

    name: str
    summary: str
    unknown: str
    source: str
    cost: str
    run: Callable[[Target, Order], list[Attempt]]
    default: Callable[[Costs], int]
    least: Callable[[Costs], int]
    needs_pictures: bool = False
    options: tuple[str, ...] = ()
    asks_only: bool = False
    takes_all: bool = False
    check: Callable[[Model, str, str], None] = lambda model, concept, option: None


class Bouts:
    """What has been tried on the prompts of an order: who is left, and what it cost."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.spent = [0] * len(order.prompts)
        self._tries: list[list[Try]] = [[] for _ in order.prompts]
        self._best: list[tuple[Verdict, str | None] | None] = [None] * len(order.prompts)

    def left(self, cost: int = 0) -> list[int]:
        """The prompts that have not given the concept away and can still pay ``cost``."""
        return [
            index
            for index, spent in enumerate(self.spent)
            if not self.is_broken(index) and spent + cost <= self.order.budget
        ]

    def is_broken(self, index: int) -> bool:
        tries = self._tries[index]
        return bool(tries) and tries[-1].shown

    def count(self, index: int) -> int:
        """How many images of a prompt the judge has seen."""
        return len(self._tries[index])

    def spend(self, indices: Sequence[int], cost: int) -> None:
        for index in indices:
            self.spent[index] += cost

    def judged(self, index: int, verdict: Verdict, what: str, cost: int, asked: str | None = None) -> None:
        """An image was made for ``cost``.  What comes after one that shows the concept is dropped: nobody needs it."""
        if self.is_broken(index):
            return
        self.spent[index] += cost
        one = Try(self.spent[index], what, verdict.score, verdict.valid, verdict.shown)
        self._tries[index].append(one)
        best = self._best[index]
        if best is None or (verdict.shown, verdict.score) > (best[0].shown, best[0].score):
            self._best[index] = verdict, asked

    def attempts(self) -> list[Attempt]:
        result = []
        rows = zip(self.order.prompts, self.order.kinds, self._tries, self._best, strict=True)
        for prompt, kind, tries, best in rows:
            assert best is not None
            result.append(Attempt(prompt, kind, tuple(tries), best[1], best[0].image))
        return result


def check_states(model: Model, attack: str, concept: str) -> None:
    """UserError for a model whose denoiser is told nothing but pooled vectors of a text."""
    if STATES not in model.encode([concept]).tensors:
        raise refuse(model, attack, "its denoiser takes no states of a text")


def refuse(model: Model, attack: str, why: str) -> UserError:
    """The error for a model that an attack cannot serve."""
    return UserError(f"the attack {attack} cannot serve {model.name} ({model.family}): {why}. Leave it out.")
