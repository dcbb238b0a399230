"""Whether a run fits its device, phase by phase, and which flag makes it fit."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from ..files.weights import INDEX, files_of, part_names
from ..models.adapter_files import is_adapter_run
from ..models.base import Model
from ..models.loading import resolve_source
from ..models.options import ModelOptions
from ..models.placement import WeightsDtype
from ..models.sketch import Blueprint, Sketch
from .memory import Phase, Workload, count_phases
from .shares import bytes_sent

_SLACK = 0.1  # of the device, for what is not counted


@dataclasses.dataclass(frozen=True)
class Remedy:
    """A flag that makes phases smaller.  ``changes``: what it sets of a workload."""

    flag: str
    changes: Mapping[str, Any]
    phases: tuple[str, ...]

    def helps(self, work: Workload, phase: str) -> bool:
        """Whether it is of this phase and would change anything."""
        if phase not in self.phases:
            return False
        return any(_is_less(name, getattr(work, name), value) for name, value in self.changes.items())

    def applied(self, work: Workload) -> Workload:
        return dataclasses.replace(work, **self.changes)


_EVERY = ("encoding", "bank", "mask", "training", "edit", "export", "evaluation")
#: In the order in which they are tried: first what changes no bit, then what changes the last one, then precision.
REMEDIES = (
    Remedy("--offload", {"offload": True}, _EVERY),
    Remedy("--gradient-checkpointing", {"gradient_checkpointing": True}, ("mask", "training")),
    *(Remedy(f"--bank-batch-size {n}", {"bank_batch_size": n}, ("encoding", "bank")) for n in (16, 4, 1)),
    *(Remedy(f"--decode-batch-size {n}", {"decode_batch_size": n}, ("evaluation",)) for n in (4, 1)),
    *(Remedy(f"--evaluation-batch-size {n}", {"evaluation_batch_size": n}, ("evaluation",)) for n in (8, 2)),
    *(Remedy(f"--micro-batch-size {n}", {"micro_batch_size": n}, ("mask", "training")) for n in (2, 1)),
    Remedy("--mixed-precision bf16 --weights-dtype bf16", {"mixed_precision": "bf16", "weights_dtype": "bf16"}, _EVERY),
)


@dataclasses.dataclass(frozen=True)
class Budget:
    """The phases of a run beside the memory that there is.  ``limit``: bytes; ``hints``: phase -> what to do."""

    phases: tuple[Phase, ...]
    limit: int
    one_memory: bool  # the device is the host
    hints: Mapping[str, str]
    sent: int = 0  # by each process for one forward, backward and step

    def needs(self, phase: Phase) -> int:
        return phase.device_bytes + (phase.host_bytes if self.one_memory else 0)


def plan_memory(blueprint: Blueprint, work: Workload, device: torch.device, stated_gib: float | None) -> Budget | None:
    """Count every phase, and for each that does not fit, find flags with which it does.

    None where a network asks for values that do not follow from the prompts' tokens: fake tensors have none.
    """
    limit = int(stated_gib * 2**30) if stated_gib is not None else device_memory(device)
    one_memory = device.type == "cpu" and stated_gib is None
    try:
        budget = Budget(tuple(count_phases(blueprint, work)), limit, one_memory, {})
    except (DataDependentOutputException, DynamicOutputShapeException):
        return None
    hints = {
        phase.name: _hint(blueprint, work, phase, budget)
        for phase in budget.phases
        if not _fits(budget.needs(phase), limit)
    }
    last = budget.phases[-1]
    sent = bytes_sent(total=last.total, trainable=last.trainable, world_size=work.world_size, deepspeed=work.deepspeed)
    return dataclasses.replace(budget, hints=hints, sent=sent)


def device_memory(device: torch.device) -> int:
    """Bytes of the device, of the machine where it is the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def sketch_of_large(name: str, options: ModelOptions, weights_dtype: WeightsDtype) -> Model | None:
    """The model of a folder without its weights, where these would not fit the memory that is left; else None."""
    if Path(name).expanduser().is_file() or is_adapter_run(Path(name).expanduser()):
        return None
    source = resolve_source(name, options)
    if not (source / INDEX).is_file():
        return None
    files = [path for part in part_names(source) for path in files_of(source / part) if path.suffix == ".safetensors"]
    if 2 * sum(path.stat().st_size for path in files) < memory_left():
        return None
    blueprint = Blueprint.of_folder(source, name, options)
    item = 2 if weights_dtype == "bf16" else 4
    if item * sum(blueprint.parameters().values()) < memory_left():
        return None
    return Sketch.of(blueprint, weights_dtype).model


def memory_left() -> int:
    """Bytes that the system could give, in total where it does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return device_memory(torch.device("cpu"))


def memory_lines(budget: Budget) -> list[str]:
    """The phases in words, and for each that does not fit, what to do."""
    lines = []
    for phase in budget.phases:
        where = f"{'':12}{phase.name:11} {_sum(phase.device)}"
        lines.append(where)
        if phase.host:
            lines.append(f"{'':24}on the host {_sum(phase.host)}")
    lines[0] = f"{'memory':12}{lines[0][12:]}"
    if budget.sent:
        lines.append(f"{'':12}every process sends {size_text(budget.sent)} for a forward, a backward and a step")
    limit = f"{budget.limit / 2**30:.1f} GiB"
    if not budget.hints:
        return [*lines, f"{'':12}every phase fits {limit}"]
    return lines + [f"{'':12}{name} does not fit {limit}: {hint}" for name, hint in budget.hints.items()]


def _hint(blueprint: Blueprint, work: Workload, phase: Phase, budget: Budget) -> str:
    """The first flag that is enough by itself, else flags that are enough together."""
    useful = [remedy for remedy in _possible(budget) if remedy.helps(work, phase.name)]

    def fits(changed: Workload) -> bool:
        (counted,) = count_phases(blueprint, changed, [phase.name])
        return _fits(budget.needs(counted), budget.limit)

    for remedy in useful:
        if fits(remedy.applied(work)):
            return f"add `{remedy.flag}`"
    added: dict[str, str] = {}  # a flag's last value is its smallest
    together = work
    for remedy in useful:
        added[remedy.flag.split()[0]] = remedy.flag
        together = remedy.applied(together)
        if fits(together):
            return "add " + " ".join(f"`{flag}`" for flag in added.values())
    return "no flag makes it fit; train less (`--trainable`), or divide it (`--deepspeed`), or take a larger device"


def _possible(budget: Budget) -> Sequence[Remedy]:
    """On one memory there is nowhere to wait."""
    return [remedy for remedy in REMEDIES if not (budget.one_memory and remedy.flag == "--offload")]


def _fits(needed: int, limit: int) -> bool:
    return needed <= (1 - _SLACK) * limit


def _is_less(name: str, now: Any, then: Any) -> bool:
    """Whether a setting would become smaller; None stands for a whole batch."""
    return now is None or now > then if isinstance(then, int) and not isinstance(then, bool) else now != then


def _sum(parts: Mapping[str, int]) -> str:
    """A sum of bytes, and what it is made of, the largest first."""
    named = ", ".join(f"{name} {size_text(size)}" for name, size in sorted(parts.items(), key=lambda item: -item[1]))
    return f"{size_text(sum(parts.values()))}: {named}"


def size_text(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
