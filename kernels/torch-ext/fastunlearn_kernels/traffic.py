"""The bytes that each kernel reads and writes, by formula: its floor, once divided by the bandwidth of the memory.

Scalars of a row, tables and partial sums are left out: they are less than a hundredth of what is counted. Tests compare
these numbers with what the kernels touch, benchmarks with what they take.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def noise_pred_loss_bytes(
    noise_pred: torch.Tensor, num_predictions: int, prediction_itemsize: int, *, with_gradient: bool = True
) -> int:
    """Forward and backward for an upstream gradient of 1; ``num_predictions`` counts noise and latents too.

    2 (K + 2) bytes an element in bfloat16. Float16 keeps its gradient in fp32 and scales it in a second pass.
    """
    itemsize = noise_pred.element_size()
    gradient = 0 if not with_gradient else itemsize if noise_pred.dtype != torch.float16 else 4 + 4 + 2
    return noise_pred.numel() * (itemsize + num_predictions * prediction_itemsize + gradient)


def masked_adamw_bytes(
    numel: int, touched: int, selected: int, mode: str, param_itemsize: int, grad_itemsize: int
) -> int:
    """One step of a tensor of ``numel`` elements.

    ``touched`` are the elements in sectors of 8 with at least one selected element, ``selected`` those that change. A
    parameter of 2 bytes has an fp32 master. For all elements touched the bytes a parameter are, in 16 bits with
    masters: dense 28, select 30.125, compact 6.125 + 24 selected / numel; in fp32: dense 28, select 28.125, compact
    12.125 + 16 selected / numel.
    """
    has_master = param_itemsize < 4
    states = 2 * 4 * (3 if has_master else 2)  # read and written
    if mode == "dense":
        return numel * (grad_itemsize + states + param_itemsize * (1 if has_master else 2))
    bits = (numel + 7) // 8
    return bits + touched * (grad_itemsize + 2 * param_itemsize) + states * (touched if mode == "select" else selected)


def saliency_mask_bytes(numel: int) -> int:
    """Four histograms, of which each program writes its own, and the packing: 20.6 bytes an element."""
    programs = -(-numel // 16384)
    return numel * 5 * 4 + (numel + 7) // 8 + programs * 4 * 2 * 1024


def accumulate_saliency_bytes(numel: int, grad_itemsize: int) -> int:
    """The saliency is read and written."""
    return numel * (8 + grad_itemsize)


def lpips_distance_bytes(features: Sequence[torch.Tensor]) -> int:
    """Both sides of every layer, read once."""
    return sum(2 * feature.numel() * feature.element_size() for feature in features)


def gradient_dots_bytes(numel: int, itemsize0: int, itemsize1: int = 0) -> int:
    """Each gradient is read once."""
    return numel * (itemsize0 + itemsize1)
