"""Which elements matter most: accumulated gradients, the exact threshold for a density, and the mask in bits.

The bits of |x| in fp32 order like its value, so the count-th largest is found digit by digit: a histogram of the first
8 of 31 bits, the digit in which the count-th largest lies, a histogram of the next 8 bits among those that share
it, and so on: 8 + 8 + 8 + 7. Of values equal to the threshold the first by index are taken, so the count is exact.

Bytes an fp32 element: accumulate 12; select 4 x 4 to count, 4 + 1/8 to pack, 4 x 1/8 for the histograms.
Each program writes its histogram and torch adds them up: no atomics, and the last tells what ties precede a program.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import native_calls, reference
from .bits import num_bytes, pack_bits, unpack_bits
from .checks import check_tensor, check_tensor_list, flattened
from .launch import backend_of, ceil_div, jit, num_warps, on_device_of, tl
from .operators import is_watched, operator
from .tables import TRITON_DTYPES, alike, are_aligned, load_pointer, place_of_program, tensor_table

MODES = ("absolute", "signed", "squared")
GRANULARITIES = ("element", "sector", "row")
SECTORS = 512  # 4096 elements a tile
TILES = 4  # 16384 elements a program: its histogram of 1 KiB is a 64th of what it reads
BINS = 256
DIGITS = ((23, 8), (15, 8), (7, 8), (0, 7))  # (shift, bits), most significant first
ACCUMULATE_BLOCK = 1024


@jit
def _accumulate_kernel(
    table_ptr,  # (num_tensors, NUM_COLUMNS): numel, first program, saliency, gradient
    program_tensor_ptr,
    DTYPE: tl.constexpr,
    MODE: tl.constexpr,
    ALIGNED: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    _, row, numel, block = place_of_program(table_ptr, program_tensor_ptr, NUM_COLUMNS)
    saliency_ptr = load_pointer(table_ptr, row + 2, tl.float32, ALIGNED)
    gradient_ptr = load_pointer(table_ptr, row + 3, DTYPE, ALIGNED)
    start = block * BLOCK_SIZE
    offsets = start + tl.arange(0, BLOCK_SIZE)
    if start + BLOCK_SIZE <= numel:
        _accumulate_tile(saliency_ptr + offsets, gradient_ptr + offsets, offsets >= 0, MODE)
    else:
        _accumulate_tile(saliency_ptr + offsets, gradient_ptr + offsets, offsets < numel, MODE)


@jit
def _accumulate_tile(saliency_ptrs, gradient_ptrs, mask, MODE: tl.constexpr):
    gradient = tl.load(gradient_ptrs, mask=mask, other=0.0).to(tl.float32)
    if MODE == "absolute":
        gradient = tl.abs(gradient)
    elif MODE == "squared":
        gradient = gradient * gradient
    tl.store(saliency_ptrs, tl.load(saliency_ptrs, mask=mask, other=0.0) + gradient, mask=mask)


@jit
def _load_keys(score_ptr, tile, numel, SECTORS: tl.constexpr):
    sectors = tile * SECTORS + tl.arange(0, SECTORS)
    offsets = sectors[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = offsets < numel
    if (tile + 1) * (SECTORS * 8) <= numel:
        scores = tl.load(score_ptr + offsets)
    else:
        scores = tl.load(score_ptr + offsets, mask=inside, other=0.0)
    keys = scores.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    keys = tl.where(keys > 0x7F800000, 0, keys)  # NaN is not salient
    return keys, inside, sectors


@jit
def _histogram_kernel(
    table_ptr,  # (num_tensors, NUM_COLUMNS): numel, first program, scores, bits
    program_tensor_ptr,
    prefix_ptr,  # () int64, the digits found so far
    histograms_ptr,  # out (num_programs, BINS) int32
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    SECTORS: tl.constexpr,
    TILES: tl.constexpr,
    BINS: tl.constexpr,
):
    pid, row, numel, block = place_of_program(table_ptr, program_tensor_ptr, NUM_COLUMNS)
    score_ptr = load_pointer(table_ptr, row + 2, tl.float32, ALIGNED)
    prefix = tl.load(prefix_ptr).to(tl.int32)
    counts = tl.zeros((BINS,), tl.int32)
    for tile in range(TILES):
        keys, inside, _ = _load_keys(score_ptr, block * TILES + tile, numel, SECTORS)
        is_counted = inside & ((keys >> (SHIFT + BITS)) == prefix)
        digits = (keys >> SHIFT) & ((1 << BITS) - 1)
        digits = tl.reshape(digits, (SECTORS * 8,))
        counts += tl.histogram(digits, BINS, mask=tl.reshape(is_counted, (SECTORS * 8,)))
    tl.store(histograms_ptr + pid * BINS + tl.arange(0, BINS), counts)


@jit
def _pack_kernel(
    table_ptr,  # (num_tensors, NUM_COLUMNS): numel, first program, scores, bits
    program_tensor_ptr,
    threshold_ptr,  # () int64, key of the smallest selected score
    ties_ptr,  # () int64, how many of the scores that equal it are selected
    ties_before_ptr,  # (num_programs,) int64, how many of them earlier programs have
    ALIGNED: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    SECTORS: tl.constexpr,
    TILES: tl.constexpr,
):
    pid, row, numel, block = place_of_program(table_ptr, program_tensor_ptr, NUM_COLUMNS)
    score_ptr = load_pointer(table_ptr, row + 2, tl.float32, ALIGNED)
    bits_ptr = load_pointer(table_ptr, row + 3, tl.uint8, False)
    threshold = tl.load(threshold_ptr).to(tl.int32)
    ties_left = tl.load(ties_ptr) - tl.load(ties_before_ptr + pid)
    columns = tl.arange(0, 8)
    for tile in range(TILES):
        keys, inside, sectors = _load_keys(score_ptr, block * TILES + tile, numel, SECTORS)
        is_tie = (inside & (keys == threshold)).to(tl.int32)
        per_sector = tl.sum(is_tie, axis=1)
        before = (tl.cumsum(per_sector, axis=0) - per_sector)[:, None] + tl.cumsum(is_tie, axis=1) - is_tie
        is_selected = inside & ((keys > threshold) | ((is_tie != 0) & (before < ties_left)))
        byte = tl.sum(is_selected.to(tl.int32) << columns[None, :], axis=1)
        tl.store(bits_ptr + sectors, byte.to(tl.uint8), mask=sectors * 8 < numel)
        ties_left -= tl.sum(per_sector, axis=0)


def launch_accumulate(saliency: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], mode: str) -> None:
    """Adds to ``saliency`` in one launch a gradient dtype. Tensors are flat and dense; none is empty."""
    for group in alike([gradients]):
        columns = [[tensors[i] for i in group] for tensors in (saliency, gradients)]
        table = tensor_table(columns, ACCUMULATE_BLOCK)
        with on_device_of(columns[0][0]):
            _accumulate_kernel[(table.num_programs,)](
                table.rows,
                table.program_tensor,
                DTYPE=TRITON_DTYPES[columns[1][0].dtype],
                MODE=mode,
                ALIGNED=are_aligned(columns),
                NUM_COLUMNS=table.rows.shape[1],
                BLOCK_SIZE=ACCUMULATE_BLOCK,
                num_warps=num_warps(4),
            )


def launch_select_largest(scores: Sequence[torch.Tensor], count: int) -> list[torch.Tensor]:
    """Packed masks of the ``count`` >= 1 largest |scores|; the digits stay on the device. Flat, none empty."""
    device = scores[0].device
    bits = [torch.empty(num_bytes(score.numel()), dtype=torch.uint8, device=device) for score in scores]
    table = tensor_table([scores, bits], TILES * SECTORS * 8)
    options = {
        "ALIGNED": are_aligned([scores]),
        "NUM_COLUMNS": table.rows.shape[1],
        "SECTORS": SECTORS,
        "TILES": TILES,
    }
    grid, warps = (table.num_programs,), num_warps(8)
    histograms = torch.empty(table.num_programs, BINS, dtype=torch.int32, device=device)
    prefix = torch.zeros((), dtype=torch.int64, device=device)
    wanted = torch.full((), count, dtype=torch.int64, device=device)
    with on_device_of(scores[0]):
        for shift, width in DIGITS:
            _histogram_kernel[grid](
                table.rows,
                table.program_tensor,
                prefix,
                histograms,
                SHIFT=shift,
                BITS=width,
                BINS=BINS,
                num_warps=warps,
                **options,
            )
            counts = histograms.sum(0, dtype=torch.int64)
            at_least = counts.flip(0).cumsum(0).flip(0)
            digit = (at_least >= wanted).sum() - 1
            prefix = (prefix << width) + digit
            wanted = wanted - (at_least - counts).gather(0, digit.view(1))[0]
        ties = histograms.gather(1, digit.expand(table.num_programs, 1))[:, 0].to(torch.int64)
        _pack_kernel[grid](
            table.rows, table.program_tensor, prefix, wanted, ties.cumsum(0) - ties, num_warps=8, **options
        )
    return bits


def accumulate_saliency_(
    saliency: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], *, mode: str = "absolute"
) -> None:
    """Adds the gradients of one batch to the saliency, in place and on the device.

    Args:
        saliency: float32 tensors, dense, on one device.
        gradients: as many, of the same shapes, float16, bfloat16 or float32.
        mode: what is added: "absolute" |g|, "signed" g (SalUn: the magnitude of the summed gradient), "squared" g^2.

    Raises:
        TypeError, ValueError: what is wrong with the inputs.
    """
    check_tensor_list("saliency", saliency, (torch.float32,))
    check_tensor_list("gradients", gradients)
    if mode not in MODES:
        raise ValueError(f"`mode` must be one of {', '.join(MODES)}, got {mode!r}.")
    if len(saliency) != len(gradients):
        raise ValueError(f"`gradients` must have {len(saliency)} tensors like `saliency`, got {len(gradients)}.")
    for i, (total, gradient) in enumerate(zip(saliency, gradients, strict=True)):
        check_tensor(f"gradients[{i}]", gradient, shape=tuple(total.shape), device=total.device, frozen=False)
        if not total.is_contiguous():
            raise ValueError(f"`saliency[{i}]` must be contiguous, got strides {total.stride()}.")
    with torch.no_grad():
        filled = [i for i, total in enumerate(saliency) if total.numel()]
        if filled:
            # plain torch, too, is what a compiler fuses
            run = reference.accumulate_saliency_ if is_watched(saliency[filled[0]]) else _run_accumulate
            run([saliency[i].view(-1) for i in filled], [flattened(gradients[i]) for i in filled], mode)


def _run_accumulate(saliency: list[torch.Tensor], gradients: list[torch.Tensor], mode: str) -> None:
    backend = backend_of(saliency[0])
    if backend == "triton":
        launch_accumulate(saliency, gradients, mode)
    elif backend == "native":
        native_calls.accumulate_saliency_(saliency, gradients, mode)
    else:
        reference.accumulate_saliency_(saliency, gradients, mode)


def saliency_mask(
    saliency: torch.Tensor | Sequence[torch.Tensor], density: float, *, granularity: str = "element"
) -> torch.Tensor | list[torch.Tensor]:
    """The packed mask of the most salient share of all elements, ranked over all tensors together.

    Exactly ``floor(density * units + 1/2)`` units are selected, by |saliency|; of equal ones the first by index, and
    NaN ranks as 0. No host sync.

    Args:
        saliency: a float32 tensor or a list of them, on one device, of any shapes.
        density: share of the units to select, in [0, 1].
        granularity: a unit: "element"; "sector", 8 neighbours in the flattened tensor, whose bits are a byte and whose
            32 bytes are what a GPU reads at least; "row", the elements of one index of the first dimension. Sectors and
            rows are ranked by their mean.

    Returns:
        (ceil(numel / 8),) uint8, or a list of them, as ``pack_bits`` makes them.

    Raises:
        TypeError, ValueError: what is wrong with the inputs.
    """
    tensors = [saliency] if isinstance(saliency, torch.Tensor) else saliency
    check_tensor_list("saliency", tensors, (torch.float32,))
    if not 0 <= density <= 1:
        raise ValueError(f"`density` must be between 0 and 1, got {density}.")
    if granularity not in GRANULARITIES:
        raise ValueError(f"`granularity` must be one of {', '.join(GRANULARITIES)}, got {granularity!r}.")
    with torch.no_grad():
        scores = [_unit_scores(tensor.detach(), granularity) for tensor in tensors]
        bits = _select_largest(scores, int(density * sum(score.numel() for score in scores) + 0.5))
        if granularity != "element":
            bits = [
                _widen(b, score, tensor, granularity) for b, score, tensor in zip(bits, scores, tensors, strict=True)
            ]
    return bits[0] if isinstance(saliency, torch.Tensor) else bits


def _select_largest(scores: list[torch.Tensor], count: int) -> list[torch.Tensor]:
    bits = [torch.zeros(num_bytes(score.numel()), dtype=torch.uint8, device=score.device) for score in scores]
    filled = [i for i, score in enumerate(scores) if score.numel()]
    if count == 0 or not filled:
        return bits
    run = _select_operator if is_watched(scores[0]) else _run_select
    for i, packed in zip(filled, run([scores[i] for i in filled], count), strict=True):
        bits[i] = packed
    return bits


def _run_select(scores: list[torch.Tensor], count: int) -> list[torch.Tensor]:
    backend = backend_of(scores[0])
    if backend == "triton":
        return launch_select_largest(scores, count)
    if backend == "native":
        return native_calls.select_largest(scores, count)
    return [pack_bits(mask) for mask in reference.select_largest(scores, count)]


_select_operator = operator(
    "select_largest",
    "(Tensor[] scores, int count) -> Tensor[]",
    _run_select,
    lambda scores, count: [score.new_empty(num_bytes(score.numel()), dtype=torch.uint8) for score in scores],
)


def _unit_scores(saliency: torch.Tensor, granularity: str) -> torch.Tensor:
    if granularity == "element" or saliency.numel() == 0:
        return flattened(saliency)
    magnitude = saliency.abs().nan_to_num_(nan=0.0, posinf=float("inf"))
    if granularity == "row":
        return magnitude.view(saliency.shape[0] if saliency.dim() else 1, -1).mean(1)
    flat = magnitude.reshape(-1)
    sums = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8).sum(1)
    sizes = torch.full_like(sums, 8.0)
    sizes[-1] = flat.numel() - 8 * (ceil_div(flat.numel(), 8) - 1)
    return sums / sizes


def _widen(bits: torch.Tensor, scores: torch.Tensor, saliency: torch.Tensor, granularity: str) -> torch.Tensor:
    """Bits of units to bits of their elements."""
    if saliency.numel() == 0:
        return bits
    units = unpack_bits(bits, scores.numel())
    repeats = 8 if granularity == "sector" else saliency.numel() // units.numel()
    return pack_bits(units.repeat_interleave(repeats)[: saliency.numel()])
