"""What a single .safetensors file is that is no model: told by the names of its tensors alone."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files.weights import open_header

_LARGEST_HEADER = 100 * 2**20  # bytes, as safetensors itself has it

# What a file is whose tensors all have one of these beginnings, the first that fits.
_ALONE = (
    (
        "first_stage_model. vae. encoder. decoder. quant_conv. post_quant_conv. loss.",
        "a VAE alone: it needs the whole model",
    ),
    (
        "cond_stage_model. conditioner. text_encoders. text_model. text_projection. shared. encoder. decoder. "
        "transformer. logit_scale. embeddings. final_layer_norm.",
        "a text encoder alone: `--model` needs the whole model",
    ),
    (
        "emb_params clip_l clip_g string_to_param",
        "a textual inversion's embedding: load it into a pipeline and save that",
    ),
    ("image_proj. ip_adapter.", "an IP-Adapter: `--model` needs the model that it belongs to"),
)


def headers(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """(name -> {"dtype", "shape"}, metadata) of a safetensors file; no values are read.  UserError for damage."""
    try:
        with open_header(path) as file:  # checks that the tensors fill the file
            metadata = dict(file.metadata() or {})
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            entries = json.loads(stream.read(min(length, _LARGEST_HEADER)))
    except OSError:
        raise
    except Exception as error:
        raise UserError(f"{path} is no whole safetensors file: {error}. Fetch it again.") from error
    return {name: entry for name, entry in entries.items() if name != "__metadata__"}, metadata


def foreign(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> str | None:
    """What the file is, and what to do with it, if it is no model; None for what may be one."""
    if '"format": "fastunlearn-' in metadata.get("fastunlearn", ""):
        return "a file of fastunlearn's own, not a model: give a delta to `fastunlearn apply`, a mask to `--mask`"
    if any(mark in name for name in tensors for mark in ("lora_", ".lora.", "lokr_", "loha_", "hada_w", ".dora_")):
        return "a LoRA: `--model` needs the model that it changes, and `--lora` this file"
    if any(name.startswith(("control_model.", "controlnet_", "input_hint_block.")) for name in tensors):
        return "a ControlNet: `--model` needs the text-to-image model that it steers"
    for beginnings, what in _ALONE:
        if tensors and all(name.startswith(tuple(beginnings.split())) for name in tensors):
            return what
    if any(name.startswith(("down_blocks.", "transformer_blocks.", "mid_block.")) for name in tensors):
        return "one network in diffusers' names: pass the folder of the whole pipeline that it is a part of"
    return None
