"""The settings of what measures models, and tells of it: `evaluate`, `evaluate-images`, `compare`, `card`."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from ..config import above, at_least, check_weights_dtype, expand_home, setting
from ..errors import UserError
from ..models.options import ModelOptions, check_guided, check_precision


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ModelOptions):
    """What `evaluate` does."""

    original: str = setting("`shapes`, `gallery`, a diffusers folder or .safetensors file, or a hub id", path=True)
    unlearned: tuple[str, ...] = setting(
        "an unlearned pipeline: a run's folder, its model/ folder, or `shapes-gold-star`; may be given several times",
        path=True,
    )
    output: str = setting("folder for the records and the report", path=True)
    lora: str | None = setting("FILE of a LoRA that the original carries (peft's or kohya's names)", None, path=True)
    prompts: str | None = setting(
        "FILE or TEXT;TEXT; a CSV may have the columns prompt and group; default: the bundled model's own", None
    )
    placebo: str | None = setting(
        "the pipeline of the same training without the forgetting part, as a control", None, path=True
    )
    forget: str | None = setting(
        "the forgotten concept, or several as in `train`; default: what the unlearned runs' records say", None
    )
    judge: str | None = setting(
        "who says whether an image shows the concept: NAME or NAME:OPTION (`fastunlearn judges`), or none; default: "
        "the bundled model's, and none for other models",
        None,
    )
    trust_judge: bool = setting("go on with a judge that cannot tell the original's own images apart", False)
    metric: str | None = setting(
        "the perceptual distance (`fastunlearn info` lists them); default: the bundled model's own, else lpips-alex",
        None,
    )
    metrics: str | None = setting("further metrics, separated by commas (`fastunlearn info` lists them)", None)
    trunk_weights: str | None = setting(
        "safetensors file of the LPIPS trunk's weights, with torchvision's names; default: torchvision fetches them",
        None,
        path=True,
    )
    seeds_per_prompt: int = setting("images per prompt", 1)
    batch_size: int = setting("images per forward; a part of the result's definition", 32)
    num_inference_steps: int = setting("sampler steps", 20)
    guidance_scale: float = setting("classifier-free guidance; 0 or 1: none", 3.0)
    mixed_precision: Literal["no", "bf16"] = setting("of both models", "no")
    weights_dtype: Literal["fp32", "bf16"] = setting(
        "bf16 keeps the weights of both in bfloat16, with `--mixed-precision bf16`", "fp32"
    )
    decode_batch_size: int | None = setting("images per forward of the VAE; default: all of a batch", None)
    offload: bool = setting("networks that idle wait on the host: one at a time is on the GPU", False)
    device: Literal["auto", "cpu", "cuda"] = setting("auto takes a GPU where there is one", "auto")
    control_pairs: int = setting("pairs on which the numeric controls are measured", 8)
    cache: str | None = setting("folder that keeps the original's images for the next evaluation", None, path=True)
    cache_limit_gib: float = setting("size the cache folder stays below", 4.0)
    num_processes: int = setting("processes that share the prompts; with several GPUs one each", 1)
    resume: bool = setting("continue the unfinished evaluation in the output folder", False)
    overwrite: bool = setting("replace an earlier evaluation in the output folder", False)

    def __post_init__(self) -> None:
        expand_home(self)
        super().__post_init__()
        at_least(self, 1, "seeds_per_prompt", "batch_size", "num_inference_steps", "control_pairs", "num_processes")
        at_least(self, 1, "decode_batch_size")
        at_least(self, 0, "guidance_scale")
        check_weights_dtype(self.weights_dtype, self.mixed_precision)
        above(self, 0, "cache_limit_gib")
        check_guided(self.negative_prompt, self.guidance_scale, "guidance_scale")
        check_precision(self.attention, self.mixed_precision == "bf16", "add `--mixed-precision bf16`")
        if not self.unlearned:
            raise UserError("`--unlearned` is empty: name at least one unlearned pipeline.")
        if self.resume and self.overwrite:
            raise UserError("`--resume` continues an evaluation and `--overwrite` replaces it: give one of them.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateImagesConfig:
    """What `evaluate-images` does."""

    original_images: str = setting("folder of the original model's images", path=True)
    unlearned_images: str = setting(
        "folder of the unlearned model's, with the same names; suffixes may differ", path=True
    )
    also: tuple[str, ...] = setting(
        "another unlearned model's folder beside the same originals, whose features are made once; once per folder, "
        "its results go below the output by its name",
        (),
        path=True,
    )
    output: str = setting("folder for the records and the report", path=True)
    prompts: str | None = setting(
        "CSV with the columns file, prompt and, if wanted, group; default: every pair is a prompt of its own", None
    )
    forget: str | None = setting("the forgotten concept, for the judge", None)
    judge: str | None = setting(
        "who says whether an image shows the concept: NAME or NAME:OPTION (`fastunlearn judges`); default: nobody", None
    )
    trust_judge: bool = setting("go on with a judge that cannot tell the original's own images apart", False)
    metric: str = setting("the perceptual distance (`fastunlearn info` lists them)", "lpips-alex")
    trunk_weights: str | None = setting(
        "safetensors file of the LPIPS trunk's weights, with torchvision's names; default: torchvision fetches them",
        None,
        path=True,
    )
    metrics: str | None = setting("further metrics, separated by commas (`fastunlearn info` lists them)", None)
    batch_size: int = setting("pairs per forward; a part of the result's definition", 8)
    mixed_precision: Literal["no", "bf16"] = setting(
        "bf16 makes the distance's convolutions in bfloat16; how far that rounds is measured and noted", "no"
    )
    num_workers: int | None = setting("decoders; default: one a CPU core", None)
    device: Literal["auto", "cpu", "cuda"] = setting("auto takes a GPU where there is one", "auto")
    overwrite: bool = setting("replace an earlier evaluation in the output folder", False)

    def __post_init__(self) -> None:
        expand_home(self)
        at_least(self, 1, "batch_size", "num_workers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What `compare` does."""

    runs: tuple[str, ...] = setting(
        "folders with the evaluation.json and pairs.jsonl to compare", positional=True, path=True
    )
    output: str = setting("folder for the table and the plot", path=True)
    margin: float | None = setting(
        "largest harmless difference, as a share of the distance of redrawn images (default 0.05); of results of "
        "`evaluate-images` as a distance, and without it nothing is said of equivalence",
        None,
    )
    overwrite: bool = setting("replace an earlier comparison in the output folder", False)

    def __post_init__(self) -> None:
        expand_home(self)
        above(self, 0, "margin")
        if len(self.runs) < 2:
            raise UserError(f"a comparison needs at least 2 runs, got {len(self.runs)}: name their folders.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CardConfig:
    """What `card` does."""

    run: str = setting("folder of the run, into which the card is written as README.md", path=True)
    evaluation: str | None = setting(
        "folder of an evaluation of the run's model; default: the one that the run's folder holds", None, path=True
    )
    attack: str | None = setting("folder of an attack on the run's model", None, path=True)
    base_model: str | None = setting(
        "OWNER/NAME of the base on the hub; default: what `train --model` named, where it is such a name", None
    )
    overwrite: bool = setting("replace a card that was changed by hand", False)

    def __post_init__(self) -> None:
        expand_home(self)
        if self.base_model is not None and not is_hub_name(self.base_model):
            raise UserError(f"`--base-model` {self.base_model!r} is no name of the hub: give OWNER/NAME.")


def is_hub_name(text: str) -> bool:
    """Whether a text can be the name of a model on the hub, OWNER/NAME."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text, re.ASCII) is not None
