"""What other packages add, by entry points: methods, families, metrics, judges, attacks.

A plug-in that cannot be loaded is named with its reason where it is asked for, and harms nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from .errors import UserError, did_you_mean, one_line

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Registry(Generic[T]):
    """Things by name.  ``broken``: those of other packages that cannot be loaded, and why."""

    kind: str  # what one of them is, in a sentence: "method"
    items: Mapping[str, T]
    broken: Mapping[str, str]
    command: str = ""  # which command lists them

    def get(self, name: str) -> T:
        """The one called ``name``.  Raises UserError that lists what there is."""
        if name in self.broken:
            raise UserError(
                f"the {self.kind} {name!r} of another package cannot be loaded: {self.broken[name]}. Mend that package."
            )
        if name not in self.items:
            where = f" (`fastunlearn {self.command}`)" if self.command else ""
            raise UserError(
                f"unknown {self.kind} {name!r}. There are: {', '.join(self.items)}{where}."
                f"{did_you_mean(name, self.items)}"
            )
        return self.items[name]


def registry(
    kind: str,
    group: str,
    ours: Mapping[str, T],
    is_one: Callable[[Any], bool],
    *,
    wanted: str,
    command: str = "",
) -> Registry[T]:
    """``ours`` and what installed packages add under the entry-point group ``group``; ours keep their names.

    ``is_one``: whether a loaded object is of the right kind, which ``wanted`` names for the error.
    """
    items: dict[str, T] = dict(ours)
    broken: dict[str, str] = {}
    for entry in entry_points(group=group):
        if entry.name in ours:
            broken.setdefault(f"{entry.name} of {entry.value}", f"the name {entry.name!r} is taken")
            continue
        try:
            loaded = _load(entry)
            if not is_one(loaded):
                raise TypeError(f"{entry.value} is a {type(loaded).__name__}, not {wanted}")
            items[entry.name] = loaded
        except (Exception, SystemExit) as error:
            # Another package's fault, an exit included, must not stop a command that does not use it.
            broken[entry.name] = f"{type(error).__name__}: {one_line(error)}"
    return Registry(kind, items, broken, command)


def _load(entry: EntryPoint) -> Any:
    """What a package prints while it is imported belongs to no output of ours."""
    with contextlib.redirect_stdout(io.StringIO()):
        return entry.load()
