"""One AdamW step of many tensors in one launch, where a bit mask says which elements may change.

    g = grad_scale * (grad + other_coefficient * other_grad)          (clip factor and projection, from device memory)
    m = beta1 m + (1 - beta1) g            v = beta2 v + (1 - beta2) g^2
    p = p (1 - lr weight_decay) - lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
                                                                  (Loshchilov & Hutter 2019, arXiv 1711.05101)

Where the bit is 0, weight and states keep their bits: nothing is multiplied, so no weight decay and no NaN gets there.
Modes: dense (no mask), select (full states), compact (m, v and master of the selected elements only, packed in order).

Bytes per parameter, all fp32: dense 28; select 28 + 1/8; compact 12 + 16 d + 1/8. Low-precision weights of 2 bytes with
fp32 masters: dense 28; select 30 + 1/8; compact 6 + 24 d + 1/8 (the old weight is read: a sector whose elements are not
all selected is written whole). They hold where every sector holds a selected element, that is, are upper bounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .launch import jit, num_warps, on_device_of, tl
from .tables import TRITON_DTYPES, Moving, MovingTable, load_pointer, pick, use

if TYPE_CHECKING:
    from .plans import Member

SECTORS = 128  # rows of 8 elements a program: 1024 elements, 8 a thread, two 128-bit accesses per fp32 tensor
BLOCK_ELEMENTS = 8 * SECTORS


@jit
def _advance_step_kernel(
    table_ptr,  # (num_tensors, NUM_COLUMNS)
    corrections_ptr,  # out (num_tensors, 2) fp32: 1 / (1 - beta1^step), 1 / sqrt(1 - beta2^step)
    log_beta1,
    log_beta2,
    NUM_COLUMNS: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    step_ptr = load_pointer(table_ptr, pid * NUM_COLUMNS + 6, tl.float32, False)
    step = tl.load(step_ptr) + 1.0
    tl.store(step_ptr, step)
    # in fp64: 1 - beta2^step loses four digits of fp32 at the first step
    step = step.to(tl.float64)
    tl.store(corrections_ptr + 2 * pid, (1.0 / (1.0 - tl.exp(step * log_beta1))).to(tl.float32))
    correction2 = 1.0 - tl.exp(step * log_beta2)
    tl.store(corrections_ptr + 2 * pid + 1, (1.0 / tl.sqrt(correction2)).to(tl.float32))


@jit
def _popcount(byte):
    byte = byte - ((byte >> 1) & 0x55)
    byte = (byte & 0x33) + ((byte >> 2) & 0x33)
    return (byte + (byte >> 4)) & 0x0F


@jit
def _update_tile(
    param_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    master_ptr,
    other_ptr,
    offsets,  # (SECTORS, 8) elements of the tensor
    state_offsets,  # (SECTORS, 8) elements of the states
    mask,  # (SECTORS, 8) read and written; the same along a sector, or accesses become one element wide
    selected,  # (SECTORS, 8) changed
    grad_scale,
    other_coefficient,
    decay,
    step_size,
    correction2,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    MODE: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    HAS_OTHER: tl.constexpr,
):
    state_mask = mask
    if MODE == "compact":
        state_mask = mask & selected
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_OTHER:
        grad += other_coefficient * tl.load(other_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    grad *= grad_scale
    exp_avg = tl.load(exp_avg_ptr + state_offsets, mask=state_mask, other=0.0)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + state_offsets, mask=state_mask, other=0.0)
    new_exp_avg = exp_avg + one_minus_beta1 * (grad - exp_avg)
    new_exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * grad * grad
    update = step_size * new_exp_avg / (tl.sqrt(new_exp_avg_sq) * correction2 + eps)
    if HAS_MASTER:
        master = tl.load(master_ptr + state_offsets, mask=state_mask, other=0.0)
        new_weight = master * decay - update
        new_param = new_weight.to(param_ptr.dtype.element_ty)
    else:
        param = tl.load(param_ptr + offsets, mask=mask, other=0.0)
        new_weight = param * decay - update
        new_param = new_weight
    if MODE != "dense":
        if HAS_MASTER:
            param = tl.load(param_ptr + offsets, mask=mask, other=0.0)
        new_param = tl.where(selected, new_param, param)
    if MODE == "select":
        new_exp_avg = tl.where(selected, new_exp_avg, exp_avg)
        new_exp_avg_sq = tl.where(selected, new_exp_avg_sq, exp_avg_sq)
        if HAS_MASTER:
            new_weight = tl.where(selected, new_weight, master)
    tl.store(param_ptr + offsets, new_param, mask=mask)
    tl.store(exp_avg_ptr + state_offsets, new_exp_avg, mask=state_mask)
    tl.store(exp_avg_sq_ptr + state_offsets, new_exp_avg_sq, mask=state_mask)
    if HAS_MASTER:
        tl.store(master_ptr + state_offsets, new_weight, mask=state_mask)


@jit
def _masked_adamw_kernel(
    table_ptr,  # (num_tensors, NUM_COLUMNS): numel, first program, then the addresses, see PARAM and so on
    program_tensor_ptr,  # (num_programs,) int32
    corrections_ptr,  # (num_tensors, 2) fp32
    lr,  # number, or () fp32
    grad_scale_ptr,  # () fp32
    other_coefficient_ptr,  # () fp32
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    weight_decay,
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    OTHER_DTYPE: tl.constexpr,
    MODE: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    HAS_OTHER: tl.constexpr,
    HAS_GRAD_SCALE: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
    ALIGNED: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    SECTORS: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    tensor = tl.load(program_tensor_ptr + pid).to(tl.int64)
    row = tensor * NUM_COLUMNS
    numel = tl.load(table_ptr + row)
    block = pid - tl.load(table_ptr + row + 1)
    param_ptr = load_pointer(table_ptr, row + 2, PARAM_DTYPE, ALIGNED)
    grad_ptr = load_pointer(table_ptr, row + 3, GRAD_DTYPE, ALIGNED)
    exp_avg_ptr = load_pointer(table_ptr, row + 4, tl.float32, ALIGNED)
    exp_avg_sq_ptr = load_pointer(table_ptr, row + 5, tl.float32, ALIGNED)
    master_ptr = load_pointer(table_ptr, row + 7, tl.float32, ALIGNED)
    other_ptr = load_pointer(table_ptr, row + 10, OTHER_DTYPE, ALIGNED)
    if LR_ON_DEVICE:
        lr = tl.load(lr).to(tl.float32)
    grad_scale = 1.0
    if HAS_GRAD_SCALE:
        grad_scale = tl.load(grad_scale_ptr).to(tl.float32)
    other_coefficient = 0.0
    if HAS_OTHER:
        other_coefficient = tl.load(other_coefficient_ptr).to(tl.float32)
    decay = 1.0 - lr * weight_decay
    step_size = lr * tl.load(corrections_ptr + 2 * tensor)
    correction2 = tl.load(corrections_ptr + 2 * tensor + 1)

    sectors = block * SECTORS + tl.arange(0, SECTORS)
    columns = tl.arange(0, 8)
    offsets = sectors[:, None] * 8 + columns[None, :]
    state_offsets = offsets
    inside = sectors * 8 < numel
    touched = inside
    selected = tl.full((SECTORS, 8), 1, tl.int1)
    if MODE != "dense":
        bits_ptr = load_pointer(table_ptr, row + 8, tl.uint8, False)
        byte = tl.load(bits_ptr + sectors, mask=inside, other=0).to(tl.int32)
        touched = byte != 0
        selected = ((byte[:, None] >> columns[None, :]) & 1) != 0
        if MODE == "compact":
            ranks_ptr = load_pointer(table_ptr, row + 9, tl.int64, False)
            per_sector = _popcount(byte)
            lower = _popcount(byte[:, None] & ((1 << columns) - 1)[None, :])
            before = (tl.cumsum(per_sector, axis=0) - per_sector)[:, None] + lower
            state_offsets = tl.load(ranks_ptr + block) + before
    mask = tl.broadcast_to(touched[:, None], (SECTORS, 8))
    if (block + 1) * (SECTORS * 8) <= numel:
        _update_tile(
            param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, master_ptr, other_ptr,
            offsets, state_offsets, mask, selected,
            grad_scale, other_coefficient, decay, step_size, correction2, one_minus_beta1, beta2, one_minus_beta2, eps,
            MODE, HAS_MASTER, HAS_OTHER,
        )  # fmt: skip
    else:  # only the last block of a tensor pays for a mask that differs along a sector
        _update_tile(
            param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, master_ptr, other_ptr,
            offsets, state_offsets, mask & (offsets < numel), selected,
            grad_scale, other_coefficient, decay, step_size, correction2, one_minus_beta1, beta2, one_minus_beta2, eps,
            MODE, HAS_MASTER, HAS_OTHER,
        )  # fmt: skip


# columns of the table: numel, first program, then
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, STEP, MASTER, BITS, RANKS, OTHER = range(2, 11)


class TritonStep:
    """One launch: parameters alike in device, dtypes, mode, group and alignment, none of them empty."""

    @staticmethod
    def launch_of(member: Member, moving: Moving, place: int) -> tuple[Any, ...]:
        """What the members of one launch share."""
        param, other = member.param, member.other
        addresses = [
            param.data_ptr(),
            moving.grads[place],
            *(t.data_ptr() for k, t in member.state.items() if k != "step"),
        ]
        if moving.others is not None:
            addresses.append(moving.others[place])
        is_aligned = all(address % 16 == 0 for address in addresses)
        dtypes = (param.dtype, member.grad.dtype, None if other is None else other.dtype)
        return param.device, dtypes, member.mode, member.group, is_aligned

    def __init__(self, members: Sequence[Member], places: Sequence[int], launch: tuple[Any, ...]) -> None:
        chosen = [members[i] for i in places]
        first = chosen[0]
        self.is_aligned = launch[-1]
        self.places, self.device, self.group, self.mode = places, first.param.device, first.group, first.mode
        self.dtypes = [first.param.dtype, first.grad.dtype, torch.float32 if first.other is None else first.other.dtype]
        self.has_master, self.has_other = "master" in first.state, first.other is not None

        def addresses(tensors: Iterable[torch.Tensor | None]) -> list[int]:
            return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]

        none = [0] * len(chosen)
        read_wide = ("exp_avg", "exp_avg_sq", "master")
        exp_avg, exp_avg_sq, master = (addresses(m.state.get(name) for m in chosen) for name in read_wide)
        params, steps = addresses(m.param for m in chosen), addresses(m.state["step"] for m in chosen)
        self.table = MovingTable(self.device, BLOCK_ELEMENTS, [m.param.numel() for m in chosen], [
            params, none, exp_avg, exp_avg_sq, steps, master,
            addresses(m.bits for m in chosen), addresses(m.ranks for m in chosen), none,
        ])  # fmt: skip

    def run(
        self,
        moving: Moving,
        groups: Sequence[Mapping[str, Any]],
        grad_scale: torch.Tensor | None,
        other_coefficient: torch.Tensor | None,
    ) -> None:
        """Steps them in place; the scalars are read on the device of the parameters."""
        grads = pick(moving.grads, self.places)
        columns = {GRAD: grads}
        if moving.others is not None:
            columns[OTHER] = pick(moving.others, self.places)
        table = use(self.table.at(columns))
        group, device = groups[self.group], self.device
        lr, (beta1, beta2) = group["lr"], group["betas"]
        if isinstance(lr, torch.Tensor):
            lr = lr.to(device)
        corrections = torch.empty(len(self.places), 2, dtype=torch.float32, device=device)
        with on_device_of(corrections):
            _advance_step_kernel[(len(self.places),)](
                table.rows,
                corrections,
                math.log(beta1) if beta1 else -math.inf,
                math.log(beta2) if beta2 else -math.inf,
                NUM_COLUMNS=table.rows.shape[1],
                num_warps=1,
            )
            _masked_adamw_kernel[(table.num_programs,)](
                table.rows,
                table.program_tensor,
                corrections,
                lr,
                None if grad_scale is None else grad_scale.to(device),
                None if other_coefficient is None else other_coefficient.to(device),
                1 - beta1,
                beta2,
                1 - beta2,
                group["eps"],
                group["weight_decay"],
                PARAM_DTYPE=TRITON_DTYPES[self.dtypes[0]],
                GRAD_DTYPE=TRITON_DTYPES[self.dtypes[1]],
                OTHER_DTYPE=TRITON_DTYPES[self.dtypes[2]],
                MODE=self.mode,
                HAS_MASTER=self.has_master,
                HAS_OTHER=self.has_other,
                HAS_GRAD_SCALE=grad_scale is not None,
                LR_ON_DEVICE=isinstance(lr, torch.Tensor),
                ALIGNED=self.is_aligned,
                NUM_COLUMNS=table.rows.shape[1],
                SECTORS=SECTORS,
                num_warps=num_warps(8 if self.mode == "compact" else 4),  # ranks take registers: 168 a thread with 4
            )
