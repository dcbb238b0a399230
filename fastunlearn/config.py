"""The settings of a run: typed, documented and self-checking dataclasses, read from flags and YAML alike.

A field is a flag: ``micro_batch_size`` is ``--micro-batch-size`` on the command line and ``micro_batch_size:`` in YAML.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import yaml

from .errors import UserError


class Settings(Protocol):
    """A dataclass of settings."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


Config = TypeVar("Config", bound=Settings)
LARGEST = 2**32 - 1  # of any number: what a seed can be, and more than anything else needs


def setting(help: str, default: Any = dataclasses.MISSING, **metadata: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


def to_yaml(config: Config) -> str:
    """The settings as YAML that ``--config`` reads back to an equal object."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def from_yaml(path: Path, kind: type[Config]) -> Config:
    """Read a file that :func:`to_yaml` wrote."""
    return kind(**read_yaml(path, kind))


def read_yaml(path: Path, kind: type[Config]) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the config file {path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"the config file {path} must hold `name: value` lines.")
    known = [field.name for field in dataclasses.fields(kind)]
    values = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise UserError(f"the config file {path} has an unknown name {key!r}. Known: {', '.join(known)}.")
        values[name] = _converted(kind, name, value, path)
    return values


def _converted(kind: type[Config], name: str, value: Any, path: Path) -> Any:
    accepted, choices = field_type(kind, name)
    if value is None and kind.__dataclass_fields__[name].default is None:
        return None
    if accepted is tuple:
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str) for item in items):
            raise UserError(f"the config file {path}: `{name}` must be a text or a list of texts, got {value!r}.")
        return tuple(items)
    if value is False and "no" in choices:  # YAML reads a bare `no` so
        return "no"
    try:
        if isinstance(value, bool) != (accepted is bool) or isinstance(value, list | dict | None):
            raise ValueError
        converted = accepted(value)
        if (accepted is int and float(value) != converted) or (choices and converted not in choices):
            raise ValueError
    except (ValueError, OverflowError):
        wanted = " or ".join(choices) if choices else accepted.__name__
        raise UserError(f"the config file {path}: `{name}` must be {wanted}, got {value!r}.") from None
    return converted


def field_type(kind: type[Config], name: str) -> tuple[type, tuple[str, ...]]:
    """(type, choices) of a field, None being left out of a union."""
    hint = typing.get_type_hints(kind)[name]
    if typing.get_origin(hint) in (types.UnionType, typing.Union):  # the latter of a Literal and None
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is Literal:
        return str, typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return tuple, ()
    return hint, ()


def at_least(config: Any, low: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not low <= value <= LARGEST:
            limit = f"at most {LARGEST}" if value > LARGEST else f"at least {low:g}"
            raise UserError(f"`--{name.replace('_', '-')}` must be {limit}, got {value}.")


def share(value: float | None, name: str) -> None:
    if value is not None and not 0 < value <= 1:
        raise UserError(f"`--{name.replace('_', '-')}` must be above 0 and at most 1, got {value:g}.")


def above(config: Any, low: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not low < value <= LARGEST:
            raise UserError(f"`--{name.replace('_', '-')}` must be a number above {low:g}, got {value:g}.")
