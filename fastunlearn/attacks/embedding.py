"""Embedding inversion: an unknown embedding is learned that makes the model predict what the original predicts.

    min over v   1/R sum_r mean( ( model(x_r, t_r, c(v)) - original(x_r, t_r, c) )^2 ),

with rows r from the original's pictures of the concept.  ``context``: v is one offset on the text's states at all
places but the first, so any family of models can be attacked.  ``word``: v is the input embedding of the concept's
tokens, in every text encoder that reads them.  Every prompt has a v of its own; all are learned in one batch, with our
row loss and its gradient on the condition.

Concept inversion (Pham et al. 2023, CCE, arXiv 2308.01508) and textual inversion (arXiv 2208.01618) match the noise of
noised pictures instead of the original's predictions; the latter say more per row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import prompts as words
from ..errors import UserError
from ..methods.recipe import STATES
from ..models.base import Model, Tensors
from .base import Attack, Attempt, Bouts, Costs, Order, check_states
from .injection import Slots, check
from .rows import STEP, RowLoss
from .target import Target

LOOKS = 4  # images per prompt, spread over the steps
_STEPS = 120
#: Of Adam, in units of the size (root mean square) of what is learned; falls to 0 over the steps.
_LEARNING_RATE = 0.03


def run(target: Target, order: Order) -> list[Attempt]:
    unknown = _Word(target, order.prompts) if order.option == "word" else _Context(target, order.prompts)
    bouts, loss = Bouts(order), RowLoss(target, target.pictures.of(order.prompts))
    looks = min(LOOKS, order.budget // (target.costs.image + STEP))
    steps = (order.budget - looks * target.costs.image) // STEP
    at = [(look + 1) * steps // looks for look in range(looks)]  # a look comes after so many steps
    optimizer = torch.optim.Adam(unknown.values, lr=_LEARNING_RATE, foreach=False)
    for step in range(steps):
        if not (left := bouts.left()):
            break
        for group, size in zip(optimizer.param_groups, unknown.sizes, strict=True):
            group["lr"] = _LEARNING_RATE * size * (1 - step / steps)
        optimizer.zero_grad()
        value, _ = loss(unknown.conditions(left), left)
        value.backward()
        optimizer.step()
        bouts.spend(left, STEP)
        for _ in range(at.count(step + 1)):
            with torch.no_grad():
                drawn = target.draw([(order.prompts[i], bouts.count(i)) for i in left], unknown.conditions(left))
            for index, verdict in zip(left, drawn, strict=True):
                bouts.judged(index, verdict, f"after {step + 1} steps", target.costs.image)
    return bouts.attempts()


class _Context:
    """One offset per prompt on its text's states, zero at first."""

    def __init__(self, target: Target, prompts: Sequence[str]) -> None:
        self._tensors = target.encode(prompts)
        states = self._tensors[STATES]
        self.offset = torch.zeros(len(prompts), 1, states.shape[-1], device=states.device, requires_grad=True)
        self.values = [{"params": [self.offset]}]
        self.sizes = [_size(states[:, 1:])]

    def conditions(self, left: list[int]) -> Tensors:
        tensors = {name: values[left] for name, values in self._tensors.items()}
        states = tensors[STATES]
        return tensors | {STATES: torch.cat([states[:, :1], states[:, 1:] + self.offset[left]], dim=1)}


class _Word:
    """The input embeddings of the concept's tokens, in every text encoder; their own at first."""

    def __init__(self, target: Target, prompts: Sequence[str]) -> None:
        self._prompts = [with_concept(prompt, target.concept) for prompt in prompts]
        self._slots = Slots(target.model, target.concept.strip(), self._prompts)
        if not self._slots.slots:
            raise UserError(
                f"the attack embedding:word cannot serve these prompts: {target.model.name} ({target.model.family}) "
                f"reads {target.concept!r} as other tokens in some than in others. Name it in the midst of each."
            )
        starts = [slot.start.expand(len(prompts), -1, -1).clone() for slot in self._slots.slots]
        self._embeddings = [start.requires_grad_() for start in starts]
        self.values = [{"params": [one]} for one in self._embeddings]
        self.sizes = [slot.size for slot in self._slots.slots]

    def conditions(self, left: list[int]) -> Tensors:
        return self._slots.encode([self._prompts[i] for i in left], [one[left] for one in self._embeddings])


def with_concept(prompt: str, concept: str) -> str:
    """The prompt, with the concept behind it where it does not name it."""
    return prompt if words.mentions([prompt], concept) else f"{prompt} {concept.strip()}"


def _size(values: torch.Tensor) -> float:
    return float(values.detach().float().square().mean().sqrt())


def _check(model: Model, concept: str, option: str) -> None:
    if option == "word":
        check(model, concept.strip(), [concept.strip()], "embedding:word")
    else:
        check_states(model, "embedding", concept)


def budget_of(costs: Costs, steps: int = _STEPS) -> int:
    """What so many steps cost a prompt, with their images, in U."""
    return LOOKS * costs.image + steps * STEP


EMBEDDING = Attack(
    name="embedding",
    summary="learns an embedding that brings the concept's pictures back: in context, or of its word",
    unknown="an embedding",
    source="CCE, arXiv 2308.01508; textual inversion",
    cost=f"{STEP} U a step, and {LOOKS} images per prompt",
    run=run,
    default=budget_of,
    least=lambda costs: costs.image + STEP,
    needs_pictures=True,
    options=("context", "word"),
    check=_check,
)
