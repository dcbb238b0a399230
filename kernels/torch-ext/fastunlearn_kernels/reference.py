"""The same functions in plain torch: what CPU tensors run, what the kernels are tested and timed against.

Nothing here validates: the public functions do, and call these with arguments that are right.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.optim.adamw import adamw

LPIPS_EPS = 1e-10  # added to the norm, not under the root, as lpips.normalize_tensor does


def min_snr_weights(snr: torch.Tensor, snr_gamma: float, prediction_type: str) -> torch.Tensor:
    """min(snr, gamma), which weights the error of the clean latents, for the error of what the model predicts."""
    if prediction_type == "epsilon":
        return (snr_gamma / snr).clamp(max=1.0)
    if prediction_type == "v_prediction":
        return snr.clamp(max=snr_gamma) / (snr + 1)
    return snr.clamp(max=snr_gamma) / (1 + snr.sqrt()) ** 2


def ground_truth_coefficients(
    noise_coefficients: torch.Tensor, snr: torch.Tensor | None, prediction_type: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Coefficients (B,) of the noise and of the clean latents in ``noise_coefficients * ground truth``."""
    if prediction_type == "epsilon":
        return noise_coefficients, None
    if prediction_type == "v_prediction":
        return noise_coefficients * (1 + 1 / snr).rsqrt(), -noise_coefficients * (1 + snr).rsqrt()
    return noise_coefficients, -noise_coefficients


def noise_pred_loss(
    noise_pred: torch.Tensor,
    terms: Sequence[tuple[torch.Tensor, torch.Tensor]],
    weights: torch.Tensor,
    spatial_mask: torch.Tensor | None,
    huber_delta: float | None,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Loss (), per-row loss (B,), gradient in fp32. ``terms`` are (prediction (B, C, H, W), coefficient (B,))."""
    batch, numel = noise_pred.shape[0], max(noise_pred[0:1].numel(), 1)
    error = noise_pred.to(torch.float32, copy=True)
    for prediction, coefficient in terms:
        coefficient = coefficient.view(-1, 1, 1, 1)
        # selected, not multiplied: a coefficient of 0 marks a slot that a row does not use, whatever it holds
        error.addcmul_(torch.where(coefficient != 0, prediction.float(), 0.0), coefficient, value=-1)
    selected = None if spatial_mask is None else spatial_mask != 0
    if selected is not None:
        error = torch.where(selected, error, 0.0)
    if huber_delta is None:
        squared, slope = error * error, error
    else:
        magnitude = error.abs()
        tail = huber_delta * (2 * magnitude - huber_delta)
        squared = torch.where(magnitude <= huber_delta, error * error, tail)
        slope = error.clamp(-huber_delta, huber_delta)
    if selected is not None:
        squared = squared * spatial_mask.float()
    per_row = squared.flatten(1).sum(1) / numel
    loss = torch.where(weights != 0, weights * per_row, 0.0).sum() / max(batch, 1)
    if not with_gradient:
        return loss, per_row, None
    gradient = slope * (weights * (2.0 / (numel * max(batch, 1)))).view(-1, 1, 1, 1)
    gradient = torch.where(weights.view(-1, 1, 1, 1) != 0, gradient, 0.0)
    return loss, per_row, gradient if selected is None else gradient * spatial_mask.float()


def lpips_distance(
    features0: Sequence[torch.Tensor], features1: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]
) -> torch.Tensor:
    """LPIPS heads, (N,) fp32."""
    distance = torch.zeros(features0[0].shape[0], dtype=torch.float32, device=features0[0].device)
    for feature0, feature1, weight in zip(features0, features1, weights, strict=True):
        feature0, feature1 = feature0.float(), feature1.float()
        # divided and then subtracted: the expanded form 1 - 2<f0, f1> + 1 cancels when the images are alike
        difference = feature0 / torch.linalg.vector_norm(feature0, dim=1, keepdim=True).add_(LPIPS_EPS)
        difference -= feature1 / torch.linalg.vector_norm(feature1, dim=1, keepdim=True).add_(LPIPS_EPS)
        head = torch.tensordot(difference.square_(), weight.float(), dims=([1], [0]))
        distance += head.flatten(1).sum(1) / max(head[0:1].numel(), 1)
    return distance


ADAMW_CHUNK = 65536  # elements: six fp32 temporaries of a chunk stay in a core's second-level cache


def masked_adamw_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    master: torch.Tensor | None,
    selected: torch.Tensor | None,
    is_compact: bool,
    step: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: torch.Tensor | None,
    other_grad: torch.Tensor | None,
    other_coefficient: torch.Tensor | None,
) -> None:
    """One AdamW step on flat tensors, in place. ``selected`` (n,) bool; compact states hold selected elements only."""
    beta1, beta2 = betas
    step_size = lr / (1 - beta1**step)
    root_correction = (1 - beta2**step) ** 0.5
    first = 0
    for start in range(0, param.numel(), ADAMW_CHUNK):
        here = slice(start, start + ADAMW_CHUNK)
        chosen = None if selected is None else selected[here]
        g = grad[here].float()
        if other_grad is not None:
            g = torch.addcmul(g, other_grad[here].float(), other_coefficient)
        if grad_scale is not None:
            g = g * grad_scale
        if is_compact:
            g = g[chosen]
            states = slice(first, first + g.numel())
            first += g.numel()
        else:
            states = here
        m, v = exp_avg[states], exp_avg_sq[states]
        weight = master[states] if master is not None else param[here][chosen] if is_compact else param[here]
        new_m = torch.lerp(m, g, 1 - beta1)
        new_v = (v * beta2).addcmul_(g, g, value=1 - beta2)
        denominator = new_v.sqrt().div_(root_correction).add_(eps)
        new_weight = (weight * (1 - lr * weight_decay)).addcdiv_(new_m, denominator, value=-step_size)
        if chosen is None or is_compact:
            m.copy_(new_m)
            v.copy_(new_v)
            if master is not None:
                weight.copy_(new_weight)
            if is_compact:
                param[here][chosen] = new_weight.to(param.dtype)
            else:
                param[here].copy_(new_weight)
        else:
            torch.where(chosen, new_m, m, out=m)
            torch.where(chosen, new_v, v, out=v)
            if master is not None:
                torch.where(chosen, new_weight, weight, out=weight)
            torch.where(chosen, new_weight.to(param.dtype), param[here], out=param[here])


def fused_adamw_(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    steps: list[torch.Tensor],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: torch.Tensor | None,
) -> None:
    """The same step of whole fp32 tensors by torch's own fused AdamW, on a CPU several times as fast; counts steps."""
    if grad_scale is not None:  # not handed on: torch would write the scaled gradients back
        grads = torch._foreach_mul(grads, grad_scale)
    adamw(
        params, grads, exp_avgs, exp_avg_sqs, [], steps, fused=True, amsgrad=False, maximize=False,
        beta1=betas[0], beta2=betas[1], lr=lr, weight_decay=weight_decay, eps=eps,
    )  # fmt: skip


def accumulate_saliency_(saliency: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], mode: str) -> None:
    """Adds |g|, g or g^2 to each fp32 tensor."""
    for total, gradient in zip(saliency, gradients, strict=True):
        gradient = gradient.float()
        if mode == "squared":
            total.addcmul_(gradient, gradient)
        else:
            total.add_(gradient.abs() if mode == "absolute" else gradient)


def select_largest(scores: Sequence[torch.Tensor], count: int) -> list[torch.Tensor]:
    """Bool masks of the ``count`` largest |scores| of all tensors; of equal ones the first, and NaN counts as 0."""
    magnitude = torch.cat([score.reshape(-1).abs() for score in scores]).nan_to_num_(nan=0.0, posinf=float("inf"))
    threshold = magnitude.kthvalue(magnitude.numel() - count + 1).values
    above, equal = magnitude > threshold, magnitude == threshold
    selected = above | (equal & (equal.cumsum(0) <= count - above.sum()))
    pieces = selected.split([score.numel() for score in scores])
    return [piece.view(score.shape) for piece, score in zip(pieces, scores, strict=True)]


def gradient_dots(
    gradients0: Sequence[torch.Tensor],
    gradients1: Sequence[torch.Tensor] | None,
    selected: Sequence[torch.Tensor | None],
) -> torch.Tensor:
    """(3,) fp32: <0, 0>, <0, 1>, <1, 1> over the selected elements; the last two 0 without ``gradients1``."""
    dots = torch.zeros(3, dtype=torch.float64, device=gradients0[0].device)
    for i, gradient0 in enumerate(gradients0):
        chosen = selected[i]
        g0 = gradient0.reshape(-1).float()
        g0 = g0 if chosen is None else torch.where(chosen, g0, 0.0)
        dots[0] += torch.dot(g0, g0)
        if gradients1 is not None:
            g1 = gradients1[i].reshape(-1).float()
            g1 = g1 if chosen is None else torch.where(chosen, g1, 0.0)
            dots[1] += torch.dot(g0, g1)
            dots[2] += torch.dot(g1, g1)
    return dots.float()
