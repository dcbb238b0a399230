"""The settings of a run: typed, documented and self-checking dataclasses, read from flags and YAML alike.

A field is a flag: ``micro_batch_size`` is ``--micro-batch-size`` on the command line and ``micro_batch_size:`` in YAML.
"""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

DEMO_METHODS = ("esd", "ovw", "placebo")
_LARGEST = 2**32 - 1  # of any number: what a seed can be, and more than anything else needs


def _setting(help: str, default: Any = dataclasses.MISSING, **metadata: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What `train` does.  A setting left at None takes the method's default for the model (`fastunlearn methods`)."""

    forget: str = _setting('the concept to forget, e.g. "star" or "Van Gogh"')
    output: str = _setting("folder of the run")
    model: str = _setting("`shapes` (bundled), a diffusers folder, or a hub id", "shapes")
    method: str = _setting("see `fastunlearn methods`", "ovw")
    anchor: str | None = _setting(
        "what the concept becomes (of TEXT;TEXT each prompt draws one); default: nothing, or its neighbour", None
    )
    forget_prompts: str | None = _setting(
        "FILE or TEXT;TEXT of prompts that show the concept; default: the concept", None
    )
    retain_prompts: str | None = _setting(
        "FILE or TEXT;TEXT of prompts to keep; the bundled model brings its own", None
    )
    steps: int | None = _setting("training steps", None)
    learning_rate: float | None = _setting("AdamW's rate", None)
    lr_scheduler: Literal["constant", "linear"] | None = _setting("linear falls to 0 over the steps", None)
    micro_batch_size: int | None = _setting("rows a student forward", None)
    trajectories: int | None = _setting("teacher trajectories a role; more means less correlated rows", None)
    trajectory_steps: int = _setting("sampler steps of a trajectory", 50)
    trajectory_guidance_scale: float = _setting("guidance of a trajectory", 3.0)
    trainable: str | None = _setting(
        "cross-attention, cross-attention-kv, non-cross-attention, all, or name parts", None
    )
    retain_weight: float | None = _setting("weight of the retain loss", None)
    negative_guidance: float | None = _setting("esd: eta", None)
    kappa: float | None = _setting("saddle: the margin, in units of the concept's strength", None)
    mask: str | None = _setting("FILE of `fastunlearn mask`: only the elements that it selects may change", None)
    mask_density: float | None = _setting("share of the trainable elements that may change, the most salient", None)
    mask_granularity: Literal["element", "sector", "row"] = _setting(
        "what is selected: single elements, 8 neighbours or rows", "element"
    )
    weight_decay: float = _setting("AdamW's decay", 0.0)
    max_grad_norm: float = _setting("gradient clipping", 1.0)
    clip_scope: Literal["selected", "all"] = _setting(
        "whose gradients the norm sees: the mask's elements' or all of the trainable parameters'", "selected"
    )
    gradient_accumulation_steps: int | None = _setting("student forwards an update", None)
    seed: int = _setting("of trajectories and row order", 0)
    mixed_precision: Literal["no", "bf16"] = _setting("bf16 runs the networks in bfloat16; weights stay float32", "no")
    device: Literal["auto", "cpu", "cuda"] = _setting("auto takes a GPU where there is one", "auto")
    deepspeed: str | None = _setting("JSON: train by DeepSpeed as this file of its settings says", None)
    num_processes: int | None = _setting("start so many processes on this machine, with `--deepspeed`", None)
    save: Literal["model", "delta"] = _setting(
        "the whole pipeline, or only what changed (`fastunlearn apply`)", "model"
    )
    checkpoint_every: int = _setting("steps between checkpoints; 0: only at the end or when stopped", 50)
    log_every: int = _setting("steps between lines of metrics.jsonl", 5)
    evaluation_prompts: str | None = _setting("prompts to evaluate on after training: FILE, `shapes` or `none`", None)
    dry_run: bool = _setting("print what would be done and stop", False)
    resume: bool = _setting("continue from the last checkpoint in the output folder", False)
    overwrite: bool = _setting("replace what an earlier run left in the output folder", False)

    def __post_init__(self) -> None:
        if not self.forget.strip():
            raise ValueError("`--forget` is empty: name the concept to forget.")
        _at_least(self, 0, "steps", "checkpoint_every", "weight_decay", "seed", "retain_weight")
        _at_least(self, -_LARGEST, "negative_guidance")
        _at_least(self, 1, "micro_batch_size", "trajectories", "trajectory_steps", "log_every")
        _at_least(self, 1, "gradient_accumulation_steps", "num_processes")
        _density(self.mask_density, "mask_density")
        if self.mask is not None and self.mask_density is not None:
            raise ValueError("`--mask` brings its own density: leave `--mask-density` out.")
        if self.num_processes is not None and self.deepspeed is None:
            raise ValueError("`--num-processes` needs `--deepspeed FILE`, which says how they divide the work.")
        _above(self, 0, "learning_rate", "max_grad_norm", "kappa", "trajectory_guidance_scale")
        if self.learning_rate is not None and self.learning_rate > 1:
            raise ValueError(f"`--learning-rate` must be at most 1, got {self.learning_rate:g}.")
        if self.resume and self.overwrite:
            raise ValueError("`--resume` continues a run and `--overwrite` replaces it: give one of them.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What `evaluate` does."""

    original: str = _setting("`shapes`, a diffusers folder, or a hub id")
    unlearned: tuple[str, ...] = _setting(
        "an unlearned pipeline: a run's folder, its model/ folder, or `shapes-gold-star`; may be given several times"
    )
    output: str = _setting("folder for the records and the report")
    prompts: str = _setting("`shapes`, or FILE or TEXT;TEXT; a CSV may have the columns prompt and group", "shapes")
    placebo: str | None = _setting("the pipeline of the same training without the forgetting part, as a control", None)
    forget: str | None = _setting("the forgotten concept; default: what the unlearned run's config says", None)
    metric: str | None = _setting(
        "shapes (default for the bundled model), lpips-alex (else), lpips-vgg, lpips-squeeze", None
    )
    metrics: str | None = _setting("further metrics, separated by commas: fid, clip-score, ...", None)
    trunk_weights: str | None = _setting(
        "safetensors file of the LPIPS trunk's weights, with torchvision's names; default: torchvision fetches them",
        None,
    )
    seeds_per_prompt: int = _setting("images a prompt", 1)
    batch_size: int = _setting("images a forward; a part of the result's definition", 32)
    num_inference_steps: int = _setting("sampler steps", 20)
    guidance_scale: float = _setting("classifier-free guidance", 3.0)
    mixed_precision: Literal["no", "bf16"] = _setting("of both models", "no")
    device: Literal["auto", "cpu", "cuda"] = _setting("auto takes a GPU where there is one", "auto")
    control_pairs: int = _setting("pairs on which the numeric controls are measured", 8)
    cache: str | None = _setting("folder that keeps the original's images for the next evaluation", None)
    cache_limit_gib: float = _setting("size the cache folder stays below", 4.0)
    num_processes: int = _setting("processes that share the prompts; with several GPUs one each", 1)
    resume: bool = _setting("continue the unfinished evaluation in the output folder", False)
    overwrite: bool = _setting("replace an earlier evaluation in the output folder", False)

    def __post_init__(self) -> None:
        _at_least(self, 1, "seeds_per_prompt", "batch_size", "num_inference_steps", "control_pairs", "num_processes")
        _above(self, 0, "guidance_scale", "cache_limit_gib")
        if not self.unlearned:
            raise ValueError("`--unlearned` is empty: name at least one unlearned pipeline.")
        if self.resume and self.overwrite:
            raise ValueError("`--resume` continues an evaluation and `--overwrite` replaces it: give one of them.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What `compare` does."""

    runs: tuple[str, ...] = _setting("folders with the evaluation.json and pairs.jsonl to compare", positional=True)
    output: str = _setting("folder for the table and the plot")
    margin: float = _setting("largest harmless difference, as a share of the distance of redrawn images", 0.05)
    overwrite: bool = _setting("replace an earlier comparison in the output folder", False)

    def __post_init__(self) -> None:
        _above(self, 0, "margin")
        if len(self.runs) < 2:
            raise ValueError(f"a comparison needs at least 2 runs, got {len(self.runs)}: name their folders.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """What `mask` does.  A setting left at None takes SalUn's default for the model."""

    forget: str = _setting('the concept whose weights to find, e.g. "star"')
    output: str = _setting("FILE for the mask, e.g. star.mask.safetensors")
    model: str = _setting("`shapes` (bundled), a diffusers folder, or a hub id", "shapes")
    density: float = _setting("share of the trainable elements to select", 0.5)
    granularity: Literal["element", "sector", "row"] = _setting(
        "what is selected: single elements, 8 neighbours or rows", "element"
    )
    trainable: str = _setting("cross-attention, cross-attention-kv, non-cross-attention, all, or name parts", "all")
    forget_prompts: str | None = _setting(
        "FILE or TEXT;TEXT of prompts that show the concept; default: as in `train`", None
    )
    trajectories: int | None = _setting("teacher trajectories; their last latents are the images", None)
    trajectory_steps: int = _setting("sampler steps of a trajectory", 50)
    trajectory_guidance_scale: float = _setting("guidance of a trajectory", 3.0)
    micro_batch_size: int | None = _setting("rows a forward", None)
    seed: int = _setting("of trajectories and noise", 0)
    mixed_precision: Literal["no", "bf16"] = _setting("bf16 runs the networks in bfloat16", "no")
    device: Literal["auto", "cpu", "cuda"] = _setting("auto takes a GPU where there is one", "auto")
    overwrite: bool = _setting("replace the file", False)

    def __post_init__(self) -> None:
        if not self.forget.strip():
            raise ValueError("`--forget` is empty: name the concept to forget.")
        _at_least(self, 0, "seed")
        _at_least(self, 1, "micro_batch_size", "trajectories", "trajectory_steps")
        _above(self, 0, "trajectory_guidance_scale")
        _density(self.density, "density")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ApplyConfig:
    """What `apply` does."""

    model: str = _setting("the original: `shapes` (bundled), a diffusers folder, or a hub id")
    delta: str = _setting("FILE that `train --save delta` wrote")
    output: str = _setting("folder for the pipeline")
    overwrite: bool = _setting("replace a pipeline that an earlier `apply` left in the output folder", False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateImagesConfig:
    """What `evaluate-images` does."""

    original_images: str = _setting("folder of the original model's images")
    unlearned_images: str = _setting("folder of the unlearned model's, with the same names; suffixes may differ")
    output: str = _setting("folder for the records and the report")
    prompts: str | None = _setting(
        "CSV with the columns file, prompt and, if wanted, group; default: every pair is a prompt of its own", None
    )
    metric: Literal["lpips-alex", "lpips-vgg", "lpips-squeeze", "shapes"] = _setting(
        "the perceptual distance; shapes is the bundled world's", "lpips-alex"
    )
    trunk_weights: str | None = _setting(
        "safetensors file of the LPIPS trunk's weights, with torchvision's names; default: torchvision fetches them",
        None,
    )
    metrics: str | None = _setting("further metrics, separated by commas: fid, kid, cmmd, clip-score, ...", None)
    batch_size: int = _setting("pairs a forward; a part of the result's definition", 8)
    num_workers: int | None = _setting("decoders; default: one a CPU core", None)
    device: Literal["auto", "cpu", "cuda"] = _setting("auto takes a GPU where there is one", "auto")
    overwrite: bool = _setting("replace an earlier evaluation in the output folder", False)

    def __post_init__(self) -> None:
        _at_least(self, 1, "batch_size", "num_workers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What `demo` does: forget "star" three ways and show them side by side."""

    output: str = _setting("folder of the runs and the report", "demo")
    seed: int = _setting("of trajectories and row order", 0)
    overwrite: bool = _setting("replace an earlier demo", False)

    def __post_init__(self) -> None:
        _at_least(self, 0, "seed")


Config = TypeVar(
    "Config",
    TrainConfig,
    EvaluateConfig,
    EvaluateImagesConfig,
    CompareConfig,
    MaskConfig,
    ApplyConfig,
    DemoConfig,
)


def add_flags(parser: argparse.ArgumentParser, kind: type[Config]) -> None:
    """Give the parser a flag for every field of ``kind``, and ``--config FILE``.  Flags not given stay absent."""
    parser.add_argument("--config", metavar="YAML", help="file with the same names; flags win over it")
    for field in dataclasses.fields(kind):
        accepted, choices = _field_type(kind, field.name)
        default = "required" if field.default is dataclasses.MISSING else _shown(field.default)
        text = f"{field.metadata['help']} ({default})" if default else field.metadata["help"]
        options: dict[str, Any] = {"help": text.replace("%", "%%")}
        flag = "--" + field.name.replace("_", "-")
        if field.metadata.get("positional"):
            # Absent when empty, so that what is missing is told in the same words as for flags.
            options["help"] = field.metadata["help"]
            parser.add_argument(field.name, metavar="RUN", nargs="*", default=argparse.SUPPRESS, **options)
            continue
        if accepted is tuple:
            options |= {"action": "append", "metavar": field.name.upper()}
            parser.add_argument(flag, dest=field.name, default=argparse.SUPPRESS, **options)
            continue
        if accepted is bool:
            parser.add_argument(flag, dest=field.name, action="store_true", default=argparse.SUPPRESS, **options)
            continue
        metavar = {int: "N", float: "X"}.get(accepted, field.name.split("_")[-1].upper())
        if choices:
            options["choices"] = choices
        else:
            options["metavar"] = metavar
        parser.add_argument(flag, dest=field.name, type=accepted, default=argparse.SUPPRESS, **options)


def build(kind: type[Config], flags: dict[str, Any]) -> Config:
    """The settings from flags, over those of the YAML file that ``flags["config"]`` names.

    Raises ValueError, in one line, for an unreadable file, unknown names and values out of range.
    """
    values: dict[str, Any] = {}
    path = flags.pop("config", None)
    if path is not None:
        values |= _read_yaml(Path(path), kind)
    values |= {name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()}
    missing = [
        "RUN" if field.metadata.get("positional") else "--" + field.name.replace("_", "-")
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.name not in values
    ]
    if missing:
        raise ValueError(f"missing: {', '.join(missing)}.")
    return kind(**values)


def to_yaml(config: Config) -> str:
    """The settings as YAML that ``--config`` reads back to an equal object."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def from_yaml(path: Path, kind: type[Config]) -> Config:
    """Read a file that :func:`to_yaml` wrote."""
    return kind(**_read_yaml(path, kind))


def _read_yaml(path: Path, kind: type[Config]) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the config file {path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"the config file {path} must hold `name: value` lines.")
    known = [field.name for field in dataclasses.fields(kind)]
    values = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ValueError(f"the config file {path} has an unknown name {key!r}. Known: {', '.join(known)}.")
        values[name] = _converted(kind, name, value, path)
    return values


def _converted(kind: type[Config], name: str, value: Any, path: Path) -> Any:
    accepted, choices = _field_type(kind, name)
    if value is None and kind.__dataclass_fields__[name].default is None:
        return None
    if accepted is tuple:
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str) for item in items):
            raise ValueError(f"the config file {path}: `{name}` must be a text or a list of texts, got {value!r}.")
        return tuple(items)
    if value is False and "no" in choices:  # YAML reads a bare `no` so
        return "no"
    try:
        if isinstance(value, bool) != (accepted is bool) or isinstance(value, list | dict | None):
            raise ValueError
        converted = accepted(value)
        if (accepted is int and float(value) != converted) or (choices and converted not in choices):
            raise ValueError
    except (ValueError, OverflowError):
        wanted = " or ".join(choices) if choices else accepted.__name__
        raise ValueError(f"the config file {path}: `{name}` must be {wanted}, got {value!r}.") from None
    return converted


def _field_type(kind: type[Config], name: str) -> tuple[type, tuple[str, ...]]:
    """(type, choices) of a field, None being left out of a union."""
    hint = typing.get_type_hints(kind)[name]
    if typing.get_origin(hint) in (types.UnionType, typing.Union):  # the latter of a Literal and None
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is Literal:
        return str, typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return tuple, ()
    return hint, ()


def _shown(default: Any) -> str:
    return "" if default is None or default is False else f"default {default}"


def _at_least(config: Any, low: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not low <= value <= _LARGEST:
            limit = f"at most {_LARGEST}" if value > _LARGEST else f"at least {low:g}"
            raise ValueError(f"`--{name.replace('_', '-')}` must be {limit}, got {value}.")


def _density(value: float | None, name: str) -> None:
    if value is not None and not 0 < value <= 1:
        raise ValueError(f"`--{name.replace('_', '-')}` must be above 0 and at most 1, got {value:g}.")


def _above(config: Any, low: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not low < value <= _LARGEST:
            raise ValueError(f"`--{name.replace('_', '-')}` must be a number above {low:g}, got {value:g}.")
