"""Weighted squared error between a noise prediction and a linear mix of frozen predictions, and its gradient.

    e_i       = noise_pred_i - sum_k a_ik teacher_k,i - b_i truth_i          truth: noise, or a mix of noise and latents
    per_row_i = mean over C, H, W of m_i * rho(e_i)      rho(e) = e^2, or Huber: e^2 for |e| <= d, d (2 |e| - d) beyond
    loss      = 1/B sum_i w_i s_i per_row_i                  s_i = min-SNR weight, 1 without it
    gradient  = w_i s_i m_i rho'(e_i) / (B C H W)

The gradient for an upstream gradient of 1 is written in the same pass that reads the inputs; backward scales it by the
real one, on the device, and moves no byte when that is 1. Bytes per latent element, bf16, K predictions: 2 (K + 2).
"""

from __future__ import annotations

from typing import Any, overload

import torch

from . import native_calls, reference
from ._noise_loss_kernel import Rows, launch_noise_pred_loss, launch_scale
from .checks import FLOAT_DTYPES, INT32_MAX, check_tensor
from .launch import backend_of
from .operators import is_watched, operator

PREDICTION_TYPES = ("epsilon", "v_prediction", "flow_prediction")


def _run_reference(
    noise_pred: torch.Tensor, rows: Rows, with_gradient: bool
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
    noise_pred: torch.Tensor, rows: Rows, with_gradient: bool
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
    loss, per_row, gradient = _run(noise_pred, Rows(*rows), with_gradient)
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
        ctx: Any, noise_pred: torch.Tensor, rows: Rows, with_gradient: bool
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
    rows = Rows(
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
