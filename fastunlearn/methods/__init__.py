"""The methods: each is data.  A file here turns a :class:`~fastunlearn.methods.recipe.Concept` into a recipe.

Other packages add methods through the entry-point group ``fastunlearn.methods``: an entry names a :class:`Method`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

from ..plugins import Registry, registry
from .recipe import Concept, Defaults, Recipe


@dataclasses.dataclass(frozen=True)
class Method:
    """A method's recipe and what a user must know of it.

    ``defaults``: by family of models or bundled world; ``stable-diffusion`` serves all that have none of their own,
    which a training's plan says.  A family without the group that they name takes its ``default_group``.
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
    is_reconstruction: bool = False  # of a paper whose full text was not at hand

    def defaults_for(self, key: str) -> Defaults:
        """The defaults of a family or a bundled world; those of ``stable-diffusion`` where it has none of its own."""
        return self.defaults.get(key, self.defaults["stable-diffusion"])


def all_methods() -> dict[str, Method]:
    """Every method by name: ours, then those of installed packages that can be loaded."""
    return dict(_registry().items)


def broken_methods() -> dict[str, str]:
    """Methods of installed packages that cannot be loaded, by name, and why."""
    return dict(_registry().broken)


def get_method(name: str) -> Method:
    """The method called ``name``; UserError lists what there is."""
    return _registry().get(name)


def _registry() -> Registry[Method]:
    from .controls import IDENTITY, PLACEBO
    from .esd import ESD
    from .neggrad import NEGGRAD
    from .ovw import OVW
    from .saddle import SADDLE
    from .salun import SALUN

    ours = {method.name: method for method in (ESD, OVW, SADDLE, SALUN, NEGGRAD, PLACEBO, IDENTITY)}
    return registry(
        "method",
        "fastunlearn.methods",
        ours,
        lambda one: isinstance(one, Method),
        wanted="a fastunlearn.methods.Method",
        command="methods",
    )
