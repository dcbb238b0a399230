"""What each process of a training keeps of weights and states, and what it sends the others: counts, by formula."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process.  ``device`` and ``host``: what -> bytes."""

    device: dict[str, int]
    host: dict[str, int]


def estimate_memory(
    *,
    total: int,
    trainable: int,
    selected: int,
    is_masked: bool,
    world_size: int,
    deepspeed: Mapping[str, Any] | None,
    other_parts: int,
    activations: int,
    bank: int,
    weights: int | None = None,
    gradients: int = 1,
    is_held: bool = False,
) -> MemoryEstimate:
    """Counts of elements to bytes, as a training's engine keeps them.

    ``total``: of the denoiser; ``trainable``: of the tensors that train; ``selected``: of these that may change;
    ``weights``: bytes of the denoiser, where they are not ``total`` in one type; ``gradients``: sets of them.
    ``is_held``: whether the weights are held to where they started.
    ``other_parts`` (text encoder, VAE and so on), ``activations`` and ``bank`` are bytes.
    """
    zero = (deepspeed or {}).get("zero_optimization", {})
    stage = zero.get("stage", 0)
    is_bf16 = bool((deepspeed or {}).get("bf16", {}).get("enabled"))
    item = 2 if is_bf16 else 4
    shares = world_size if stage else 1
    whole = item * total if weights is None or is_bf16 else weights
    # Float32 weights are stepped where they are, but for the copy that ZeRO 1 and 2 make of each process' share.
    masters = 4 * trainable // shares if is_bf16 or stage in (1, 2) else 0
    states = 8 * selected // shares
    masks = trainable // 8 + 2 * trainable // 8 // shares if is_masked else 0
    device = {
        "weights": whole // (world_size if stage == 3 else 1),
        "gradients": gradients * item * trainable // (world_size if stage >= 2 else 1),
        "masks": masks,
    }
    host: dict[str, int] = {}
    on_host = zero.get("offload_optimizer", {}).get("device") == "cpu"
    (host if on_host else device)["optimizer"] = masters + states
    if zero.get("offload_param", {}).get("device") == "cpu":
        host["weights"] = device.pop("weights")
    device |= {"held weights": 8 * trainable if is_held else 0}
    device |= {"activations": activations, "bank": bank, "other parts": other_parts}
    return MemoryEstimate(present(device), present(host))


def bytes_sent(*, total: int, trainable: int, world_size: int, deepspeed: Mapping[str, Any] | None) -> int:
    """Bytes that each process sends for one forward, backward and step, by rings, as NCCL sends large tensors.

    In a ring of n every process sends (n - 1) / n of a tensor to reduce it in parts or to gather it, and twice that to
    have all of the sum.  ``total``: elements of the denoiser; ``trainable``: of the tensors that train.  Stage 0 sums
    gradients; 1 and 2 sum them too (DeepSpeed's buckets of several ranks) and gather what was stepped; 3 gathers every
    weight, frozen ones too, for the forward and again for the backward, and reduces gradients in parts.  What of a
    small model stage 3 keeps until the backward (``stage3_max_reuse_distance``) is counted twice all the same.
    """
    settings = deepspeed or {}
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    item = 2 if settings.get("bf16", {}).get("enabled") else 4
    elements = {0: 2 * trainable, 3: 2 * total + trainable}.get(stage, 3 * trainable)
    return item * elements * (world_size - 1) // world_size


def present(parts: Mapping[str, int]) -> dict[str, int]:
    """Without what takes nothing."""
    return {name: size for name, size in parts.items() if size}
