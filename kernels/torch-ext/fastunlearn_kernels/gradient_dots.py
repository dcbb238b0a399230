"""Inner products of two gradients over all parameters, and the projection that resolves their conflict.

    dots = <g0, g0>, <g0, g1>, <g1, g1>                                   bytes: 4 a parameter (two bf16 gradients)

Gradient surgery (Yu et al. 2020, https://arxiv.org/abs/2001.06782): where <g0, g1> < 0, g0 loses its part along g1,
    g0 <- g0 - <g0, g1> / <g1, g1> g1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from . import native_calls, reference
from .bits import num_bytes, unpack_bits
from .checks import check_tensor, check_tensor_list, flattened
from .launch import backend_of, jit, num_warps, on_device_of, tl
from .operators import is_watched, operator
from .tables import (
    TRITON_DTYPES,
    Moving,
    MovingTable,
    TensorTable,
    alike,
    are_aligned,
    load_pointer,
    pick,
    place_of_program,
    tensor_table,
    use,
)

if TYPE_CHECKING:
    from .plans import Member

TILES = 8  # of 1024 elements a program: few enough partials that their sum costs nothing
SECTORS = 128


@jit
def _tile_products(pointer0, pointer1, offsets, mask, selected, HAS_SECOND: tl.constexpr):
    gradient0 = tl.load(pointer0 + offsets, mask=mask, other=0.0).to(tl.float32)
    gradient0 = tl.where(selected, gradient0, 0.0)
    gradient1 = gradient0
    if HAS_SECOND:
        gradient1 = tl.load(pointer1 + offsets, mask=mask, other=0.0).to(tl.float32)
        gradient1 = tl.where(selected, gradient1, 0.0)
    return gradient0 * gradient0, gradient0 * gradient1, gradient1 * gradient1


@jit
def _gradient_dots_kernel(
    table_ptr,  # (num_tensors, NUM_COLUMNS): numel, first program, gradient 0, gradient 1, bits
    program_tensor_ptr,  # (num_programs,) int32
    partial_ptr,  # out (num_programs, 3) fp32
    DTYPE0: tl.constexpr,
    DTYPE1: tl.constexpr,
    HAS_SECOND: tl.constexpr,
    HAS_BITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    SECTORS: tl.constexpr,
    TILES: tl.constexpr,
):
    pid, row, numel, block = place_of_program(table_ptr, program_tensor_ptr, NUM_COLUMNS)
    pointer0 = load_pointer(table_ptr, row + 2, DTYPE0, ALIGNED)
    pointer1 = load_pointer(table_ptr, row + 3, DTYPE1, ALIGNED)
    bits_address = tl.load(table_ptr + row + 4)
    bits_ptr = bits_address.to(tl.pointer_type(tl.uint8))
    columns = tl.arange(0, 8)
    dot00 = tl.zeros((SECTORS, 8), tl.float32)
    dot01 = tl.zeros((SECTORS, 8), tl.float32)
    dot11 = tl.zeros((SECTORS, 8), tl.float32)
    for tile in range(TILES):
        sectors = (block * TILES + tile) * SECTORS + tl.arange(0, SECTORS)
        offsets = sectors[:, None] * 8 + columns[None, :]
        inside = sectors * 8 < numel
        touched = inside
        selected = tl.full((SECTORS, 8), 1, tl.int1)
        if HAS_BITS:
            # a tensor without a mask has address 0 and all its bits set
            byte = tl.load(bits_ptr + sectors, mask=inside & (bits_address != 0), other=255).to(tl.int32)
            touched = inside & (byte != 0)
            selected = ((byte[:, None] >> columns[None, :]) & 1) != 0
        mask = tl.broadcast_to(touched[:, None], (SECTORS, 8))
        if (block * TILES + tile + 1) * (SECTORS * 8) <= numel:
            new00, new01, new11 = _tile_products(pointer0, pointer1, offsets, mask, selected, HAS_SECOND)
        else:  # only here may the mask differ along a sector, which makes accesses one element wide
            mask = mask & (offsets < numel)
            new00, new01, new11 = _tile_products(pointer0, pointer1, offsets, mask, selected & mask, HAS_SECOND)
        dot00 += new00
        if HAS_SECOND:
            dot01 += new01
            dot11 += new11
    tl.store(partial_ptr + 3 * pid, tl.sum(dot00))
    tl.store(partial_ptr + 3 * pid + 1, tl.sum(dot01))
    tl.store(partial_ptr + 3 * pid + 2, tl.sum(dot11))


def launch_gradient_dots(
    gradients0: Sequence[torch.Tensor],
    gradients1: Sequence[torch.Tensor] | None,
    bits: Sequence[torch.Tensor | None],
) -> torch.Tensor:
    """Partial products, one row a program, and their sum in one fixed order. Tensors are flat; none is empty."""
    absent = [None] * len(gradients0)
    table = tensor_table([gradients0, absent if gradients1 is None else gradients1, bits], TILES * SECTORS * 8)
    dtypes = gradients0[0].dtype, None if gradients1 is None else gradients1[0].dtype
    is_aligned = are_aligned([gradients0] if gradients1 is None else [gradients0, gradients1])
    return _launch(table, gradients0[0].device, *dtypes, any(b is not None for b in bits), is_aligned)


def _launch(
    table: TensorTable,
    device: torch.device,
    dtype0: torch.dtype,
    dtype1: torch.dtype | None,
    has_bits: bool,
    is_aligned: bool,
) -> torch.Tensor:
    partial = torch.empty(table.num_programs, 3, dtype=torch.float32, device=device)
    with on_device_of(partial):
        _gradient_dots_kernel[(table.num_programs,)](
            table.rows,
            table.program_tensor,
            partial,
            DTYPE0=TRITON_DTYPES[dtype0],
            DTYPE1=TRITON_DTYPES[torch.float32 if dtype1 is None else dtype1],
            HAS_SECOND=dtype1 is not None,
            HAS_BITS=has_bits,
            ALIGNED=is_aligned,
            NUM_COLUMNS=table.rows.shape[1],
            SECTORS=SECTORS,
            TILES=TILES,
            num_warps=num_warps(4),
        )
    return partial.sum(0, dtype=torch.float64)


class TritonNorm:
    """The squared norm of gradients alike in device, dtype and alignment, none of them empty; see ``plans``."""

    @staticmethod
    def launch_of(member: Member, moving: Moving, place: int) -> tuple[Any, ...]:
        """What the members of one launch share."""
        return member.param.device, member.grad.dtype, moving.grads[place] % 16 == 0

    def __init__(self, members: Sequence[Member], places: Sequence[int], launch: tuple[Any, ...]) -> None:
        self.is_aligned = launch[-1]
        chosen = [members[i] for i in places]
        self.places, self.device, self.dtype = places, chosen[0].param.device, chosen[0].grad.dtype
        bits = [0 if m.bits is None else m.bits.data_ptr() for m in chosen]
        self.has_bits, none = any(bits), [0] * len(chosen)
        numels = [m.grad.numel() for m in chosen]
        self.table = MovingTable(self.device, TILES * SECTORS * 8, numels, [none, none, bits])

    def run(self, moving: Moving) -> torch.Tensor:
        """() float64 on the device."""
        grads = pick(moving.grads, self.places)
        return _launch(use(self.table.at({2: grads})), self.device, self.dtype, None, self.has_bits, self.is_aligned)[0]


def gradient_dots(
    gradients0: Sequence[torch.Tensor],
    gradients1: Sequence[torch.Tensor] | None = None,
    *,
    grad_masks: Sequence[torch.Tensor | None] | None = None,
) -> torch.Tensor:
    """Inner products over all elements of two lists of gradients, in one pass and without a host sync.

    Args:
        gradients0: tensors of any shapes, float16, bfloat16 or float32, on one device.
        gradients1: as many, of the same shapes; None for norms alone.
        grad_masks: for each tensor its packed mask (see ``pack_bits``) or None; what it leaves out is not read, NaN
            included.

    Returns:
        (3,) float32: <0, 0>, <0, 1>, <1, 1>. The last two are 0 without ``gradients1``. Repeats bit for bit, on a CPU
        for any number of threads.

    Raises:
        TypeError, ValueError: what is wrong with the inputs; an empty list among them.
    """
    check_tensor_list("gradients0", gradients0)
    if not gradients0:
        raise ValueError("`gradients0` must have at least one tensor.")
    device = gradients0[0].device
    if gradients1 is not None:
        check_tensor_list("gradients1", gradients1)
        if len(gradients1) != len(gradients0):
            raise ValueError(
                f"`gradients1` must have {len(gradients0)} tensors like `gradients0`, got {len(gradients1)}."
            )
        for i, (gradient0, gradient1) in enumerate(zip(gradients0, gradients1, strict=True)):
            check_tensor(f"gradients1[{i}]", gradient1, shape=tuple(gradient0.shape), device=device, frozen=False)
    bits: list[torch.Tensor | None] = [None] * len(gradients0) if grad_masks is None else list(grad_masks)
    if len(bits) != len(gradients0):
        raise ValueError(f"`grad_masks` must have {len(gradients0)} entries like `gradients0`, got {len(bits)}.")
    for i, (gradient0, packed) in enumerate(zip(gradients0, bits, strict=True)):
        if packed is not None:
            check_tensor(f"grad_masks[{i}]", packed, (torch.uint8,), (num_bytes(gradient0.numel()),), device)
    with torch.no_grad():
        flat0 = [flattened(gradient) for gradient in gradients0]
        flat1 = None if gradients1 is None else [flattened(gradient) for gradient in gradients1]
        return (_operator if is_watched(gradients0[0]) else _run)(flat0, flat1, bits)


def _run(
    gradients0: list[torch.Tensor], gradients1: list[torch.Tensor] | None, bits: list[torch.Tensor | None]
) -> torch.Tensor:
    """Of flat dense tensors."""
    backend = backend_of(gradients0[0])
    if backend == "native":
        return native_calls.gradient_dots(gradients0, gradients1, bits)
    if backend == "reference":
        selected = [None if b is None else unpack_bits(b, g.numel()) for b, g in zip(bits, gradients0, strict=True)]
        return reference.gradient_dots(gradients0, gradients1, selected)
    dots = torch.zeros(3, dtype=torch.float64, device=gradients0[0].device)
    for group in alike([gradients0] if gradients1 is None else [gradients0, gradients1]):
        dots += launch_gradient_dots(
            [gradients0[i] for i in group],
            None if gradients1 is None else [gradients1[i] for i in group],
            [bits[i] for i in group],
        )
    return dots.float()


_operator = operator(
    "gradient_dots",
    "(Tensor[] gradients0, Tensor[]? gradients1, Tensor?[] bits) -> Tensor",
    _run,
    lambda gradients0, gradients1, bits: gradients0[0].new_empty(3, dtype=torch.float32),
)


def projection_coefficient(dots: torch.Tensor) -> torch.Tensor:
    """The c of ``g0 + c g1`` that takes from g0 its part against g1: ``-min(<g0, g1>, 0) / <g1, g1>``, 0 if g1 is 0.

    Args:
        dots: (3,) float32 as :func:`gradient_dots` gives it.

    Returns:
        () float32 on the device. ``MaskedAdamW.step(other_grads=g1, other_coefficient=c)`` steps along the projected
        g0, and ``c + 1`` along the sum of the projected g0 and g1.
    """
    check_tensor("dots", dots, (torch.float32,), (3,))
    return torch.where(dots[2] > 0, -dots[1].clamp(max=0) / dots[2], torch.zeros_like(dots[2]))
