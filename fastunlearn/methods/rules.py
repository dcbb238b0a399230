"""How the losses of a recipe's rows become steps of the optimizer.  A rule is data with three verbs.

``start`` gives the rule's state before the first step, ``updates`` the updates of a step, and ``after_step`` changes
the state by what the step has measured.  The trainer knows no rule by name.  The state is saved in every checkpoint.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

from .recipe import Role

if TYPE_CHECKING:
    from torch import Tensor

    Weight = float | Tensor
    State = dict[str, Tensor]


class Measured(Protocol):
    """What a rule may ask of the training rows before the first step."""

    def way_to_go(self) -> float:
        """The forget loss before the first step: the mean of ``weight * (teacher(concept) - target)^2``."""


@dataclasses.dataclass(frozen=True)
class Update:
    """One step of the optimizer, on the weighted sum of the roles' mean losses.

    ``weights``: role -> its weight, a number or a () tensor.  Roles without rows are passed over.
    ``against``: the same for a second gradient g, computed on rows of its own.  To the step's gradient h is then added
    what it lacks of g, ``max(rate - <h, g> / <g, g>, 0) g``, so that the step descends along g at ``rate`` times g's
    own pace at least; with ``rate`` 0 it loses its part against g (gradient surgery).  ``along`` times g is added, too.
    """

    weights: Mapping[Role, Weight]
    against: Mapping[Role, Weight] = dataclasses.field(default_factory=dict)
    along: float = 0.0
    rate: float = 0.0


@dataclasses.dataclass(frozen=True)
class Rule(ABC):
    """What every rule is.

    ``passes``: student batches in a step, for the plan.  ``projects``: whether any update has a gradient ``against``,
    which not every engine can compute.  ``has_target``: whether the forget rows' targets are to be reached, or left
    behind by a known distance, so that what is left of the concept can be measured.  ``ends_early``: whether a training
    is done once little enough of it is left.  ``takes_weight``: whether it adds the two losses by a weight that is
    given, so that :class:`Constrained` may find it.
    """

    passes: ClassVar[int] = 1
    projects: ClassVar[bool] = False
    has_target: ClassVar[bool] = True
    ends_early: ClassVar[bool] = True
    takes_weight: ClassVar[bool] = False

    def start(self, rows: Measured) -> dict[str, float]:
        """The state before the first step, name -> value; the trainer keeps each as a () float32 tensor."""
        return {}

    def residual(self, error: float, before: float, state: Mapping[str, Tensor]) -> float:
        """How much of the concept is left: 1 before the first step, 0 where the rule's end is reached.

        ``error``: the student's mean squared distance from the forget rows' targets, ``before``: the teacher's.
        """
        return error / before if before > 0 else 0.0

    def found_weight(self, state: Mapping[str, Tensor]) -> float | None:
        """The retain weight that the rule has found, where it looks for one."""
        return None

    @abstractmethod
    def updates(self, state: State) -> Sequence[Update]:
        """The updates of one step, in order."""

    def after_step(self, metrics: dict[str, Tensor], state: State) -> None:  # noqa: B027 - most have nothing to do
        """Change the state in place by the step's metrics: ``loss``, ``grad_norm``, ``forget_loss``, ``retain_loss``.

        What is added to ``metrics``, () tensors, is logged.
        """


@dataclasses.dataclass(frozen=True)
class Sum(Rule):
    """One step on ``forget_weight`` times the mean forget loss plus ``retain_weight`` times the mean retain loss."""

    retain_weight: float = 1.0
    forget_weight: float = 1.0
    takes_weight: ClassVar[bool] = True

    def updates(self, state: State) -> Sequence[Update]:
        return [Update({"forget": self.forget_weight, "retain": self.retain_weight})]


@dataclasses.dataclass(frozen=True)
class Alternate(Rule):
    """A step on the forget loss, then a step on ``retain_weight`` times the retain loss."""

    retain_weight: float = 1.0
    passes: ClassVar[int] = 2
    takes_weight: ClassVar[bool] = True

    def updates(self, state: State) -> Sequence[Update]:
        return [Update({"forget": 1.0}), Update({"retain": self.retain_weight})]


@dataclasses.dataclass(frozen=True)
class Saddle(Rule):
    """Minimise over weights, maximise over lambda >= 0: ``retain + lambda * (margin - forget)``.

    The forget loss is a distance that must reach ``margin = kappa * E|teacher(concept) - target|^2``;
    lambda, the price of missing it, follows by dual ascent, ``lambda += dual_rate * (1 - forget / margin)``, in
    [0, lambda_max].  With ``kappa`` below 1 the distance must fall to the margin instead: both differences change their
    sign, and no step of lambda is larger than ``dual_rate``.
    """

    kappa: float
    dual_rate: float = 0.1
    lambda_start: float = 0.1
    lambda_max: float = 1.0

    def start(self, rows: Measured) -> dict[str, float]:
        return {"dual": self.lambda_start, "margin": self.kappa * rows.way_to_go()}

    def residual(self, error: float, before: float, state: Mapping[str, Tensor]) -> float:
        """The share of the way to the margin that is still to go."""
        margin = float(state["margin"])
        return max(0.0, (margin - error) / (margin - before)) if margin != before else 0.0

    def updates(self, state: State) -> Sequence[Update]:
        return [Update({"forget": state["dual"] if self.kappa < 1 else -state["dual"], "retain": 1.0})]

    def after_step(self, metrics: dict[str, Tensor], state: State) -> None:
        metrics["dual"] = state["dual"].clone()
        missed = 1 - metrics["forget_loss"] / state["margin"]
        if self.kappa < 1:
            missed = (-missed).clamp(max=1)
        state["dual"].add_(self.dual_rate * missed).clamp_(0.0, self.lambda_max)


@dataclasses.dataclass(frozen=True)
class Constrained(Rule):
    """One loss as small as possible while the other keeps within a bound: its price follows by dual ascent.

    With ``bounded`` "forget" it deviates as little as possible, subject to having forgotten:

        min over weights, max over lambda > 0:   retain + lambda * (forget - bound * way)

    ``way`` is the forget loss before the first step: forget / way is the residual of a step's rows.  While more than
    ``bound`` of it is left, lambda rises, and while less is, it falls.  With "retain" it forgets as far as it can,
    subject to retain / way <= ``bound``: while the deviation is larger than that, lambda falls.

        log lambda += +-price_rate * clamp(loss / way / bound - 1, -1, 1),   1e-3 <= lambda <= 1e3

    A step is made on the losses by the weights lambda / (1 + lambda) and 1 / (1 + lambda), so that its size does not
    follow the price.  1 / lambda is the retain weight that this finds.
    """

    bound: float
    bounded: Role = "forget"
    price_rate: float = 0.05
    price_start: float = 1.0
    ends_early: ClassVar[bool] = False  # what is gained within the bound, is gained to the last step

    def start(self, rows: Measured) -> dict[str, float]:
        return {"price": self.price_start, "way": rows.way_to_go()}

    def found_weight(self, state: Mapping[str, Tensor]) -> float | None:
        return 1 / float(state["price"])

    def updates(self, state: State) -> Sequence[Update]:
        price = state["price"]
        return [Update({"forget": price / (1 + price), "retain": 1 / (1 + price)})]

    def after_step(self, metrics: dict[str, Tensor], state: State) -> None:
        metrics["price"] = state["price"].clone()
        missed = (metrics[f"{self.bounded}_loss"] / (self.bound * state["way"]) - 1).clamp(-1, 1)
        rise = self.price_rate * (missed if self.bounded == "forget" else -missed)
        state["price"].mul_(rise.exp()).clamp_(1e-3, 1e3)


@dataclasses.dataclass(frozen=True)
class Project(Rule):
    """A step along the forget gradient without its part against the retain gradient (Yu et al. 2020, 2001.06782).

        g = g_f - min(<g_f, g_r>, 0) / <g_r, g_r> g_r + retain_weight * g_r

    ``retain_weight`` 0: forgetting alone, but never, to first order, at the retain loss' expense.
    """

    retain_weight: float = 1.0
    passes: ClassVar[int] = 2
    projects: ClassVar[bool] = True

    def updates(self, state: State) -> Sequence[Update]:
        return [Update({"forget": 1.0}, against={"retain": 1.0}, along=self.retain_weight)]


@dataclasses.dataclass(frozen=True)
class Bilevel(Rule):
    """Keep, subject to having forgotten: the retain gradient, with as much of the forget gradient as is needed.

        g = g_r + lambda g_f,   lambda = max(rate - <g_r, g_f> / <g_f, g_f>, 0)

    The first-order bilevel step of Liu et al. 2022 (BOME, 2209.08709), in which the forget loss falls at ``rate`` times
    the pace of its own descent at least, and the retain loss has the rest.
    """

    rate: float = 1.0
    passes: ClassVar[int] = 2
    projects: ClassVar[bool] = True

    def updates(self, state: State) -> Sequence[Update]:
        return [Update({"retain": 1.0}, against={"forget": 1.0}, rate=self.rate)]
