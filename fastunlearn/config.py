"""The settings of a run: typed, documented and self-checking dataclasses, read from flags and YAML alike.

A field is a flag: ``micro_batch_size`` is ``--micro-batch-size`` on the command line and ``micro_batch_size:`` in YAML.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import yaml

from .errors import UserError, did_you_mean


class Settings(Protocol):
    """A dataclass of settings."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


Config = TypeVar("Config", bound=Settings)
LARGEST = 2**32 - 1  # of any number: what a seed can be, and more than anything else needs


def setting(help: str, default: Any = dataclasses.MISSING, **metadata: Any) -> Any:
    """A field of settings.  ``path=True``: it names a file or folder.  ``positional=True``: it has no flag.

    ``word``: a text that may stand in a number's place.
    """
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


def map_setting(help: str, flag: str) -> Any:
    """A setting of names and values: ``--flag NAME=VALUE``, as often as wanted, or a map in YAML."""
    return dataclasses.field(default_factory=dict, metadata={"help": help, "flag": flag})


def expand_home(config: Settings) -> None:
    """A `~` at the beginning of a path is the user's home, wherever the setting was written."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not field.metadata.get("path") or value is None:
            continue
        one_or_several = tuple(map(expanded, value)) if isinstance(value, tuple) else expanded(value)
        object.__setattr__(config, field.name, one_or_several)


def expanded(path: Any) -> Any:
    """A path with a `~` at its beginning as the user's home.  Raises UserError for a text that no path can be."""
    text = str(path) if isinstance(path, Path) else path
    if isinstance(text, str) and "\0" in text:
        raise UserError(f"the path {text!r} holds a zero byte, which no path can.")
    if not isinstance(text, str) or not text.startswith("~"):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError as error:
        raise UserError(f"the path {text!r} names a user that this machine does not have.") from error


def flag_of(field: dataclasses.Field[Any]) -> str:
    """The flag of a field: ``--micro-batch-size``."""
    return "--" + str(field.metadata.get("flag", field.name)).replace("_", "-")


def is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


class PlainLoader(yaml.SafeLoader):
    """YAML whose numbers are what they look like: 012 is twelve; 1:30, 0x10 and 2026-11-28 are texts.

    A name comes once.  PyYAML reads YAML 1.1: 012 is ten, 1:30 is ninety, and the last of two equal names wins.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012  # as the base class has it
        first: [
            (tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("int", "float", "timestamp")
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and names.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the name {key.value!r} comes twice", key.start_mark
                )
        return super().construct_mapping(node, deep)

    def whole(self, node: yaml.ScalarNode) -> int:
        return int(node.value)

    def real(self, node: yaml.ScalarNode) -> float:
        return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))


class PlainDumper(yaml.SafeDumper):
    """Puts quotes around a text that :class:`PlainLoader` would read as a number."""


_REAL = r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
for _kind, _pattern, _construct in (
    ("int", "[-+]?[0-9]+", PlainLoader.whole),
    ("float", _REAL, PlainLoader.real),
):
    _tag = f"tag:yaml.org,2002:{_kind}"
    for _side in (PlainLoader, PlainDumper):
        _side.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), list("-+.0123456789"))
    PlainLoader.add_constructor(_tag, _construct)


def to_yaml(config: Config) -> str:
    """The settings as YAML that ``--config`` reads back to an equal object."""
    return yaml.dump(dataclasses.asdict(config), Dumper=PlainDumper, sort_keys=False, allow_unicode=True)


def from_yaml(path: Path, kind: type[Config]) -> Config:
    """Read a file that :func:`to_yaml` wrote."""
    return kind(**read_yaml(path, kind))


def read_yaml(path: Path, kind: type[Config]) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), PlainLoader)  # a SafeLoader
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the config file {path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"the config file {path} must hold `name: value` lines.")
    known = [field.name for field in dataclasses.fields(kind)]
    values = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise UserError(
                f"the config file {path} has an unknown name {key!r}. Known: {', '.join(known)}."
                f"{did_you_mean(name, known)}"
            )
        values[name] = converted(kind, name, value, f"the config file {path}: `{name}`")
    return values


def converted(kind: type[Any], name: str, value: Any, where: str) -> Any:
    """A value as the field ``name`` of ``kind`` has it.  Raises UserError, beginning with ``where``, if it is none."""
    accepted, choices = field_type(kind, name)
    if value is None and kind.__dataclass_fields__[name].default is None:
        return None
    if isinstance(value, str) and value == kind.__dataclass_fields__[name].metadata.get("word"):
        return value
    if accepted is tuple:
        items = list(value) if isinstance(value, list | tuple) else [value]
        if not all(isinstance(item, str) for item in items):
            raise UserError(f"{where} must be a text or a list of texts, got {value!r}.")
        return tuple(items)
    if accepted is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{where} must be a map of names to values, got {value!r}.")
        return {str(key).replace("-", "_"): item for key, item in value.items()}
    if value is False and "no" in choices:  # YAML reads a bare `no` so
        return "no"
    try:
        if isinstance(value, bool) != (accepted is bool) or isinstance(value, list | dict | None):
            raise ValueError
        result = accepted(value)
        if (accepted is int and not isinstance(value, int) and float(value) != result) or (
            choices and result not in choices
        ):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        wanted = " or ".join(choices) if choices else accepted.__name__
        raise UserError(f"{where} must be {wanted}, got {value!r}.") from None
    return result


def check_types(config: Settings) -> None:
    """Bring each setting to the type of its field: a path to a text, a number of numpy's to Python's.

    Raises UserError for a value of another type.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Path):
            value = str(value)
        if isinstance(value, float) and not math.isfinite(value):
            continue  # its range is checked where it has one
        object.__setattr__(config, field.name, converted(type(config), field.name, value, f"`{field.name}`"))


Options = TypeVar("Options")


def with_options(base: Options, given: Mapping[str, Any], owner: str) -> Options:
    """``base``, an object of options or None for an owner without any, with the values that are given.

    A value may be a text, as the command line has it.  Raises UserError, in one line, for a name that is no option, for
    a value of another type and for a number out of its range.
    """
    fields = {field.name: field for field in dataclasses.fields(base)} if base is not None else {}  # type: ignore[arg-type]
    changed = {}
    for name, value in given.items():
        if name not in fields:
            has = f"It has: {', '.join(fields)}" if fields else "It has none"
            raise UserError(f"{owner} has no option {name!r}. {has}.{did_you_mean(name, fields)}")
        where = f"{owner}: the option `{name}`"
        accepted, _ = field_type(type(base), name)
        if isinstance(value, str) and accepted is bool and value.lower() in ("true", "false"):
            value = value.lower() == "true"
        if isinstance(value, str) and fields[name].default is None and value.lower() in ("none", "null"):
            value = None
        value = converted(type(base), name, value, where)
        _check_limits(value, fields[name].metadata, where)
        changed[name] = value
    return dataclasses.replace(base, **changed) if changed else base  # type: ignore[type-var]


def _check_limits(value: Any, limits: Mapping[str, Any], where: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where} must be a finite number, got {value}.")
    if "above" in limits and not value > limits["above"]:
        raise UserError(f"{where} must be above {limits['above']:g}, got {value}.")
    if "at_least" in limits and not value >= limits["at_least"]:
        raise UserError(f"{where} must be at least {limits['at_least']:g}, got {value}.")
    if "at_most" in limits and not value <= limits["at_most"]:
        raise UserError(f"{where} must be at most {limits['at_most']:g}, got {value}.")


def type_name(kind: type[Any], name: str) -> str:
    """What a field accepts, for people."""
    accepted, choices = field_type(kind, name)
    optional = " or none" if kind.__dataclass_fields__[name].default is None else ""
    return (" | ".join(choices) if choices else accepted.__name__) + optional


def field_type(kind: type[Any], name: str) -> tuple[type, tuple[str, ...]]:
    """(type, choices) of a field, None being left out of a union."""
    hint = typing.get_type_hints(kind)[name]
    if typing.get_origin(hint) in (types.UnionType, typing.Union):  # the latter of a Literal and None
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is Literal:
        return str, typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return tuple, ()
    if typing.get_origin(hint) in (dict, Mapping):
        return dict, ()
    return hint, ()


def at_least(config: Any, low: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not isinstance(value, str) and not low <= value <= LARGEST:
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


def check_weights_dtype(weights_dtype: str, mixed_precision: str) -> None:
    if weights_dtype == "bf16" and mixed_precision != "bf16":
        raise UserError("`--weights-dtype bf16` is for networks that run in bfloat16. Add `--mixed-precision bf16`.")
