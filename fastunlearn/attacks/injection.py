"""Puts unknown embeddings in the place of a prompt's tokens, inside the text encoders and with their gradient.

In every encoder of transformers one layer turns tokens into embeddings; a hook on it exchanges those of a run.  It is
the layer that ``get_input_embeddings`` gives or, as in T5, another with the same weights.  What reads the prompt before
and after (templates, lower case, poolings) is the family's own ``encode_texts``.
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
_SPACES = ("\u2581", "\u0120", " ")  # how vocabularies write a space that is a token of its own


@dataclasses.dataclass(frozen=True)
class Slot:
    """A run of tokens in one text encoder: ``ids``, and ``layer``, which embeds them."""

    layer: nn.Embedding
    ids: tuple[int, ...]

    @property
    def start(self) -> torch.Tensor:
        """(T, D), the embeddings that the run has by itself."""
        return self.embedded(self.ids)

    @property
    def size(self) -> float:
        """The root mean square of the layer's embeddings."""
        weight = self.layer.weight.detach().float()
        scale = self.start.norm() / weight[list(self.ids)].norm()  # 1 but where the layer scales
        return float(weight.square().mean().sqrt() * scale)

    @torch.no_grad()
    def embedded(self, ids: Sequence[int]) -> torch.Tensor:
        """(N, D), what the layer makes of tokens, which some scale."""
        device = next(self.layer.parameters()).device
        made: torch.Tensor = self.layer(torch.tensor(list(ids), device=device))
        return made.float()


class Slots:
    """The run of tokens that ``text`` becomes in all of the prompts, in every text encoder that sees it in each.

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
    seen: list[tuple[nn.Embedding, torch.Tensor]] = []
    with torch.no_grad(), _watched(_embedding_layers(encoder), seen):
        model.encode_texts(list(prompts))
    if not seen:
        return None
    layer = seen[0][0]
    rows = [row for one, ids in seen if one is layer for row in ids]
    for ids in _spelt(tokenizer, text):
        if all(_starts(row, ids) for row in rows):
            return Slot(layer, ids)
    return None


def _embedding_layers(encoder: Any) -> list[nn.Embedding]:
    """The layers that may turn an encoder's tokens into embeddings: they have the same weights."""
    named = encoder.get_input_embeddings()
    layers = [one for one in encoder.modules() if isinstance(one, nn.Embedding) and one is not named]
    return [named, *(one for one in layers if one.weight.data_ptr() == named.weight.data_ptr())]


def _spelt(tokenizer: Any, text: str) -> Iterator[tuple[int, ...]]:
    """A word as tokens: they are others behind a space, in lower case, or behind a template's line break."""
    for spelt in (text, f" {text}", text.lower(), f" {text.lower()}"):
        ids = tuple(tokenizer(spelt, add_special_tokens=False).input_ids)
        if ids:
            yield ids
        if len(ids) > 1 and tokenizer.convert_ids_to_tokens(ids[0]) in _SPACES:
            yield ids[1:]


def _starts(row: torch.Tensor, ids: Sequence[int]) -> list[int]:
    """Where in a row of tokens (L,) the run stands."""
    tokens, run = row.tolist(), list(ids)
    return [at for at in range(len(tokens) - len(run) + 1) if tokens[at : at + len(run)] == run]


@contextlib.contextmanager
def _watched(layers: Sequence[nn.Embedding], seen: list[tuple[nn.Embedding, torch.Tensor]]) -> Iterator[None]:
    def note(module: nn.Embedding, inputs: Any, output: torch.Tensor) -> None:
        seen.append((module, inputs[0].detach().cpu()))

    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
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
