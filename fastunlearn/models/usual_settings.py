"""The settings and tokenizers of Stable Diffusion 1 and XL, which a single file does not hold.

CLIP's vocabulary comes with the package open_clip.  Of Stable Diffusion 2 there are two kinds that no tensor tells
apart, and of further families the settings are many: these need a folder.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Container
from pathlib import Path
from typing import Any

from ..errors import UserError

_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
_VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
_CLIP = {"model_type": "clip_text_model", "vocab_size": 49408, "max_position_embeddings": 77}
_CLIP |= {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 1}
_SMALL = _CLIP | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_SMALL |= {"projection_dim": 768, "hidden_act": "quick_gelu"}
_LARGE = _CLIP | {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
_LARGE |= {"projection_dim": 1280, "hidden_act": "gelu"}
_UNET = {"_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4, "layers_per_block": 2}
_WITH, _WITHOUT = "CrossAttn{}Block2D", "{}Block2D"

# pipeline -> (its index, the settings by part)
_SETTINGS: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "StableDiffusionPipeline": (
        {
            "scheduler": ["diffusers", "PNDMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
        },
        {
            "scheduler": _BETAS | {"steps_offset": 1, "skip_prk_steps": True, "set_alpha_to_one": False},
            "text_encoder": _SMALL,
            "unet": _UNET
            | {
                "sample_size": 64,
                "block_out_channels": [320, 640, 1280, 1280],
                "down_block_types": [*[_WITH.format("Down")] * 3, _WITHOUT.format("Down")],
                "up_block_types": [_WITHOUT.format("Up"), *[_WITH.format("Up")] * 3],
                "attention_head_dim": 8,
                "cross_attention_dim": 768,
            },
            "vae": _VAE | {"sample_size": 512, "scaling_factor": 0.18215},
        },
    ),
    "StableDiffusionXLPipeline": (
        {
            "scheduler": ["diffusers", "EulerDiscreteScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "force_zeros_for_empty_prompt": True,
        },
        {
            "scheduler": _BETAS | {"steps_offset": 1, "timestep_spacing": "leading"},
            "text_encoder": _SMALL,
            "text_encoder_2": _LARGE,
            "unet": _UNET
            | {
                "sample_size": 128,
                "block_out_channels": [320, 640, 1280],
                "down_block_types": [_WITHOUT.format("Down"), *[_WITH.format("Down")] * 2],
                "up_block_types": [*[_WITH.format("Up")] * 2, _WITHOUT.format("Up")],
                "attention_head_dim": [5, 10, 20],
                "transformer_layers_per_block": [1, 2, 10],
                "cross_attention_dim": 2048,
                "use_linear_projection": True,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
            },
            "vae": _VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
        },
    ),
}
# Tensors of files that are built like these two and are sampled otherwise.
_OTHERWISE = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
_OPEN_CLIP_ONLY = "cond_stage_model.model.token_embedding.weight"  # Stable Diffusion 2


def has_settings(pipeline: str, tensors: Container[str]) -> bool:
    """Whether the settings of a file of this pipeline's class, with these tensors, are known here."""
    strange = (*_OTHERWISE, _OPEN_CLIP_ONLY)
    return pipeline in _SETTINGS and not any(name in tensors for name in strange)


def write_settings(folder: Path, pipeline: str, tensors: Container[str]) -> None:
    """Write a diffusers folder without weights.

    A file says by the empty tensors ``v_pred`` and ``ztsnr`` that it predicts v, and that its last step is pure noise.
    """
    index, parts = _SETTINGS[pipeline]
    changes: dict[str, Any] = {"prediction_type": "v_prediction"} if "v_pred" in tensors else {}
    if "ztsnr" in tensors:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        index = index | {"scheduler": ["diffusers", "EulerDiscreteScheduler"]}
    _write(folder / "model_index.json", {"_class_name": pipeline, **index})
    for part, settings in parts.items():
        if part == "scheduler":
            _write(folder / part / "scheduler_config.json", {"_class_name": index[part][1], **settings, **changes})
        else:
            _write(folder / part / "config.json", settings)
    for part, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        if part in index:
            _write_tokenizer(folder / part, pad)


def _write_tokenizer(folder: Path, pad: str) -> None:
    """CLIP's tokenizer from the list of merges that its makers published, which open_clip carries."""
    found = importlib.util.find_spec("open_clip")
    merges = Path(str(found.origin)).parent / "bpe_simple_vocab_16e6.txt.gz" if found else None
    if merges is None or not merges.is_file():
        raise UserError(
            "the file's settings are known, its tokenizer's vocabulary is not: `pip install open_clip_torch` brings "
            "it, or name a diffusers folder of the same base by `--parts`."
        )
    lines = gzip.decompress(merges.read_bytes()).decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [*map(chr, printable), *(chr(256 + n) for n in range(256 - len(printable)))]
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(line.split()) for line in lines)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    _write(folder / "vocab.json", {word: number for number, word in enumerate(words)})
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n", encoding="utf-8")
    end = "<|endoftext|>"
    marks = {"bos_token": "<|startoftext|>", "eos_token": end, "unk_token": end, "pad_token": pad}
    _write(folder / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **marks})


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
