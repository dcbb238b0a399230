"""A LoRA that the base carries: read by diffusers, under peft's, diffusers' or kohya's names, and merged in memory."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UserError, is_out_of_memory, one_line
from ..files.tensors import refused
from ..files.weights import read_tensors
from .adapter_files import base_in
from .adapters import import_peft, merge
from .base import Model

_KEY = "lora_adapter_metadata"
#: What of peft's settings in a file is believed: what it needs to read the tensors, and nothing that loads code.
_SETTINGS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_rslora")
_UPS = (".lora_B.weight", ".lora_up.weight", ".lora.up.weight", "_lora.up.weight", ".lora_linear_layer.up.weight")


def add_lora(model: Model, path: Path) -> None:
    """Merge a LoRA file into the weights of the model's denoiser and text encoders.

    Raises UserError for a file that is none, is for another base, matches nothing or in part, or changes nothing.
    """
    if not path.is_file():
        raise UserError(f"`--lora` {path} does not exist. Name a .safetensors file.")
    pipeline = model.pipeline
    if not hasattr(pipeline, "load_lora_weights"):
        raise UserError(f"diffusers reads no LoRA file for {type(pipeline).__name__}. Leave `--lora` out.")
    import_peft()
    with refused(path, "LoRA file"):
        tensors, metadata = read_tensors(path)
        if not tensors:
            raise ValueError("it holds no tensor")
        for name, values in tensors.items():
            if "dora_scale" in name or "magnitude_vector" in name:
                raise ValueError(f"{name} is of DoRA, which is not read")
            if not torch.isfinite(values.float()).all():
                raise ValueError(f"{name} has values that are no numbers")
        wanted = sum(name.endswith(_UPS) for name in tensors)
        if not wanted:
            raise ValueError(f"{next(iter(tensors))!r} is no name of a LoRA's tensor")
        settings = _believed(metadata)
    if (base := base_in(metadata)) and base != (ours := model.hash_files()):
        raise UserError(
            f"the LoRA {path} belongs to another base: its hash is {base[:12]}, that of {model.name} is {ours[:12]}. "
            "Use it on the model that its run started from."
        )
    _read(model, path, tensors, settings)
    found, changed = 0, False
    merged = dict(model.merged)
    for part, module in pipeline.components.items():
        if isinstance(module, nn.Module) and (layers := merge(module)):
            found += len(layers)
            changed |= any(layers.values())
            merged[part] = merged.get(part, frozenset()) | {f"{layer}.weight" for layer in layers}
    if found < wanted:
        some = "nothing" if not found else f"{found} of its {wanted} layers"
        raise UserError(f"the LoRA {path} is for another model: {some} of it fits {model.name}.")
    if not changed:
        raise UserError(f"the LoRA {path} changes nothing: its factors are zero. Leave `--lora` out.")
    model.merged, model.adapter_files = merged, (*model.adapter_files, path)


def _believed(metadata: dict[str, str] | None) -> dict[str, str]:
    """The part of a file's settings that is passed on."""
    content = json.loads((metadata or {}).get(_KEY, "{}"))
    if not isinstance(content, dict):
        raise ValueError(f"its {_KEY} is no object")
    kept = {name: value for name, value in content.items() if name.rpartition(".")[2] in _SETTINGS}
    return {_KEY: json.dumps(kept)} if kept else {}


def _read(model: Model, path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Let diffusers put the LoRA on its layers."""
    from safetensors.torch import save_file

    pipeline: Any = model.pipeline
    with tempfile.TemporaryDirectory(prefix="fastunlearn-lora-") as folder:
        save_file(tensors, Path(folder) / "lora.safetensors", metadata=metadata or None)
        try:
            pipeline.load_lora_weights(
                folder, weight_name="lora.safetensors", use_safetensors=True, local_files_only=True
            )
        except Exception as error:
            if is_out_of_memory(error):
                raise
            if one_line(error).startswith("Target modules"):  # peft's words, with all of them in any order
                raise UserError(f"the LoRA {path} is for another model: nothing of it fits {model.name}.") from error
            raise UserError(f"the LoRA {path} does not fit {model.name}: {one_line(error)[:200]}.") from error
