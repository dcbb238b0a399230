"""Masks at one bit an element: element i of the flattened mask is bit i % 8 of byte i // 8, and padding bits are 0."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import native_calls
from .checks import check_tensor, flattened
from .launch import backend_of, ceil_div
from .operators import is_watched


def num_bytes(numel: int) -> int:
    return ceil_div(numel, 8)


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """Packs a bool mask of any shape into uint8 of shape (ceil(numel / 8),), least significant bit first.

    Raises:
        TypeError: the mask is not bool.
    """
    check_tensor("mask", mask, (torch.bool,))
    flat = flattened(mask)
    if not is_watched(flat) and backend_of(flat) == "native":
        return native_calls.pack_bits(flat)
    padding = -flat.numel() % 8
    if padding:
        flat = torch.cat([flat, flat.new_zeros(padding)])
    columns = flat.view(torch.uint8).view(-1, 8)
    packed = columns[:, 0].clone()
    for bit in range(1, 8):  # column by column: no temporary of 8 bytes an element
        packed |= columns[:, bit] << bit
    return packed


def unpack_bits(bits: torch.Tensor, shape: int | Sequence[int]) -> torch.Tensor:
    """The bool mask of ``shape`` that :func:`pack_bits` packed.

    Raises:
        TypeError: ``bits`` is not uint8.
        ValueError: ``bits`` has not ceil(numel / 8) bytes.
    """
    shape = torch.Size([shape] if isinstance(shape, int) else shape)
    check_tensor("bits", bits, (torch.uint8,), (num_bytes(shape.numel()),))
    byte = torch.arange(256, device=bits.device)
    table = (byte[:, None] >> torch.arange(8, device=bits.device) & 1).to(torch.uint8).view(torch.int64)[:, 0]
    return table[bits.int()].view(torch.bool)[: shape.numel()].view(shape)
