"""Weighted squared error between a noise prediction and a linear mix of frozen predictions, and its gradient.

    e_i       = noise_pred_i - sum_k a_ik teacher_k,i - b_i truth_i          truth: noise, or a mix of noise and latents
    per_row_i = mean over C, H, W of m_i * rho(e_i)      rho(e) = e^2, or Huber: e^2 for |e| <= d, d (2 |e| - d) beyond
    loss      = 1/B sum_i w_i s_i per_row_i                  s_i = min-SNR weight, 1 without it
    gradient  = w_i s_i m_i rho'(e_i) / (B C H W)

The gradient for an upstream gradient of 1 is written in the same pass that reads the inputs; backward scales it by the
real one, on the device, and moves no byte when that is 1. Bytes per latent element, bf16, K predictions: 2 (K + 2).
"""

from __future__ import annotations

from typing import Any, NamedTuple, overload

import torch

from . import native_calls, reference
from .checks import FLOAT_DTYPES, INT32_MAX, check_tensor
from .launch import backend_of, ceil_div, jit, next_power_of_2, num_warps, on_device_of, tl
from .operators import is_watched, operator

PREDICTION_TYPES = ("epsilon", "v_prediction", "flow_prediction")
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


class _Rows(NamedTuple):
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
    noise_pred: torch.Tensor, rows: _Rows, with_gradient: bool
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


def _run_reference(
    noise_pred: torch.Tensor, rows: _Rows, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    terms: list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]] = []
    weights = rows.weights
    if rows.teacher_preds is not None:
        assert rows.coefficients is not None
        for k in range(rows.teacher_preds.shape[0]):
            terms.append((rows.teacher_preds[k], rows.row_index, rows.coefficients[:, k]))
    if rows.noise is not None:
        assert rows.noise_coefficients is not None
        noise_coefficients, latents_coefficients = reference.ground_truth_coefficients(
            rows.noise_coefficients, rows.snr, rows.prediction_type
        )
        terms.append((rows.noise, None, noise_coefficients))
        if rows.latents is not None:
            assert latents_coefficients is not None
            terms.append((rows.latents, None, latents_coefficients))
    if rows.snr_gamma is not None:
        assert rows.snr is not None
        weights = weights * reference.min_snr_weights(rows.snr, rows.snr_gamma, rows.prediction_type)
    return reference.noise_pred_loss(noise_pred, terms, weights, rows.spatial_mask, rows.huber_delta, with_gradient)


def _run(
    noise_pred: torch.Tensor, rows: _Rows, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    backend = backend_of(noise_pred)
    if backend == "triton":
        return launch_noise_pred_loss(noise_pred, rows, with_gradient)
    if backend == "native":
        return native_calls.noise_pred_loss(noise_pred, rows, with_gradient)
    return _run_reference(noise_pred, rows, with_gradient)


def _run_operator(
    noise_pred: torch.Tensor, with_gradient: bool, *rows: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    loss, per_row, gradient = _run(noise_pred, _Rows(*rows), with_gradient)
    return loss, per_row, noise_pred.new_empty(0) if gradient is None else gradient


def _fake_operator(
    noise_pred: torch.Tensor, with_gradient: bool, *rows: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # fp16 keeps its gradient in fp32, and so does the reference every dtype
    wide = noise_pred.dtype == torch.float16 or backend_of(noise_pred) == "reference"
    gradient = torch.empty_like(noise_pred, dtype=torch.float32 if wide else noise_pred.dtype)
    loss = noise_pred.new_empty((), dtype=torch.float32)
    return loss, loss.new_empty(noise_pred.shape[0]), gradient if with_gradient else noise_pred.new_empty(0)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(output[2])
    ctx.dtype, ctx.num_inputs = inputs[0].dtype, len(inputs)


def _operator_backward(ctx: Any, *upstream: Any) -> tuple[Any, ...]:
    (gradient,) = ctx.saved_tensors
    return ((gradient * upstream[0]).to(ctx.dtype), *[None] * (ctx.num_inputs - 1))


_operator = operator(
    "noise_pred_loss",
    "(Tensor noise_pred, bool with_gradient, Tensor? teacher_preds, Tensor? coefficients, Tensor weights, "
    "Tensor? noise, Tensor? noise_coefficients, Tensor? latents, Tensor? snr, Tensor? spatial_mask, "
    "Tensor? row_index, float? snr_gamma, float? huber_delta, str prediction_type) -> (Tensor, Tensor, Tensor)",
    _run_operator,
    _fake_operator,
)
_operator.register_autograd(_operator_backward, setup_context=_keep_for_backward)


class _FunctionalLoss(torch.autograd.Function):
    """The same for ``torch.func``, which wants forward and what it keeps apart."""

    forward = staticmethod(_run_operator)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        _keep_for_backward(ctx, inputs, output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Any) -> tuple[Any, ...]:
        return _operator_backward(ctx, *upstream)


class NoisePredLossFunction(torch.autograd.Function):
    """The gradient is made in forward and handed out, once, in backward."""

    @staticmethod
    def forward(
        ctx: Any, noise_pred: torch.Tensor, rows: _Rows, with_gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.launched = backend_of(noise_pred) == "triton"
        loss, per_row, gradient = _run(noise_pred, rows, with_gradient)
        ctx.gradient, ctx.dtype = gradient, noise_pred.dtype
        ctx.mark_non_differentiable(per_row)
        return loss, per_row

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor, _: Any) -> tuple[torch.Tensor, None, None]:
        if torch.is_grad_enabled():  # only if somebody means to differentiate the result, which must fail then
            return _backward_once(ctx, upstream)
        return _gradient(ctx, upstream), None, None


def _gradient(ctx: Any, upstream: torch.Tensor) -> torch.Tensor:
    gradient, ctx.gradient = ctx.gradient, None
    if gradient is None:
        raise RuntimeError(
            "The gradient of noise_pred_loss was already handed out. Call noise_pred_loss once for each backward()."
        )
    if ctx.launched:
        gradient = launch_scale(gradient, upstream, ctx.dtype)
    elif not upstream.is_cpu or upstream.item() != 1.0:
        gradient = gradient * upstream
    return gradient if gradient.dtype == ctx.dtype else gradient.to(ctx.dtype)


@torch.autograd.function.once_differentiable
def _backward_once(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    return _gradient(ctx, upstream), None, None


def noise_pred_loss(
    noise_pred: torch.Tensor,
    teacher_preds: torch.Tensor | None,
    coefficients: torch.Tensor | None,
    weights: torch.Tensor,
    *,
    noise: torch.Tensor | None = None,
    noise_coefficients: torch.Tensor | None = None,
    latents: torch.Tensor | None = None,
    snr: torch.Tensor | None = None,
    spatial_mask: torch.Tensor | None = None,
    row_index: torch.Tensor | None = None,
    snr_gamma: float | None = None,
    huber_delta: float | None = None,
    prediction_type: str = "epsilon",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted error between a prediction and a mix of frozen predictions, with its gradient from the same pass.

    ``loss = 1/B sum_i weights_i * per_row_i`` with ``per_row_i`` the mean over C, H, W of
    ``mask * (noise_pred_i - sum_k coefficients_ik teacher_k,i - noise_coefficients_i * truth_i)^2``.

    Args:
        noise_pred: (B, C, H, W) float16, bfloat16 or float32; the only input that gets a gradient.
        teacher_preds: (K, B, C, H, W), frozen, any of the three dtypes. With ``row_index`` the storage of a bank,
            (K, N, C, H, W) with dense rows, gathered without a copy. None or K = 0 if only noise is predicted.
        coefficients: (B, K) float32. A prediction whose coefficient is exactly 0 is not read. None with K = 0.
        weights: (B,) float32, of either sign. A row of weight 0 adds nothing to loss or gradient, whatever it holds.
        noise: (B, C, H, W), the noise that was added, with ``noise_coefficients`` (B,) float32. The truth is what
            the model was trained to predict: ``noise``, or by ``prediction_type`` as below.
        latents: (B, C, H, W), the clean latents; with noise, needed for "v_prediction" and "flow_prediction".
        snr: (B,) float32, signal-to-noise ratio alpha^2 / sigma^2 of the rows' timesteps; needed by ``snr_gamma`` and,
            with noise, by "v_prediction".
        spatial_mask: (B or 1, C or 1, H, W) of any of the three dtypes or bool. Where it is 0 nothing is read into the
            result, NaN included; the mean still runs over all C * H * W.
        row_index: (B,) int32 or int64, rows of the bank. Outside 0..N-1: IndexError on the CPU, NaN loss on a GPU
            (checking it there would make the host wait).
        snr_gamma: min-SNR-gamma weighting (Hang et al. 2023, https://arxiv.org/abs/2303.09556), as a factor of
            ``weights``: min(snr, gamma) / snr for epsilon, / (snr + 1) for v, / (1 + sqrt(snr))^2 for flow.
        huber_delta: error beyond which it counts linearly, ``delta (2 |e| - delta)``; twice torch's ``huber_loss``, so
            that it tends to the squared error for a large delta.
        prediction_type: "epsilon" (truth = noise), "v_prediction" (alpha noise - sigma latents), "flow_prediction"
            (noise - latents).

    Returns:
        loss: () float32, with a gradient for ``noise_pred``; may be back-propagated once.
        per_row_loss: (B,) float32, without ``weights`` and min-SNR, detached.

    Raises:
        TypeError, ValueError: what is wrong with the inputs. A batch of 0 is none: its loss is 0, its gradient empty.
        RuntimeError: at a second backward through one result.
    """
    check_tensor("noise_pred", noise_pred, frozen=False)
    if noise_pred.dim() != 4:
        raise ValueError(f"`noise_pred` must have shape (B, C, H, W), got {tuple(noise_pred.shape)}.")
    device, batch, shape = noise_pred.device, noise_pred.shape[0], tuple(noise_pred.shape)
    if noise_pred[0:1].numel() > INT32_MAX:
        raise ValueError(f"A row of `noise_pred` must have fewer than 2^31 elements, got shape {shape}.")
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"`prediction_type` must be one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}.")
    check_tensor("weights", weights, (torch.float32,), (batch,), device)
    teacher_preds, coefficients, row_index = _checked_teacher(noise_pred, teacher_preds, coefficients, row_index)
    if teacher_preds is None and noise is None:
        raise ValueError("There is no target: give at least one teacher prediction (K >= 1) or `noise`.")
    if (noise is None) != (noise_coefficients is None):
        raise ValueError("`noise` and `noise_coefficients` must be given together.")
    if noise is not None:
        check_tensor("noise", noise, FLOAT_DTYPES, shape, device)
        check_tensor("noise_coefficients", noise_coefficients, (torch.float32,), (batch,), device)
    if (latents is not None) != (noise is not None and prediction_type != "epsilon"):
        raise ValueError("`latents` must be given with `noise` for v_prediction and flow_prediction, and only then.")
    if latents is not None:
        check_tensor("latents", latents, FLOAT_DTYPES, shape, device)
    needs_snr = snr_gamma is not None or (noise is not None and prediction_type == "v_prediction")
    if (snr is not None) != needs_snr:
        raise ValueError("`snr` must be given with `snr_gamma`, or with `noise` for v_prediction, and only then.")
    if snr is not None:
        check_tensor("snr", snr, (torch.float32,), (batch,), device)
    if spatial_mask is not None:
        check_tensor("spatial_mask", spatial_mask, (*FLOAT_DTYPES, torch.bool), None, device)
        allowed = [{size, 1} for size in shape[:2]] + [{size} for size in shape[2:]]
        if spatial_mask.dim() != 4 or any(s not in a for s, a in zip(spatial_mask.shape, allowed, strict=True)):
            raise ValueError(
                f"`spatial_mask` must broadcast over rows and channels of {shape}, got {tuple(spatial_mask.shape)}."
            )
    for name, value in (("huber_delta", huber_delta), ("snr_gamma", snr_gamma)):
        if value is not None and not value > 0:
            raise ValueError(f"`{name}` must be greater than 0, got {value}.")

    if noise_pred.numel() == 0:
        return noise_pred.float().sum(), torch.zeros(batch, dtype=torch.float32, device=device)
    rows = _Rows(
        teacher_preds=teacher_preds,
        coefficients=_dense(coefficients),
        weights=_dense(weights),
        noise=_dense(noise),
        noise_coefficients=_dense(noise_coefficients),
        latents=_dense(latents),
        snr=_dense(snr),
        spatial_mask=_dense(spatial_mask),
        row_index=_dense(row_index),
        snr_gamma=snr_gamma,
        huber_delta=huber_delta,
        prediction_type=prediction_type,
    )
    with_gradient = noise_pred.requires_grad and torch.is_grad_enabled()
    if is_watched(noise_pred):
        run = _FunctionalLoss.apply if torch._C._are_functorch_transforms_active() else _operator
        loss, per_row, _ = run(noise_pred.contiguous(), True, *rows)
        return loss, per_row.detach()
    return NoisePredLossFunction.apply(noise_pred.contiguous(), rows, with_gradient)


@overload
def _dense(value: torch.Tensor) -> torch.Tensor: ...
@overload
def _dense(value: None) -> None: ...
def _dense(value: torch.Tensor | None) -> torch.Tensor | None:
    if value is None:
        return None
    dense = value.contiguous()
    return dense.view(torch.uint8) if dense.dtype == torch.bool else dense  # the same bytes, and kernels do arithmetic


def _checked_teacher(
    noise_pred: torch.Tensor,
    teacher_preds: torch.Tensor | None,
    coefficients: torch.Tensor | None,
    row_index: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The three after checking, dense where the kernel needs it; all None if K is 0."""
    batch, device = noise_pred.shape[0], noise_pred.device
    if teacher_preds is None:
        if coefficients is not None or row_index is not None:
            raise ValueError("`coefficients` and `row_index` need `teacher_preds`.")
        return None, None, None
    check_tensor("teacher_preds", teacher_preds, FLOAT_DTYPES, None, device)
    if teacher_preds.dim() != 5:
        raise ValueError(f"`teacher_preds` must have shape (K, B, C, H, W), got {tuple(teacher_preds.shape)}.")
    num_teachers = teacher_preds.shape[0]
    rows = batch if row_index is None else teacher_preds.shape[1]
    check_tensor(
        "teacher_preds", teacher_preds, FLOAT_DTYPES, (num_teachers, rows, *tuple(noise_pred.shape[1:])), device
    )
    check_tensor("coefficients", coefficients, (torch.float32,), (batch, num_teachers), device)
    if row_index is not None:
        check_tensor("row_index", row_index, (torch.int32, torch.int64), (batch,), device)
    if num_teachers == 0:
        return None, None, None
    row = teacher_preds[0, 0:1]
    if row.numel() and not row.is_contiguous():
        if row_index is not None:
            raise ValueError(
                "`teacher_preds` with `row_index` must hold each row densely: copying a whole bank is no option."
            )
        teacher_preds = teacher_preds.contiguous()
    return teacher_preds, coefficients, row_index
