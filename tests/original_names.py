"""The weights of a diffusers pipeline under the names of their makers, as single files have them.

Written from the makers' layouts, the other way round than diffusers' converters, which read what this writes.
"""

import re

import torch


def renamed(tensors, pairs):
    """Each name with every pattern replaced, in order."""
    result = {}
    for name, tensor in tensors.items():
        for pattern, new in pairs:
            name = re.sub(pattern, new, name)
        result[name] = tensor
    return result


def prefixed(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


# ---- latent diffusion ------------------------------------------------------------------------------------------------

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
RESNET |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
STEMS = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
STEMS |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
STEMS |= {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}


def unet(network):
    layers, kinds = network.config.layers_per_block, network.config.up_block_types
    result = {}
    for name, tensor in network.state_dict().items():
        stem, leaf = name.rsplit(".", 1)
        words = stem.split(".")
        if stem in STEMS:
            new = STEMS[stem]
        elif words[0] == "mid_block":
            index = {"resnets0": "0", "attentions0": "1", "resnets1": "2"}[words[1] + words[2]]
            new = ".".join(["middle_block", index, *words[3:]])
        else:
            block, kind, place = int(words[1]), words[2], int(words[3])
            if words[0] == "down_blocks":
                index, sub = (layers + 1) * block + place + 1, {"resnets": 0, "attentions": 1, "downsamplers": 0}[kind]
                index = (layers + 1) * (block + 1) if kind == "downsamplers" else index
                rest = ["op", *words[5:]] if kind == "downsamplers" else words[4:]
                new = ".".join(["input_blocks", str(index), str(sub), *rest])
            else:
                up = 2 if kinds[block].startswith("CrossAttn") else 1
                index = (layers + 1) * block + (layers if kind == "upsamplers" else place)
                sub = {"resnets": 0, "attentions": 1, "upsamplers": up}[kind]
                new = ".".join(["output_blocks", str(index), str(sub), *words[4:]])
        if ".resnets." in f".{stem}.":
            new = ".".join(RESNET.get(word, word) for word in new.split("."))
        result[f"model.diffusion_model.{new}.{leaf}"] = tensor
    return result


def vae(network):
    last = len(network.config.up_block_types) - 1
    tensors = renamed(
        network.state_dict(),
        [
            (r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block."),
            (r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample."),
            (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
            (r"mid_block\.attentions\.0\.", "mid.attn_1."),
            (r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{last - int(m[1])}.block."),
            (r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"up.{last - int(m[1])}.upsample."),
            ("conv_shortcut", "nin_shortcut"),
            ("conv_norm_out", "norm_out"),
            (r"attn_1\.group_norm", "attn_1.norm"),
            (r"attn_1\.to_([qkv])", r"attn_1.\1"),
            (r"attn_1\.to_out\.0", "attn_1.proj_out"),
        ],
    )
    is_linear = re.compile(r"attn_1\.(q|k|v|proj_out)\.weight$")
    tensors = {name: t[:, :, None, None] if is_linear.search(name) else t for name, t in tensors.items()}
    return prefixed("first_stage_model.", tensors)


def clip(encoder, prefix):
    """transformers' own names, whatever the class wraps."""
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    return {
        prefix + (name if name.startswith("text_projection") else f"text_model.{name}"): tensor
        for name, tensor in tensors.items()
    }


def open_clip(encoder, prefix):
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    result = {}
    for name, tensor in tensors.items():
        if ".self_attn." in name and "out_proj" not in name:
            continue
        for pattern, new in (
            (r"^encoder\.layers\.", "transformer.resblocks."),
            ("layer_norm", "ln_"),
            (r"mlp\.fc1", "mlp.c_fc"),
            (r"mlp\.fc2", "mlp.c_proj"),
            (r"self_attn\.out_proj", "attn.out_proj"),
            (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
            (r"^embeddings\.token_embedding", "token_embedding"),
            (r"^final_layer_norm|^final_ln_", "ln_final"),
        ):
            name = re.sub(pattern, new, name)
        if name == "text_projection.weight":
            name, tensor = "text_projection", tensor.T.contiguous()
        result[prefix + name] = tensor
    for layer in range(encoder.config.num_hidden_layers):
        for leaf in ("weight", "bias"):
            three = [tensors[f"encoder.layers.{layer}.self_attn.{one}_proj.{leaf}"] for one in "qkv"]
            result[f"{prefix}transformer.resblocks.{layer}.attn.in_proj_{leaf}"] = torch.cat(three)
    return result


def stable_diffusion(pipeline):
    if pipeline.text_encoder.config.hidden_act == "gelu":  # 2.x has OpenCLIP
        text = open_clip(pipeline.text_encoder, "cond_stage_model.model.")
    else:
        text = clip(pipeline.text_encoder, "cond_stage_model.transformer.")
    return unet(pipeline.unet) | vae(pipeline.vae) | text


def stable_diffusion_xl(pipeline):
    text = clip(pipeline.text_encoder, "conditioner.embedders.0.transformer.")
    text |= open_clip(pipeline.text_encoder_2, "conditioner.embedders.1.model.")
    return unet(pipeline.unet) | vae(pipeline.vae) | text


# ---- transformers ----------------------------------------------------------------------------------------------------


def fused(tensors, groups):
    """The tensors with those of each group, (names, new name), in one."""
    result = dict(tensors)
    for names, new in groups:
        if names[0] in result:
            result[new] = torch.cat([result.pop(name) for name in names])
    return result


def swapped(tensor):
    """Scale and shift stand the other way round."""
    scale, shift = tensor.chunk(2)
    return torch.cat([shift, scale])


def stable_diffusion_3(pipeline):
    network = pipeline.transformer
    tensors, layers = network.state_dict(), network.config.num_layers
    groups = []
    for layer in range(layers):
        for leaf in ("weight", "bias"):
            old, new = f"transformer_blocks.{layer}.", f"joint_blocks.{layer}."
            groups.append(([f"{old}attn.to_{x}.{leaf}" for x in "qkv"], f"{new}x_block.attn.qkv.{leaf}"))
            groups.append(([f"{old}attn.add_{x}_proj.{leaf}" for x in "qkv"], f"{new}context_block.attn.qkv.{leaf}"))
            groups.append(([f"{old}attn2.to_{x}.{leaf}" for x in "qkv"], f"{new}x_block.attn2.qkv.{leaf}"))
    last = f"transformer_blocks.{layers - 1}.norm1_context.linear."
    tensors = {n: swapped(t) if n.startswith((last, "norm_out.linear.")) else t for n, t in tensors.items()}
    tensors = renamed(
        fused(tensors, groups),
        [
            (r"^pos_embed\.proj", "x_embedder.proj"),
            (r"^pos_embed\.pos_embed", "pos_embed"),
            (r"^time_text_embed\.timestep_embedder\.linear_(\d)", lambda m: f"t_embedder.mlp.{2 * int(m[1]) - 2}"),
            (r"^time_text_embed\.text_embedder\.linear_(\d)", lambda m: f"y_embedder.mlp.{2 * int(m[1]) - 2}"),
            (r"^proj_out", "final_layer.linear"),
            (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
            (r"^transformer_blocks", "joint_blocks"),
            (r"\.norm1\.linear", ".x_block.adaLN_modulation.1"),
            (r"\.norm1_context\.linear", ".context_block.adaLN_modulation.1"),
            (r"(attn2?)\.norm_([qk])\.", r"x_block.\1.ln_\2."),
            (r"attn\.norm_added_([qk])\.", r"context_block.attn.ln_\1."),
            (r"(attn2?)\.to_out\.0", r"x_block.\1.proj"),
            (r"attn\.to_add_out", "context_block.attn.proj"),
            (r"\.ff\.net\.0\.proj", ".x_block.mlp.fc1"),
            (r"\.ff\.net\.2", ".x_block.mlp.fc2"),
            (r"\.ff_context\.net\.0\.proj", ".context_block.mlp.fc1"),
            (r"\.ff_context\.net\.2", ".context_block.mlp.fc2"),
        ],
    )
    text = clip(pipeline.text_encoder, "text_encoders.clip_l.transformer.")
    text |= clip(pipeline.text_encoder_2, "text_encoders.clip_g.transformer.")
    if pipeline.text_encoder_3 is not None:
        text |= prefixed("text_encoders.t5xxl.transformer.", pipeline.text_encoder_3.state_dict())
    return prefixed("model.diffusion_model.", tensors) | vae(pipeline.vae) | text


def flux(pipeline):
    """The transformer alone, as Black Forest Labs publish it."""
    network = pipeline.transformer
    tensors, groups = network.state_dict(), []
    for leaf in ("weight", "bias"):
        for layer in range(network.config.num_layers):
            old, new = f"transformer_blocks.{layer}.attn.", f"double_blocks.{layer}."
            groups.append(([f"{old}to_{x}.{leaf}" for x in "qkv"], f"{new}img_attn.qkv.{leaf}"))
            groups.append(([f"{old}add_{x}_proj.{leaf}" for x in "qkv"], f"{new}txt_attn.qkv.{leaf}"))
        for layer in range(network.config.num_single_layers):
            old, new = f"single_transformer_blocks.{layer}.", f"single_blocks.{layer}."
            four = [*(f"{old}attn.to_{x}.{leaf}" for x in "qkv"), f"{old}proj_mlp.{leaf}"]
            groups.append((four, f"{new}linear1.{leaf}"))
    tensors = {name: swapped(t) if name.startswith("norm_out.linear.") else t for name, t in tensors.items()}
    ends = {"1": "in_layer", "2": "out_layer"}
    return renamed(
        fused(tensors, groups),
        [
            (r"^time_text_embed\.timestep_embedder\.linear_(\d)", lambda m: f"time_in.{ends[m[1]]}"),
            (r"^time_text_embed\.text_embedder\.linear_(\d)", lambda m: f"vector_in.{ends[m[1]]}"),
            (r"^time_text_embed\.guidance_embedder\.linear_(\d)", lambda m: f"guidance_in.{ends[m[1]]}"),
            (r"^context_embedder", "txt_in"),
            (r"^x_embedder", "img_in"),
            (r"^single_transformer_blocks\.(\d+)\.norm\.linear", r"single_blocks.\1.modulation.lin"),
            (r"^single_transformer_blocks\.(\d+)\.attn\.norm_q\.weight", r"single_blocks.\1.norm.query_norm.scale"),
            (r"^single_transformer_blocks\.(\d+)\.attn\.norm_k\.weight", r"single_blocks.\1.norm.key_norm.scale"),
            (r"^single_transformer_blocks\.(\d+)\.proj_out", r"single_blocks.\1.linear2"),
            (r"^proj_out", "final_layer.linear"),
            (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
            (r"^transformer_blocks", "double_blocks"),
            (r"\.norm1\.linear", ".img_mod.lin"),
            (r"\.norm1_context\.linear", ".txt_mod.lin"),
            (r"attn\.norm_q\.weight", "img_attn.norm.query_norm.scale"),
            (r"attn\.norm_k\.weight", "img_attn.norm.key_norm.scale"),
            (r"attn\.norm_added_q\.weight", "txt_attn.norm.query_norm.scale"),
            (r"attn\.norm_added_k\.weight", "txt_attn.norm.key_norm.scale"),
            (r"attn\.to_out\.0", "img_attn.proj"),
            (r"attn\.to_add_out", "txt_attn.proj"),
            (r"\.ff\.net\.0\.proj", ".img_mlp.0"),
            (r"\.ff\.net\.2", ".img_mlp.2"),
            (r"\.ff_context\.net\.0\.proj", ".txt_mlp.0"),
            (r"\.ff_context\.net\.2", ".txt_mlp.2"),
        ],
    )
