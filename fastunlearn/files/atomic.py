"""Files and folders that are whole or absent under their names, and stay so through a power cut."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

#: What every temporary name of ours begins with.  No other file is ever taken for one.
TEMPORARY = ".fastunlearn-"
_SUFFIX = ".tmp"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside ``path``; on success it becomes ``path``, on any error it is gone."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{TEMPORARY}{path.name}.", suffix=_SUFFIX)
    os.close(handle)
    unfinished = Path(name)
    try:
        yield unfinished
        unfinished.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner may read
        _flush(unfinished)
        os.replace(unfinished, path)
        _flush(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """As :func:`whole_file` for a folder.  An older one keeps its name until the new one is there."""
    unfinished = temporary_folder(path)
    try:
        yield unfinished
        publish_folder(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def temporary_folder(path: Path) -> Path:
    """A new folder beside ``path``, under a temporary name."""
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{TEMPORARY}{path.name}.", suffix=_SUFFIX))
    folder.chmod(0o777 & ~_umask())
    return folder


def publish_folder(unfinished: Path, path: Path) -> None:
    """Give a finished folder its name.  What had the name before is deleted once the new one has it."""
    for entry in sorted(unfinished.rglob("*")):
        if entry.is_file():
            entry.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner may read
        _flush(entry)
    _flush(unfinished)
    if path.exists():
        _exchange(unfinished, path)
        shutil.rmtree(unfinished)
    else:
        os.rename(unfinished, path)
    _flush(path.parent)


def remove_folder(folder: Path) -> None:
    """Delete a folder so that no half of it is ever seen under its name."""
    temporary = folder.with_name(f"{TEMPORARY}{folder.name}.old{_SUFFIX}")
    shutil.rmtree(temporary, ignore_errors=True)
    folder.rename(temporary)
    shutil.rmtree(temporary, ignore_errors=True)


def is_temporary(entry: Path) -> bool:
    """Whether a process of ours left this while it wrote, and was killed."""
    return entry.name.startswith(TEMPORARY) and entry.name.endswith(_SUFFIX)


def remove_temporaries(folder: Path) -> None:
    """Delete what killed processes of ours were in the middle of writing into ``folder``."""
    for entry in folder.iterdir():
        if is_temporary(entry):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """``NaN`` is refused: it is no JSON, and no result."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> str:
    """One JSON object per line.  Returns the file's SHA-256."""
    digest = hashlib.sha256()
    with whole_file(path) as unfinished, unfinished.open("wb") as stream:
        for record in records:
            line = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
            digest.update(line)
            stream.write(line)
    return digest.hexdigest()


def _exchange(one: Path, other: Path) -> None:
    """Swap two names in one step where the system can; else the old folder steps aside first."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        names = os.fsencode(one), os.fsencode(other)
        if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
            return
    aside = other.with_name(f"{TEMPORARY}{other.name}.old{_SUFFIX}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(other, aside)
    try:
        os.rename(one, other)
    except BaseException:
        os.rename(aside, other)
        raise
    os.rename(aside, one)


def _flush(path: Path) -> None:
    """See that a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
