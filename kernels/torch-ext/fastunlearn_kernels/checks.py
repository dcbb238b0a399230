"""What callers can get wrong, said in one sentence each."""

from __future__ import annotations

from collections.abc import Sequence

import torch

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INT32_MAX = 2**31 - 1


def flattened(tensor: torch.Tensor) -> torch.Tensor:
    """As a dense vector: a view where it is one, else a copy. ``reshape`` alone leaves a strided vector strided."""
    return tensor.reshape(-1).contiguous()


def check_tensor(
    name: str,
    value: object,
    dtypes: Sequence[torch.dtype] = FLOAT_DTYPES,
    shape: tuple[int, ...] | None = None,
    device: torch.device | None = None,
    frozen: bool = True,
) -> None:
    """Raises unless ``value`` is a tensor of one of ``dtypes``, of ``shape``, on ``device``, if ``frozen`` gradless."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"`{name}` must be a torch.Tensor, got {type(value).__name__}.")
    if value.dtype not in dtypes:
        allowed = ", ".join(str(d).replace("torch.", "") for d in dtypes)
        raise TypeError(f"`{name}` must be of dtype {allowed}, got {str(value.dtype).replace('torch.', '')}.")
    if shape is not None and tuple(value.shape) != tuple(shape):
        raise ValueError(f"`{name}` must have shape {tuple(shape)}, got {tuple(value.shape)}.")
    if device is not None and value.device != device:
        raise ValueError(f"`{name}` must be on {device} like the other tensors, got {value.device}.")
    if frozen and value.requires_grad:
        raise ValueError(f"`{name}` requires grad, but no gradient flows into it. Pass `{name}.detach()`.")


def check_tensor_list(name: str, values: object, dtypes: Sequence[torch.dtype] = FLOAT_DTYPES) -> None:
    """Raises unless ``values`` is a list or tuple of tensors of ``dtypes`` that are all on one device."""
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"`{name}` must be a list or tuple of tensors, got {type(values).__name__}.")
    for i, value in enumerate(values):
        check_tensor(f"{name}[{i}]", value, dtypes, device=values[0].device if i else None, frozen=False)
