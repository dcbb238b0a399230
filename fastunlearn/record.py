"""Result files as dataclasses: written and read here alone.

Each file begins with ``schema``, ``kind``, ``fastunlearn`` and ``sha256``: the number of its form, what it is, which
version wrote it, and a hash of all its other content (as JSON with sorted keys), by which damage is found.
Reading checks every key that this version knows and leaves out the others.  A file without a hash is read.  A number
that JSON lacks is a text in the free-form parts of a file: ``"inf"``, ``"-inf"`` or ``"nan"``.  Nowhere else may one
stand.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from . import __version__
from .errors import UserError, one_line
from .files.atomic import write_text

#: The form of the files that this version writes, and the newest that it reads.
SCHEMA = 1

_HASH = "sha256"

Share = Annotated[float, "share"]  # from 0 to 1

#: Of a field that a file leaves out where it is None.
OMITTED = {"omit": True}
#: Of a field of any JSON content, by name.
FREE = {"free": True}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """A result file.  ``kind`` is written into it; ``command`` makes it."""

    kind: ClassVar[str]
    command: ClassVar[str]
    _commands: ClassVar[dict[str, str]] = {}  # of every kind

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        Record._commands[cls.kind] = cls.command

    def to_dict(self) -> dict[str, Any]:
        """The content of the file.  Raises UserError for a number that is not finite."""
        head = {"schema": SCHEMA, "kind": self.kind, "fastunlearn": __version__}
        body = _written(self, "")
        return head | {_HASH: _hash_of(head | body)} | body

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        write_text(path, self.to_json())

    @classmethod
    def from_dict(cls, content: Any, where: str = "the record") -> Self:
        """The record from a file's content; ``where`` names the file.

        Raises UserError, in one line, for what an older or a newer version or another command wrote, and for damage.
        """
        again = f"Make it again with `fastunlearn {cls.command}`."
        if not isinstance(content, dict):
            raise UserError(f"{where} is damaged: it must hold an object, got {_short(content)}. {again}")
        if "schema" not in content:
            raise UserError(
                f"{where} is of version 0.1 or older, which wrote no schema; fastunlearn {__version__} reads schema "
                f"{SCHEMA}. {again}"
            )
        schema, kind, version = (content.get(key) for key in ("schema", "kind", "fastunlearn"))
        if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
            raise UserError(f"{where} is damaged: schema must be a number from 1 on, got {_short(schema)}. {again}")
        if schema > SCHEMA:
            raise UserError(
                f"{where} has schema {schema}, of fastunlearn {_text(version)}; fastunlearn {__version__} reads schema "
                f"{SCHEMA}. Update fastunlearn."
            )
        if kind != cls.kind:
            theirs = Record._commands.get(kind) if isinstance(kind, str) else None
            if theirs is None:
                raise UserError(f"{where} is damaged: it has the unknown kind {_short(kind)}. {again}")
            raise UserError(
                f"{where} is a result of `fastunlearn {theirs}` (schema {schema}), where one of `fastunlearn "
                f"{cls.command}` is wanted. Name such a one."
            )
        try:
            record: Self = _read_record(cls, content, "")
        except (UserError, RecursionError) as error:
            written = f"schema {schema}, fastunlearn {_text(version)}"
            raise UserError(f"{where} is damaged ({written}): {one_line(error)}. {again}") from None
        if content.get(_HASH, now := _hash_of(content)) != now:
            raise UserError(f"{where} is damaged: its content has changed since it was written. {again}")
        return record

    @classmethod
    def read(cls, path: Path) -> Self:
        """The record in a file.  Raises UserError like :meth:`from_dict`, and OSError where it cannot be read."""
        return cls.from_dict(read_json(path, cls.command), str(path))


def read_json(path: Path, command: str) -> Any:
    """The content of a file that ``command`` writes.  Raises UserError where it is no JSON."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError
        reason = one_line(error)
        raise UserError(f"{path} is damaged: {reason}. Make it again with `fastunlearn {command}`.") from None


def plain(value: Any) -> Any:
    """Any content as JSON holds it: lists for tuples, texts for the numbers that JSON lacks and for all else."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _hash_of(content: Mapping[str, Any]) -> str:
    """SHA-256 of everything but the hash itself, as it stands in a file."""
    rest = json.loads(json.dumps({name: value for name, value in content.items() if name != _HASH}))
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


# ---- between dataclasses and JSON ------------------------------------------------------------------------------------


def _written(record: Any, where: str) -> Any:
    """A value as JSON holds it.  Raises UserError for a number that is not finite outside of free-form parts."""
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        content = {}
        for field in dataclasses.fields(record):
            value, inside = getattr(record, field.name), f"{where}.{field.name}".lstrip(".")
            if value is None and field.metadata.get("omit"):
                continue
            if field.metadata.get("free"):
                if value:
                    content[field.name] = plain(value)
                continue
            content[field.name] = _written(value, inside)
        return content
    if isinstance(record, Mapping):
        return {key: _written(value, f"{where}.{key}") for key, value in record.items()}
    if isinstance(record, list | tuple):
        return [_written(value, where) for value in record]
    if isinstance(record, float) and not math.isfinite(record):
        raise UserError(f"{where} must be a finite number, got {record}")
    return record


def _read_record(kind: Any, content: Any, where: str) -> Any:
    """A dataclass from the object ``content``; ``where`` is its path in the file."""
    if not isinstance(content, dict):
        raise UserError(f"{where} must be an object, got {_short(content)}")
    values, hints = {}, _hints(kind)
    for field in dataclasses.fields(kind):
        inside = f"{where}.{field.name}".lstrip(".")
        if field.name in content:
            values[field.name] = _read(hints[field.name], content[field.name], inside)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{inside} is missing")
    return kind(**values)


def _read(hint: Any, value: Any, where: str) -> Any:
    if hint is Any:
        return plain(value)
    if dataclasses.is_dataclass(hint):
        return _read_record(hint, value, where)
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _read(next(part for part in parts if part is not type(None)), value, where)
    if origin is Annotated:
        number: float = _read(parts[0], value, where)
        if not 0 <= number <= 1:
            raise UserError(f"{where} must be from 0 to 1, got {number}")
        return number
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where} must be an object, got {_short(value)}")
        return {key: _read(parts[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is tuple:
        kinds = [parts[0]] * len(value) if isinstance(value, list) and parts[-1] is Ellipsis else parts
        if not isinstance(value, list) or len(value) != len(kinds):
            raise UserError(f"{where} must be a list{f' of {len(parts)}' if Ellipsis not in parts else ''}")
        pairs = enumerate(zip(kinds, value, strict=True))
        return tuple(_read(kind, item, f"{where}[{index}]") for index, (kind, item) in pairs)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise UserError(f"{where} must be a finite number, got {value}")
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        names = {float: "a number", int: "a whole number", str: "a text", bool: "true or false"}
        raise UserError(f"{where} must be {names[hint]}, got {_short(value)}")
    return value


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def _text(version: Any) -> str:
    return version if isinstance(version, str) else "(unknown version)"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else text[:37] + "..."
