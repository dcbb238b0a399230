"""An adapter under the names of kohya's scripts, which ComfyUI and A1111 read.

For a UNet diffusers' own converter writes them.  For FLUX the scripts adapt the layers of the original code, in which
queries, keys and values are one: their factors are stacked, block by block, each block of its own rank.  Both are read
back through diffusers before anything is written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import UserError, one_line
from .adapter_files import AdapterFile
from .runtime import import_diffusers

Tensors = dict[str, torch.Tensor]

#: Of FLUX: what follows ``transformer_blocks.N.`` or ``single_transformer_blocks.N.`` -> the original layer, and which
#: of how many layers in it this is.
_DOUBLE = {
    **{f"attn.to_{one}": ("img_attn_qkv", index, 3) for index, one in enumerate("qkv")},
    **{f"attn.add_{one}_proj": ("txt_attn_qkv", index, 3) for index, one in enumerate("qkv")},
    "attn.to_out.0": ("img_attn_proj", 0, 1),
    "attn.to_add_out": ("txt_attn_proj", 0, 1),
    "ff.net.0.proj": ("img_mlp_0", 0, 1),
    "ff.net.2": ("img_mlp_2", 0, 1),
    "ff_context.net.0.proj": ("txt_mlp_0", 0, 1),
    "ff_context.net.2": ("txt_mlp_2", 0, 1),
    "norm1.linear": ("img_mod_lin", 0, 1),
    "norm1_context.linear": ("txt_mod_lin", 0, 1),
}
_SINGLE = {
    **{f"attn.to_{one}": ("linear1", index, 4) for index, one in enumerate("qkv")},
    "proj_mlp": ("linear1", 3, 4),
    "proj_out": ("linear2", 0, 1),
    "norm.linear": ("modulation_lin", 0, 1),
}
_MLP_RATIO = 4  # of FLUX: the width of proj_mlp by that of a query


def kohya_tensors(file: AdapterFile, pipeline_class: str) -> Tensors:
    """The tensors of an adapter, and each layer's alpha, under kohya's names.

    Raises UserError for an adapter of a network that these names are not for, and for a layer that diffusers would not
    find again under its name.
    """
    pipeline = getattr(import_diffusers(), pipeline_class)
    if file.part == "unet":
        result = _unet_tensors(file)
    elif pipeline_class == "FluxPipeline":
        result = _flux_tensors(file)
    else:
        raise UserError(
            f"kohya's names are for UNets and FLUX, and the adapter {file.path} is one of a {pipeline_class}. Use "
            "`--format lora`."
        )
    try:
        found = kohya_values(result, pipeline)
    except (ValueError, AssertionError) as error:  # diffusers' ways to say so
        raise UserError(
            f"kohya's names cannot hold this adapter ({one_line(error)[:160]}). Use `--format lora`, or another "
            "`--trainable`."
        ) from error
    for layer in file.layers:
        down, up = (file.values[f"{layer}.{kind}.weight"] for kind in ("lora_A", "lora_B"))
        scale = file.alpha / file.rank if file.part != "unet" else 1.0  # where diffusers' reader works it in
        theirs = [found.get(f"{file.part}.{layer}.{kind}.weight") for kind in ("lora_A", "lora_B")]
        if theirs[0] is None or theirs[1] is None or not _same((down * scale, up), (theirs[0], theirs[1])):
            raise UserError(f"kohya's names cannot hold {layer}. Use `--format lora`, or another `--trainable`.")
    return {name: value.contiguous() for name, value in result.items()}


def kohya_values(tensors: Mapping[str, torch.Tensor], pipeline: Any) -> Tensors:
    """Tensors under kohya's names as diffusers reads them for a class of pipelines, under peft's names."""
    read = pipeline.lora_state_dict(dict(tensors))
    read = read[0] if isinstance(read, tuple) else read
    if any("lora_A" in name for name in read):
        return dict(read)
    return dict(import_diffusers().utils.state_dict_utils.convert_unet_state_dict_to_peft(read))


def _same(ours: tuple[torch.Tensor, torch.Tensor], theirs: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def _unet_tensors(file: AdapterFile) -> Tensors:
    named = {f"{file.part}.{name}": value for name, value in file.values.items()}
    result: Tensors = import_diffusers().utils.state_dict_utils.convert_state_dict_to_kohya(named)
    for name in result:
        if name.endswith(".alpha"):  # where the converter writes the rank
            result[name] = torch.tensor(file.alpha)
    return result


def _flux_tensors(file: AdapterFile) -> Tensors:
    joined: dict[str, dict[int, str]] = {}  # the original layer -> which of it -> ours
    counts: dict[str, int] = {}
    for layer in file.layers:
        found = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", layer)
        place = (_SINGLE if found[1] else _DOUBLE).get(found[3]) if found else None
        if found is None or place is None:
            raise UserError(f"kohya's names have none for {layer}. Use `--format lora`, or another `--trainable`.")
        name, index, count = place
        original = f"lora_unet_{'single' if found[1] else 'double'}_blocks_{found[2]}_{name}"
        joined.setdefault(original, {})[index] = layer
        counts[original] = count
    result: Tensors = {}
    for original, layers in joined.items():
        count = counts[original]
        some = next(iter(layers.values()))
        down = file.values[f"{some}.lora_A.weight"]
        result[f"{original}.lora_down.weight"] = torch.cat(
            [_factor(file, layers.get(index), "lora_A", torch.zeros_like(down)) for index in range(count)]
        )
        ups = [_factor(file, layers.get(index), "lora_B", _no_up(file, layers, index)) for index in range(count)]
        result[f"{original}.lora_up.weight"] = torch.block_diag(*ups)
        result[f"{original}.alpha"] = torch.tensor(file.alpha * count)  # so that alpha by rank is what it was
    return result


def _factor(file: AdapterFile, layer: str | None, kind: str, missing: torch.Tensor) -> torch.Tensor:
    return missing if layer is None else file.values[f"{layer}.{kind}.weight"]


def _no_up(file: AdapterFile, layers: Mapping[int, str], index: int) -> torch.Tensor:
    """Zeros for a layer that is not adapted, as wide as the layer is."""
    there, layer = next(iter(layers.items()))
    up = file.values[f"{layer}.lora_B.weight"]
    wide, narrow = index == 3, there == 3
    rows = len(up) * (_MLP_RATIO if wide and not narrow else 1) // (_MLP_RATIO if narrow and not wide else 1)
    return up.new_zeros(rows, up.shape[1])
