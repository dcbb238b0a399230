"""What a run was of, kept in its folder, so that ``--resume`` continues only what it can prove to be the same run.

The key of a run holds contents, not names: a hash of the model's files, the prompts themselves, a digest of the mask,
and every setting that changes the result.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError, one_line
from ..methods.recipe import Edit
from .config import TrainConfig
from .pictures import digests
from .plan import TrainPlan, resolved

KEY = "run-key.json"
_FORMAT = "fastunlearn-run-1"

#: These may change, since they do not change the result.  How many rows a step has, a checkpoint knows.
_FREE = {
    *("resume", "overwrite", "dry_run", "output", "log_every", "checkpoint_every", "evaluation_prompts", "judge"),
    *("device", "num_processes", "deepspeed", "micro_batch_size", "gradient_accumulation_steps", "save"),
    *("gradient_checkpointing", "offload", "evaluation_batch_size", "decode_batch_size", "device_memory_gib"),
}
#: These are compared by what they lead to.
_BY_CONTENT = {"model", "lora", "parts", "forget_prompts", "retain_prompts", "mask", "anchor"}


def run_key(config: TrainConfig, plan: TrainPlan, model_hash: str) -> dict[str, Any]:
    """What the run is of, as JSON holds it."""
    settings = dataclasses.asdict(resolved(config, plan))
    return {
        "format": _FORMAT,
        "model": model_hash,
        "forget": list(plan.concept.forget_prompts),
        "anchors": dict(plan.concept.anchors),
        "retain": list(plan.concept.retain_prompts),
        "pictures": {} if isinstance(plan.recipe, Edit) else digests(plan.recipe.pictures),
        "mask": plan.selection.digest() if config.mask else None,
        "settings": {name: value for name, value in settings.items() if name not in _FREE | _BY_CONTENT},
    }


def check_settings(config: TrainConfig, folder: Path) -> None:
    """UserError if the run in ``folder`` has another setting than one that is given.  Needs no model."""
    before = _read(folder)["settings"]
    for name, then in before.items():
        now = getattr(config, name, None)
        if name != "options" and now is not None and now != then:
            raise _different(folder, name, then, now)


def check_same_run(key: dict[str, Any], folder: Path) -> None:
    """UserError, naming the first thing that differs, unless the run in ``folder`` is the one that ``key`` is of."""
    before = _read(folder)
    if before["model"] != key["model"]:
        raise UserError(
            f"`--resume`: the model's files are not those that the run in {folder} was started from (hash "
            f"{str(before['model'])[:12]}, now {key['model'][:12]}). Give `--model` the same, or another `--output`."
        )
    for name in ("forget", "retain"):
        _check_prompts(folder, name, before[name], key[name])
    for prompt, then in before["anchors"].items():
        if (now := key["anchors"].get(prompt)) != then:
            raise _different(folder, f"the anchor of {prompt!r}", then, now)
    if before.get("pictures", {}) != key["pictures"]:
        raise UserError(f"`--resume`: the run in {folder} has other pictures. Give the same, or another `--output`.")
    if before["mask"] != key["mask"]:
        raise UserError(f"`--resume`: the run in {folder} has another mask. Give the same, or another `--output`.")
    for name, now in key["settings"].items():
        if (then := before["settings"].get(name)) != now:
            raise _different(folder, name, then, now)


def _check_prompts(folder: Path, role: str, before: Sequence[str], now: Sequence[str]) -> None:
    if list(before) == list(now):
        return
    gone, new = [p for p in before if p not in now], [p for p in now if p not in before]
    example = f"{gone[0]!r} is gone" if gone else f"{new[0]!r} is new" if new else "their order differs"
    raise UserError(
        f"`--resume`: the run in {folder} has {len(before)} {role} prompts, now there are {len(now)} ({example}). Give "
        f"the same `--{role}-prompts`, or another `--output`."
    )


def _different(folder: Path, name: str, then: Any, now: Any) -> UserError:
    return UserError(
        f"`--resume`: the run in {folder} has {name} = {then!r}, now it is {now!r}. Give the same settings, or another "
        "`--output`."
    )


def _read(folder: Path) -> dict[str, Any]:
    path = folder / KEY
    if not path.is_file():
        raise UserError(f"`--resume`: {folder} holds no run. Leave the flag out to start one.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {content['format']!r}, not {_FORMAT!r}")
        lists = all(isinstance(content[name], list) for name in ("forget", "retain"))
        if not lists or not all(isinstance(content[name], dict) for name in ("anchors", "settings")):
            raise ValueError("a part of it is of another type")
        content["model"], content["mask"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}). Start the run again with `--overwrite`.") from None
    return content
