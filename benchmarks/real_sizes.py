"""The settings of public models, as their config.json files have them, in folders without weights.

Counts of memory need shapes alone.  The tokenizers are stand-ins of one token per character, of the real length.

python benchmarks/real_sizes.py sdxl FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

CLIP_L = {
    "_class": "CLIPTextModel",
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "bos_token_id": 49406,
    "eos_token_id": 49407,
}
CLIP_G = CLIP_L | {
    "_class": "CLIPTextModelWithProjection",
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
T5_XXL = {
    "_class": "T5EncoderModel",
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
QWEN_25_VL_7B = {
    "_class": "Qwen2_5_VLForConditionalGeneration",
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": False,
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
    },
}
QWEN_3_4B = {
    "_class": "Qwen3Model",
    "architectures": ["Qwen3Model"],
    "model_type": "qwen3",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "rope_theta": 1000000.0,
}
VAE = {
    "_class": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "norm_num_groups": 32,
}
UNET = {
    "_class": "UNet2DConditionModel",
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
FLUX_VAE = VAE | {
    "sample_size": 1024,
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}

#: name -> (pipeline's class, its own settings, part -> settings).  The facts are the published config.json files'.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, dict[str, Any]]]] = {
    "sd15": (
        "StableDiffusionPipeline",
        {"requires_safety_checker": False},
        {
            "text_encoder": CLIP_L,
            "tokenizer": {"_class": "CLIPTokenizer"},
            "vae": VAE | {"sample_size": 512, "scaling_factor": 0.18215},
            "unet": UNET
            | {
                "sample_size": 64,
                "block_out_channels": [320, 640, 1280, 1280],
                "cross_attention_dim": 768,
                "attention_head_dim": 8,
                "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
                "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
            },
            "scheduler": {"_class": "PNDMScheduler", "skip_prk_steps": True, **BETAS},
        },
    ),
    "sdxl": (
        "StableDiffusionXLPipeline",
        {"force_zeros_for_empty_prompt": True},
        {
            "text_encoder": CLIP_L,
            "text_encoder_2": CLIP_G,
            "tokenizer": {"_class": "CLIPTokenizer"},
            "tokenizer_2": {"_class": "CLIPTokenizer"},
            "vae": VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
            "unet": UNET
            | {
                "sample_size": 128,
                "block_out_channels": [320, 640, 1280],
                "cross_attention_dim": 2048,
                "attention_head_dim": [5, 10, 20],
                "transformer_layers_per_block": [1, 2, 10],
                "use_linear_projection": True,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
                "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
                "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            },
            "scheduler": {"_class": "EulerDiscreteScheduler", "timestep_spacing": "leading", **BETAS},
        },
    ),
    "flux-dev": (
        "FluxPipeline",
        {},
        {
            "text_encoder": CLIP_L,
            "text_encoder_2": T5_XXL,
            "tokenizer": {"_class": "CLIPTokenizer"},
            "tokenizer_2": {"_class": "T5TokenizerFast"},
            "vae": FLUX_VAE,
            "transformer": {
                "_class": "FluxTransformer2DModel",
                "patch_size": 1,
                "in_channels": 64,
                "num_layers": 19,
                "num_single_layers": 38,
                "attention_head_dim": 128,
                "num_attention_heads": 24,
                "joint_attention_dim": 4096,
                "pooled_projection_dim": 768,
                "guidance_embeds": True,
                "axes_dims_rope": [16, 56, 56],
            },
            "scheduler": {
                "_class": "FlowMatchEulerDiscreteScheduler",
                "shift": 3.0,
                "use_dynamic_shifting": True,
                "base_shift": 0.5,
                "max_shift": 1.15,
            },
        },
    ),
    "qwen-image": (
        "QwenImagePipeline",
        {},
        {
            "text_encoder": QWEN_25_VL_7B,
            "tokenizer": {"_class": "T5TokenizerFast"},
            "vae": {"_class": "AutoencoderKLQwenImage", "base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4]},
            "transformer": {
                "_class": "QwenImageTransformer2DModel",
                "patch_size": 2,
                "in_channels": 64,
                "out_channels": 16,
                "num_layers": 60,
                "attention_head_dim": 128,
                "num_attention_heads": 24,
                "joint_attention_dim": 3584,
                "axes_dims_rope": [16, 56, 56],
            },
            "scheduler": {
                "_class": "FlowMatchEulerDiscreteScheduler",
                "use_dynamic_shifting": True,
                "base_shift": 0.5,
                "max_shift": 0.9,
                "shift_terminal": 0.02,
            },
        },
    ),
    "z-image": (
        "ZImagePipeline",
        {},
        {
            "text_encoder": QWEN_3_4B,
            "tokenizer": {"_class": "T5TokenizerFast"},
            "vae": FLUX_VAE,
            "transformer": {
                "_class": "ZImageTransformer2DModel",
                "in_channels": 16,
                "dim": 3840,
                "n_layers": 30,
                "n_refiner_layers": 2,
                "n_heads": 30,
                "n_kv_heads": 30,
                "cap_feat_dim": 2560,
                "axes_dims": [32, 48, 48],
                "axes_lens": [1536, 512, 512],
            },
            "scheduler": {"_class": "FlowMatchEulerDiscreteScheduler", "shift": 6.0},
        },
    ),
}


def write(name: str, folder: Path) -> Path:
    """A pipeline's folder of the model's settings, without weights."""
    kind, settings, parts = MODELS[name]
    index: dict[str, Any] = {"_class_name": kind, **settings}
    for part, config in parts.items():
        class_name, values = config["_class"], {key: value for key, value in config.items() if key != "_class"}
        index[part] = ["transformers" if part.startswith(("text_encoder", "tokenizer")) else "diffusers", class_name]
        (folder / part).mkdir(parents=True, exist_ok=True)
        if part.startswith("tokenizer"):
            _write_tokenizer(class_name, folder / part)
            continue
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        content = values if "architectures" in values else {"_class_name": class_name, **values}
        (folder / part / file).write_text(json.dumps(content), encoding="utf-8")
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def _write_tokenizer(class_name: str, folder: Path) -> None:
    letters = [chr(code) for code in range(33, 127)]
    if class_name == "CLIPTokenizer":
        words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
        vocabulary = {word: index for index, word in enumerate(words)}
        (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
        marks = {"bos_token": words[-2], "eos_token": words[-1], "unk_token": words[-1], "pad_token": words[-1]}
        content = {"tokenizer_class": class_name, "model_max_length": 77, **marks}
        (folder / "tokenizer_config.json").write_text(json.dumps(content), encoding="utf-8")
        return
    from fastunlearn.models.runtime import import_diffusers

    import_diffusers()
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    scored = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), *((letter, -3.0) for letter in [*letters, "\u2581"])]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    wrapped = transformers.T5TokenizerFast(tokenizer_object=tokenizer, model_max_length=512, extra_ids=0, **names)
    wrapped.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    wrapped.save_pretrained(folder)


if __name__ == "__main__":
    print(write(sys.argv[1], Path(sys.argv[2])))
