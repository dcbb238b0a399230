"""Fused kernels of diffusion unlearning: Triton on CUDA and ROCm tensors, a native library on a CPU, else torch."""

from .bits import pack_bits, unpack_bits
from .gradient_dots import gradient_dots, projection_coefficient
from .lpips_head import lpips_distance
from .masked_adamw import MaskedAdamW
from .noise_loss import noise_pred_loss
from .saliency import accumulate_saliency_, saliency_mask

__version__ = "0.1.0"

__all__ = [
    "MaskedAdamW",
    "accumulate_saliency_",
    "gradient_dots",
    "lpips_distance",
    "noise_pred_loss",
    "pack_bits",
    "projection_coefficient",
    "saliency_mask",
    "unpack_bits",
]
