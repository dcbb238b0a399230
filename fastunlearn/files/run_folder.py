"""The output folder of a command: one writer, never overwritten by accident, and only what is ours is ever deleted.

A folder of ours holds a record that says which command made it and which files it may hold.  A file that the record
does not name belongs to somebody else; while there is one, nothing in the folder is deleted.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import translate
from pathlib import Path

from ..errors import UserError
from .atomic import is_temporary, remove_temporaries, write_json

RECORD = ".fastunlearn-folder"
_FORMAT = "fastunlearn-folder-1"
_RESULTS = ("pairs.jsonl", "evaluation.json", "grid.png", "report.html")

#: What each command writes, by path in its folder; `*` is any name.  Names that a run chooses are added by ``own``.
_OWNED = {
    "train": (
        *(
            "config.yaml",
            "run-key.json",
            "run.json",
            "README.md",
            "metrics.jsonl",
            "mask.safetensors",
            "delta.safetensors",
            "pytorch_lora_weights.safetensors",
            *_RESULTS,
        ),
        *("checkpoints/step-*/state.json", "checkpoints/step-*/rank-*.safetensors"),
    ),
    "evaluate": (*_RESULTS, "journal/*"),
    "attack": ("attack.json", "attempts.jsonl", "prompts.csv", "grid.png", "report.html", "journal/*"),
    "evaluate-images": _RESULTS,
    "compare": ("compare.json", "compare.png", "compare.html"),
    "demo": ("demo.json", *_RESULTS),
    "apply": (),
    "export": (),
}

_RESUMABLE = ("train", "evaluate", "attack")


def check_output(folder: Path, command: str, *, overwrite: bool, resume: bool = False) -> None:
    """UserError unless the folder is new or empty, or is ours and is to be replaced or continued.  Changes nothing."""
    if folder.is_symlink() and not folder.exists():
        raise UserError(f"`--output` {folder} is a link to nothing. Name a folder.")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"`--output` {folder} is a file. Name a folder.")
    used = folder.is_dir() and _is_used(folder)
    if not used:
        if resume:
            raise UserError(f"`--resume`: {folder} holds no run. Leave the flag out to start one.")
    elif overwrite:
        _refuse_foreign(folder, "--overwrite", command)
    elif resume:
        _refuse_foreign(folder, "--resume", command)
    else:
        goes_on = ", `--overwrite`, or `--resume` to continue" if command in _RESUMABLE else " or `--overwrite`"
        raise UserError(f"`--output` {folder} is not empty. Use another folder{goes_on}.")


def prepare_output(folder: Path, command: str, *, overwrite: bool, resume: bool = False) -> None:
    """Make the folder, as :func:`check_output` allows it, with its record; one to be replaced is emptied."""
    check_output(folder, command, overwrite=overwrite, resume=resume)
    folder.mkdir(parents=True, exist_ok=True)
    if overwrite:
        clear_output(folder)
        (folder / RECORD).unlink(missing_ok=True)
    remove_temporaries(folder)
    own(folder, command)


def own(folder: Path, command: str, names: Iterable[str] = ()) -> None:
    """Name in the folder's record what ``command`` writes, and ``names``: files that a run chooses, by path in it.

    What the record named before stays.  To be called before the files are written.
    """
    before = _read_record(folder)
    owned = {*(before[1] if before else ()), *_OWNED[command], *names}
    write_json(folder / RECORD, {"format": _FORMAT, "command": command, "owned": sorted(owned)})


def files_below(folder: Path, name: str = "") -> list[str]:
    """Every file in ``folder`` as :func:`own` takes it, where the folder will have the path ``name`` in the output."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return [_escaped(f"{name}/{file}" if name else file) for file in files]


def clear_output(folder: Path, *, but: Sequence[str] = ()) -> None:
    """Delete what the folder's record names, but for files at or below these names.  The folder and its record stay."""
    if not _is_used(folder):
        return
    _refuse_foreign(folder, "--overwrite", None)
    for path in sorted(folder.rglob("*"), reverse=True):  # a folder's content first
        inside = path.relative_to(folder)
        if inside.parts[0] in but or inside.parts == (RECORD,):
            continue
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):  # it holds what is to stay
                path.rmdir()
        elif path.exists() or path.is_symlink():
            path.unlink()


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Holds the output folder, made if need be, against other commands; a new one that stays empty goes again.

    The lock is the operating system's, on the folder itself: it ends with the process, however that ends.
    Raises UserError where another process has it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle, f"another command is writing to {folder}. Wait for it, or use another `--output`.")
        yield
    finally:
        os.close(handle)
        if made and [entry.name for entry in folder.iterdir()] == [RECORD]:
            (folder / RECORD).unlink()
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def claimed_file(path: Path) -> Iterator[None]:
    """Holds the name of one output file against other commands, by a lock file beside it that goes at the end."""
    lock = path.with_name(f".fastunlearn-{path.name}.lock")
    handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        _lock(handle, f"another command is writing {path}. Wait for it, or use another `--output`.")
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _lock(handle: int, message: str) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(message) from None


def _refuse_foreign(folder: Path, flag: str, command: str | None) -> None:
    """A mistyped path must not cost anybody a file, nor may a run be continued that is another command's."""
    record = _read_record(folder)
    if record is None:
        raise UserError(f"`{flag}`: {folder} holds files that are no run of fastunlearn. Use another folder.")
    if flag == "--resume" and command is not None and record[0] != command:
        raise UserError(f"`--resume`: {folder} holds the output of `fastunlearn {record[0]}`. Use another folder.")
    foreign = _foreign(folder)
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise UserError(
            f"`{flag}`: {folder} holds files that are no run of fastunlearn ({foreign[0]}{more}). Move them away, or "
            "use another folder."
        )


def _foreign(folder: Path, prefix: str = "") -> list[str]:
    """The files in a folder of ours that its record does not name, links included.

    A folder in it that has a record of its own is judged by that one.
    """
    record = _read_record(folder)
    patterns = [re.compile(translate(name).replace(".*", "[^/]*")) for name in (record[1] if record else [])]
    foreign: list[str] = []

    def visit(inside: Path, name: str) -> None:
        for entry in sorted(inside.iterdir()):
            path = f"{name}{entry.name}"
            if entry.is_symlink():
                foreign.append(prefix + path)
            elif is_temporary(entry) or path == RECORD:
                continue
            elif entry.is_dir():
                if (entry / RECORD).is_file():
                    foreign.extend(_foreign(entry, f"{prefix}{path}/"))
                else:
                    visit(entry, f"{path}/")
            elif not any(pattern.fullmatch(path) for pattern in patterns):
                foreign.append(prefix + path)

    visit(folder, "")
    return foreign


def _read_record(folder: Path) -> tuple[str, list[str]] | None:
    """(command, patterns) of a folder of ours; None for another's."""
    path = folder / RECORD
    if path.is_symlink():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT or content["command"] not in _OWNED:
            return None
        owned = content["owned"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (content["command"], owned) if all(isinstance(name, str) for name in owned) else None


def _escaped(name: str) -> str:
    """A name as a pattern that matches it alone."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _is_used(folder: Path) -> bool:
    """Whether the folder holds more than its record and what a killed process was writing."""
    return not all(is_temporary(entry) or entry.name == RECORD for entry in folder.iterdir())
