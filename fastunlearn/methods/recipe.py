"""The vocabulary of methods: a recipe says which rows a method trains on and how their losses are put together.

A row is a latent on a sampling trajectory of the frozen teacher, what the student is asked there, and a target: a
linear mix of the teacher's own predictions.  Nothing in a recipe depends on the student, so rows are made in advance.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

Role = Literal["forget", "retain"]
ROLES: tuple[Role, ...] = ("forget", "retain")
EMPTY = ""  # a prompt like any other
# Names that stand where a prompt does; no prompt holds this sign.
UNCONDITIONAL = "\0unconditional"  # what guidance leads away from: "" to some families of models, not to all
NOISE = "\0noise"  # in a target: the noise itself


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of training example; the bank makes it at every point of the trajectories it is given.

    At ``x_t`` from the teacher's trajectory for the prompt ``trajectory``, the student, asked with ``condition``, is
    compared with ``sum_k target[k] * teacher(x_t, t, k)``, where each k is a prompt or
    :data:`UNCONDITIONAL`.  A target of :data:`NOISE` alone is the usual training loss: x_t is then the trajectory's
    last latents with fresh noise, and the target what was added (or the velocity, where that is what the model
    predicts).
    """

    role: Role
    trajectory: str
    condition: str
    target: Mapping[str, float]

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"a row's role is one of {ROLES}, got {self.role!r}.")
        total = math.fsum(self.target.values())
        if not math.isclose(total, 1.0, abs_tol=1e-9):
            # Only then does the algebra hold for epsilon, v and flow models alike.
            raise ValueError(f"a row's target mix must sum to 1, got {total:g} from {dict(self.target)}.")
        if NOISE in self.target and len(self.target) > 1:
            raise ValueError(f"a row's target is noise or a mix of predictions, not both, got {dict(self.target)}.")


def mix(*parts: tuple[str, float]) -> dict[str, float]:
    """A target from (prompt, coefficient) parts; a prompt named twice counts with the sum."""
    target: dict[str, float] = {}
    for prompt, coefficient in parts:
        target[prompt] = target.get(prompt, 0.0) + coefficient
    return target


@dataclasses.dataclass(frozen=True)
class Sum:
    """One step on ``forget_weight`` times the mean forget loss plus ``retain_weight`` times the mean retain loss."""

    retain_weight: float = 1.0
    forget_weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Alternate:
    """A step on the forget loss, then a step on ``retain_weight`` times the retain loss."""

    retain_weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Saddle:
    """Minimise over weights, maximise over lambda >= 0: ``retain + lambda * (margin - forget)``.

    The forget loss is a distance that must reach ``margin = kappa * E|teacher(concept) - teacher(unconditional)|^2``;
    lambda, the price of missing it, follows by dual ascent, ``lambda += dual_rate * (1 - forget / margin)``, in
    [0, lambda_max].
    """

    kappa: float
    dual_rate: float = 0.1
    lambda_start: float = 0.1
    lambda_max: float = 1.0


Rule = Sum | Alternate | Saddle


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a method trains on.  No rows means that nothing is trained."""

    rows: Sequence[Row]
    rule: Rule

    def prompts(self) -> list[str]:
        """Every prompt that must be encoded, each once, the unconditional first."""
        prompts = [UNCONDITIONAL]
        for row in self.rows:
            prompts += [row.trajectory, row.condition, *(key for key in row.target if key != NOISE)]
        return list(dict.fromkeys(prompts))


@dataclasses.dataclass(frozen=True)
class Defaults:
    """A method's settings for a family of models, used where the user says nothing.

    ``negative_guidance`` (ESD's eta) and ``kappa`` (Saddle's margin) are None for methods without them;
    ``mask_density`` is the share of the trainable elements that a saliency mask lets change, None without a mask.
    """

    steps: int
    learning_rate: float
    micro_batch_size: int
    trajectories: int
    trainable: str
    lr_scheduler: str = "constant"
    retain_weight: float = 1.0
    negative_guidance: float | None = None
    kappa: float | None = None
    mask_density: float | None = None


@dataclasses.dataclass(frozen=True)
class Concept:
    """What a method is told: prompts that show the concept, what each becomes, and prompts to keep.

    ``anchor`` takes the concept's place and ``anchors`` maps every forget prompt to the prompt with it; None and empty
    where the method needs no anchor and the user names none.
    """

    anchor: str | None
    forget_prompts: tuple[str, ...]
    anchors: Mapping[str, str]
    retain_prompts: tuple[str, ...]
    settings: Defaults
