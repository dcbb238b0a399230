"""The LPIPS head: how far apart two stacks of feature maps are.

    u(f) = f / (|f| + 1e-10), the norm over channels     (Zhang et al. 2018, https://arxiv.org/abs/1801.03924, eq. 1)
    distance = sum over layers of the mean over H, W of sum_c weights_c (u(f0)_c - u(f1)_c)^2

Features are read once, channels_last, and stay in registers between norm and difference. Bytes of a pair in 16
bits: 4 C H W, summed over layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import native_calls, reference
from .checks import INT32_MAX, check_tensor, check_tensor_list
from .launch import backend_of, ceil_div, jit, next_power_of_2, num_warps, on_device_of, tl
from .operators import is_watched, operator

TILE_ELEMENTS = 4096  # of each map, 32 a thread: four 128-bit loads of 16-bit features
MAX_CHANNELS = 16384  # of one pixel, which must fit the registers of a program


@jit
def _lpips_head_kernel(
    features0,  # a pointer a layer, (N, H * W, C)
    features1,
    weights,  # a pointer a layer, (C,) fp32
    first_blocks,  # of a pair, a layer: its first program
    pixels,  # H * W of each layer
    partial_ptr,  # out (N, num_blocks) fp32
    num_blocks,
    CHANNELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    NUM_LAYERS: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    pair = pid // num_blocks
    block = pid % num_blocks
    for layer in tl.static_range(NUM_LAYERS):
        num_pixels = pixels[layer]
        layer_block = block - first_blocks[layer]
        if (layer_block >= 0) & (layer_block * PIXELS[layer] < num_pixels):
            start = pair * num_pixels * CHANNELS[layer]
            distance = _tile_distance(
                features0[layer] + start,
                features1[layer] + start,
                weights[layer],
                layer_block * PIXELS[layer],
                num_pixels,
                CHANNELS[layer],
                BLOCK_CHANNELS[layer],
                PIXELS[layer],
            )
            tl.store(partial_ptr + pid, distance / num_pixels)


@jit
def _tile_distance(
    feature0_ptr,
    feature1_ptr,
    weight_ptr,
    first_pixel,
    num_pixels,
    CHANNELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    channels = tl.arange(0, BLOCK_CHANNELS)
    pixels = first_pixel + tl.arange(0, PIXELS)
    offsets = pixels[:, None] * CHANNELS + channels[None, :]
    mask = (pixels < num_pixels)[:, None] & (channels < CHANNELS)[None, :]
    weight = tl.load(weight_ptr + channels, mask=channels < CHANNELS, other=0.0)
    feature0 = tl.load(feature0_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    feature1 = tl.load(feature1_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    scale0 = 1.0 / (tl.sqrt(tl.sum(feature0 * feature0, axis=1)) + 1e-10)
    scale1 = 1.0 / (tl.sqrt(tl.sum(feature1 * feature1, axis=1)) + 1e-10)
    difference = feature0 * scale0[:, None] - feature1 * scale1[:, None]
    return tl.sum(tl.sum(difference * difference * weight[None, :], axis=1), axis=0)


def launch_lpips_distance(
    features0: Sequence[torch.Tensor], features1: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]
) -> torch.Tensor:
    """All layers in one launch, then one sum of the partials in fixed order. No map is empty."""
    features0 = [feature.permute(0, 2, 3, 1).contiguous() for feature in features0]
    features1 = [feature.permute(0, 2, 3, 1).contiguous() for feature in features1]
    weights = [weight.float().contiguous() for weight in weights]
    batch, device = features0[0].shape[0], features0[0].device
    channels = tuple(feature.shape[3] for feature in features0)
    if max(channels) > MAX_CHANNELS:
        raise ValueError(f"Feature maps must have at most {MAX_CHANNELS} channels, got {max(channels)}.")
    block_channels = tuple(next_power_of_2(c) for c in channels)
    tile_pixels = tuple(max(1, TILE_ELEMENTS // c) for c in block_channels)
    pixels = tuple(feature.shape[1] * feature.shape[2] for feature in features0)
    blocks = [ceil_div(count, tile) for count, tile in zip(pixels, tile_pixels, strict=True)]
    first_blocks = tuple(sum(blocks[:layer]) for layer in range(len(blocks)))
    num_blocks = sum(blocks)
    if batch * num_blocks > INT32_MAX:
        raise ValueError(f"{batch} pairs are too many for one launch. Split the batch.")
    partial = torch.empty(batch, num_blocks, dtype=torch.float32, device=device)
    with on_device_of(partial):
        _lpips_head_kernel[(batch * num_blocks,)](
            tuple(features0),
            tuple(features1),
            tuple(weights),
            first_blocks,
            pixels,
            partial,
            num_blocks,
            CHANNELS=channels,
            BLOCK_CHANNELS=block_channels,
            PIXELS=tile_pixels,
            NUM_LAYERS=len(channels),
            num_warps=num_warps(4),
            # a fused multiply-add rounds one product and not the other: equal maps would not be at distance 0
            enable_fp_fusion=False,
        )
    return partial.sum(1)


def lpips_distance(
    features0: Sequence[torch.Tensor], features1: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]
) -> torch.Tensor:
    """LPIPS distance of N pairs from the feature maps of their images, all layers at once.

    Args:
        features0, features1: one (N, C_l, H_l, W_l) map a layer, float16, bfloat16 or float32. channels_last is read as
            it lies; another layout is copied first.
        weights: one (C_l,) vector a layer, the ``lin`` weights of LPIPS.

    Returns:
        (N,) float32, equal to ``lpips.LPIPS`` on the same features within 1e-5; exactly 0 for equal features, and the
        same in both orders. No gradient.

    Raises:
        TypeError, ValueError: what is wrong with the inputs; features that require grad among them.
    """
    for name, values in (("features0", features0), ("features1", features1), ("weights", weights)):
        check_tensor_list(name, values)
    if not len(features0) == len(features1) == len(weights) > 0:
        raise ValueError(
            "`features0`, `features1` and `weights` must have one tensor a layer, at least one; got "
            f"{len(features0)}, {len(features1)} and {len(weights)}."
        )
    batch, device = features0[0].shape[0], features0[0].device
    for layer, (feature0, feature1, weight) in enumerate(zip(features0, features1, weights, strict=True)):
        if feature0.dim() != 4 or feature0.shape[0] != batch:
            raise ValueError(f"`features0[{layer}]` must have shape ({batch}, C, H, W), got {tuple(feature0.shape)}.")
        frozen = torch.is_grad_enabled()
        check_tensor(f"features0[{layer}]", feature0, (features0[0].dtype,), device=device, frozen=frozen)
        check_tensor(f"features1[{layer}]", feature1, (feature0.dtype,), tuple(feature0.shape), device, frozen)
        check_tensor(f"weights[{layer}]", weight, shape=(feature0.shape[1],), device=device, frozen=frozen)
    with torch.no_grad():
        if any(feature.numel() == 0 for feature in features0):
            if batch:
                raise ValueError("Feature maps must have at least one channel and one pixel.")
            return torch.zeros(0, dtype=torch.float32, device=device)
        run = _operator if is_watched(features0[0]) else _run
        return run(list(features0), list(features1), list(weights))


def _run(features0: list[torch.Tensor], features1: list[torch.Tensor], weights: list[torch.Tensor]) -> torch.Tensor:
    backend = backend_of(features0[0])
    if backend == "triton":
        return launch_lpips_distance(features0, features1, weights)
    if backend == "native":
        return native_calls.lpips_distance(features0, features1, weights)
    return reference.lpips_distance(features0, features1, weights)


_operator = operator(
    "lpips_distance",
    "(Tensor[] features0, Tensor[] features1, Tensor[] weights) -> Tensor",
    _run,
    lambda features0, features1, weights: features0[0].new_empty(features0[0].shape[0], dtype=torch.float32),
)
