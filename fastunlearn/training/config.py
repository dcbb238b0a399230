"""The settings of what changes a model: `train`, `mask`, `apply`, `export`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from ..config import above, at_least, check_types, check_weights_dtype, expand_home, map_setting, setting, share
from ..errors import UserError
from ..models.options import ModelOptions, SourceOptions, check_guided, check_precision

DEFAULT_RANK = 4  # as diffusers' training scripts have it
_TRAINABLE = (
    "groups of the model's family, such as cross-attention, text-attention, all, or parts of names; a comma list"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(ModelOptions):
    """What `train` does.  A setting left at None takes the method's default for the model (`fastunlearn methods`)."""

    forget: str = setting(
        'what to forget: "Van Gogh", several as "Van Gogh;Monet", or FILE with the columns concept and perhaps anchor'
    )
    output: str = setting("folder of the run", path=True)
    model: str = setting(
        "`shapes` or `gallery` (bundled), a diffusers folder, a .safetensors file, or a hub id", "shapes", path=True
    )
    lora: str | None = setting("FILE of a LoRA that the model carries (peft's or kohya's names)", None, path=True)
    method: str = setting("see `fastunlearn methods`", "ovw")
    anchor: str | None = setting(
        "what the concept becomes (of TEXT;TEXT each prompt draws one; with several concepts one text for all, or one "
        "for each in their order); default: nothing, or its neighbour",
        None,
    )
    forget_prompts: str | None = setting(
        "FILE or TEXT;TEXT of prompts that show the concept; default: the concept", None
    )
    retain_prompts: str | None = setting(
        "FILE or TEXT;TEXT of prompts to keep; auto proposes some, the empty one too; the bundled model brings its own",
        None,
    )
    steps: int | None = setting("training steps, at most", None)
    stop_residual: float | None = setting(
        "end earlier, once so much of the concept is left on held-out rows and a falling rate has got to 0; 0: never",
        None,
    )
    learning_rate: float | None = setting("AdamW's rate", None)
    lr_scheduler: Literal["constant", "linear"] | None = setting("linear falls to 0 over the steps", None)
    micro_batch_size: int | None = setting("rows per student forward", None)
    trajectories: int | None = setting(
        "teacher trajectories per role, more for less correlated rows; default: enough for all forget prompts", None
    )
    trajectory_steps: int | None = setting("sampler steps of a trajectory", None)
    trajectory_guidance_scale: float = setting("guidance of a trajectory; 0 or 1: none", 3.0)
    trainable: str | None = setting(_TRAINABLE, None)
    retain_weight: float | Literal["auto"] | None = setting(
        "weight of the retain loss; auto finds it: the least deviation with `--stop-residual` of the concept left",
        None,
        word="auto",
    )
    options: Mapping[str, Any] = map_setting("an option of the method's own (`fastunlearn methods METHOD`)", flag="set")
    mask: str | None = setting(
        "FILE of `fastunlearn mask`: only the elements that it selects may change", None, path=True
    )
    mask_density: float | None = setting("share of the trainable elements that may change, the most salient", None)
    mask_granularity: Literal["element", "sector", "row"] = setting(
        "what is selected: single elements, 8 neighbours or rows", "element"
    )
    adapter: Literal["lora", "none"] | None = setting(
        "lora: train low-rank adapters of the trainable layers, saved alone, and leave the weights as they are; none: "
        "whole weights, also of a method that trains adapters by default",
        None,
    )
    rank: int | None = setting(f"of the adapters; default: the method's, else {DEFAULT_RANK}", None)
    lora_alpha: float | None = setting("the adapters' strength is this by their rank; default: the rank", None)
    weight_decay: float = setting("AdamW's decay", 0.0)
    max_grad_norm: float = setting("gradient clipping; 0: none", 1.0)
    clip_scope: Literal["selected", "all"] = setting(
        "whose gradients the norm sees: the mask's elements' or all of the trainable parameters'", "selected"
    )
    gradient_accumulation_steps: int | None = setting("student forwards per update", None)
    seed: int = setting("of trajectories and row order", 0)
    mixed_precision: Literal["no", "bf16"] = setting("bf16 runs the networks in bfloat16; weights stay float32", "no")
    device: Literal["auto", "cpu", "cuda"] = setting("auto takes a GPU where there is one", "auto")
    deepspeed: str | None = setting("JSON: train by DeepSpeed as this file of its settings says", None, path=True)
    num_processes: int | None = setting("start so many processes on this machine, with `--deepspeed`", None)
    weights_dtype: Literal["fp32", "bf16"] = setting(
        "bf16 keeps what does not train in bfloat16, with `--mixed-precision bf16`; what trains stays float32", "fp32"
    )
    gradient_checkpointing: bool = setting("compute activations again in the backward: the same bits, slower", False)
    offload: bool = setting("networks that idle wait on the host: one at a time is on the GPU", False)
    bank_batch_size: int | None = setting("trajectories, and prompts, per forward of the bank; default: 64", None)
    bank_precision: Literal["no", "bf16"] = setting("bf16 samples the bank in bfloat16; its rows stay float32", "no")
    evaluation_batch_size: int = setting("images per forward of the evaluation after training", 32)
    decode_batch_size: int | None = setting("images per forward of the VAE; default: all of a batch", None)
    device_memory_gib: float | None = setting("what `--dry-run` plans for; default: this device's memory", None)
    save: Literal["model", "delta"] = setting(
        "the whole pipeline, or only what changed (`fastunlearn apply`); an adapter is saved as itself", "model"
    )
    checkpoint_every: int = setting("steps between checkpoints; 0: only at the end or when stopped", 50)
    log_every: int = setting("steps between lines of metrics.jsonl", 5)
    evaluation_prompts: str | None = setting(
        "prompts to evaluate on after training: FILE, `none`, or `shapes` or `gallery` for its own", None
    )
    judge: str | None = setting(
        "who says, in that evaluation, whether an image shows the concept: NAME or NAME:OPTION (`fastunlearn judges`); "
        "default: the bundled model's, and none for other models",
        None,
    )
    dry_run: bool = setting("print what would be done and stop", False)
    resume: bool = setting("continue from the last checkpoint in the output folder", False)
    overwrite: bool = setting("replace what an earlier run left in the output folder", False)

    def __post_init__(self) -> None:
        expand_home(self)
        check_types(self)
        super().__post_init__()
        if not self.forget.strip():
            raise UserError("`--forget` is empty: name the concept to forget.")
        at_least(self, 0, "steps", "checkpoint_every", "weight_decay", "seed", "retain_weight")
        at_least(self, 0, "trajectory_guidance_scale", "max_grad_norm")
        at_least(self, 1, "micro_batch_size", "trajectories", "trajectory_steps", "log_every")
        at_least(self, 1, "gradient_accumulation_steps", "num_processes", "rank")
        above(self, 0, "lora_alpha")
        self._check_adapter()
        at_least(self, 1, "bank_batch_size", "evaluation_batch_size", "decode_batch_size")
        above(self, 0, "device_memory_gib")
        check_weights_dtype(self.weights_dtype, self.mixed_precision)
        share(self.mask_density, "mask_density")
        if self.stop_residual is not None and not 0 <= self.stop_residual < 1:
            raise UserError(f"`--stop-residual` must be at least 0 and below 1, got {self.stop_residual}.")
        if self.mask is not None and self.mask_density is not None:
            raise UserError("`--mask` brings its own density: leave `--mask-density` out.")
        if self.num_processes is not None and self.deepspeed is None:
            raise UserError("`--num-processes` needs `--deepspeed FILE`, which says how they divide the work.")
        above(self, 0, "learning_rate")
        if self.learning_rate is not None and self.learning_rate > 1:
            raise UserError(f"`--learning-rate` must be at most 1, got {self.learning_rate:g}.")
        check_guided(self.negative_prompt, self.trajectory_guidance_scale, "trajectory_guidance_scale")
        check_precision(self.attention, False, "a training's rows are made in float32. Use xformers")
        if self.resume and self.overwrite:
            raise UserError("`--resume` continues a run and `--overwrite` replaces it: give one of them.")

    @property
    def is_adapted(self) -> bool:
        """Whether adapters train, as far as is said here; see :func:`.low_rank.with_default_adapter`."""
        return self.adapter == "lora"

    def _check_adapter(self) -> None:
        if not self.is_adapted:
            return
        for name in ("mask", "mask_density"):
            if getattr(self, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"`{flag}` selects elements of the weights, which an adapter leaves alone. Give one.")
        if self.save == "delta":
            raise UserError("`--save delta` and `--adapter lora` are two ways to save what changed. Give one.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskConfig(ModelOptions):
    """What `mask` does.  A setting left at None takes SalUn's default for the model."""

    forget: str = setting('the concept whose weights to find, e.g. "star"; several as in `train`')
    output: str = setting("FILE for the mask, e.g. star.mask.safetensors", path=True)
    model: str = setting(
        "`shapes` or `gallery` (bundled), a diffusers folder, a .safetensors file, or a hub id", "shapes", path=True
    )
    density: float = setting("share of the trainable elements to select", 0.5)
    granularity: Literal["element", "sector", "row"] = setting(
        "what is selected: single elements, 8 neighbours or rows", "element"
    )
    trainable: str = setting(_TRAINABLE, "all")
    forget_prompts: str | None = setting(
        "FILE or TEXT;TEXT of prompts that show the concept; default: as in `train`", None
    )
    trajectories: int | None = setting("teacher trajectories; their last latents are the images", None)
    trajectory_steps: int | None = setting("sampler steps of a trajectory", None)
    trajectory_guidance_scale: float = setting("guidance of a trajectory; 0 or 1: none", 3.0)
    micro_batch_size: int | None = setting("rows per forward", None)
    seed: int = setting("of trajectories and noise", 0)
    mixed_precision: Literal["no", "bf16"] = setting("bf16 runs the networks in bfloat16", "no")
    gradient_checkpointing: bool = setting("compute activations again in the backward: the same bits, slower", False)
    offload: bool = setting("networks that idle wait on the host: one at a time is on the GPU", False)
    bank_batch_size: int | None = setting("trajectories, and prompts, per forward; default: 64", None)
    device: Literal["auto", "cpu", "cuda"] = setting("auto takes a GPU where there is one", "auto")
    overwrite: bool = setting("replace the file", False)

    def __post_init__(self) -> None:
        expand_home(self)
        check_types(self)
        super().__post_init__()
        if not self.forget.strip():
            raise UserError("`--forget` is empty: name the concept to forget.")
        at_least(self, 0, "seed", "trajectory_guidance_scale")
        at_least(self, 1, "micro_batch_size", "trajectories", "trajectory_steps", "bank_batch_size")
        share(self.density, "density")
        check_guided(self.negative_prompt, self.trajectory_guidance_scale, "trajectory_guidance_scale")
        check_precision(self.attention, False, "a training's rows are made in float32. Use xformers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What `export` does."""

    run: str = setting("the folder of a run, or of a pipeline", path=True)
    format: Literal["diffusers", "lora", "kohya-lora", "single-file"] = setting(
        "diffusers: a pipeline's folder, adapters merged; lora: for load_lora_weights; kohya-lora: for ComfyUI and "
        "A1111; single-file: all weights in the original layout"
    )
    output: str = setting("FILE.safetensors, or the folder of the pipeline", path=True)
    lora: str | None = setting("FILE of a LoRA to merge into the model too", None, path=True)
    overwrite: bool = setting("replace the file, or what an earlier `export` left in the folder", False)

    def __post_init__(self) -> None:
        expand_home(self)
        check_types(self)
        if self.lora is not None and self.format in ("lora", "kohya-lora"):
            raise UserError("`--lora` is merged into a whole model: leave it out for an adapter's own file.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ApplyConfig(SourceOptions):
    """What `apply` does."""

    model: str = setting(
        "the original: `shapes` or `gallery` (bundled), a diffusers folder or .safetensors file, or a hub id", path=True
    )
    delta: str = setting("FILE that `train --save delta` wrote", path=True)
    output: str = setting("folder for the pipeline", path=True)
    overwrite: bool = setting("replace a pipeline that an earlier `apply` left in the output folder", False)

    def __post_init__(self) -> None:
        expand_home(self)
        check_types(self)
        super().__post_init__()
