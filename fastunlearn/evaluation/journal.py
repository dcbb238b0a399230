"""What an evaluation keeps of every pair: a few numbers, as columns in memory and as a journal on disk.

Each rank appends to a journal of its own, batch by batch; a line is there whole or not at all.  Sorting all journals by
key gives the same columns whatever number of ranks wrote them, in whatever order, with whatever stops in between.
"""

from __future__ import annotations

import csv
import dataclasses
import fcntl
import hashlib
import io
import itertools
import json
import os
import shutil
import struct
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from ..files.atomic import write_json, write_text
from ..judges.base import Judged
from ..record import plain

FOLDER = "journal"
#: Of the lines.  A journal of another format cannot be continued.
FORMAT = 4

Key = tuple[str, int]
Floats = npt.NDArray[np.float32]


@dataclasses.dataclass
class PairScores:
    """The results of some keys, or of all.

    ``redrawn``: (N,) distance of the original to itself from other noise, NaN where it was not asked.  ``distances``:
    (M, N), one row a model.  ``judged``: what the judge says of 1 + M sides, the original's first, or None without a
    judge.  ``colors``: (1 + M, N) distances of colors, those of ``redrawn`` first.  ``rows``: a metric's rows,
    (M, N, F), by its name.
    """

    keys: list[Key]
    redrawn: Floats
    distances: Floats
    colors: Floats
    judged: Judged | None = None
    rows: Mapping[str, Floats] = dataclasses.field(default_factory=dict)

    @classmethod
    def merge(cls, parts: Sequence[PairScores]) -> PairScores:
        """All of them, sorted by key.  Raises UserError for a key that is there twice."""
        keys = [key for part in parts for key in part.keys]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        for one, following in itertools.pairwise(order):
            if keys[one] == keys[following]:
                raise UserError(f"the pair {keys[one]} was recorded twice: delete the output folder and start again.")
        judged = [part.judged for part in parts if part.judged is not None]
        return cls(
            [keys[index] for index in order],
            np.concatenate([part.redrawn for part in parts])[order],
            np.concatenate([part.distances for part in parts], axis=1)[:, order],
            np.concatenate([part.colors for part in parts], axis=1)[:, order],
            Judged.joined(judged, axis=1).taken(order) if judged else None,
            {name: np.concatenate([part.rows[name] for part in parts], axis=1)[:, order] for name in parts[0].rows},
        )


class Journal:
    """The unfinished evaluation in ``folder/journal``: what it is of, and every finished key of every rank."""

    def __init__(self, folder: Path, rank: int, world_size: int) -> None:
        self.folder = folder / FOLDER
        self.rank, self.world_size = rank, world_size
        self._stream: IO[bytes] | None = None
        self._rows: dict[str, IO[bytes]] = {}

    # ---- beginning ---------------------------------------------------------------------------------------------------

    def begin(self, spec: Mapping[str, Any], config: str, prompts: Sequence[Sequence[Any]], *, resume: bool) -> None:
        """Start, or continue what was begun with the same ``spec``.  For the first rank.

        ``config``: YAML that starts the other ranks and continues the evaluation; ``prompts``: a table with its header.
        One that was stopped before it had begun is started.  Raises UserError where there is something else to
        continue, or a finished evaluation.
        """
        if resume and ((self.folder / "spec.json").exists() or (self.folder.parent / "evaluation.json").exists()):
            self._check_same(spec)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            text = io.StringIO(newline="")
            csv.writer(text, lineterminator="\n").writerows(prompts)
            write_text(self.folder / "prompts.csv", text.getvalue())
            write_text(self.folder / "evaluate.yaml", config)
            write_json(self.folder / "spec.json", _spec(spec))  # last: the other ranks wait for it
        self._open()

    def join(self, spec: Mapping[str, Any], timeout_s: float = 600) -> None:
        """Take part in what the first rank began."""
        deadline = time.monotonic() + timeout_s
        while not (self.folder / "spec.json").is_file():
            if time.monotonic() > deadline:
                raise UserError(f"rank {self.rank} waited for rank 0 to begin in {self.folder.parent}: it did not.")
            time.sleep(0.1)
        self._check_same(spec)
        self._open()

    def _check_same(self, spec: Mapping[str, Any]) -> None:
        try:
            before = json.loads((self.folder / "spec.json").read_text(encoding="utf-8"))
            written = before.get("format", 1)
        except (OSError, ValueError, AttributeError):
            raise UserError(
                f"`--resume`: {self.folder.parent} holds no unfinished evaluation. Leave the flag out to start one."
            ) from None
        now = _spec(spec)
        if written != FORMAT:
            raise UserError(
                f"the evaluation in {self.folder.parent} was begun by another version of fastunlearn: its journal has "
                f"format {_short(written)}, this version continues format {FORMAT}. Start it anew with `--overwrite`."
            )
        differing = [name for name in dict.fromkeys([*before, *now]) if before.get(name) != now.get(name)]
        if differing:
            name = differing[0]
            raise UserError(
                f"the evaluation in {self.folder.parent} has {name} = {_short(before.get(name))}, now it is "
                f"{_short(now.get(name))}. Give the same settings, or another `--output`."
            )

    def _open(self) -> None:
        path = self.folder / f"{self.rank}.jsonl"
        self._stream = os.fdopen(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666), "ab+")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._stream.close()
            raise UserError(f"another process still writes {path}. Wait for it, or end it.") from None
        lines = _whole_lines(path)
        os.truncate(path, sum(map(len, lines)))
        for rows in self._row_files(self.rank).values():
            width = _header(rows)[0]
            os.truncate(rows, _HEADER.size + 4 * width * len(lines) if width else 0)

    # ---- writing -----------------------------------------------------------------------------------------------------

    def append(self, scores: PairScores) -> None:
        """Add the results of a batch.  Rows of metrics go first, so that no line is without them."""
        assert self._stream is not None
        hashes: list[dict[str, str]] = [{} for _ in scores.keys]
        for name, rows in scores.rows.items():
            stream = self._rows.get(name)
            if stream is None:
                stream = self._rows[name] = self._row_path(self.rank, name).open("ab")
                if stream.tell() == 0:
                    stream.write(_HEADER.pack(rows.shape[0] * rows.shape[2], rows.shape[0]))
            content = np.ascontiguousarray(rows.transpose(1, 0, 2), dtype="<f4")
            for index, row in enumerate(content):
                hashes[index][name] = _hash(row.tobytes())
            stream.write(content.tobytes())
            stream.flush()
        lines = []
        for index, (prompt, seed) in enumerate(scores.keys):
            redrawn = float(scores.redrawn[index])
            judged = _sides(scores.judged, index)
            colors = [_or_none(color) for color in scores.colors[:, index].tolist()]
            distances = scores.distances[:, index].tolist()
            line = [prompt, seed, _or_none(redrawn), distances, judged, hashes[index], colors]
            lines.append(_with_hash(line))
        self._stream.write("".join(lines).encode())
        self._stream.flush()

    # ---- reading -----------------------------------------------------------------------------------------------------

    def finished(self) -> set[Key]:
        """The keys that are done, by any rank."""
        return {(line[0], line[1]) for path in self._files() for line in self._lines(path)}

    def batches(self) -> Iterator[PairScores]:
        """What every rank wrote."""
        for path in self._files():
            lines = self._lines(path)
            if not lines:
                continue
            judged = _columns([line[4] for line in lines]) if lines[0][4] is not None else None
            rows = {}
            for name, file in self._row_files(int(path.stem)).items():
                width, models = _header(file)
                content = np.fromfile(file, dtype="<f4", offset=_HEADER.size, count=width * len(lines))
                found = [_hash(row.tobytes()) for row in content.reshape(-1, width)] if width else []
                if found != [line[5].get(name) for line in lines] or width % models:
                    raise self._damaged(file)
                rows[name] = content.reshape(len(lines), models, width // models).transpose(1, 0, 2)
            yield PairScores(
                [(sys.intern(line[0]), line[1]) for line in lines],
                np.array([np.nan if line[2] is None else line[2] for line in lines], dtype=np.float32),
                np.array([line[3] for line in lines], dtype=np.float32).T,
                np.array([line[6] for line in lines], dtype=np.float32).T,  # None is NaN
                judged,
                rows,
            )

    def _lines(self, path: Path) -> list[list[Any]]:
        """The records in a rank's file.  Raises UserError where one has changed since it was written."""
        lines = [_checked(line) for line in _whole_lines(path)]
        if None in lines:
            raise self._damaged(path, lines.index(None) + 1)
        return [line for line in lines if line is not None]

    def _damaged(self, path: Path, line: int | None = None) -> UserError:
        where = f" in line {line}" if line else ""
        return UserError(
            f"the journal {path} has changed{where} since it was written, so the evaluation cannot be continued. Start "
            "it anew with `--overwrite`."
        )

    def close(self) -> None:
        """Let go of the files.  A journal without a single record is removed: there is nothing to continue."""
        for stream in (self._stream, *self._rows.values()):
            if stream is not None:
                stream.close()
        begun, self._stream, self._rows = self._stream is not None, None, {}
        if begun and self.rank == 0 and not any(path.stat().st_size for path in self._files()):
            shutil.rmtree(self.folder, ignore_errors=True)

    def remove(self) -> None:
        """The evaluation is finished and written."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.jsonl"))

    def _row_path(self, rank: int, name: str) -> Path:
        return self.folder / f"{rank}.{name}.rows"

    def _row_files(self, rank: int) -> dict[str, Path]:
        prefix = f"{rank}."
        return {path.name.removeprefix(prefix)[: -len(".rows")]: path for path in self.folder.glob(f"{prefix}*.rows")}


_HEADER = struct.Struct("<2I")  # floats a line, models


def _header(path: Path) -> tuple[int, int]:
    """(floats per line, models) of a file of rows; (0, 1) for one that was cut before."""
    with path.open("rb") as stream:
        header = stream.read(_HEADER.size)
    width, models = _HEADER.unpack(header) if len(header) == _HEADER.size else (0, 1)
    return width, max(models, 1)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _with_hash(line: list[Any]) -> str:
    """A line of the journal: its record, and a hash of it."""
    return json.dumps([_hash(json.dumps(line).encode()), line]) + "\n"


def _checked(line: bytes) -> list[Any] | None:
    """The record of a line; None where the line is not what was written."""
    try:
        told, content = json.loads(line)
        is_whole = told == _hash(json.dumps(content).encode())
    except (ValueError, TypeError):
        return None
    record: list[Any] | None = content if is_whole else None
    return record


def _whole_lines(path: Path) -> list[bytes]:
    """The lines of a journal; one that was being written when its process was killed is left out."""
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def _spec(spec: Mapping[str, Any]) -> dict[str, Any]:
    """As it stands in spec.json."""
    return {"format": FORMAT, **plain(spec)}


def _sides(judged: Judged | None, index: int) -> list[list[Any]] | None:
    """One image's verdicts: per side [shown, valid, indices of words]."""
    if judged is None:
        return None
    columns = judged.shown[:, index].tolist(), judged.valid[:, index].tolist(), judged.words[:, index].tolist()
    return [[shown, _or_none(valid), words] for shown, valid, words in zip(*columns, strict=True)]


def _columns(lines: Sequence[Sequence[Sequence[Any]]]) -> Judged:
    """The other way round, from all lines."""

    def column(which: int) -> list[list[Any]]:
        return [[line[side][which] for line in lines] for side in range(len(lines[0]))]

    shown, valid = (np.array(column(which), dtype=np.float32) for which in (0, 1))
    return Judged(shown, valid, np.array(column(2), dtype=np.int32))


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 60 else text[:57] + "..."
