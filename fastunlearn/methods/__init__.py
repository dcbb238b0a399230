"""The methods: each is data.  A file here turns a :class:`~fastunlearn.methods.recipe.Concept` into a recipe.

Other packages add methods through the entry-point group ``fastunlearn.methods``: an entry names a :class:`Method`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Literal

from ..errors import UserError
from .recipe import Concept, Defaults, Recipe


@dataclasses.dataclass(frozen=True)
class Method:
    """A method's recipe and what a user must know of it.

    ``defaults``: by family of models or bundled world; ``stable-diffusion`` serves all that have none of their own.
    """

    name: str
    paper: str
    needs: str
    summary: str
    recipe: Callable[[Concept], Recipe]
    defaults: Mapping[str, Defaults]
    anchor: Literal["none", "optional", "needed"] = "none"
    concept_alone: bool = False  # unless told otherwise, trains on the bare concept, as its authors do
    needs_retain: bool = False
    is_control: bool = False

    def defaults_for(self, key: str) -> Defaults:
        """The defaults of a family or a bundled world; those of ``stable-diffusion`` where it has none of its own."""
        return self.defaults.get(key, self.defaults["stable-diffusion"])


def all_methods() -> dict[str, Method]:
    """Every method by name: ours, then those of installed packages that can be loaded."""
    return _installed()[0]


def broken_methods() -> dict[str, str]:
    """Methods of installed packages that cannot be loaded, by name, and why."""
    return _installed()[1]


def get_method(name: str) -> Method:
    """The method called ``name``; UserError lists what there is."""
    methods, broken = _installed()
    if name in broken:
        raise UserError(f"the method {name!r} of another package cannot be loaded: {broken[name]}. Mend that package.")
    if name not in methods:
        raise UserError(f"unknown method {name!r}. There are: {', '.join(methods)} (`fastunlearn methods`).")
    return methods[name]


def _installed() -> tuple[dict[str, Method], dict[str, str]]:
    from .controls import IDENTITY, PLACEBO
    from .esd import ESD
    from .neggrad import NEGGRAD
    from .ovw import OVW
    from .saddle import SADDLE
    from .salun import SALUN

    methods = {method.name: method for method in (ESD, OVW, SADDLE, SALUN, NEGGRAD, PLACEBO, IDENTITY)}
    broken: dict[str, str] = {}
    for entry in entry_points(group="fastunlearn.methods"):
        if entry.name in methods:
            continue
        try:
            methods[entry.name] = entry.load()
        except Exception as error:  # another package's fault must not stop a run that does not use it
            broken[entry.name] = " ".join(f"{type(error).__name__}: {error}".split())
    return methods, broken
