"""The same functions in plain torch: what CPU tensors run, what the kernels are tested and timed against.

Nothing here validates: the public functions do, and call these with arguments that are right.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.optim.adamw import adamw

CHUNK = 65536  # elements: the temporaries of a chunk stay in a core's second-level cache
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
        assert snr is not None
        return noise_coefficients * (1 + 1 / snr).rsqrt(), -noise_coefficients * (1 + snr).rsqrt()
    return noise_coefficients, -noise_coefficients


def noise_pred_loss(
    noise_pred: torch.Tensor,
    terms: Sequence[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]],
    weights: torch.Tensor,
    spatial_mask: torch.Tensor | None,
    huber_delta: float | None,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Loss (), per-row loss (B,), gradient in fp32.

    ``terms`` are (prediction (N, C, H, W), row_index (B,) or None for all in order, coefficient (B,)).
    """
    batch, numel = noise_pred.shape[0], max(noise_pred[0:1].numel(), 1)
    rows = batch if torch.compiler.is_compiling() else max(4 * CHUNK // numel, 1)  # a compiler makes its own chunks
    scale = weights * (2.0 / (numel * max(batch, 1)))
    pieces, gradients = [], []
    for start in range(0, batch, rows):
        here = slice(start, start + rows)
        chunk = [
            (prediction[here] if index is None else prediction.index_select(0, index[here]), coefficient[here])
            for prediction, index, coefficient in terms
        ]
        mask = spatial_mask if spatial_mask is None or len(spatial_mask) == 1 else spatial_mask[here]
        per_row, gradient = _row_losses(
            noise_pred[here], chunk, scale[here] if with_gradient else None, mask, huber_delta
        )
        pieces.append(per_row)
        if gradient is not None:
            gradients.append(gradient)
    per_row = torch.cat(pieces) / numel
    loss = torch.where(weights != 0, weights * per_row, 0.0).sum() / max(batch, 1)
    if not gradients:
        return loss, per_row, None
    return loss, per_row, gradients[0] if len(gradients) == 1 else torch.cat(gradients)


def _row_losses(
    noise_pred: torch.Tensor,
    terms: Sequence[tuple[torch.Tensor, torch.Tensor]],
    scale: torch.Tensor | None,
    spatial_mask: torch.Tensor | None,
    huber_delta: float | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sums (B,) of the rows' errors, and their gradient times ``scale`` (B,); None without it."""
    error = noise_pred.float()
    for prediction, coefficient in terms:
        column = coefficient.view(-1, 1, 1, 1)
        # selected, not multiplied: a coefficient of 0 marks a slot that a row does not use, whatever it holds
        used = prediction.float() if _all_used(coefficient) else torch.where(column != 0, prediction.float(), 0.0)
        error = torch.addcmul(error, used, column, value=-1)
    if spatial_mask is not None:
        error = torch.where(spatial_mask != 0, error, 0.0)
    if huber_delta is None:
        squared, slope = error * error, error
    else:
        magnitude = error.abs()
        tail = huber_delta * (2 * magnitude - huber_delta)
        squared = torch.where(magnitude <= huber_delta, error * error, tail)
        slope = error.clamp(-huber_delta, huber_delta)
    if spatial_mask is not None:
        squared = squared * spatial_mask.float()
    per_row = squared.flatten(1).sum(1)
    if scale is None:
        return per_row, None
    slope = slope * scale.view(-1, 1, 1, 1)
    if not _all_used(scale):
        slope = torch.where(scale.view(-1, 1, 1, 1) != 0, slope, 0.0)
    return per_row, slope if spatial_mask is None else slope * spatial_mask.float()


def _all_used(factors: torch.Tensor) -> bool:
    """Whether no factor is 0, so that nothing must be selected; unknown, and so False, while compiling."""
    return not torch.compiler.is_compiling() and factors.device.type == "cpu" and bool((factors != 0).all())


def lpips_distance(
    features0: Sequence[torch.Tensor], features1: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]
) -> torch.Tensor:
    """LPIPS heads, (N,) fp32, by pairs few enough that their temporaries stay in a cache."""
    distance = torch.zeros(features0[0].shape[0], dtype=torch.float32, device=features0[0].device)
    for layer0, layer1, weight in zip(features0, features1, weights, strict=True):
        pairs = max(1, 4 * CHUNK // max(layer0[0:1].numel(), 1))
        parts = zip(distance.split(pairs), layer0.split(pairs), layer1.split(pairs), strict=True)
        for total, feature0, feature1 in parts:
            feature0, feature1 = feature0.float(), feature1.float()
            # divided and then subtracted: the expanded form 1 - 2<f0, f1> + 1 cancels when the images are alike
            difference = feature0 / torch.linalg.vector_norm(feature0, dim=1, keepdim=True).add_(LPIPS_EPS)
            difference -= feature1 / torch.linalg.vector_norm(feature1, dim=1, keepdim=True).add_(LPIPS_EPS)
            head = torch.tensordot(difference.square_(), weight.float(), dims=([1], [0]))
            total += head.flatten(1).sum(1) / max(head[0:1].numel(), 1)
    return distance


def masked_adamw_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    master: torch.Tensor | None,
    selected: torch.Tensor | None,
    is_compact: bool,
    step: torch.Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: torch.Tensor | None,
    other_grad: torch.Tensor | None,
    other_coefficient: torch.Tensor | None,
) -> None:
    """One AdamW step on flat tensors, in place: torch's fused one, by chunks, on copies where it must not write.

    ``selected`` (n,) bool; compact states hold selected elements only.  ``step`` (): steps done before this one.
    """
    settings = (lr, betas, eps, weight_decay, None)
    first = 0
    for start in range(0, param.numel(), CHUNK):
        here = slice(start, start + CHUNK)
        g = grad[here].float()
        if other_grad is not None:
            assert other_coefficient is not None
            g = torch.addcmul(g, other_grad[here].float(), other_coefficient)
        if grad_scale is not None:
            g = g * grad_scale
        if is_compact:
            assert selected is not None
            places = selected[here].nonzero()[:, 0]
            states = slice(first, first + len(places))
            first += len(places)
            weight = param[here].index_select(0, places) if master is None else master[states]
            fused_adamw_([weight], [g[places]], [exp_avg[states]], [exp_avg_sq[states]], [step.clone()], *settings)
            param[here].index_copy_(0, places, weight.to(param.dtype))
            continue
        targets = [param[here] if master is None else master[here], exp_avg[here], exp_avg_sq[here]]
        weight, m, v = targets if selected is None else [target.clone() for target in targets]
        fused_adamw_([weight], [g], [m], [v], [step.clone()], *settings)
        if selected is None and master is not None:
            param[here].copy_(weight)
        if selected is not None:
            news = [weight, m, v]
            if master is not None:
                targets, news = [*targets, param[here]], [*news, weight.to(param.dtype)]
            for target, new in zip(targets, news, strict=True):
                bits, mask = _bits(target), _bit_mask(selected[here], target)
                bits ^= (bits ^ _bits(new)) & mask


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
    """A step of whole fp32 tensors by torch's own fused AdamW, in one pass; counts ``steps``."""
    if grad_scale is not None:  # not handed on: torch would write the scaled gradients back
        grads = list(torch._foreach_mul(grads, grad_scale))
    adamw(
        params, grads, exp_avgs, exp_avg_sqs, [], steps, fused=True, amsgrad=False, maximize=False,
        beta1=betas[0], beta2=betas[1], lr=lr, weight_decay=weight_decay, eps=eps,
    )  # fmt: skip


def accumulate_saliency_(saliency: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], mode: str) -> None:
    """Adds |g|, g or g^2 to each fp32 tensor."""
    for total, gradient in zip(saliency, gradients, strict=True):
        # a tensor that cannot be seen flat is one chunk
        flat = total.is_contiguous() and gradient.is_contiguous()
        pairs = (
            zip(*(t.view(-1).split(4 * CHUNK) for t in (total, gradient)), strict=True) if flat else [(total, gradient)]
        )
        for part, values in pairs:
            values = values.float()
            if mode == "squared":
                part.addcmul_(values, values)
            else:
                part.add_(values.abs() if mode == "absolute" else values)


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
        sides = [gradient0.reshape(-1)] + ([] if gradients1 is None else [gradients1[i].reshape(-1)])
        chosen = selected[i]
        for start in range(0, gradient0.numel(), 4 * CHUNK):
            here = slice(start, start + 4 * CHUNK)
            parts = [side[here].float() for side in sides]
            if chosen is not None:
                mask = _bit_mask(chosen[here], parts[0])
                parts = [(_bits(part) & mask).view(torch.float32) for part in parts]
            dots[0] += torch.dot(parts[0], parts[0])
            if len(parts) == 2:
                dots[1] += torch.dot(parts[0], parts[1])
                dots[2] += torch.dot(parts[1], parts[1])
    return dots.float()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers.  Bits are selected by arithmetic, several times as fast on a CPU as by torch.where,
    and as exact: a NaN that is not selected reaches nothing."""
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def _bit_mask(selected: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """All bits of an element of ``like`` set where ``selected``, else none."""
    return selected.to(torch.int16 if like.element_size() == 2 else torch.int32).neg_()
