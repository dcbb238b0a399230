"""What the registry knows of a judge before it is made: what it is for, what it needs, whether that is here."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import UserError


def _nothing(option: str) -> str:
    return ""


def _yes() -> str:
    return "yes"


@dataclasses.dataclass(frozen=True)
class JudgeFactory:
    """Makes a judge from a device and the text behind the colon of ``--judge NAME:OPTION``.

    ``purpose``: what the judge is for.  ``needs``: packages and weights, with their sizes, for people.  ``license``: of
    code and weights.  ``option``: what may stand behind the colon; empty where nothing may.  ``about``: thresholds,
    limits and sources, for the page of the judge.  ``modules``: what must be importable, and the package that brings
    each.  ``install``: the command that brings them.  ``also``: option -> what else is missing, empty where nothing.
    ``here``: whether it can run where nothing is known to be missing, for people.
    """

    name: str
    purpose: str
    needs: str
    license: str
    make: Callable[[Any, str], Any]
    option: str = ""
    about: str = ""
    modules: Mapping[str, str] = dataclasses.field(default_factory=dict)
    install: str = "pip install 'fastunlearn[judges]'"
    also: Callable[[str], str] = _nothing
    here: Callable[[], str] = _yes

    def missing(self, option: str = "") -> str:
        """What is missing here and how to get it, in a clause; empty where the judge can run.  Loads nothing."""
        absent = [package for module, package in self.modules.items() if not _is_installed(module)]
        if absent:
            return f"the package {' and '.join(absent)}, which is not installed: {self.install}"
        return self.also(option)

    def __call__(self, device: Any, option: str = "") -> Any:
        """The judge.  Raises UserError where something is missing, and for an option that is none."""
        if option and not self.option:
            raise UserError(f"the judge `{self.name}` takes no option, got {option!r}. Write `--judge {self.name}`.")
        if missing := self.missing(option):
            raise UserError(f"the judge {self.name} needs {missing}.")
        return self.make(device, option)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def threshold_of(name: str, option: str, default: float) -> float:
    """The threshold that an option says.  Raises UserError for what is no number from 0 to 1."""
    if not option:
        return default
    try:
        threshold = float(option)
    except ValueError:
        threshold = -1.0
    if not 0 < threshold < 1:
        raise UserError(f"`--judge {name}:{option}`: the threshold must be a number above 0 and below 1.")
    return threshold
