"""The LPIPS head: how far apart two stacks of feature maps are.

    u(f) = f / (|f| + 1e-10), the norm over channels     (Zhang et al. 2018, https://arxiv.org/abs/1801.03924, eq. 1)
    distance = sum over layers of the mean over H, W of sum_c weights_c (u(f0)_c - u(f1)_c)^2

Features are read once, channels_last, and stay in registers between norm and difference. Bytes of a pair in 16
bits: 4 C H W, summed over layers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from . import native_calls, reference
from .checks import INT32_MAX, check_tensor, check_tensor_list
from .launch import backend_of, ceil_div, jit, next_power_of_2, num_warps, on_device_of, tl
from .tables import TRITON_DTYPES, are_aligned, load_pointer, tensor_table

TILE_ELEMENTS = 4096  # of each map, 32 a thread: four 128-bit loads of 16-bit features
MAX_CHANNELS = 16384  # of one pixel, which must fit the registers of a program


@jit
def _lpips_head_kernel(
    table_ptr,  # (num_layers, NUM_COLUMNS): two unused, features 0, features 1 (N, H * W, C), weights (C,) fp32
    layout_ptr,  # (num_layers, 2) int64: first program of a pair's layer, pixels
    partial_ptr,  # out (N, num_blocks) fp32
    num_blocks,
    DTYPE: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    NUM_LAYERS: tl.constexpr,
    ALIGNED: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    pair = pid // num_blocks
    block = pid % num_blocks
    for layer in tl.static_range(NUM_LAYERS):
        first_block = tl.load(layout_ptr + 2 * layer)
        num_pixels = tl.load(layout_ptr + 2 * layer + 1)
        layer_block = block - first_block
        if (layer_block >= 0) & (layer_block * PIXELS[layer] < num_pixels):
            row = layer * NUM_COLUMNS
            start = pair * num_pixels * CHANNELS[layer]
            distance = _tile_distance(
                load_pointer(table_ptr, row + 2, DTYPE, ALIGNED) + start,
                load_pointer(table_ptr, row + 3, DTYPE, ALIGNED) + start,
                load_pointer(table_ptr, row + 4, tl.float32, False),
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


@functools.lru_cache(maxsize=64)  # a handful of image sizes
def _layout(device: torch.device, first_blocks: tuple[int, ...], pixels: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(list(zip(first_blocks, pixels, strict=True)), dtype=torch.int64).to(device)


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
    table = tensor_table([features0, features1, weights], INT32_MAX)
    partial = torch.empty(batch, num_blocks, dtype=torch.float32, device=device)
    with on_device_of(partial):
        _lpips_head_kernel[(batch * num_blocks,)](
            table.rows,
            _layout(device, first_blocks, pixels),
            partial,
            num_blocks,
            DTYPE=TRITON_DTYPES[features0[0].dtype],
            CHANNELS=channels,
            BLOCK_CHANNELS=block_channels,
            PIXELS=tile_pixels,
            NUM_LAYERS=len(channels),
            ALIGNED=are_aligned([features0, features1]),
            NUM_COLUMNS=table.rows.shape[1],
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
        run = {
            "triton": launch_lpips_distance,
            "native": native_calls.lpips_distance,
            "reference": reference.lpips_distance,
        }[backend_of(features0[0])]
        return run(features0, features1, weights)
