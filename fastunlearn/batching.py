"""Batches of one size: a network's results may change in the last bit with the size of a batch.

The last batch is filled up with its last row; a row's results depend neither on its company nor on its index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


def filled(rows: Sequence[T], size: int) -> list[T]:
    """At least one row as ``size`` rows, the last one repeated."""
    return [*rows, *[rows[-1]] * (size - len(rows))]


def filled_tensor(rows: torch.Tensor, size: int) -> torch.Tensor:
    """As :func:`filled` for (B, ...), B at most ``size``; a view where nothing is missing."""
    if len(rows) == size:
        return rows
    return torch.cat([rows, rows[-1:].expand(size - len(rows), *rows.shape[1:])])


def chunks(rows: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Runs of ``size`` rows, the last one shorter."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def in_fixed_batches(function: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, size: int) -> torch.Tensor:
    """``function``, which maps (size, ...) to (size, ...), over any number of rows (N, ...), N at least 1."""
    return torch.cat([function(filled_tensor(part, size))[: len(part)] for part in rows.split(size)])
