"""What a training needs of memory, counted before it starts: bytes of every process, on its device and on the host.

Weights, gradients and states are counts; activations are measured, as the bytes that one forward saves for its
backward, on the model itself; the bank is what its plan says.  The allocator's slack, kernels' workspaces and
DeepSpeed's buckets come on top: take a tenth more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..models.base import Model


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
    held: bool = False,
) -> MemoryEstimate:
    """Counts of elements to bytes, as a training's engine keeps them.

    ``total``: of the denoiser; ``trainable``: of the tensors that train; ``selected``: of these that may change;
    ``other_parts``: of text encoder, VAE and so on.  ``activations`` and ``bank`` are bytes.  ``held``:
    whether the weights are held to where they started.
    """
    zero = (deepspeed or {}).get("zero_optimization", {})
    stage = zero.get("stage", 0)
    is_bf16 = bool((deepspeed or {}).get("bf16", {}).get("enabled"))
    item = 2 if is_bf16 else 4
    shares = world_size if stage else 1
    weights = item * total // (world_size if stage == 3 else 1)
    # Float32 weights are stepped where they are, but for the copy that ZeRO 1 and 2 make of each process' share.
    masters = 4 * trainable // shares if is_bf16 or stage in (1, 2) else 0
    gradients = item * trainable // (world_size if stage >= 2 else 1)
    states = 8 * selected // shares
    masks = trainable // 8 + 2 * trainable // 8 // shares if is_masked else 0
    device = {"weights": weights, "gradients": gradients, "masks": masks}
    host: dict[str, int] = {}
    on_host = zero.get("offload_optimizer", {}).get("device") == "cpu"
    (host if on_host else device)["optimizer"] = masters + states
    if zero.get("offload_param", {}).get("device") == "cpu":
        host["weights"] = device.pop("weights")
    device |= {"held weights": 8 * trainable if held else 0}
    device |= {"activations": activations, "bank": bank, "other parts": 4 * other_parts}
    return MemoryEstimate({k: v for k, v in device.items() if v}, {k: v for k, v in host.items() if v})


def measure_activations(model: Model, names: Sequence[str], mixed_precision: str) -> int:
    """Bytes that a forward of one row saves for the backward of the parameters ``names``; weights are not counted."""
    parameters = dict(model.denoiser.named_parameters())
    own = {tensor.untyped_storage().data_ptr() for tensor in [*parameters.values(), *model.denoiser.buffers()]}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    latents = torch.zeros(1, *model.latent_shape, device=model.device)
    timesteps = torch.zeros(1, dtype=torch.int64, device=model.device)
    for name in names:
        parameters[name].requires_grad_(True)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            with torch.autocast(model.device.type, torch.bfloat16, enabled=mixed_precision == "bf16"):
                output = model.predict(latents, timesteps, model.encode([""]).rows([0]))
            del output
    finally:
        model.denoiser.requires_grad_(False)
    return sum(saved.values())
