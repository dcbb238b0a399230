"""Puts unknown embeddings in the place of a prompt's tokens, inside the text encoders and with their gradient.

Every encoder of transformers has one layer that turns tokens into embeddings; a hook on it exchanges those of a run of
tokens.  What reads the prompt before and after (templates, lower case, poolings) is the family's own ``encode_texts``.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from ..models.base import Model, Tensors

_PARTS = ("", "_2", "_3")


@dataclasses.dataclass(frozen=True)
class Slot:
    """A run of tokens in one text encoder: ``ids``, and ``layer``, which embeds them, (V, D) its ``weight``."""

    layer: nn.Module
    weight: torch.Tensor
    ids: tuple[int, ...]

    @property
    def start(self) -> torch.Tensor:
        """(T, D), the embeddings that the run has by itself."""
        return self.weight[list(self.ids)].detach().float()


class Slots:
    """The run of tokens that ``text`` becomes in the prompts that hold it, in every text encoder that sees it.

    ``first_only``: in the first such encoder alone.
    """

    def __init__(self, model: Model, text: str, prompts: Sequence[str], *, first_only: bool = False) -> None:
        self.model = model
        found = [slot for part in _PARTS if (slot := _slot(model, part, text, prompts)) is not None]
        self.slots = found[:1] if first_only else found

    def encode(self, prompts: Sequence[str], values: Sequence[torch.Tensor]) -> Tensors:
        """The denoiser's conditions for P prompts with ``values``, (P, T, D) per slot, in the place of the run."""
        with contextlib.ExitStack() as stack, torch.enable_grad():
            for slot, value in zip(self.slots, values, strict=True):
                stack.enter_context(_replaced(slot, value))
            return self.model.encode_texts(list(prompts))


def check(model: Model, text: str, prompts: Sequence[str], attack: str) -> None:
    """UserError, in one line, where no gradient reaches the embeddings of ``text`` in the prompts."""
    slots = Slots(model, text, prompts).slots
    why = "no text encoder of it sees the concept's tokens in a prompt" if not slots else ""
    if slots:
        made = Slots(model, text, prompts)
        values = [slot.start[None].clone().requires_grad_() for slot in slots]
        conditions = made.encode(prompts[:1], values)
        if not any(one.requires_grad for one in conditions.values()):
            why = "its text encoders pass no gradient to their embeddings"
    if why:
        raise UserError(
            f"the attack {attack} cannot inject an embedding into {model.name} ({model.family}): {why}. Leave it out."
        )


def _slot(model: Model, part: str, text: str, prompts: Sequence[str]) -> Slot | None:
    encoder = getattr(model.pipeline, f"text_encoder{part}", None)
    tokenizer = getattr(model.pipeline, f"tokenizer{part}", None)
    if encoder is None or tokenizer is None:
        return None
    layer = encoder.get_input_embeddings()
    seen: list[torch.Tensor] = []
    with torch.no_grad(), _watched(layer, seen):
        model.encode_texts(list(prompts[:1]))
    if not seen:
        return None
    # A word is other tokens behind a space, in lower case, or alone, as the tokenizer and the family have it.
    for spelt in (text, f" {text}", text.lower(), f" {text.lower()}"):
        ids = tuple(tokenizer(spelt, add_special_tokens=False).input_ids)
        if ids and all(_starts(row, ids) for row in seen[0]):
            return Slot(layer, layer.weight, ids)
    return None


def _starts(row: torch.Tensor, ids: Sequence[int]) -> list[int]:
    """Where in a row of tokens (L,) the run stands."""
    tokens, run = row.tolist(), list(ids)
    return [at for at in range(len(tokens) - len(run) + 1) if tokens[at : at + len(run)] == run]


@contextlib.contextmanager
def _watched(layer: nn.Module, seen: list[torch.Tensor]) -> Iterator[None]:
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach().cpu()))
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _replaced(slot: Slot, value: torch.Tensor) -> Iterator[None]:
    def exchange(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        rows = []
        for row, own, ids in zip(output, value.to(output), inputs[0], strict=True):
            at = _starts(ids, slot.ids)
            assert at, "the prompt has lost its tokens"
            first, last = at[0], at[0] + len(slot.ids)
            rows.append(torch.cat([row[:first], own, row[last:]]))
        return torch.stack(rows)

    handle = slot.layer.register_forward_hook(exchange)
    try:
        yield
    finally:
        handle.remove()
