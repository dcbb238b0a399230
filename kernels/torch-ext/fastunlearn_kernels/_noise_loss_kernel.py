"""The launches of ``noise_pred_loss``: one pass over the data with the gradient, the sum of its partials, the scale.

The maths is in ``noise_loss``; inputs are right and dense here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .checks import INT32_MAX
from .launch import ceil_div, jit, next_power_of_2, num_warps, on_device_of, tl

BLOCK_SIZE = 1024  # 8 elements a thread: one 128-bit load of 16-bit latents per input
SCALE_BLOCK_SIZE = 8192  # the programs of the backward pass mostly find that there is nothing to do: few of them


@jit
def _noise_pred_loss_kernel(
    noise_pred_ptr,  # (B, n), n = C * H * W
    teacher_ptr,  # (K, B or bank rows, n), by its strides
    coefficients_ptr,  # (B, K) fp32
    weights_ptr,  # (B,) fp32
    noise_ptr,  # (B, n)
    noise_coefficients_ptr,  # (B,) fp32
    latents_ptr,  # (B, n)
    snr_ptr,  # (B,) fp32
    spatial_mask_ptr,  # (B, C, H, W), by its strides, 0 where it is broadcast
    row_index_ptr,  # (B,) row of the bank
    gradient_ptr,  # out (B, n)
    partial_ptr,  # out (B, num_blocks) fp32
    n,
    num_blocks,
    bank_rows,
    teacher_stride_k,
    teacher_stride_row,
    spatial_mask_stride_row,
    spatial_mask_stride_channel,
    height_width,
    gradient_scale,
    snr_gamma,
    huber_delta,
    K: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    HAS_MIN_SNR: tl.constexpr,
    HAS_SPATIAL_MASK: tl.constexpr,
    HAS_ROW_INDEX: tl.constexpr,
    HAS_HUBER: tl.constexpr,
    PREDICTION_TYPE: tl.constexpr,
    WRITE_GRADIENT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    row = pid // num_blocks
    block = pid % num_blocks
    offsets = block * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offsets < n
    row_offsets = row * n + offsets

    error = tl.load(noise_pred_ptr + row_offsets, mask=mask, other=0.0).to(tl.float32)
    if K > 0:
        teacher_row = row
        if HAS_ROW_INDEX:
            teacher_row = tl.load(row_index_ptr + row).to(tl.int64)
        is_inside = (teacher_row >= 0) & (teacher_row < bank_rows)
        teacher_ptrs = teacher_ptr + teacher_row * teacher_stride_row + offsets
        for k in tl.static_range(K):
            coefficient = tl.load(coefficients_ptr + row * K + k)
            # an unused slot is a row of no elements: as uniform a mask as any, so accesses stay wide
            readable = tl.where((coefficient != 0.0) & is_inside, n, 0)
            error -= coefficient * tl.load(teacher_ptrs, mask=offsets < readable, other=0.0).to(tl.float32)
            teacher_ptrs += teacher_stride_k  # added up: in a large bank k * stride is beyond 2^31
        # the index cannot be checked on the host without waiting for the device, so a wrong one is loud instead
        error = tl.where(is_inside, error, float("nan"))
    if HAS_NOISE:
        coefficient = tl.load(noise_coefficients_ptr + row)
        is_used = offsets < tl.where(coefficient != 0.0, n, 0)
        noise = tl.load(noise_ptr + row_offsets, mask=is_used, other=0.0).to(tl.float32)
        if PREDICTION_TYPE == "epsilon":
            error -= coefficient * noise
        else:
            latents = tl.load(latents_ptr + row_offsets, mask=is_used, other=0.0).to(tl.float32)
            alpha = 1.0
            sigma = 1.0
            if PREDICTION_TYPE == "v_prediction":
                snr = tl.load(snr_ptr + row)
                alpha = 1.0 / tl.sqrt(1.0 + 1.0 / snr)
                sigma = 1.0 / tl.sqrt(1.0 + snr)
            error -= (coefficient * alpha) * noise - (coefficient * sigma) * latents

    weight = tl.load(weights_ptr + row)
    if HAS_MIN_SNR:
        weight *= _min_snr_weight(tl.load(snr_ptr + row), snr_gamma, PREDICTION_TYPE)
    # compiled graphs pass numbers in fp64, which would spread to all that follows
    gradient_factor = (weight * gradient_scale).to(tl.float32)

    error = tl.where(mask, error, 0.0)
    slope = error
    if HAS_SPATIAL_MASK:
        spatial_mask_offsets = (
            row * spatial_mask_stride_row
            + (offsets // height_width) * spatial_mask_stride_channel
            + offsets % height_width
        )
        spatial_mask = tl.load(spatial_mask_ptr + spatial_mask_offsets, mask=mask, other=0.0).to(tl.float32)
        error = tl.where(spatial_mask != 0.0, error, 0.0)
        slope = error
    squared = error * error
    if HAS_HUBER:
        delta = (tl.zeros((1,), tl.float32) + huber_delta).to(tl.float32)
        magnitude = tl.abs(error)
        squared = tl.where(magnitude <= delta, squared, delta * (2.0 * magnitude - delta))
        # not minimum(maximum()): those drop a NaN, and a NaN error must stay loud
        slope = tl.where(error > delta, delta, tl.where(error < -delta, -delta, error))
    if HAS_SPATIAL_MASK:
        squared *= spatial_mask
        slope *= spatial_mask
    tl.store(partial_ptr + pid, tl.sum(squared, axis=0))
    if WRITE_GRADIENT:
        gradient = tl.where(weight != 0.0, slope * gradient_factor, 0.0)
        tl.store(gradient_ptr + row_offsets, gradient.to(gradient_ptr.dtype.element_ty), mask=mask)


@jit
def _min_snr_weight(snr, snr_gamma, PREDICTION_TYPE: tl.constexpr):
    if PREDICTION_TYPE == "epsilon":
        return tl.minimum(snr_gamma / snr, 1.0).to(tl.float32)
    elif PREDICTION_TYPE == "v_prediction":
        return (tl.minimum(snr, snr_gamma) / (snr + 1.0)).to(tl.float32)
    else:
        root = 1.0 + tl.sqrt(snr)
        return (tl.minimum(snr, snr_gamma) / (root * root)).to(tl.float32)


@jit
def _reduce_rows_kernel(
    partial_ptr,  # (B, num_blocks) fp32
    weights_ptr,  # (B,) fp32
    snr_ptr,  # (B,) fp32
    per_row_ptr,  # out (B,) fp32
    loss_ptr,  # out () fp32
    batch,
    num_blocks,
    n,
    snr_gamma,
    HAS_MIN_SNR: tl.constexpr,
    PREDICTION_TYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # one program and one fixed order: the sum repeats bit for bit, which float atomics do not
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for first_row in range(0, batch, ROWS):
        rows = first_row + tl.arange(0, ROWS).to(tl.int64)
        row_mask = rows < batch
        row_sum = tl.zeros((ROWS,), dtype=tl.float32)
        for first_column in range(0, num_blocks, COLUMNS):
            columns = first_column + tl.arange(0, COLUMNS)
            mask = row_mask[:, None] & (columns < num_blocks)[None, :]
            tile = tl.load(partial_ptr + rows[:, None] * num_blocks + columns[None, :], mask=mask, other=0.0)
            row_sum += tl.sum(tile, axis=1)
        per_row = row_sum / n
        tl.store(per_row_ptr + rows, per_row, mask=row_mask)
        weight = tl.load(weights_ptr + rows, mask=row_mask, other=0.0)
        if HAS_MIN_SNR:
            weight *= _min_snr_weight(tl.load(snr_ptr + rows, mask=row_mask, other=1.0), snr_gamma, PREDICTION_TYPE)
        total += tl.where(weight != 0.0, weight * per_row, 0.0)
    tl.store(loss_ptr, tl.sum(total, axis=0) / batch)


@jit
def _scale_kernel(source_ptr, scale_ptr, out_ptr, n, IN_PLACE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    scale = tl.load(scale_ptr).to(tl.float32)
    offsets = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    if IN_PLACE:
        n = tl.where(scale != 1.0, n, 0)  # the usual upstream gradient: nothing is read or written
    mask = offsets < n
    values = tl.load(source_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * scale
    tl.store(out_ptr + offsets, values.to(out_ptr.dtype.element_ty), mask=mask)


class Rows(NamedTuple):
    """Everything but the prediction, as :func:`noise_pred_loss` describes it: checked, dense, None where absent."""

    teacher_preds: torch.Tensor | None
    coefficients: torch.Tensor | None
    weights: torch.Tensor
    noise: torch.Tensor | None
    noise_coefficients: torch.Tensor | None
    latents: torch.Tensor | None
    snr: torch.Tensor | None
    spatial_mask: torch.Tensor | None
    row_index: torch.Tensor | None
    snr_gamma: float | None
    huber_delta: float | None
    prediction_type: str


def launch_noise_pred_loss(
    noise_pred: torch.Tensor, rows: Rows, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Launches one pass over the data and the fixed-order sum of its partials. Inputs are right and dense."""
    batch, channels, height, width = noise_pred.shape
    n = channels * height * width
    num_blocks = ceil_div(n, BLOCK_SIZE)
    if batch * num_blocks > INT32_MAX:
        raise ValueError(f"`noise_pred` has too many elements for one launch: {tuple(noise_pred.shape)}.")
    # the gradient of a mean is tiny, and in fp16 it would underflow before the loss scale reaches it
    gradient_dtype = torch.float32 if noise_pred.dtype == torch.float16 else noise_pred.dtype
    gradient = torch.empty_like(noise_pred, dtype=gradient_dtype) if with_gradient else None
    partial = torch.empty(batch, num_blocks, dtype=torch.float32, device=noise_pred.device)
    per_row = torch.empty(batch, dtype=torch.float32, device=noise_pred.device)
    loss = torch.empty((), dtype=torch.float32, device=noise_pred.device)
    teacher_preds, spatial_mask = rows.teacher_preds, rows.spatial_mask
    num_teachers = bank_rows = teacher_stride_k = teacher_stride_row = 0
    if teacher_preds is not None:
        num_teachers, bank_rows = teacher_preds.shape[:2]
        teacher_stride_k, teacher_stride_row = teacher_preds.stride()[:2]
    if spatial_mask is not None:
        spatial_mask = spatial_mask.expand(batch, channels, height, width)
    has_min_snr = rows.snr_gamma is not None
    snr_gamma = rows.snr_gamma if has_min_snr else 1.0
    columns = min(next_power_of_2(num_blocks), 1024)
    with on_device_of(noise_pred):
        _noise_pred_loss_kernel[(batch * num_blocks,)](
            noise_pred,
            teacher_preds,
            rows.coefficients,
            rows.weights,
            rows.noise,
            rows.noise_coefficients,
            rows.latents,
            rows.snr,
            spatial_mask,
            rows.row_index,
            gradient,
            partial,
            n,
            num_blocks,
            bank_rows=bank_rows,
            teacher_stride_k=teacher_stride_k,
            teacher_stride_row=teacher_stride_row,
            spatial_mask_stride_row=0 if spatial_mask is None else spatial_mask.stride(0),
            spatial_mask_stride_channel=0 if spatial_mask is None else spatial_mask.stride(1),
            height_width=height * width,
            gradient_scale=2.0 / (batch * n),
            snr_gamma=snr_gamma,
            huber_delta=1.0 if rows.huber_delta is None else rows.huber_delta,
            K=num_teachers,
            HAS_NOISE=rows.noise is not None,
            HAS_MIN_SNR=has_min_snr,
            HAS_SPATIAL_MASK=spatial_mask is not None,
            HAS_ROW_INDEX=rows.row_index is not None,
            HAS_HUBER=rows.huber_delta is not None,
            PREDICTION_TYPE=rows.prediction_type,
            WRITE_GRADIENT=with_gradient,
            BLOCK_SIZE=BLOCK_SIZE,
            num_warps=num_warps(4),
        )
        _reduce_rows_kernel[(1,)](
            partial,
            rows.weights,
            rows.snr,
            per_row,
            loss,
            batch,
            num_blocks,
            n,
            snr_gamma,
            HAS_MIN_SNR=has_min_snr,
            PREDICTION_TYPE=rows.prediction_type,
            ROWS=4096 // columns,  # a tile of 4096 partials: 32 a thread
            COLUMNS=columns,
            num_warps=num_warps(4),
        )
    return loss, per_row, gradient


def launch_scale(gradient: torch.Tensor, upstream: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``gradient * upstream`` in ``dtype``; in place, and free when ``upstream`` is 1, if the dtype stays."""
    out = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    n = gradient.numel()
    with on_device_of(gradient):
        _scale_kernel[(ceil_div(n, SCALE_BLOCK_SIZE),)](
            gradient, upstream, out, n, IN_PLACE=out is gradient, BLOCK_SIZE=SCALE_BLOCK_SIZE, num_warps=num_warps(8)
        )
    return out
