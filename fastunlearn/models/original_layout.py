"""The single-file layout of Stable Diffusion's authors, which ComfyUI, A1111 and diffusers' ``from_single_file`` read.

Only names change, but for what the original stores otherwise: OpenCLIP's queries, keys and values are one matrix, its
projection is transposed, and the VAE's attention is made of 1 x 1 convolutions.  The way back is diffusers' own reader,
against which the names are tested.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from ..errors import UserError
from ..files.weights import read_tensors, weight_files

Tensors = dict[str, torch.Tensor]

_UNET_ENDS = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
}
_UNET_RESNET = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}
_VAE_ATTENTION = {"group_norm.": "norm.", "to_q.": "q.", "to_k.": "k.", "to_v.": "v.", "to_out.0.": "proj_out."}
_VAE_OLD_ATTENTION = {"query.": "q.", "key.": "k.", "value.": "v.", "proj_attn.": "proj_out."}
_OPEN_CLIP_LAYER = {
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "self_attn.out_proj.": "attn.out_proj.",
}
_OPEN_CLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


def original_tensors(source: Path, encoders: Mapping[str, str], variant: str | None = None) -> Tensors:
    """Every tensor of a pipeline by its name in the original layout, with the type that it has.

    ``encoders``: where in that layout each text encoder stands, such as ``cond_stage_model.`` (see ``Model``).  Raises
    UserError for a part that the layout has no name for.
    """
    unet, vae = _config(source / "unet"), _config(source / "vae")
    result = {
        f"model.diffusion_model.{unet_name(name, unet)}": value
        for name, value in _tensors_of(source / "unet", variant).items()
    }
    for name, value in _tensors_of(source / "vae", variant).items():
        is_matrix = ".attentions." in name and value.ndim == 2
        result[f"first_stage_model.{vae_name(name, vae)}"] = value[:, :, None, None] if is_matrix else value
    for part, place in encoders.items():
        is_open = _config(source / part).get("hidden_act") != "quick_gelu"  # OpenAI's own CLIP alone has this one
        convert = _open_clip if is_open else _clip
        result |= {f"{place}{name}": value for name, value in convert(_tensors_of(source / part, variant)).items()}
    return {name: value.contiguous() for name, value in result.items()}


def unet_name(name: str, config: Mapping[str, object]) -> str:
    """A UNet's tensor in the original layout."""
    for ours, theirs in _UNET_ENDS.items():
        if name.startswith(ours):
            return theirs + _replaced(name.removeprefix(ours), _UNET_RESNET if ".resnets." in name else {})
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name)
    layers = config.get("layers_per_block")
    if found is None or not isinstance(layers, int):
        raise _unnamed("unet", name)
    side, block, kind, layer, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
    first = block * (layers + 1)
    if side == "down":
        place = f"input_blocks.{first + layer + 1}"
        if kind == "downsamplers":
            return f"input_blocks.{first + layers + 1}.0.op.{rest.removeprefix('conv.')}"
    else:
        place = f"output_blocks.{first + layer}"
        if kind == "upsamplers":
            types = config.get("up_block_types")
            attends = isinstance(types, list) and "Attn" in types[block]
            return f"output_blocks.{first + layers}.{2 if attends else 1}.{rest}"
    if kind == "attentions":
        return f"{place}.1.{rest}"
    return f"{place}.0.{_replaced(rest, _UNET_RESNET)}"


def vae_name(name: str, config: Mapping[str, object]) -> str:
    """A VAE's tensor in the original layout."""
    found = re.fullmatch(r"(encoder|decoder)\.(.+)", name)
    if found is None:
        return name  # quant_conv and post_quant_conv
    side, rest = found[1], found[2]
    types = config.get(f"{'down' if side == 'encoder' else 'up'}_block_types")
    blocks = len(types) if isinstance(types, list) else 0
    rest = rest.replace("conv_norm_out.", "norm_out.").replace("conv_shortcut.", "nin_shortcut.")
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", rest):
        if found[1] == "attentions":
            return f"{side}.mid.attn_1.{_replaced(found[3], _VAE_ATTENTION | _VAE_OLD_ATTENTION)}"
        return f"{side}.mid.block_{int(found[2]) + 1}.{found[3]}"
    if found := re.fullmatch(r"(?:down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)", rest):
        block = int(found[1])
        place = f"{side}.down.{block}" if side == "encoder" else f"{side}.up.{blocks - 1 - block}"
        if found[2] == "resnets":
            return f"{place}.block.{found[3]}.{found[4]}"
        return f"{place}.{found[2].removesuffix('rs')}.{found[4]}"
    return f"{side}.{rest}"


def _clip(tensors: Tensors) -> Tensors:
    """OpenAI's CLIP, which the originals read through transformers, as it called its parts."""
    return {f"transformer.text_model.{_plain(name)}": value for name, value in tensors.items()}


def _open_clip(tensors: Tensors) -> Tensors:
    result: Tensors = {}
    for name, value in tensors.items():
        name = _plain(name)
        if name == "text_projection.weight":
            result["model.text_projection"] = value.T
        elif name in _OPEN_CLIP_ENDS:
            result[f"model.{_OPEN_CLIP_ENDS[name]}"] = value
        elif found := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name):
            place = f"model.transformer.resblocks.{found[1]}."
            if joined := re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", found[2]):
                parts = [tensors[_like(tensors, name, f"{letter}_proj")] for letter in "qkv"]
                result[f"{place}attn.in_proj_{joined[2]}"] = torch.cat(parts)
            else:
                result[place + _replaced(found[2], _OPEN_CLIP_LAYER)] = value
        else:
            raise _unnamed("text encoder", name)
    return result


def _like(tensors: Tensors, name: str, projection: str) -> str:
    """The name, as it is stored, of the same tensor of another projection."""
    other = re.sub(r"[qkv]_proj", projection, name)
    return other if other in tensors else f"text_model.{other}"


def _plain(name: str) -> str:
    """Newer versions of transformers leave this out."""
    return name.removeprefix("text_model.")


def _replaced(name: str, table: Mapping[str, str]) -> str:
    """``name`` with its beginning as the table has it."""
    return next((new + name.removeprefix(old) for old, new in table.items() if name.startswith(old)), name)


def _tensors_of(folder: Path, variant: str | None) -> Tensors:
    files = weight_files(folder, variant) or weight_files(folder)
    if not files:
        raise UserError(f"{folder} has no weights, so there is no single file of them.")
    result: Tensors = {}
    for path in files:
        result |= read_tensors(path)[0]
    # A buffer of positions that older versions of transformers saved.
    return {name: value for name, value in result.items() if not name.endswith("position_ids")}


def _config(folder: Path) -> dict[str, object]:
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def _unnamed(part: str, name: str) -> UserError:
    return UserError(f"the single-file layout has no name for {name!r} of the {part}. Use `--format diffusers`.")
