"""What an evaluation keeps of every pair: a few numbers, as columns in memory and as a journal on disk.

Each rank appends to a journal of its own, batch by batch; a line is there whole or not at all.  Sorting all journals by
key gives the same columns whatever number of ranks wrote them, in whatever order, with whatever stops in between.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from ..judges.base import Judged
from .records import FOLDER, Records, hash_of

__all__ = ["FOLDER", "Journal", "Key", "PairScores"]

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


class Journal(Records):
    """An unfinished evaluation: every finished key of every rank, and files of the metrics' rows beside them."""

    command, result, what = "evaluate", "evaluation.json", "evaluation"
    form = 4

    def __init__(self, folder: Path, rank: int, world_size: int) -> None:
        super().__init__(folder, rank, world_size)
        self._rows: dict[str, IO[bytes]] = {}

    def opened(self, count: int) -> None:
        """Rows of a line that is not whole go too."""
        for rows in self._row_files(self.rank).values():
            width = _header(rows)[0]
            os.truncate(rows, _HEADER.size + 4 * width * count if width else 0)

    def append(self, scores: PairScores) -> None:
        """Add the results of a batch.  Rows of metrics go first, so that no line is without them."""
        hashes: list[dict[str, str]] = [{} for _ in scores.keys]
        for name, rows in scores.rows.items():
            stream = self._rows.get(name)
            if stream is None:
                stream = self._rows[name] = self._row_path(self.rank, name).open("ab")
                if stream.tell() == 0:
                    stream.write(_HEADER.pack(rows.shape[0] * rows.shape[2], rows.shape[0]))
            content = np.ascontiguousarray(rows.transpose(1, 0, 2), dtype="<f4")
            for index, row in enumerate(content):
                hashes[index][name] = hash_of(row.tobytes())
            stream.write(content.tobytes())
            stream.flush()
        lines: list[list[Any]] = []
        for index, (prompt, seed) in enumerate(scores.keys):
            redrawn = float(scores.redrawn[index])
            judged = _sides(scores.judged, index)
            colors = [_or_none(color) for color in scores.colors[:, index].tolist()]
            distances = scores.distances[:, index].tolist()
            line = [prompt, seed, _or_none(redrawn), distances, judged, hashes[index], colors]
            lines.append(line)
        self.write(lines)

    def finished(self) -> set[Key]:
        """The keys that are done, by any rank."""
        return {(line[0], line[1]) for lines in self.read().values() for line in lines}

    def batches(self) -> Iterator[PairScores]:
        """What every rank wrote."""
        for rank, lines in self.read().items():
            judged = _columns([line[4] for line in lines]) if lines[0][4] is not None else None
            rows = {}
            for name, file in self._row_files(rank).items():
                width, models = _header(file)
                content = np.fromfile(file, dtype="<f4", offset=_HEADER.size, count=width * len(lines))
                found = [hash_of(row.tobytes()) for row in content.reshape(-1, width)] if width else []
                if found != [line[5].get(name) for line in lines] or width % models:
                    raise self.damaged(file)
                rows[name] = content.reshape(len(lines), models, width // models).transpose(1, 0, 2)
            yield PairScores(
                [(sys.intern(line[0]), line[1]) for line in lines],
                np.array([np.nan if line[2] is None else line[2] for line in lines], dtype=np.float32),
                np.array([line[3] for line in lines], dtype=np.float32).T,
                np.array([line[6] for line in lines], dtype=np.float32).T,  # None is NaN
                judged,
                rows,
            )

    def close(self) -> None:
        for stream in self._rows.values():
            stream.close()
        self._rows = {}
        super().close()

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
