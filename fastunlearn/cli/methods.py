"""What `fastunlearn methods` prints: the table of all methods, or the page of one."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.table import Table

from ..config import type_name
from ..methods import Method, all_methods, broken_methods, get_method
from ..methods.recipe import Defaults
from .console import listed, pages, terminal


def methods_table() -> None:
    """Every method: what it does, paper, what it needs, what it changes."""
    rows = [
        (method.name, f"{method.summary}.\n{method.paper}. Needs {method.needs}. Changes {_changes(method)}.\n")
        for method in all_methods().values()
    ]
    out = terminal()
    out.print(listed(rows))
    out.print("`fastunlearn methods NAME` shows one, with its options.")
    for name, why in broken_methods().items():
        out.print(f"{name}: cannot be loaded ({why})")


def method_facts(name: str) -> dict[str, Any]:
    """What is known of a method, as JSON can hold it."""
    method, options = get_method(name), {}
    if method.options is not None:
        for field in dataclasses.fields(method.options):
            kind = type_name(method.options, field.name)
            options[field.name] = {"help": field.metadata.get("help", ""), "type": kind, "default": _default(field)}
    return {
        **{"name": method.name, "summary": method.summary, "paper": method.paper, "needs": method.needs},
        **{"anchor": method.anchor, "changes": _changes(method), "is_control": method.is_control, "options": options},
        "defaults": {key: _flat(method.defaults_for(key)) for key in method.defaults},
    }


def _changes(method: Method) -> str:
    """What a method changes by default, in words."""
    from ..training.selection import GROUPS

    selector = method.defaults["stable-diffusion"].trainable
    if method.name == "identity":
        return "nothing"
    by = f", by an adapter of rank {method.adapter_rank}" if method.adapter_rank else ""
    return f"{selector}: {GROUPS.get(selector, selector)}{by}"


def method_page(name: str) -> None:
    """One method: source and equation, what it needs, its options, and its defaults for each family."""
    method = get_method(name)
    out = terminal(soft_wrap=True)
    anchors = {"none": "takes none", "optional": "taken if given", "needed": "needed"}
    for label, text in (
        ("method", f"{method.name}: {method.summary}"),
        ("paper", method.paper),
        ("needs", method.needs),
        ("anchor", anchors[method.anchor]),
        ("changes", _changes(method)),
    ):
        out.print(f"{label:9} {text}")
    if method.about:
        out.print()
        pages(method.about)
    out.print()
    if method.options is None:
        out.print("It has no options of its own.")
    else:
        out.print("options of its own (`--set NAME=VALUE`, or a map `options:` in YAML):")
        for field in dataclasses.fields(method.options):
            help_text = field.metadata.get("help", "")
            kind = f"{type_name(method.options, field.name)}{_limits(field)}"
            out.print(f"  {field.name:20} {kind:16} {help_text} (default {_default(field)})")
    out.print()
    out.print(_defaults_table(method))


def _limits(field: dataclasses.Field[Any]) -> str:
    signs = {"above": ">", "at_least": ">=", "at_most": "<="}
    return "".join(f" {sign} {field.metadata[name]:g}" for name, sign in signs.items() if name in field.metadata)


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if callable(field.default_factory) else field.default


def _defaults_table(method: Method) -> Table:
    """Settings down, families across."""
    columns = {key: _flat(method.defaults_for(key)) for key in method.defaults}
    grid = Table("default of")
    for key in columns:
        grid.add_column(key, overflow="fold")  # no name of a part is cut
    for name in next(iter(columns.values())):
        values = [column[name] for column in columns.values()]
        if any(value is not None for value in values):
            grid.add_row(name, *("-" if value is None else str(value) for value in values))
    return grid


def _flat(defaults: Defaults) -> dict[str, Any]:
    values = dataclasses.asdict(defaults)
    return values | (values.pop("options") or {})
