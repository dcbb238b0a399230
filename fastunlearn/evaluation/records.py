"""Records that come one by one and are kept on disk: begun, stopped, continued, shared by several processes.

Each rank appends to a file of its own; a line is there whole or not at all, with a hash of its content.  What they are
of stands beside them, so that only the same work is continued.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, ClassVar

from ..errors import UserError
from ..files.atomic import write_json, write_text
from ..record import plain

FOLDER = "journal"


class Records:
    """Unfinished work in ``folder/journal``: what it is of, and every finished line of every rank.

    A subclass says: ``command``, which makes them; ``result``, the file of the finished work; ``what`` the work is
    called; ``form``, of the lines: records of another form cannot be continued.
    """

    command: ClassVar[str]
    result: ClassVar[str]
    what: ClassVar[str]
    form: ClassVar[int]

    def __init__(self, folder: Path, rank: int, world_size: int) -> None:
        self.folder = folder / FOLDER
        self.rank, self.world_size = rank, world_size
        self._stream: IO[bytes] | None = None

    @property
    def config_path(self) -> Path:
        """The settings that start other ranks and continue the work."""
        return self.folder / f"{self.command}.yaml"

    # ---- beginning ---------------------------------------------------------------------------------------------------

    def begin(self, spec: Mapping[str, Any], config: str, prompts: Sequence[Sequence[Any]], *, resume: bool) -> None:
        """Start, or continue what was begun with the same ``spec``.  For the first rank.

        ``config``: YAML that starts the other ranks and continues the work; ``prompts``: a table with its header.
        One that was stopped before it had begun is started.  Raises UserError where there is something else to
        continue, or finished work.
        """
        if resume and ((self.folder / "spec.json").exists() or (self.folder.parent / self.result).exists()):
            self._check_same(spec)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            text = io.StringIO(newline="")
            csv.writer(text, lineterminator="\n").writerows(prompts)
            write_text(self.folder / "prompts.csv", text.getvalue())
            write_text(self.config_path, config)
            write_json(self.folder / "spec.json", self._spec(spec))  # last: the other ranks wait for it
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
                f"`--resume`: {self.folder.parent} holds no unfinished {self.what}. Leave the flag out to start one."
            ) from None
        now = self._spec(spec)
        if written != self.form:
            raise UserError(
                f"the {self.what} in {self.folder.parent} was begun by another version of fastunlearn: its journal has "
                f"format {_short(written)}, this version continues format {self.form}. Start it anew with "
                "`--overwrite`."
            )
        differing = [name for name in dict.fromkeys([*before, *now]) if before.get(name) != now.get(name)]
        if differing:
            name = differing[0]
            raise UserError(
                f"the {self.what} in {self.folder.parent} has {name} = {_short(before.get(name))}, now it is "
                f"{_short(now.get(name))}. Give the same settings, or another `--output`."
            )

    def _spec(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        """As it stands in spec.json."""
        return {"format": self.form, **plain(spec)}

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
        self.opened(len(lines))

    def opened(self, count: int) -> None:
        """Called once this rank's file is open, with ``count`` whole lines."""

    # ---- writing and reading -----------------------------------------------------------------------------------------

    def write(self, lines: Sequence[list[Any]]) -> None:
        """Append lines of JSON content."""
        assert self._stream is not None
        self._stream.write("".join(map(_with_hash, lines)).encode())
        self._stream.flush()

    def read(self) -> dict[int, list[list[Any]]]:
        """The lines of every rank that has any, in the order in which they were written.

        Raises UserError where one has changed since then.
        """
        found = {int(path.stem): self._lines(path) for path in sorted(self.folder.glob("*.jsonl"))}
        return {rank: lines for rank, lines in found.items() if lines}

    def _lines(self, path: Path) -> list[list[Any]]:
        lines = [_checked(line) for line in _whole_lines(path)]
        if None in lines:
            raise self.damaged(path, lines.index(None) + 1)
        return [line for line in lines if line is not None]

    def damaged(self, path: Path, line: int | None = None) -> UserError:
        where = f" in line {line}" if line else ""
        return UserError(
            f"the journal {path} has changed{where} since it was written, so the {self.what} cannot be continued. "
            "Start it anew with `--overwrite`."
        )

    # ---- ending ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Let go of the files.  A journal without a single record is removed: there is nothing to continue."""
        begun = self._stream is not None
        if self._stream is not None:
            self._stream.close()
        self._stream = None
        if begun and self.rank == 0 and not any(path.stat().st_size for path in self.folder.glob("*.jsonl")):
            shutil.rmtree(self.folder, ignore_errors=True)

    def remove(self) -> None:
        """The work is finished and written."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def hash_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _with_hash(line: list[Any]) -> str:
    """A line of the journal: its record, and a hash of it."""
    return json.dumps([hash_of(json.dumps(line).encode()), line]) + "\n"


def _checked(line: bytes) -> list[Any] | None:
    """The record of a line; None where the line is not what was written."""
    try:
        told, content = json.loads(line)
        is_whole = told == hash_of(json.dumps(content).encode())
    except (ValueError, TypeError):
        return None
    record: list[Any] | None = content if is_whole else None
    return record


def _whole_lines(path: Path) -> list[bytes]:
    """The lines of a journal; one that was being written when its process was killed is left out."""
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 60 else text[:57] + "..."
