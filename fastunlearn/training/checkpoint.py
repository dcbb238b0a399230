"""The files of a checkpoint: what every process holds of the trained elements, in a form that any number of them reads.

A parameter's elements that may change, in order, are a vector; each process writes the range of it that it owns, with
the optimizer's states of the range.  So a checkpoint does not depend on how many processes wrote it, nor on how they
had divided the parameters, and it holds nothing of what may not change.  Only safetensors and JSON, never pickle.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..distributed import World
from ..errors import UserError, is_out_of_memory, one_line
from ..files.atomic import TEMPORARY, publish_folder, write_json, write_text

FORMAT = "fastunlearn-checkpoint-1"
KINDS = ("weight", "exp_avg", "exp_avg_sq")


@dataclasses.dataclass
class Piece:
    """A range of one parameter's vector.  ``values``: kind -> (n,) float32; before the first step only ``weight``."""

    name: str
    start: int
    values: dict[str, torch.Tensor]
    step: float = 0.0

    @property
    def stop(self) -> int:
        return self.start + len(self.values["weight"])


def save_checkpoint(
    folder: Path, world: World, pieces: Sequence[Piece], lengths: Mapping[str, int], state: Mapping[str, Any]
) -> None:
    """Write a checkpoint; all processes call it together.  It has its name only once all of it is on the disk.

    ``lengths``: parameter -> length of its vector.  ``state``: JSON values, which :func:`load_checkpoint` gives back.
    """
    from safetensors.torch import save_file

    unfinished = folder.with_name(f"{TEMPORARY}{folder.name}.tmp")  # all processes must know it
    try:
        if world.is_main:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        world.barrier()
        tensors: dict[str, torch.Tensor] = {}
        ranges: dict[str, list[float]] = {}
        for piece in pieces:
            tensors |= {f"{kind}/{piece.name}": value.contiguous().cpu() for kind, value in piece.values.items()}
            ranges[piece.name] = [piece.start, piece.stop, piece.step]
        file = unfinished / f"rank-{world.rank}.safetensors"
        save_file(tensors, file, metadata={"ranges": json.dumps(ranges)})
        write_text(file.with_suffix(".sha256"), _hash(file))  # by who wrote it: the main process need not read it all
        world.barrier()
        if world.is_main:
            hashes = {path.stem: path.read_text(encoding="utf-8") for path in unfinished.glob("*.sha256")}
            content = {"format": FORMAT, "lengths": dict(lengths), "hashes": hashes, "trainer": dict(state)}
            write_json(unfinished / "state.json", content | {"sha256": _checksum(content)})
            for path in unfinished.glob("*.sha256"):
                path.unlink()
            publish_folder(unfinished, folder)
        world.barrier()
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def load_checkpoint(
    folder: Path, lengths: Mapping[str, int], wanted: Mapping[str, tuple[int, int]]
) -> tuple[dict[str, Piece], dict[str, Any]]:
    """The ranges ``wanted`` (start, stop) of each parameter's vector, whoever wrote them, and the trainer's state.

    UserError if the checkpoint is damaged, or of a run that trained other elements.
    """
    from safetensors import safe_open

    try:
        content = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if content.get("format") != FORMAT:
            raise ValueError(f"its format is {content.get('format')!r}, not {FORMAT!r}")
        if content.pop("sha256") != _checksum(content):
            raise ValueError("state.json has changed")
        files = [folder / f"rank-{rank}.safetensors" for rank in range(len(content["hashes"]))]
        for path in files:
            if _hash(path) != content["hashes"][path.stem]:
                raise ValueError(f"{path.name} has changed")
        if content["lengths"] != dict(lengths):
            raise _AnotherRun
        result: dict[str, list[tuple[int, int, float, dict[str, torch.Tensor]]]] = {name: [] for name in wanted}
        for path in files:
            with safe_open(path, "pt") as file:
                keys = set(file.keys())
                for name, (start, stop, step) in json.loads(file.metadata()["ranges"]).items():
                    if name not in wanted:
                        continue
                    first, last = max(start, wanted[name][0]), min(stop, wanted[name][1])
                    if first < last:
                        values = {
                            kind: file.get_slice(f"{kind}/{name}")[first - start : last - start]
                            for kind in KINDS
                            if f"{kind}/{name}" in keys
                        }
                        result[name].append((first, last, step, values))
        pieces = {name: _joined(name, wanted[name], parts) for name, parts in result.items()}
    except _AnotherRun:
        raise UserError(f"the checkpoint {folder} is of another run: it trained other elements.") from None
    except Exception as error:
        if is_out_of_memory(error):
            raise
        text = one_line(error)
        raise UserError(
            f"the checkpoint {folder} is damaged ({text}). Delete it to resume from an older one."
        ) from error
    return pieces, content["trainer"]


class _AnotherRun(Exception):
    pass


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _checksum(content: Mapping[str, Any]) -> str:
    """Of JSON values, in whatever order they are kept."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _joined(name: str, wanted: tuple[int, int], parts: list[tuple[int, int, float, dict[str, torch.Tensor]]]) -> Piece:
    """Ranges that follow one another, as one; it is an error if any element is missing."""
    position, steps = wanted[0], {step for _, _, step, _ in parts}
    parts = sorted(parts, key=lambda part: part[0])
    for first, last, _, _ in parts:
        if first != position:
            break
        position = last
    if position != wanted[1] or len(steps) > 1:
        raise UserError(f"{name} is incomplete")
    kinds = parts[0][3] if parts else {"weight": torch.empty(0)}
    values = {kind: torch.cat([part[3][kind] for part in parts]) if parts else kinds[kind] for kind in kinds}
    return Piece(name, wanted[0], values, steps.pop() if steps else 0.0)
