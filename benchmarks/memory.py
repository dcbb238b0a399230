"""Counts what models of real sizes need of memory on one device and over processes, into results and docs.

python benchmarks/memory.py                   # counts, writes results/memory.json and the tables; --check compares
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import real_sizes

from fastunlearn.models.sketch import Blueprint, Sketch
from fastunlearn.training.memory import Workload, count_phases, count_training
from fastunlearn.training.selection import select_parameters
from fastunlearn.training.shares import bytes_sent

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "memory.json"
DOCS = ROOT / "docs"
NAMES = {"sdxl": "SDXL", "flux-dev": "FLUX.1 dev", "z-image": "Z-Image", "qwen-image": "Qwen-Image"}
#: ESD's defaults: 16 trajectories of 50 points with two predictions each.
BANK: dict[str, Any] = {"trajectories": 16, "rows": 800, "branches": 2, "prompts": 3, "micro_batch_size": 1}
FRUGAL: dict[str, Any] = {
    **{"mixed_precision": "bf16", "weights_dtype": "bf16", "gradient_checkpointing": True, "offload": True},
    **{"bank_batch_size": 4, "evaluation_batch_size": 4, "decode_batch_size": 1},
}
#: (model, what trains, rank of an adapter)
DEVICE: list[tuple[str, str, int | None]] = [
    ("sdxl", "cross-attention", None),
    ("sdxl", "cross-attention", 16),
    ("flux-dev", "text-attention", 16),
    ("flux-dev", "text-attention", None),
    ("z-image", "joint-attention", 16),
    ("qwen-image", "text-attention", 16),
]
#: (model, what trains, rank, ZeRO stage)
PROCESSES: list[tuple[str, str, int | None, int]] = [
    ("sdxl", "cross-attention", None, 2),
    ("sdxl", "all", None, 3),
    ("flux-dev", "text-attention", 16, 3),
    ("flux-dev", "text-attention", None, 3),
    ("flux-dev", "all", None, 3),
]
GPUS = (1, 8, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 if a count or a table would change")
    args = parser.parse_args()
    text = json.dumps(count(), indent=1) + "\n"
    pages = {path: rendered(path, json.loads(text)) for path in (DOCS / "memory.md", DOCS / "distributed.md")}
    if args.check:
        changed = RESULTS.read_text(encoding="utf-8") != text
        sys.exit(int(changed or any(path.read_text(encoding="utf-8") != page for path, page in pages.items())))
    RESULTS.write_text(text, encoding="utf-8")
    for path, page in pages.items():
        path.write_text(page, encoding="utf-8")


def count() -> dict[str, Any]:
    """Every case: bytes of one process."""
    return {"device": [on_device(*case) for case in DEVICE], "processes": [over(*case) for case in PROCESSES]}


@functools.cache
def blueprint(model: str) -> Blueprint:
    folder = tempfile.mkdtemp()
    return Blueprint.of_folder(real_sizes.write(model, Path(folder)), model)


def names_of(model: str, selector: str) -> tuple[str, ...]:
    return tuple(select_parameters(Sketch.of(blueprint(model)).model, selector))


def on_device(model: str, trains: str, rank: int | None) -> dict[str, Any]:
    work = Workload(names_of(model, trains), rank=rank, **BANK | FRUGAL)
    phases = count_phases(blueprint(model), work)
    peaks = {phase.name: {"device": phase.device_bytes, "host": phase.host_bytes} for phase in phases}
    return {"model": model, "trains": trains, "rank": rank, "phases": peaks}


def over(model: str, trains: str, rank: int | None, stage: int) -> dict[str, Any]:
    """By processes: the parts of the training phase, and what each sends for a step."""
    settings = {"bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}
    names, flags = names_of(model, trains), {key: value for key, value in FRUGAL.items() if key != "weights_dtype"}
    result: dict[str, Any] = {"model": model, "trains": trains, "rank": rank, "stage": stage, "gpus": {}}
    work = Workload(names, rank=rank, deepspeed=settings, **BANK | flags)
    for gpus, phase in zip(GPUS, count_training(blueprint(model), work, GPUS), strict=True):
        sent = bytes_sent(total=phase.total, trainable=phase.trainable, world_size=gpus, deepspeed=settings)
        result["trainable"] = phase.trainable
        result["gpus"][str(gpus)] = {"device": phase.device, "sent": sent}
    return result


# ---- the tables ------------------------------------------------------------------------------------------------------


def rendered(path: Path, results: dict[str, Any]) -> str:
    """The page's text with its marked section made anew."""
    section = device_table(results["device"]) if path.stem == "memory" else processes_table(results["processes"])
    begin, end = "<!-- begin counts -->\n", "<!-- end counts -->"
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    return before + begin + section + end + rest.partition(end)[2]


def device_table(cases: list[dict[str, Any]]) -> str:
    phases = list(cases[0]["phases"])
    lines = [f"| GB on the device | {' | '.join(phases)} |", f"|---|{'---|' * len(phases)}"]
    lines += [f"| {_case(one)} | {' | '.join(_gb(one['phases'][p]['device']) for p in phases)} |" for one in cases]
    return "\n".join(lines) + "\n"


def processes_table(cases: list[dict[str, Any]]) -> str:
    kinds = ["weights", "gradients", "optimizer", "activations", "bank", "gathered weights"]
    lines = [f"| GB each process | GPUs | {' | '.join(kinds)} | sum | sent a step |", f"|---|---|{'---|' * 8}"]
    for one in cases:
        for gpus, counted in one["gpus"].items():
            device = counted["device"]
            cells = [_gb(device.get(kind, 0)) for kind in kinds]
            cells += [_gb(sum(device.values())), _gb(counted["sent"])]
            lines.append(f"| {_case(one)}, ZeRO-{one['stage']} | {gpus} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _case(one: dict[str, Any]) -> str:
    how = f", LoRA of rank {one['rank']}" if one["rank"] else ""
    return f"{NAMES[one['model']]}, {one['trains']}{how}"


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}" if 0 < size < 1e9 else f"{size / 1e9:.1f}"


if __name__ == "__main__":
    main()
