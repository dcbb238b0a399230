"""Bad input, one table: what is given, and the one line that answers it.  Nothing is written, nothing is changed."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fastunlearn.worlds.shapes import pipeline_folder

TRAIN = (
    "train",
    "--forget",
    "star",
    "--output",
    "{new}",
    "--trajectories",
    "1",
    "--trajectory-steps",
    "2",
    "--steps",
    "1",
)
FORGET = ("train", "--output", "{new}", "--trajectories", "1", "--trajectory-steps", "2", "--steps", "1", "--forget")
INSTANCE = (*TRAIN, "--method", "instance", "--set")
EVALUATE = ("evaluate", "--original", "shapes", "--unlearned", "{run}", "--output", "{new}", "--device", "cpu")
IMAGES = ("evaluate-images", "--original-images", "{before}", "--unlearned-images", "{after}", "--metric", "shapes")
IMAGES = (*IMAGES, "--output", "{new}")
MASK = ("mask", "--forget", "star", "--output", "{new}", "--trajectories", "1", "--trajectory-steps", "2")
APPLY = ("apply", "--model", "shapes", "--output", "{new}")
COMPARE = ("compare", "--output", "{new}")
ATTACK = ("attack", "--original", "shapes", "--unlearned", "{run}", "--output", "{new}", "--device", "cpu")

# name: (command, what the answer says).  {name} is a path of the workbench; a file is made by FILES.
COMMANDS = {
    "no command": ([], "COMMAND"),
    "an unknown command": (["forget"], "invalid choice: 'forget'"),
    "an unknown flag": (["train", "--forgte", "x"], "unrecognized arguments: --forgte"),
    "a flag without its value": (["train", "--forget"], "expected one argument"),
    "nothing required": (["train"], "missing: --forget, --output"),
    "evaluate without models": (["evaluate"], "missing: --original"),
    "compare without runs": (["compare", "--output", "{new}"], "missing: RUN"),
    "compare with one run": ([*COMPARE, "a"], "at least 2 runs"),
    "images without folders": (["evaluate-images"], "missing: --original-images"),
    "apply without a delta": (["apply"], "missing: --model, --delta"),
}
NUMBERS = {
    "steps below 0": ([*TRAIN, "--steps", "-1"], "`--steps` must be at least 0"),
    "steps that are a word": ([*TRAIN, "--steps", "many"], "invalid int value: 'many'"),
    "half a step": ([*TRAIN, "--steps", "2.5"], "invalid int value"),
    "too many steps": ([*TRAIN, "--steps", "9999999999"], "`--steps` must be at most"),
    "a learning rate of 0": ([*TRAIN, "--learning-rate", "0"], "above 0"),
    "a learning rate of nan": ([*TRAIN, "--learning-rate", "nan"], "`--learning-rate` must be a number above 0"),
    "a learning rate of inf": ([*TRAIN, "--learning-rate", "inf"], "`--learning-rate` must be a number above 0"),
    "a learning rate above 1": ([*TRAIN, "--learning-rate", "2"], "at most 1"),
    "an empty batch": ([*TRAIN, "--micro-batch-size", "0"], "at least 1"),
    "no trajectory": ([*TRAIN, "--trajectories", "0"], "at least 1"),
    "a seed below 0": ([*TRAIN, "--seed", "-1"], "at least 0"),
    "a seed above 32 bits": ([*TRAIN, "--seed", str(2**32)], "at most"),
    "a density of 0": ([*TRAIN, "--mask-density", "0"], "above 0 and at most 1"),
    "a density above 1": ([*TRAIN, "--mask-density", "1.5"], "above 0 and at most 1"),
    "a density of nan": ([*MASK, "--density", "nan"], "above 0 and at most 1"),
    "clipping below 0": ([*TRAIN, "--max-grad-norm", "-1"], "at least 0"),
    "decay below 0": ([*TRAIN, "--weight-decay", "-0.1"], "at least 0"),
    "a margin of 0": ([*COMPARE, "--margin", "0", "{evaluation}", "{evaluation2}"], "above 0"),
    "no images per forward": ([*EVALUATE, "--batch-size", "0"], "at least 1"),
    "no seeds": ([*EVALUATE, "--seeds-per-prompt", "0"], "at least 1"),
    "a cache of no size": ([*EVALUATE, "--cache", "{new}c", "--cache-limit-gib", "0"], "above 0"),
    "no decoders": ([*IMAGES, "--num-workers", "0"], "at least 1"),
    "no trajectory per forward": ([*TRAIN, "--bank-batch-size", "0"], "`--bank-batch-size` must be at least 1"),
    "no trajectory per forward of a mask": ([*MASK, "--bank-batch-size", "0"], "must be at least 1"),
    "no image per decoding": ([*TRAIN, "--decode-batch-size", "0"], "`--decode-batch-size` must be at least 1"),
    "no image per decoding of an evaluation": ([*EVALUATE, "--decode-batch-size", "-2"], "must be at least 1"),
    "no image per forward after training": ([*TRAIN, "--evaluation-batch-size", "0"], "must be at least 1"),
    "a device of no memory": ([*TRAIN, "--dry-run", "--device-memory-gib", "0"], "must be a number above 0"),
    "a device of nan memory": ([*TRAIN, "--dry-run", "--device-memory-gib", "nan"], "must be a number above 0"),
    "a planned device and no plan": ([*TRAIN, "--device-memory-gib", "24"], "give both"),
    "an unknown type of weights": ([*TRAIN, "--weights-dtype", "int8"], "invalid choice: 'int8'"),
    "bfloat16 weights in float32 networks": ([*TRAIN, "--weights-dtype", "bf16"], "Add `--mixed-precision bf16`"),
    "the same in an evaluation": ([*EVALUATE, "--weights-dtype", "bf16"], "Add `--mixed-precision bf16`"),
    "an unknown precision": ([*TRAIN, "--mixed-precision", "fp8"], "invalid choice: 'fp8'"),
    "an unknown device": ([*TRAIN, "--device", "tpu"], "invalid choice: 'tpu'"),
    "an unknown schedule": ([*TRAIN, "--lr-scheduler", "cosine"], "invalid choice: 'cosine'"),
}
SETTINGS = {
    "a config that is not there": ([*TRAIN, "--config", "{files}/none.yaml"], "cannot read the config file"),
    "a config that is a folder": ([*TRAIN, "--config", "{files}"], "cannot read the config file"),
    "a config that is no YAML": ([*TRAIN, "--config", "{files}/broken.yaml"], "cannot read the config file"),
    "a config that is a list": ([*TRAIN, "--config", "{files}/list.yaml"], "must hold `name: value` lines"),
    "a config that is binary": ([*TRAIN, "--config", "{files}/binary"], "cannot read the config file"),
    "a config with an unknown name": ([*TRAIN, "--config", "{files}/unknown.yaml"], "unknown name 'stpes'"),
    "a config with code": ([*TRAIN, "--config", "{files}/code.yaml"], "cannot read the config file"),
    "a number that is a text": ([*TRAIN, "--config", "{files}/text.yaml"], "`seed` must be int, got 'x'"),
    "a number that is a list": ([*TRAIN, "--config", "{files}/listed.yaml"], "`seed` must be int"),
    "a truth for a number": ([*TRAIN, "--config", "{files}/truth.yaml"], "`seed` must be int, got True"),
    "a choice that is none": ([*TRAIN, "--config", "{files}/choice.yaml"], "must be no or bf16, got 'fp8'"),
    "a list of numbers for texts": (
        [*EVALUATE, "--config", "{files}/numbers.yaml"],
        "must be a text or a list of texts",
    ),
    "resume and overwrite": ([*TRAIN, "--resume", "--overwrite"], "give one of them"),
    "mask and density": ([*TRAIN, "--mask", "m", "--mask-density", "0.5"], "leave `--mask-density` out"),
    "processes without DeepSpeed": ([*TRAIN, "--num-processes", "2"], "needs `--deepspeed FILE`"),
}
CONCEPTS = {
    "an empty concept": (["train", "--forget", " ", "--output", "{new}"], "`--forget` is empty"),
    "a concept the world lacks": (["train", "--forget", "dog", "--output", "{new}"], "does not know the concept 'dog'"),
    "several concepts and one that the world lacks": ([*FORGET, "star;dog"], "does not know the concept 'dog'"),
    "a list of no concept": ([*FORGET, " ; "], "names no concept"),
    "a file of concepts that is not there": ([*FORGET, "none.csv"], "concept file 'none.csv' does not exist"),
    "a file of concepts without the column": ([*FORGET, "{files}/words.csv"], "must have one column `concept`"),
    "a file of concepts that is no JSON": ([*FORGET, "{files}/broken.json"], "concept file .* is no JSON"),
    "a file of concepts that is binary": ([*FORGET, "{files}/anchors.txt"], "concept file .* is not UTF-8 text"),
    "a concept with two anchors": ([*FORGET, "{files}/twice.csv"], "names 'Star' twice, with different anchors"),
    "concepts that are each other's anchors": (
        [*FORGET, "{files}/circle.csv"],
        "anchor 'a ring' of 'star' names 'ring', which is to be forgotten too",
    ),
    "an anchor that is another concept": (
        [*FORGET, "star;ring", "--anchor", "ring"],
        "anchor 'ring' of 'star' names 'ring'",
    ),
    "anchors for some concepts": (
        [*FORGET, "star;ring;heart", "--anchor", "cross;square"],
        "names 2 texts for 3 concepts",
    ),
    "an anchor of no tokens for spm": ([*TRAIN, "--method", "spm", "--anchor", "<|endoftext|>"], "into nothing"),
    "an anchor of no tokens for mace": ([*TRAIN[:-2], "--method", "mace", "--anchor", "<|endoftext|>"], "into nothing"),
    "an anchor of no tokens": ([*TRAIN, "--anchor", "<|endoftext|>"], "turns the anchor '<.endoftext.>' into nothing"),
    "every concept of a kind": (
        [*FORGET, "plain;striped;checkered;dotted;gradient", "--method", "uce"],
        "every background of the bundled model is to be forgotten",
    ),
    "anchors for a method without": ([*FORGET, "{files}/circle.csv", "--method", "neggrad"], "the column `anchor` out"),
    "a concept that is kept": ([*FORGET, "star;ring", "--retain-prompts", "ring;a heart"], "also retain prompts"),
    "a forget prompt of none of the concepts": (
        [*FORGET, "star;ring", "--forget-prompts", "a star;a heart"],
        "'a heart' names none of the 2 concepts",
    ),
    "an edit that means nothing": (
        [*TRAIN[:-2], "--method", "uce", "--set", "ridge=1e-300", "--retain-weight", "0", "--forget-prompts", "star"],
        "ill-conditioned: its matrix has the condition number",
    ),
    "a null space of nothing": (
        [*TRAIN[:-2], "--method", "speed", "--set", "null_below=1e-300"],
        "speed has nothing left to change",
    ),
    "a run of a delta as a model": ([*MASK, "--model", "{delta}"], "is a run that saved a delta"),
    "an unknown method": ([*TRAIN, "--method", "erase"], "unknown method 'erase'"),
    "an anchor that is the concept": ([*TRAIN, "--anchor", "STAR"], "leaves the forget prompt"),
    "an anchor for a method without": ([*TRAIN, "--method", "neggrad", "--anchor", "ring"], "takes no `--anchor`"),
    "an option that the method lacks": ([*TRAIN, "--method", "ace", "--set", "kappa=1"], "has no option 'kappa'"),
    "an option that spm lacks": ([*TRAIN, "--method", "spm", "--set", "anchors=4"], "spm has no option 'anchors'"),
    "an option that mace lacks": ([*TRAIN, "--method", "mace", "--set", "lamb=1"], "mace has no option 'lamb'"),
    "steps of mace": ([*TRAIN, "--method", "mace"], "mace computes its weights in no steps. Leave `--steps` out"),
    "a rank of mace": ([*TRAIN[:-2], "--method", "mace", "--set", "attention_rank=0"], "must be at least 1"),
    "a ridge of mace": ([*TRAIN[:-2], "--method", "mace", "--set", "ridge=0"], "`ridge` must be above 0"),
    "mace without keys and values": (
        [*TRAIN[:-2], "--method", "mace", "--trainable", "conv_in"],
        "selects none of them",
    ),
    "a share of 0": (
        [*TRAIN, "--method", "scissorhands", "--set", "redrawn_share=0"],
        "`redrawn_share` must be above 0",
    ),
    "a warm-up above 1": (
        [*TRAIN, "--method", "race", "--set", "attack_warm_up=2"],
        "`attack_warm_up` must be at most 1",
    ),
    "a truth that is none": ([*TRAIN, "--method", "concept-ablation", "--set", "noise_based=x"], "must be bool"),
    "no pictures": ([*TRAIN, "--method", "instance"], "needs `--set picture_folder=FOLDER`"),
    "a folder without pictures": (
        [*INSTANCE, "picture_folder={files}", "--set", "surrogate_folder={before}"],
        "holds no image",
    ),
    "a picture without a surrogate": (
        [*INSTANCE, "picture_folder={before}", "--set", "surrogate_folder={images:missing}"],
        "holds no surrogate named 1",
    ),
    "a picture of another size": (
        [*INSTANCE, "picture_folder={images:size}", "--set", "surrogate_folder={images:size}"],
        "has 32 x 64 pixels and shapes generates 64 x 64",
    ),
    "a picture that was cut": (
        [*INSTANCE, "picture_folder={images:cut}", "--set", "surrogate_folder={before}"],
        "cannot read",
    ),
    "a selector of nothing": ([*TRAIN, "--trainable", "attn9"], "selects no parameter"),
    "an empty selector": ([*TRAIN, "--trainable", ","], "selects no parameter"),
    "a forget prompt that is kept": ([*TRAIN, "--retain-prompts", "a star;a ring"], "are also retain prompts"),
    "a prompt of nothing": ([*TRAIN, "--retain-prompts", ";;"], "holds no prompt"),
    "a prompt without a shape": ([*TRAIN, "--retain-prompts", "\u200b"], "holds no prompt"),
    "a prompt that is too long": ([*TRAIN, "--forget-prompts", "star " * 40], "tokens and the model reads 14"),
    "a prompt of marks alone": ([*TRAIN, "--forget-prompts", "<|endoftext|>"], "turns the forget prompt"),
}
PROMPTS = {
    "a prompt file that is not there": ([*TRAIN, "--retain-prompts", "none.txt"], "does not exist"),
    "a JSON file that is not there": ([*TRAIN, "--retain-prompts", "none.jsonl"], "does not exist"),
    "a path that is not there": ([*TRAIN, "--retain-prompts", "data/none"], "does not exist"),
    "a prompt file that is a folder": ([*TRAIN, "--retain-prompts", "{files}"], "is a folder"),
    "an empty prompt file": ([*TRAIN, "--retain-prompts", "{files}/empty.txt"], "holds no prompt"),
    "a prompt file of blank lines": ([*TRAIN, "--retain-prompts", "{files}/blank.txt"], "holds no prompt"),
    "a prompt file in another encoding": ([*TRAIN, "--retain-prompts", "{files}/latin.txt"], "is not UTF-8 text"),
    "a prompt file of another kind": ([*TRAIN, "--retain-prompts", "{files}/table.parquet"], "a kind that is not read"),
    "a prompt file that is binary": ([*TRAIN, "--retain-prompts", "{files}/binary"], "binary data|not UTF-8"),
    "a CSV without prompts": ([*TRAIN, "--retain-prompts", "{files}/words.csv"], "no column named `prompt`"),
    "cells too many": ([*TRAIN, "--retain-prompts", "{files}/cells.csv"], "3 cells in line 2 and 2 columns"),
    "an open quote": ([*TRAIN, "--retain-prompts", "{files}/quote.csv"], "no proper CSV"),
    "a prompt in two groups": ([*EVALUATE, "--prompts", "{files}/groups.csv"], "is in two groups"),
    "a seed that is none": ([*EVALUATE, "--prompts", "{files}/seed.csv"], "the seed of row 2"),
    "seeds for some": ([*EVALUATE, "--prompts", "{files}/seeds.csv"], "none for 'b'"),
    "broken JSON": ([*TRAIN, "--retain-prompts", "{files}/broken.json"], "is no JSON"),
    "broken JSON lines": ([*TRAIN, "--retain-prompts", "{files}/broken.jsonl"], "no JSON in line 2"),
    "JSON of a number": ([*TRAIN, "--retain-prompts", "{files}/number.json"], "must hold a list of prompts"),
    "JSON of deep objects": ([*TRAIN, "--retain-prompts", "{files}/deep.json"], "must be a list of prompts"),
    "one prompt to keep": ([*EVALUATE, "--prompts", "a red ring"], "at least 2 retain prompts"),
    "only prompts to forget": ([*EVALUATE, "--prompts", "{files}/forget.csv"], "at least 2 retain prompts"),
}
OPTIONS = {
    "a sampler that is none": ([*TRAIN, "--scheduler", "Nonsense"], "has no such sampler. Use Euler"),
    "a sampler of nothing": ([*EVALUATE, "--scheduler", ""], "has no such sampler. Use Euler"),
    "a sampler of flows": ([*MASK, "--scheduler", "FlowMatchEulerDiscrete"], "samples flow models"),
    "a size that is none": ([*TRAIN, "--resolution", "64x"], "must be N or WxH in pixels"),
    "a size of nothing": ([*EVALUATE, "--resolution", "0"], "must be N or WxH in pixels"),
    "a size between two": ([*MASK, "--resolution", "63"], "multiples of .* pixels. Use 64x64"),
    "an unknown attention": ([*TRAIN, "--attention", "fast"], "invalid choice: 'fast'"),
    "attention that cannot run": ([*EVALUATE, "--attention", "xformers"], "needs a CUDA device|cannot run here"),
    "flash attention for a training": ([*TRAIN, "--attention", "flash"], "a training's rows are made in float32"),
    "flash attention in float32": ([*EVALUATE, "--attention", "flash"], "add `--mixed-precision bf16`"),
    "flash attention for a UNet": (
        [*EVALUATE, "--attention", "flash", "--mixed-precision", "bf16"],
        "do not ask diffusers' dispatcher",
    ),
    "a negative prompt that is cut": ([*TRAIN, "--negative-prompt", "star " * 40], "the negative prompt has"),
    "a negative prompt without guidance": (
        [*EVALUATE, "--negative-prompt", "x", "--guidance-scale", "1"],
        "does nothing without guidance",
    ),
    "a negative prompt without guidance of trajectories": (
        [*MASK, "--negative-prompt", "x", "--trajectory-guidance-scale", "0"],
        "does nothing without guidance",
    ),
    "a variant that is no name": ([*TRAIN, "--variant", "../x"], "is no variant's name"),
    "a variant that is not there": ([*TRAIN, "--variant", "bf16", "--model", "{model:whole}"], "cannot load the model"),
    "parts for a folder": ([*TRAIN, "--parts", "{model:whole}"], "completes a model in a single file"),
    "parts to apply to a folder": (
        [*APPLY, "--delta", "{run}/delta.safetensors", "--parts", "{model:whole}"],
        "completes a model in a single file",
    ),
    "parts that are none": ([*TRAIN, "--model", "{files}/sd.safetensors", "--parts", "{files}"], "no diffusers folder"),
    "parts of another layout": (
        [*TRAIN, "--model", "{files}/flux.safetensors", "--parts", "{model:whole}"],
        "holds the weights of a FluxPipeline alone, and `--parts` .* is a StableDiffusionPipeline",
    ),
    "a file without its settings": ([*TRAIN, "--model", "{files}/sd.safetensors"], "by `--parts`|cannot read"),
    "a file without its parts": (
        [*TRAIN, "--model", "{files}/sd.safetensors", "--parts", "{model:none}"],
        "cannot read|has no",
    ),
    "a LoRA for a model": ([*TRAIN, "--model", "{files}/lora.safetensors"], "is a LoRA"),
    "a ControlNet for a model": ([*MASK, "--model", "{files}/control.safetensors"], "is a ControlNet"),
    "a VAE for a model": ([*EVALUATE, "--unlearned", "{files}/vae.safetensors"], "is a VAE alone"),
    "a text encoder for a model": ([*TRAIN, "--model", "{files}/text.safetensors"], "is a text encoder alone"),
    "a mask for a model": ([*TRAIN, "--model", "{files}/star.mask.safetensors"], "a mask to `--mask`"),
    "a delta for a model": (
        [*EVALUATE, "--unlearned", "{run}/delta.safetensors"],
        "a delta to `fastunlearn apply`",
    ),
    "tensors for a model": ([*TRAIN, "--model", "{files}/tensors.safetensors"], "whose layout is known"),
    "a cut file for a model": ([*TRAIN, "--model", "{files}/cut.mask.safetensors"], "is no whole safetensors file"),
    "a pickle for a model": ([*TRAIN, "--model", "{files}/model.ckpt"], "is pickled"),
}
SINGLE_FILES = {
    "lora": ("lora_unet_x.lora_down.weight",),
    "control": ("control_model.input_blocks.0.0.weight",),
    "vae": ("first_stage_model.encoder.conv_in.weight",),
    "text": ("text_model.embeddings.token_embedding.weight",),
    "sd": ("model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.transformer.x", "first_stage_model.x"),
    "flux": ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight",),
}
MODELS = {
    "an unknown model": ([*TRAIN, "--model", "sd99"], "unknown model 'sd99'"),
    "a model folder that is not there": ([*TRAIN, "--model", "./none"], "unknown model './none'"),
    "a model that is a file": ([*TRAIN, "--model", "{files}/empty.txt"], "it is no folder"),
    "a folder that is no model": ([*TRAIN, "--model", "{files}"], "no model_index.json"),
    "a hub id without a network": ([*TRAIN, "--model", "nobody/nothing"], "cannot fetch the model"),
    "a model with a damaged index": ([*TRAIN, "--model", "{model:index}"], r"model_index\.json is damaged"),
    "a model of another family": ([*TRAIN, "--model", "{model:family}"], "a family not supported"),
    "a model with cut weights": ([*TRAIN, "--model", "{model:cut}"], "truncated or damaged"),
    "a model without weights": ([*TRAIN, "--model", "{model:none}"], "cannot load the model"),
    "a model of a pickle": ([*TRAIN, "--model", "{model:pickle}"], "is pickled"),
    "a model with too few tensors": ([*TRAIN, "--model", "{model:few}"], "is incomplete"),
    "a model with a link that leads out": ([*MASK, "--model", "{model:link}"], "outside the model's folder"),
    "a model whose index leads out": ([*TRAIN, "--model", "{model:part}"], "no name of a folder in it"),
    "another sampler": ([*EVALUATE, "--unlearned", "{model:sampler}", "--forget", "star"], "another sampler"),
    "a custom pipeline": ([*TRAIN, "--model", "{model:custom}"], "is a custom pipeline, .*whose code is not run"),
    "a LoRA still injected": ([*TRAIN, "--model", "{model:injected}"], r"holds LoRA layers.*`fuse_lora\(\)`"),
    "a model for inpainting": ([*TRAIN, "--model", "{model:inpainting}"], "takes 9 channels where"),
    "a model of no size": ([*TRAIN, "--model", "{model:sizeless}"], "does not say its resolution"),
    "a model without a tokenizer": ([*TRAIN, "--model", "{model:speechless}"], "has no tokenizer, without which"),
    "a model without its scheduler": ([*TRAIN, "--model", "{model:still}"], "cannot load the model"),
    "a model of variants alone": ([*TRAIN, "--model", "{model:variants}"], "Say which one by `--variant`"),
    "a root of the cache without a snapshot": ([*TRAIN, "--model", "{files}/models--x--y"], "holds no snapshot"),
    "more steps than the sampler has": ([*EVALUATE, "--num-inference-steps", "1001"], "1000"),
    "an original that is none": ([*EVALUATE, "--original", "sd99"], "unknown model 'sd99'"),
    "an unlearned model that is none": ([*EVALUATE, "--unlearned", "sd99"], "unknown model 'sd99'"),
    "a concept that one of the runs forgot and the judge lacks": (
        [*EVALUATE, "--forget", "star;dog"],
        "does not know the concept 'dog'",
    ),
    "no word of the concept": (
        ["evaluate", "--original", "shapes", "--unlearned", "shapes", "--output", "{new}"],
        "Name it with `--forget`",
    ),
    "an unknown distance": ([*EVALUATE, "--metric", "psnr"], "psnr"),
    "an unknown metric": ([*EVALUATE, "--metrics", "psnr"], "psnr"),
    "a metric twice": ([*EVALUATE, "--metrics", "ssim,ssim"], "twice"),
    "trunk weights that are not there": (
        [*EVALUATE, "--metric", "lpips-alex", "--trunk-weights", "none.safetensors"],
        "cannot read the trunk weights",
    ),
    "trunk weights of another kind": (
        [*EVALUATE, "--metric", "lpips-alex", "--trunk-weights", "{files}/empty.txt"],
        "cannot read the trunk weights",
    ),
}
WEIGHTS = {
    "a mask that is not there": ([*TRAIN, "--mask", "none.safetensors"], "the mask none.safetensors does not exist"),
    "a mask that is no mask": ([*TRAIN, "--mask", "{files}/tensors.safetensors"], "is no mask"),
    "a mask that is a text": ([*TRAIN, "--mask", "{files}/empty.txt"], "is no mask"),
    "a mask that was cut": ([*TRAIN, "--mask", "{files}/cut.mask.safetensors"], "is no mask|damaged"),
    "a mask of other weights": (
        [*TRAIN, "--mask", "{files}/star.mask.safetensors", "--model", "{model:changed}"],
        "is of other weights",
    ),
    "a mask over a folder": (["mask", "--forget", "star", "--output", "{files}"], "is a folder"),
    "a mask over a file": (["mask", "--forget", "star", "--output", "{files}/empty.txt"], "exists"),
    "a mask into no folder": (
        ["mask", "--forget", "star", "--output", "{new}/deep/m"],
        "does not exist. Make it first",
    ),
    "a delta that is not there": ([*APPLY, "--delta", "none.safetensors"], "does not exist"),
    "a delta that is no delta": ([*APPLY, "--delta", "{files}/tensors.safetensors"], "is no delta"),
    "a delta that is a mask": ([*APPLY, "--delta", "{files}/star.mask.safetensors"], "is no delta"),
    "a delta of another original": (
        ["apply", "--model", "{model:changed}", "--delta", "{run}/delta.safetensors", "--output", "{new}"],
        "belongs to another original",
    ),
    "a delta over its original": (
        ["apply", "--model", "{model:whole}", "--delta", "{run}/delta.safetensors", "--output", "{model:whole}"],
        "is the original itself",
    ),
    "a delta into a used folder": ([*APPLY[:-1], "{files}", "--delta", "{run}/delta.safetensors"], "is not empty"),
}
IMAGE_FOLDERS = {
    "a folder that is not there": ([*IMAGES, "--original-images", "none"], "is no folder"),
    "a folder without images": ([*IMAGES, "--original-images", "{files}"], "holds no image"),
    "a missing partner": ([*IMAGES, "--unlearned-images", "{images:missing}"], "partners are missing"),
    "one pair": (
        [*IMAGES, "--original-images", "{images:one}", "--unlearned-images", "{images:one}"],
        "at least 2 pairs",
    ),
    "another size": ([*IMAGES, "--unlearned-images", "{images:size}"], "distances of different sizes do not compare"),
    "a cut image": ([*IMAGES, "--unlearned-images", "{images:cut}"], "cannot read the image"),
    "an empty image": ([*IMAGES, "--unlearned-images", "{images:empty}"], "it is empty"),
    "a text for an image": ([*IMAGES, "--unlearned-images", "{images:text}"], "no image of a kind that is read"),
    "a transparent image": ([*IMAGES, "--unlearned-images", "{images:alpha}"], "transparent pixels"),
    "an animation": ([*IMAGES, "--unlearned-images", "{images:animation}"], "is an animation"),
    "16 bits per channel": ([*IMAGES, "--unlearned-images", "{images:deep}"], "more than 8 bits per channel"),
    "CMYK": ([*IMAGES, "--unlearned-images", "{images:cmyk}"], "color mode CMYK"),
    "two images of one name": ([*IMAGES, "--original-images", "{images:twice}"], "holds two images named"),
    "a prompt file without files": ([*IMAGES, "--prompts", "{files}/groups.csv"], "no column named `file`"),
    "a prompt file of other images": ([*IMAGES, "--prompts", "{files}/images.csv"], "does not fit the folders"),
    "clip-score without prompts": ([*IMAGES, "--metrics", "clip-score"], "needs the prompts"),
}
FOLDERS = {
    "an output that is a file": ([*TRAIN[:4], "{files}/empty.txt"], "is a file"),
    "an output that is used": ([*TRAIN[:4], "{files}"], "is not empty"),
    "overwriting what is not ours": ([*TRAIN[:4], "{files}", "--overwrite"], "no run of fastunlearn"),
    "resuming what is not ours": ([*TRAIN[:4], "{files}", "--resume"], "no run of fastunlearn"),
    "a settings file that no path can be": ([*TRAIN, "--config", "a\0b"], "holds a zero byte"),
    "a model that no path can be": ([*TRAIN, "--model", "a\0b"], "holds a zero byte"),
    "an output that no path can be": (["train", "--forget", "star", "--output", "a\0b"], "holds a zero byte"),
    "runs that no path can be": ([*COMPARE, "a\0b", "{evaluation}"], "holds a zero byte"),
    "an adapter for a method that edits first": ([*TRAIN, "--method", "scissorhands", "--adapter", "lora"], "has not"),
    "an adapter for a method that holds weights": (
        [*TRAIN, "--method", "selective-amnesia", "--adapter", "lora"],
        "holds each weight to where it started, which an adapter has not",
    ),
    "resuming nothing": ([*TRAIN, "--resume"], "holds no run"),
    "resuming with other settings": ([*TRAIN[:4], "{run}", "--resume", "--seed", "7"], "seed"),
    "training into an evaluation": ([*TRAIN[:4], "{evaluation}", "--resume"], "output of `fastunlearn evaluate`"),
    "evaluating into a run": (
        ["evaluate", "--original", "shapes", "--unlearned", "{run}", "--output", "{run}"],
        "is not empty",
    ),
    "a demo into a used folder": (["demo", "--output", "{files}"], "is not empty"),
    "images into a used folder": ([*IMAGES[:-1], "{files}"], "is not empty"),
    "comparing nothing": ([*COMPARE, "none", "{evaluation}"], "holds no evaluation"),
    "comparing a run with itself": ([*COMPARE, "{evaluation}", "{evaluation}"], "is given twice"),
    "comparing a folder of prompts": ([*COMPARE, "{files}", "{evaluation}"], "holds no evaluation"),
    "comparing into a used folder": (
        ["compare", "--output", "{files}", "{evaluation}", "{evaluation2}"],
        "is not empty",
    ),
}
DEEPSPEED = {
    "a DeepSpeed file that is not there": ([*TRAIN, "--deepspeed", "none.json"], "cannot read the DeepSpeed file"),
    "a DeepSpeed file that is no JSON": ([*TRAIN, "--deepspeed", "{files}/broken.json"], "is not JSON"),
    "a DeepSpeed file of a list": ([*TRAIN, "--deepspeed", "{files}/list.json"], "must hold one JSON object"),
    "an optimizer of its own": ([*TRAIN, "--deepspeed", "{files}/ds-optimizer.json"], "take `optimizer` out"),
    "an unknown key": ([*TRAIN, "--deepspeed", "{files}/ds-unknown.json"], "unknown key 'zero_optimisation'"),
    "a stage that is none": ([*TRAIN, "--deepspeed", "{files}/ds-stage.json"], "must be 0, 1, 2 or 3, got 4"),
    "batch sizes that disagree": ([*TRAIN, "--deepspeed", "{files}/ds-batch.json"], "the batch sizes disagree"),
    "two offloads": (
        [*TRAIN, "--offload", "--deepspeed", "{files}/ds-offload.json"],
        "`--offload` and `offload_optimizer` of .* Give one",
    ),
    "bfloat16 weights that DeepSpeed makes float32": (
        [*TRAIN, "--mixed-precision", "bf16", "--weights-dtype", "bf16", "--deepspeed", "{files}/ds-empty.json"],
        'with DeepSpeed needs `"bf16": {"enabled": true}`',
    ),
    "fp16": ([*TRAIN, "--deepspeed", "{files}/ds-fp16.json"], "fp16 with its loss scaling is not supported"),
}
JUDGES = {
    "an unknown judge": ([*EVALUATE, "--judge", "nobody"], "unknown judge 'nobody'"),
    "an option for a judge without": ([*EVALUATE, "--judge", "shapes:large"], "takes no option, got 'large'"),
    "a threshold that is none": ([*EVALUATE, "--judge", "nsfw:high"], "the threshold must be a number above 0"),
    "a judge of other things": ([*EVALUATE, "--judge", "nsfw"], "looks for sexual content, and the concept 'star'"),
    "a concept that is no class": ([*EVALUATE, "--judge", "imagenet"], "no class 'star'. Near names: "),
    "a class that is none": ([*EVALUATE, "--judge", "imagenet:dogg"], "no class 'dogg'"),
    "a CLIP that is not there": ([*EVALUATE, "--judge", "clip:./none"], "the folder ./none, which is not there"),
    "a CLIP that is none": ([*EVALUATE, "--judge", "clip:{model:whole}"], "config.json and .* in "),
    "a CLIP with an unknown option": ([*EVALUATE, "--judge", "clip:x,size=3"], "'size=3' is none of against="),
    "a training with an unknown judge": ([*TRAIN, "--judge", "nobody"], "unknown judge 'nobody'"),
    "a training with another's judge": ([*TRAIN, "--judge", "imagenet"], "no class 'star'"),
    "a training that nobody judges": (
        [*TRAIN, "--judge", "shapes", "--evaluation-prompts", "none"],
        "give `--evaluation-prompts` FILE too",
    ),
    "a demo of another model": (["demo", "--output", "{new}", "--model", "sd15"], "is no bundled model"),
    "a demo of a word that the model lacks": (["demo", "--output", "{new}", "--forget", "cow"], "does not know"),
    "a demo of one method": (["demo", "--output", "{new}", "--methods", "esd"], "compares two or more"),
    "a demo with an unknown judge": (["demo", "--output", "{new}", "--judge", "nobody"], "unknown judge 'nobody'"),
    "a demo with another's judge": (["demo", "--output", "{new}", "--judge", "nsfw"], "looks for sexual content"),
    "images without a concept": ([*IMAGES, "--judge", "shapes"], "name it with `--forget`"),
    "images without prompts": ([*IMAGES, "--judge", "shapes", "--forget", "star"], "give `--prompts FILE`"),
    "a page of no judge": (["judges", "nobody"], "unknown judge 'nobody'"),
}
ASKED = ("prompts", "--concept", "okapi")
ASKING = {
    "prompts of nothing": (["prompts"], "missing: --concept"),
    "prompts of a blank": (["prompts", "--concept", " "], "`--concept` is empty"),
    "an unknown kind": ([*ASKED, "--kinds", "name,rhyme"], "unknown kind of prompts 'rhyme'"),
    "no kind": ([*ASKED, "--kinds", ","], "`--kinds` is empty"),
    "a kind of which nothing is known": ([*ASKED, "--kinds", "near"], "give `--near`"),
    "a hint that names it": ([*ASKED, "--hints", "an okapi"], "names 'okapi'"),
    "an unknown category": ([*ASKED, "--category", "animal"], "invalid choice: 'animal'"),
    "no prompts of a kind": ([*ASKED, "--per-kind", "0"], "at least 1"),
    "prompts into a text": ([*ASKED, "--output", "{new}.txt"], "ends in .csv"),
    "prompts over a file": ([*ASKED, "--output", "{files}/groups.csv"], "exists"),
    "prompts into no folder": ([*ASKED, "--output", "{new}/p.csv"], "does not exist. Make it first"),
}
LORA = (*TRAIN, "--adapter", "lora")
SPM = (*TRAIN, "--method", "spm")
EXPORT = ("export", "--output", "{new}.safetensors", "--run")
ADAPTERS = {
    "an adapter of an unknown kind": ([*TRAIN, "--adapter", "dora"], "invalid choice: 'dora'"),
    "a rank of 0": ([*LORA, "--rank", "0"], "`--rank` must be at least 1"),
    "a rank beyond every layer": ([*LORA, "--rank", "9999"], "is more than any selected layer has"),
    "an alpha of 0": ([*LORA, "--lora-alpha", "0"], "above 0"),
    "a rank of nothing": ([*TRAIN, "--rank", "4"], "is of an adapter"),
    "a rank of whole weights": ([*SPM, "--adapter", "none", "--rank", "4"], "is of an adapter"),
    "a delta of a method that trains an adapter": (
        [*SPM, "--save", "delta"],
        "spm trains an adapter .* `--adapter none`",
    ),
    "a mask of a method that trains an adapter": ([*SPM, "--mask-density", "0.5"], "Leave `--mask-density` out"),
    "a mask beside an adapter": ([*LORA, "--mask-density", "0.5"], "which an adapter leaves alone"),
    "a mask's file beside an adapter": ([*LORA, "--mask", "{files}/star.mask.safetensors"], "an adapter leaves alone"),
    "a delta of an adapter": ([*LORA, "--save", "delta"], "two ways to save"),
    "an adapter of an edit": ([*LORA, "--method", "uce", "--anchor", "a ring"], "computes whole weights"),
    "an adapter on no layer": ([*LORA, "--trainable", "norm2"], "linear or convolution layer"),
    "an adapter on an adapter's run": ([*LORA, "--model", "{adapter:whole}"], "Make it with `fastunlearn export"),
    "a mask of an adapter's run": ([*MASK, "--model", "{adapter:whole}"], "a mask is for one model's weights"),
    "an adapter as a delta": ([*APPLY, "--delta", "{adapter:whole}/pytorch_lora_weights.safetensors"], "is no delta"),
    "an adapter of another base": ([*EVALUATE, "--unlearned", "{adapter:base}"], "belongs to another base"),
    "an adapter whose base is gone": ([*EVALUATE, "--unlearned", "{adapter:gone}"], "cannot be loaded: unknown model"),
    "an adapter of itself": ([*EVALUATE, "--unlearned", "{adapter:itself}"], "itself an adapter's run"),
    "an adapter without a base": ([*EVALUATE, "--unlearned", "{adapter:nameless}"], r"adapter\.base is missing"),
    "an adapter alone": ([*EVALUATE, "--unlearned", "{adapter:alone}"], "holds an adapter and no run.json"),
    "an adapter that was cut": ([*EVALUATE, "--unlearned", "{adapter:cut}"], "is no adapter"),
    "an adapter that was changed": ([*EVALUATE, "--unlearned", "{adapter:bit}"], "has changed since it was written"),
    "an adapter of another program": ([*EVALUATE, "--unlearned", "{adapter:foreign}"], "its format is None"),
    "an adapter of other layers": ([*EVALUATE, "--unlearned", "{adapter:layers}"], "which shapes does not have"),
    "an adapter of another rank": ([*EVALUATE, "--unlearned", "{adapter:rank}"], "of rank 7 it would be"),
    "an adapter of an infinite number": ([*EVALUATE, "--unlearned", "{adapter:inf}"], "values that are no numbers"),
    "an adapter another run wrote": ([*EVALUATE, "--unlearned", "{adapter:other}"], "has changed since its run wrote"),
    "a LoRA that is not there": ([*TRAIN, "--lora", "none.safetensors"], "does not exist"),
    "a LoRA that is a text": ([*TRAIN, "--lora", "{files}/blank.txt"], "is no LoRA file"),
    "a LoRA that is a mask": ([*TRAIN, "--lora", "{files}/star.mask.safetensors"], "is no name of a LoRA's tensor"),
    "a LoRA for another model": ([*EVALUATE, "--lora", "{files}/elsewhere.safetensors"], "nothing of it fits"),
    "an adapter on a LoRA": ([*LORA, "--lora", "{files}/lora.safetensors"], "Make it with `fastunlearn export"),
    "a delta on a LoRA": ([*TRAIN, "--save", "delta", "--lora", "{files}/lora.safetensors"], "Make it with"),
    "an eraser of another base as a LoRA": (
        [*TRAIN, "--model", "{model:changed}", "--lora", "{adapter:whole}/pytorch_lora_weights.safetensors"],
        "belongs to another base",
    ),
    "exporting nothing": (["export"], "missing: --run, --format, --output"),
    "exporting to an unknown form": ([*EXPORT, "{adapter:whole}", "--format", "gguf"], "invalid choice: 'gguf'"),
    "exporting what is no folder": ([*EXPORT, "none", "--format", "lora"], "is no folder"),
    "exporting what is no run": ([*EXPORT, "{files}", "--format", "lora"], "is no run"),
    "exporting a model of what is none": ([*EXPORT, "{files}", "--format", "single-file"], "is no run"),
    "exporting a LoRA of whole weights": ([*EXPORT, "{run}", "--format", "kohya-lora"], "changed whole weights"),
    "exporting to a file of another kind": (
        ["export", "--run", "{adapter:whole}", "--format", "lora", "--output", "{new}.ckpt"],
        "must end in .safetensors",
    ),
    "exporting over a file": (
        ["export", "--run", "{adapter:whole}", "--format", "lora", "--output", "{files}/tensors.safetensors"],
        "exists. Use another name",
    ),
    "exporting into a used folder": (
        ["export", "--run", "{adapter:whole}", "--format", "diffusers", "--output", "{files}"],
        "is not empty",
    ),
    "exporting into the run": (
        ["export", "--run", "{adapter:whole}", "--format", "diffusers", "--output", "{adapter:whole}/model"],
        "lie in one another",
    ),
    "a LoRA merged into a LoRA": (
        [*EXPORT, "{adapter:whole}", "--format", "lora", "--lora", "{files}/lora.safetensors"],
        "is merged into a whole model",
    ),
}
ATTACKS = {
    "attack without models": (["attack"], "missing: --original"),
    "an unknown attack": ([*ATTACK, "--attacks", "seed"], "unknown attack 'seed'"),
    "an unknown option of an attack": ([*ATTACK, "--attacks", "embedding:all"], "has no option 'all'"),
    "an attack twice": ([*ATTACK, "--attacks", "seeds,seeds"], "twice"),
    "no attack": ([*ATTACK, "--attacks", ","], "names no attack"),
    "an attack for an empty concept": ([*ATTACK, "--concept", " "], "`--concept` is empty"),
    "an attack for what the world lacks": ([*ATTACK, "--concept", "dog"], "does not know the concept 'dog'"),
    "an attack without a concept": (
        ["attack", "--original", "shapes", "--unlearned", "shapes", "--output", "{new}"],
        "`--concept` is missing",
    ),
    "an attack without a judge": ([*ATTACK, "--judge", "none"], "needs a judge"),
    "an attack by an unknown judge": ([*ATTACK, "--judge", "nobody"], "unknown judge 'nobody'"),
    "a budget of nothing": ([*ATTACK, "--budget", "0"], "at least 1"),
    "a budget below an image": (
        [*ATTACK, "--budget", "39"],
        "less than the attack seeds needs for its first image, 40",
    ),
    "one prompt to attack": ([*ATTACK, "--prompts", "a star"], "at least 2 prompts"),
    "at most one prompt to attack": ([*ATTACK, "--max-prompts", "1"], "at least 2"),
    "an attack's prompt file that is not there": ([*ATTACK, "--prompts", "none.txt"], "does not exist"),
    "an attack on another sampler": (
        [*ATTACK, "--unlearned", "{model:sampler}", "--concept", "star"],
        "another sampler",
    ),
    "an attack with another sampler's gold": ([*ATTACK, "--gold", "{model:sampler}"], "another sampler"),
    "an attack's evaluation that is none": ([*ATTACK, "--evaluation", "{files}"], "holds no evaluation.json"),
    "an attack's evaluation of something else": (
        [*ATTACK, "--concept", "ring", "--evaluation", "{evaluation}"],
        "is no evaluation of a model that forgot 'ring'",
    ),
    "an attack into a used folder": ([*ATTACK, "--output", "{files}"], "is not empty"),
    "an attack into a run": ([*ATTACK, "--output", "{run}", "--resume"], "output of `fastunlearn train`"),
    "an attack that resumes and replaces": ([*ATTACK, "--resume", "--overwrite"], "give one of them"),
    "resuming no attack": ([*ATTACK, "--resume"], "holds no run"),
}
TABLES = (COMMANDS, NUMBERS, SETTINGS, CONCEPTS, PROMPTS, OPTIONS, MODELS, WEIGHTS, IMAGE_FOLDERS, FOLDERS, DEEPSPEED)
TABLES = (*TABLES, JUDGES, ASKING, ADAPTERS, ATTACKS)
TABLE = {name: row for table in TABLES for name, row in table.items()}

FILES = {
    "empty.txt": "",
    "blank.txt": "\n \n\t\n",
    "table.parquet": "PAR1",
    "latin.txt": b"caf\xe9 \xff",
    "binary": b"\x00\xff\x00",
    "broken.yaml": "a: [",
    "list.yaml": "- a",
    "unknown.yaml": "stpes: 3",
    "text.yaml": "seed: x",
    "truth.yaml": "seed: true",
    "code.yaml": "seed: !!python/object/apply:os.getpid []",
    "listed.yaml": "seed: [1]",
    "choice.yaml": "mixed_precision: fp8",
    "numbers.yaml": "unlearned: [1, 2]",
    "words.csv": "words\na\n",
    "cells.csv": "prompt,group\na,b,c\n",
    "quote.csv": 'prompt\n"a\n',
    "groups.csv": "prompt,group\na,near\na,far\nb,far\n",
    "seed.csv": "prompt,seed\na,x\n",
    "seeds.csv": "prompt,seed\na,1\nb,\n",
    "model.ckpt": b"\x80",
    "models--x--y/snapshots/none": "",
    "broken.json": '["a"',
    "anchors.txt": b"caf\xe9 \xff",
    "twice.csv": "concept,anchor\nstar,ring\nStar,heart\n",
    "circle.csv": "concept,anchor\nstar,a ring\nring,a star\n",
    "broken.jsonl": '"a"\n{"b"\n',
    "number.json": "5",
    "deep.json": '{"a": {"b": ["c"]}}',
    "forget.csv": "prompt,group\na,forget\nb,Forget\n",
    "list.json": "[]",
    "images.csv": "file,prompt\nnone.png,a\n",
    "ds-optimizer.json": '{"optimizer": {"type": "Adam"}}',
    "ds-unknown.json": '{"zero_optimisation": {}}',
    "ds-stage.json": '{"zero_optimization": {"stage": 4}}',
    "ds-batch.json": '{"train_batch_size": 7, "train_micro_batch_size_per_gpu": 2}',
    "ds-offload.json": '{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}',
    "ds-empty.json": "{}",
    "ds-fp16.json": '{"fp16": {"enabled": true}}',
}
UNET = "unet/diffusion_pytorch_model.safetensors"


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(path):
    path.write_bytes(path.read_bytes()[:1000])


def fewer(path):
    save_file(dict(list(load_file(path).items())[:10]), path)


def nudged(path):
    tensors = load_file(path)
    name = min(tensors)
    save_file(tensors | {name: tensors[name] + 1}, path)


def with_channels(folder, count):
    change_json(folder / "unet" / "config.json", in_channels=count)
    tensors = load_file(folder / UNET)
    kernel = tensors["conv_in.weight"]
    save_file(tensors | {"conv_in.weight": kernel.new_zeros(len(kernel), count, 3, 3)}, folder / UNET)


def pickled(folder):
    (folder / UNET).unlink()
    torch.save({}, folder / "unet" / "diffusion_pytorch_model.bin")


def linked(folder, outside):
    outside.write_text("{}")
    (folder / "unet" / "notes.json").symlink_to(outside)


MODEL_DAMAGE = {
    "whole": lambda f: None,
    "index": lambda f: (f / "model_index.json").write_text("{"),
    "family": lambda f: change_json(f / "model_index.json", _class_name="KandinskyPipeline"),
    "cut": lambda f: cut(f / UNET),
    "none": lambda f: (f / UNET).unlink(),
    "pickle": pickled,
    "few": lambda f: fewer(f / UNET),
    "link": lambda f: linked(f, f.with_name("outside.json")),
    "part": lambda f: change_json(f / "model_index.json", **{"../../x": ["diffusers", "DDIMScheduler"]}),
    "sampler": lambda f: change_json(f / "scheduler" / "scheduler_config.json", beta_end=0.02),
    "custom": lambda f: change_json(f / "model_index.json", _class_name=["mine", "MyPipeline"]),
    "injected": lambda f: save_file({**load_file(f / UNET), "x.lora_A.a.weight": torch.zeros(1)}, f / UNET),
    "inpainting": lambda f: with_channels(f, 9),
    "sizeless": lambda f: change_json(f / "unet" / "config.json", sample_size=None),
    "speechless": lambda f: change_json(f / "model_index.json", tokenizer=[None, None]),
    "still": lambda f: shutil.rmtree(f / "scheduler"),
    "variants": lambda f: (
        [shutil.copy(f / UNET, (f / UNET).with_suffix(f".{name}.safetensors")) for name in ("ema", "fp16")]
        and (f / UNET).unlink()
    ),
    "changed": lambda f: nudged(f / UNET),
}


ADAPTER = "pytorch_lora_weights.safetensors"


def rebased(folder, base):
    record = json.loads((folder / "run.json").read_text())
    record["adapter"] = {**record["adapter"], "base": base} if base else {}
    del record["sha256"]
    (folder / "run.json").write_text(json.dumps(record))


def forged(folder, **changes):
    """A whole file with a true checksum that holds something else."""
    from fastunlearn.models.adapter_files import read_adapter, save_adapter
    from fastunlearn.models.adapters import Adapter

    file = read_adapter(folder / ADAPTER)
    values, rank = changes.get("values", dict)(file.values) or file.values, changes.get("rank", file.rank)
    layers = dict.fromkeys(name.rsplit(".", 2)[0] for name in values)
    shapes = {layer: tuple(values[f"{layer}.{kind}.weight"].shape for kind in ("lora_A", "lora_B")) for layer in layers}
    save_adapter(folder / ADAPTER, file.part, Adapter(shapes, rank, file.alpha, file.made), values)


def flipped(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


ADAPTER_DAMAGE = {
    "whole": lambda f: None,
    "base": lambda f: rebased(f, str(f.with_name("model-changed"))),
    "gone": lambda f: rebased(f, "./gone"),
    "itself": lambda f: rebased(f, str(f)),
    "nameless": lambda f: rebased(f, None),
    "alone": lambda f: (f / "run.json").unlink(),
    "cut": lambda f: cut(f / ADAPTER),
    "bit": lambda f: flipped(f / ADAPTER),
    "foreign": lambda f: save_file(load_file(f / ADAPTER), f / ADAPTER),
    "layers": lambda f: forged(f, values=lambda v: {f"x.{name}": value for name, value in v.items()}),
    "rank": lambda f: forged(f, rank=7),
    "inf": lambda f: forged(f, values=lambda v: {name: value / 0 for name, value in v.items()}),
    "other": lambda f: forged(f, values=lambda v: {name: 2 * value for name, value in v.items()}),
}


def image(seed, size=(64, 64), mode="RGB"):
    return Image.effect_noise(size, 20 + 20 * seed).convert(mode)


IMAGE_DAMAGE = {
    "missing": lambda f: (f / "1.png").unlink(),
    "one": lambda f: [(f / f"{n}.png").unlink() for n in (1, 2)],
    "size": lambda f: image(1, (32, 64)).save(f / "1.png"),
    "cut": lambda f: cut(f / "1.png"),
    "empty": lambda f: (f / "1.png").write_bytes(b""),
    "text": lambda f: (f / "1.png").write_text("hello"),
    "alpha": lambda f: image(1).convert("RGBA").putalpha(128) or Image.new("RGBA", (64, 64)).save(f / "1.png"),
    "animation": lambda f: (
        (f / "1.png").unlink(),
        image(1).save(f / "1.gif", save_all=True, append_images=[image(2)]),
    ),
    "deep": lambda f: Image.new("I;16", (64, 64), 999).save(f / "1.png"),
    "cmyk": lambda f: ((f / "1.png").unlink(), image(1).convert("CMYK").save(f / "1.jpg")),
    "twice": lambda f: image(1).save(f / "1.bmp"),
}


@pytest.fixture(scope="session")
def workbench(tmp_path_factory):
    """Whatever the table names: files, damaged models and images, a finished run, two evaluations."""
    from fastunlearn.cli.main import main

    root = tmp_path_factory.mktemp("workbench")
    for name, content in FILES.items():
        path = root / "files" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    save_file({"x": torch.zeros(3)}, root / "files" / "tensors.safetensors")
    for name, tensors in SINGLE_FILES.items():
        save_file({tensor: torch.zeros(4, 4, 3, 3) for tensor in tensors}, root / "files" / f"{name}.safetensors")
    for name, damage in MODEL_DAMAGE.items():
        damage(Path(shutil.copytree(pipeline_folder("shapes"), root / f"model-{name}")))
    for side in ("before", "after"):
        (root / side).mkdir()
        for number in range(3):
            image(number).save(root / side / f"{number}.png")
    for name, damage in IMAGE_DAMAGE.items():
        damage(Path(shutil.copytree(root / "before", root / f"images-{name}")))
    tiny = ["--trajectories", "1", "--trajectory-steps", "2", "--steps", "1", "--evaluation-prompts", "none"]
    mask = root / "files" / "star.mask.safetensors"
    evaluate = ["evaluate", "--original", "shapes", "--unlearned", "shapes", "--forget", "star", "--device", "cpu"]
    evaluate += ["--prompts", "a red ring;a blue ring", "--num-inference-steps", "1", "--control-pairs", "1"]
    for words in (
        ["train", "--forget", "star", "--output", root / "run", *tiny],
        ["train", "--forget", "star", "--output", root / "delta", "--save", "delta", *tiny],
        ["train", "--forget", "ring", "--output", root / "other", *tiny],
        ["train", "--forget", "star", "--output", root / "adapter", "--adapter", "lora", *tiny],
        ["mask", "--forget", "star", "--output", mask, "--trajectories", "1", "--trajectory-steps", "2"],
        [*evaluate, "--output", root / "evaluation"],
        [*evaluate, "--output", root / "evaluation2"],
    ):
        assert main([str(word) for word in words]) == 0
    for name, damage in ADAPTER_DAMAGE.items():
        damage(Path(shutil.copytree(root / "adapter", root / f"adapter-{name}")))
    lora = load_file(root / "adapter" / ADAPTER)
    save_file(lora, root / "files" / "lora.safetensors")
    elsewhere = {name.replace("unet.", "unet.nowhere."): value for name, value in lora.items()}
    save_file(elsewhere, root / "files" / "elsewhere.safetensors")
    shutil.copy(root / "delta" / "delta.safetensors", root / "files" / "star.delta.safetensors")
    shutil.copy(mask, root / "files" / "cut.mask.safetensors")
    cut(root / "files" / "cut.mask.safetensors")
    return root


def placed(word, root):
    names = {"new": root / "new", "run": root / "run", "files": root / "files", "other": root / "other"}
    names |= {name: root / name for name in ("delta", "before", "after", "evaluation", "evaluation2")}
    word = word.replace("{run}/delta.safetensors", str(root / "files" / "star.delta.safetensors"))
    word = re.sub(r"\{(model|images|adapter):(\w+)\}", lambda found: str(root / f"{found[1]}-{found[2]}"), word)
    return re.sub(r"\{(\w+)\}", lambda found: str(names[found[1]]), word)


def state(root):
    return {path: (path.lstat().st_mtime_ns, path.lstat().st_size) for path in root.rglob("*")}


@pytest.mark.parametrize(("words", "said"), TABLE.values(), ids=TABLE)
def test_bad_input_is_one_line_and_changes_nothing(words, said, workbench, refused, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    before = state(workbench)
    line = refused(*(placed(word, workbench) for word in words))
    assert re.search(said, line), line
    assert state(workbench) == before
    assert not list(tmp_path.iterdir())


def test_the_table_is_as_long_as_it_says():
    assert len(TABLE) >= 120
    assert len(TABLE) == sum(map(len, TABLES))
