"""Reads a DeepSpeed configuration, holds it against our flags and says, in one line, where they disagree."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..errors import UserError

_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_SECTIONS = (
    *("zero_optimization", "bf16", "fp16", "data_types"),
    *("comms_logger", "flops_profiler", "tensorboard", "wandb", "csv_monitor"),
)
_SWITCHES = (
    *("prescale_gradients", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
    *("wall_clock_breakdown", "memory_breakdown", "dump_state"),
)
_POSITIVE = ("gradient_predivide_factor", "steps_per_print")
_DTYPES = ("fp32", "fp16", "bf16")
_KNOWN = {*_BATCH, *_SECTIONS, *_SWITCHES, *_POSITIVE, "gradient_clipping", "communication_data_type"}
_NOT_OURS = {
    "optimizer": "the optimizer is MaskedAdamW, set by `--learning-rate` and `--weight-decay`",
    "scheduler": "the schedule is set by `--lr-scheduler`",
    "torch_autocast": "`--mixed-precision bf16` sets it",
    "amp": "use `--mixed-precision bf16`",
}
# These change stored values or where states live, so that what is not selected would no longer keep its bits.
_INEXACT = (
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients",
    "zeropp_loco_param",
)
_BUCKET = 50_000_000  # elements; DeepSpeed's default of 5e8 takes gigabytes that a UNet has no use for


def read_deepspeed(
    path: Path,
    *,
    world_size: int,
    micro_batch_size: int | None,
    gradient_accumulation_steps: int | None,
    max_grad_norm: float,
    default_micro_batch_size: int,
) -> dict[str, Any]:
    """The configuration with batch sizes, clipping and what our optimizer needs filled in.

    Sizes that a flag gives (not None) must be those of the file; what neither says follows from
    ``train = micro x accumulation x processes``, the micro batch being the method's default.  Keys that begin with `_`
    are comments; ``"auto"`` says nothing.  UserError names what is wrong in the file.
    """
    settings = _read(path)
    for name, reason in _NOT_OURS.items():
        if name in settings:
            raise UserError(f"{path}: take `{name}` out: {reason}.")
    if unknown := sorted(set(settings) - _KNOWN):
        raise UserError(f"{path} has an unknown key {unknown[0]!r}. Known: {', '.join(sorted(_KNOWN))}.")
    _check_types(settings, path)
    if _section(settings, "fp16", path).get("enabled"):
        raise UserError(f"{path}: fp16 with its loss scaling is not supported. Use `bf16`.")
    if _section(settings, "bf16", path).get("bf16_master_weights_and_grads"):
        raise UserError(f"{path}: `bf16_master_weights_and_grads` rounds what must stay exact. Take it out.")
    zero = _section(settings, "zero_optimization", path)
    _check_zero(zero, path)
    micro, accumulation = _batch_sizes(
        settings, path, world_size, micro_batch_size, gradient_accumulation_steps, default_micro_batch_size
    )
    clipping = settings.get("gradient_clipping", max_grad_norm) or 0.0  # null and 0 both mean none
    if isinstance(clipping, bool) or not isinstance(clipping, int | float) or not 0 <= clipping < math.inf:
        raise UserError(f"{path}: `gradient_clipping` must be a number, 0 for none, got {clipping!r}.")
    if clipping != max_grad_norm:
        raise UserError(
            f"{path} clips gradients at {clipping:g}, `--max-grad-norm` says {max_grad_norm:g}. Give both the same."
        )
    stage = zero.get("stage", 0)
    if stage:
        zero = {"reduce_bucket_size": _BUCKET, **({"allgather_bucket_size": _BUCKET} if stage < 3 else {}), **zero}
    ours = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro * accumulation * world_size,
        "gradient_clipping": max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    return {"steps_per_print": 10**9, **settings, **ours}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read the DeepSpeed file {path}: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"the DeepSpeed file {path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"the DeepSpeed file {path} must hold one JSON object.")
    return _told(content)


def _told(content: dict[str, Any]) -> dict[str, Any]:
    """Without comments and `auto`."""
    return {
        key: _told(value) if isinstance(value, dict) else value
        for key, value in content.items()
        if not key.startswith("_") and value != "auto"
    }


def _section(settings: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    section = settings.get(name, {})
    if not isinstance(section, dict):
        raise UserError(f"{path}: `{name}` must be an object, got {section!r}.")
    return section


def _check_types(settings: dict[str, Any], path: Path) -> None:
    """UserError for a value that DeepSpeed would take as it is and fail by in the middle of a run."""
    for name in _SECTIONS:
        _section(settings, name, path)
    for name in _SWITCHES:
        if not isinstance(settings.get(name, False), bool):
            raise UserError(f"{path}: `{name}` must be true or false, got {settings[name]!r}.")
    for name in _POSITIVE:
        value = settings.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(f"{path}: `{name}` must be a number above 0, got {value!r}.")
    profiler = settings.get("flops_profiler", {})  # the one section whose types DeepSpeed does not look at
    for name, kind in (("enabled", bool), ("detailed", bool), ("profile_step", int), ("module_depth", int)):
        if type(profiler.get(name, kind())) is not kind:
            wanted = "true or false" if kind is bool else "a whole number"
            raise UserError(f"{path}: `flops_profiler.{name}` must be {wanted}, got {profiler[name]!r}.")
    types = {"communication_data_type": settings.get("communication_data_type")}
    data_types = settings.get("data_types", {})
    types |= {
        f"data_types.{name}": data_types.get(name) for name in ("grad_accum_dtype", "param_dtype", "buffer_dtype")
    }
    for name, value in types.items():
        if value is not None and (not isinstance(value, str) or value.lower() not in _DTYPES):
            raise UserError(f"{path}: `{name}` must be one of {', '.join(_DTYPES)}, got {value!r}.")


def _check_zero(zero: dict[str, Any], path: Path) -> None:
    if (stage := zero.get("stage", 0)) not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise UserError(f"{path}: the ZeRO stage must be 0, 1, 2 or 3, got {stage!r}.")
    for name in _INEXACT:
        if zero.get(name):
            raise UserError(f"{path}: `{name}` changes weights that must keep their bits. Take it out.")
    for name, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        device = _section(zero, name, path).get("device", "none")
        if device == "nvme":
            raise UserError(f"{path}: `{name}` to nvme is not supported. Use cpu.")
        if device == "cpu" and zero.get("stage", 0) < lowest:
            raise UserError(f"{path}: `{name}` needs ZeRO stage {lowest} or more, got {zero.get('stage', 0)}.")


def _batch_sizes(
    settings: dict[str, Any], path: Path, world_size: int, micro: int | None, accumulation: int | None, default: int
) -> tuple[int, int]:
    """(micro batch, accumulation steps), such that train = micro x accumulation x processes."""
    for name in _BATCH:
        value = settings.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UserError(f"{path}: `{name}` must be a whole number from 1 on, got {value!r}.")
    train, file_micro, file_accumulation = (settings.get(name) for name in _BATCH)
    for flag, given, name, filed in (
        ("--micro-batch-size", micro, _BATCH[1], file_micro),
        ("--gradient-accumulation-steps", accumulation, _BATCH[2], file_accumulation),
    ):
        if given is not None and filed is not None and given != filed:
            raise UserError(f"{path} says {name} = {filed}, `{flag}` says {given}. Give both the same.")
    micro, accumulation = micro or file_micro, accumulation or file_accumulation
    if micro is None:
        micro = max(1, train // (world_size * (accumulation or 1))) if train else default
    if accumulation is None:
        accumulation = max(1, train // (micro * world_size)) if train else 1
    if train is not None and train != micro * accumulation * world_size:
        raise UserError(
            f"{path}: the batch sizes disagree: train_batch_size {train} is not micro batch {micro} x accumulation "
            f"{accumulation} x {world_size} processes = {micro * accumulation * world_size}."
        )
    return micro, accumulation
