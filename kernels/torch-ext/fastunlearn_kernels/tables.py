"""One launch for many tensors: a table of their addresses on the device, and the tensor each program works on.

Row i of the table: number of elements, first program of tensor i, then one address a column. The table is a function of
those integers alone, so keeping the last few is always right, and a step whose addresses repeat uploads nothing.
:class:`MovingTable` is for an owner who knows which columns move.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch

from .checks import INT32_MAX
from .launch import ceil_div, jit, tl

HEADER = 2  # columns before the addresses


class TensorTable(NamedTuple):
    rows: torch.Tensor  # (num_tensors, HEADER + columns) int64
    program_tensor: torch.Tensor  # (num_programs,) int32
    num_programs: int
    uploaded: torch.cuda.Event | None  # None for tensors on a CPU


class Moving(NamedTuple):
    """The gradients of one step: their addresses, the tensors, and copies that must outlive the launch."""

    grads: list[int]
    others: list[int] | None
    tensors: Sequence[torch.Tensor]
    other_tensors: Sequence[torch.Tensor]
    copies: Sequence[torch.Tensor] = ()


def pick(addresses: list[int], places: Sequence[int]) -> list[int]:
    """Those of one launch; mostly there is only one."""
    return addresses if len(places) == len(addresses) else [addresses[i] for i in places]


_held_by_graphs: dict[int, TensorTable] = {}  # by address: a captured graph reads its table at every replay


def tensor_table(columns: Sequence[Sequence[torch.Tensor | None]], elements_per_program: int) -> TensorTable:
    """The table of ``columns``: lists of equally many tensors, on one device; the first column sets the sizes.

    Raises:
        RuntimeError: a table would have to be uploaded while a CUDA graph is being captured.
    """
    sized = cast("Sequence[torch.Tensor]", columns[0])
    numels = tuple(tensor.numel() for tensor in sized)
    addresses = tuple(
        tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)
        for tensors in zip(*columns, strict=True)
    )
    return use(_kept_table(sized[0].device, elements_per_program, numels, addresses))


def use(table: TensorTable) -> TensorTable:
    """Orders a launch on the current stream after the table's upload, and keeps the table for it."""
    if table.uploaded is None:
        return table
    if torch.cuda.is_current_stream_capturing():
        _held_by_graphs[table.rows.data_ptr()] = table
    else:
        stream = torch.cuda.current_stream(table.rows.device)
        stream.wait_event(table.uploaded)
        table.rows.record_stream(stream)
        table.program_tensor.record_stream(stream)
    return table


def _refuse_upload_in_a_capture(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "The tensors have other addresses than in the steps before the capture of this CUDA graph. Run one step "
            "first, keep the gradients with zero_grad(set_to_none=False), then capture."
        )


def _to(device: torch.device, values: torch.Tensor) -> torch.Tensor:
    return values.pin_memory().to(device, non_blocking=True)  # pinned: the host does not wait for the stream


def _event(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


@functools.lru_cache(maxsize=64)  # several models' tensors beside each other
def _kept_table(
    device: torch.device, elements_per_program: int, numels: tuple[int, ...], addresses: tuple[tuple[int, ...], ...]
) -> TensorTable:
    return MovingTable(device, elements_per_program, numels, list(zip(*addresses, strict=True))).at({})


class MovingTable:
    """A table of which some columns move from step to step: only then rows are uploaded anew."""

    def __init__(
        self,
        device: torch.device,
        elements_per_program: int,
        numels: Sequence[int],
        columns: Sequence[Sequence[int]],
    ) -> None:
        _refuse_upload_in_a_capture(device)
        self.device = device
        programs = torch.tensor([ceil_div(numel, elements_per_program) for numel in numels], dtype=torch.int64)
        ends = programs.cumsum(0)
        self.num_programs = int(ends[-1])
        if self.num_programs > INT32_MAX:
            raise ValueError(f"{sum(numels)} elements are too many for one launch.")
        self.rows = torch.tensor([numels, [0] * len(numels), *columns], dtype=torch.int64).t().contiguous()
        self.rows[:, 1] = ends - programs
        program_tensor = torch.arange(len(numels), dtype=torch.int32).repeat_interleave(programs)
        self.program_tensor = program_tensor if device.type != "cuda" else _to(device, program_tensor)
        self.moving: Mapping[int, Sequence[int]] = {}
        self.table: TensorTable | None = None

    def at(self, moving: Mapping[int, Sequence[int]]) -> TensorTable:
        """The table with the addresses ``moving``, by column of the table.

        Raises:
            RuntimeError: they have moved while a CUDA graph is being captured.
        """
        if self.table is None or moving != self.moving:
            _refuse_upload_in_a_capture(self.device)
            for column, addresses in moving.items():
                self.rows[:, column] = torch.tensor(addresses, dtype=torch.int64)
            self.moving = moving
            rows, uploaded = self.rows.clone(), None
            if self.device.type == "cuda":
                rows = _to(self.device, rows)
                uploaded = _event(self.device)
            self.table = TensorTable(rows, self.program_tensor, self.num_programs, uploaded)
        return self.table


def are_aligned(columns: Sequence[Sequence[torch.Tensor]]) -> bool:
    """Whether every tensor starts at a multiple of 16 bytes, as 128-bit accesses need."""
    return all(tensor.data_ptr() % 16 == 0 for tensors in columns for tensor in tensors)


def alike(columns: Sequence[Sequence[torch.Tensor]]) -> list[list[int]]:
    """Indices of the tensors that share their dtypes, as one launch needs, in order. Empty tensors are left out."""
    groups: dict[tuple[torch.dtype, ...], list[int]] = {}
    for i, tensors in enumerate(zip(*columns, strict=True)):
        if tensors[0].numel():
            groups.setdefault(tuple(tensor.dtype for tensor in tensors), []).append(i)
    return list(groups.values())


TRITON_DTYPES: dict[torch.dtype, Any] = (
    {}
    if tl is None
    else {
        torch.float16: tl.float16,
        torch.bfloat16: tl.bfloat16,
        torch.float32: tl.float32,
    }
)


@jit
def place_of_program(table_ptr, program_tensor_ptr, NUM_COLUMNS: tl.constexpr):
    """This program's number, its tensor's row of the table, that tensor's numel, and which of its blocks this is."""
    pid = tl.program_id(0).to(tl.int64)
    row = tl.load(program_tensor_ptr + pid).to(tl.int64) * NUM_COLUMNS
    return pid, row, tl.load(table_ptr + row), pid - tl.load(table_ptr + row + 1)


@jit
def load_pointer(table_ptr, column, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(table_ptr + column).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)  # without the hint every access through it is 32 bits wide
    return pointer
