"""Reads weights in the type that their files have, so that a large model is never in memory at twice its size."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..files.weights import stored_types, weight_files
from .placement import networks
from .runtime import import_diffusers

_NARROW = {"BF16": torch.bfloat16, "F16": torch.float16}


def stored_dtypes(source: Path, parts: Iterable[str], variant: str | None) -> dict[str, Any]:
    """The option of ``from_pretrained`` that loads parts whose floating-point weights are all of one narrow type so."""
    found: dict[str, torch.dtype] = {"default": torch.float32}
    for part in parts:
        files = weight_files(source / part, variant) or weight_files(source / part)
        kinds = {kind for kind in stored_types(files) if kind.startswith(("F", "BF"))}
        if len(kinds) == 1 and (kind := kinds.pop()) in _NARROW and part != "vae":
            found[part] = _NARROW[kind]
    return {_option(): found}


def restore_buffers(pipeline: Any, source: Path, variant: str | None) -> None:
    """Read again, in float32, the networks that compute a table when they are built: it was rounded with the rest."""
    for name, network in list(pipeline.components.items()):
        if network not in networks(pipeline) or network.dtype == torch.float32:
            continue
        computed = dict(network.named_buffers()).keys() - network.state_dict().keys()
        if any(network.get_buffer(buffer).is_floating_point() for buffer in computed):
            options = {"use_safetensors": True, "local_files_only": True, _option(): torch.float32}
            setattr(pipeline, name, type(network).from_pretrained(source / name, variant=variant, **options))


def _option() -> str:
    """What diffusers calls it, of old and by now."""
    return "dtype" if hasattr(import_diffusers().utils.torch_utils, "_resolve_dtype") else "torch_dtype"
