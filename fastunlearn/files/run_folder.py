"""The folder of a run: never overwritten by accident, and every file in it whole or absent."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..config import DEMO_METHODS, TrainConfig, from_yaml

_OURS = {
    *("config.yaml", "run.json", "metrics.jsonl", "checkpoints", "mask.safetensors", "model", "delta.safetensors"),
    *("pairs.jsonl", "evaluation.json", "grid.png", "report.html", "demo.json", "journal"),
    *("compare.json", "compare.png", "compare.html"),
}
_TELLING = ("config.yaml", "pairs.jsonl", "evaluation.json", "demo.json", "journal", "compare.json")


def check_output(folder: Path, *, overwrite: bool, resume: bool = False) -> None:
    """ValueError unless the folder is new or empty, or is ours and is to be replaced or continued.  Changes nothing."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`--output` {folder} is a file. Name a folder.")
    used = folder.is_dir() and _is_used(folder)
    if used and overwrite:
        _refuse_foreign(folder)
    elif used and not resume:
        raise ValueError(
            f"`--output` {folder} is not empty. Use another folder, `--overwrite`, or `--resume` to continue."
        )
    elif resume and not used:
        raise ValueError(f"`--resume`: {folder} holds no run. Leave the flag out to start one.")


def prepare_output(folder: Path, *, overwrite: bool, resume: bool = False) -> None:
    """Make the folder, as :func:`check_output` allows it; one to be replaced is emptied."""
    check_output(folder, overwrite=overwrite, resume=resume)
    folder.mkdir(parents=True, exist_ok=True)
    if overwrite:
        clear_output(folder)
    remove_scraps(folder)


def clear_output(folder: Path, *, but: Sequence[str] = ()) -> None:
    """Remove what an earlier run left, as :func:`check_output` allows it, but for these names.  The folder stays."""
    if _is_used(folder):
        _refuse_foreign(folder)
    for entry in folder.iterdir():
        if entry.name not in but:
            _remove(entry)


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Holds the output folder, made if need be, against other evaluations; a new one that stays empty goes again.

    The lock is the operating system's, on the folder itself: it ends with the process, however that ends.
    Raises ValueError where another process has it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"another evaluation is writing to {folder}. Wait for it, or use another `--output`."
            ) from None
        yield
    finally:
        os.close(handle)
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


def _refuse_foreign(folder: Path) -> None:
    """`--overwrite` deletes only what is all ours: a mistyped path must not cost anybody a home directory."""
    runs = [folder / name for name in DEMO_METHODS if (folder / name).is_dir() and _is_run(folder / name)]
    if not _is_run(folder, but=runs):
        raise ValueError(f"`--overwrite`: {folder} holds files that are no run of fastunlearn. Empty it yourself.")


def _is_run(folder: Path, but: Sequence[Path] = ()) -> bool:
    """Whether all files are named as ours, but for ``but``, the runs of a demo, and something tells that they are."""
    entries = [entry for entry in folder.iterdir() if entry not in but and not _is_scrap(entry)]
    config = folder / "config.yaml"
    if config.exists():
        try:
            from_yaml(config, TrainConfig)
        except (ValueError, TypeError):
            return False
    results = [entry for entry in entries if _is_result(entry)]
    telling = any((folder / name).exists() for name in _TELLING)
    return all(entry.name in _OURS or entry in results for entry in entries) and (telling or bool(but) or bool(results))


def _is_result(entry: Path) -> bool:
    """Whether this is the folder of one of the models that were evaluated together."""
    names = {path.name for path in entry.iterdir()} if entry.is_dir() else set()
    return "evaluation.json" in names and names <= {"pairs.jsonl", "evaluation.json"}


def _is_used(folder: Path) -> bool:
    """Whether the folder holds more than scraps."""
    return not all(_is_scrap(entry) for entry in folder.iterdir())


def _is_scrap(entry: Path) -> bool:
    """Whether a killed run left this while it wrote."""
    return entry.name.startswith(".") and entry.suffix == ".tmp"


def remove_scraps(folder: Path) -> None:
    """Delete what killed runs were in the middle of writing."""
    for entry in folder.iterdir():
        if _is_scrap(entry):
            _remove(entry)


def _remove(entry: Path) -> None:
    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside ``path``; on success it becomes ``path``, on any error it is gone."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    unfinished = Path(name)
    try:
        unfinished.chmod(0o666 & ~_umask())
        yield unfinished
        _flush(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """As :func:`whole_file` for a new folder; an older one of that name is replaced at the end."""
    unfinished = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        unfinished.chmod(0o777 & ~_umask())
        yield unfinished
        flush_folder(unfinished)
        if path.exists():
            shutil.rmtree(path)
        os.replace(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def flush_folder(folder: Path) -> None:
    """See that all files below the folder are on the disk, readable as the user's other files are."""
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner may read
            _flush(file)


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """``NaN`` is refused: it is no JSON, and no result."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line."""
    with whole_file(path) as unfinished, unfinished.open("w", encoding="utf-8") as stream:
        for record in records:
            stream.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")


def _flush(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
