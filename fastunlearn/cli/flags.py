"""From a config dataclass to flags, and from flags and YAML to a config."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import Config, expanded, field_type, flag_of, is_required, read_yaml
from ..errors import UserError


def add_flags(parser: argparse.ArgumentParser, kind: type[Config]) -> None:
    """Give the parser a flag for every field of ``kind``, and ``--config FILE``.  Flags not given stay absent."""
    parser.add_argument("--config", metavar="YAML", help="file with the same names; flags win over it")
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        accepted, choices = field_type(kind, field.name)
        default = "required" if is_required(field) else _shown(field.default)
        text = f"{field.metadata['help']} ({default})" if default else field.metadata["help"]
        options: dict[str, Any] = {"help": text.replace("%", "%%")}
        flag = flag_of(field)
        if field.metadata.get("positional"):
            # Absent when empty, so that what is missing is told in the same words as for flags.
            options["help"] = field.metadata["help"]
            parser.add_argument(field.name, metavar="RUN", nargs="*", default=argparse.SUPPRESS, **options)
            continue
        if accepted is tuple:
            options |= {"action": "append", "metavar": field.name.upper()}
            parser.add_argument(flag, dest=field.name, default=argparse.SUPPRESS, **options)
            continue
        if accepted is dict:
            options |= {"action": "append", "type": _named_value, "metavar": "NAME=VALUE"}
            parser.add_argument(flag, dest=field.name, default=argparse.SUPPRESS, **options)
            continue
        if accepted is bool:
            parser.add_argument(flag, dest=field.name, action="store_true", default=argparse.SUPPRESS, **options)
            continue
        title = field.metadata.get("group")
        if title is not None and title not in groups:
            groups[title] = parser.add_argument_group(title)
        place = parser if title is None else groups[title]
        metavar = {int: "N", float: "X"}.get(accepted, field.name.split("_")[-1].upper())
        if choices:
            options["choices"] = choices
        else:
            options["metavar"] = metavar
        read = _number_or(field.metadata["word"], accepted) if "word" in field.metadata else accepted
        place.add_argument(flag, dest=field.name, type=read, default=argparse.SUPPRESS, **options)


def build(kind: type[Config], flags: dict[str, Any]) -> Config:
    """The settings from flags, over those of the YAML file that ``flags["config"]`` names.

    Raises UserError, in one line, for an unreadable file, unknown names and values out of range.
    """
    values: dict[str, Any] = {}
    flags = dict(flags)
    path = flags.pop("config", None)
    if path is not None:
        values |= read_yaml(Path(expanded(path)), kind)
    for field in dataclasses.fields(kind):
        if field.name not in flags:
            continue
        value = flags.pop(field.name)
        if field_type(kind, field.name)[0] is dict and isinstance(value, list):
            value = {**values.get(field.name, {}), **dict(value)}  # one by one over those of the file
        values[field.name] = tuple(value) if isinstance(value, list) else value
    values |= flags
    missing = [
        "RUN" if field.metadata.get("positional") else flag_of(field)
        for field in dataclasses.fields(kind)
        if is_required(field) and field.name not in values
    ]
    if missing:
        raise UserError(f"missing: {', '.join(missing)}.")
    return kind(**values)


def _shown(default: Any) -> str:
    return "" if default is None or default is False or default is dataclasses.MISSING else f"default {default}"


def _number_or(word: str, number: Callable[[str], Any]) -> Callable[[str], Any]:
    """Reads a number, or the word that may stand in its place."""

    def read(text: str) -> Any:
        try:
            return text if text == word else number(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"wants a number or {word}, got {text!r}") from None

    return read


def _named_value(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign or not name.strip():
        raise argparse.ArgumentTypeError(f"wants NAME=VALUE, got {text!r}")
    return name.strip().replace("-", "_"), value.strip()
