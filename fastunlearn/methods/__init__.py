"""The methods: each is data.  A file turns a :class:`~fastunlearn.methods.recipe.Concept` into a recipe or an edit.

Other packages add methods through the entry-point group ``fastunlearn.methods``: an entry names a :class:`Method`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

from ..config import with_options
from ..plugins import Registry, registry
from .recipe import Concept, Defaults, Edit, Recipe


@dataclasses.dataclass(frozen=True)
class Method:
    """A method's recipe and what a user must know of it.

    ``defaults``: by family of models or bundled world; ``stable-diffusion`` serves all that have none of their own,
    which a training's plan says.  A family without the group that they name takes its ``default_group``.
    ``adapter_rank``: of the low-rank adapter that it trains by default; None for one that trains whole weights.
    ``options``: a frozen dataclass of the settings that this method alone has, each with a default
    (:func:`~fastunlearn.methods.recipe.option`).  A recipe reads them from ``concept.options``.
    """

    name: str
    paper: str
    needs: str
    summary: str
    recipe: Callable[[Concept], Recipe | Edit]
    defaults: Mapping[str, Defaults]
    options: type | None = None
    anchor: Literal["none", "optional", "needed"] = "none"
    adapter_rank: int | None = None
    needs_retain: bool = False
    is_control: bool = False
    is_reconstruction: bool = False  # of a paper whose full text was not at hand

    def __post_init__(self) -> None:
        if "stable-diffusion" not in self.defaults:
            raise TypeError(f"the method {self.name} has no defaults for stable-diffusion")
        if self.options is not None and not (isinstance(self.options, type) and dataclasses.is_dataclass(self.options)):
            raise TypeError(f"the options of the method {self.name} must be a dataclass, got {self.options!r}")
        for defaults in self.defaults.values():
            if defaults.options is not None and type(defaults.options) is not self.options:
                raise TypeError(
                    f"the method {self.name} has defaults with options of another kind: {defaults.options!r}"
                )

    def key_of(self, *keys: str) -> str:
        """The first of the keys, families or bundled worlds, that the method has defaults of; else stable-diffusion."""
        return next((key for key in keys if key in self.defaults), "stable-diffusion")

    def defaults_for(self, *keys: str) -> Defaults:
        """The defaults of a family or a bundled world, of which there may be several to ask in turn."""
        defaults = self.defaults[self.key_of(*keys)]
        if defaults.options is None and self.options is not None:
            defaults = dataclasses.replace(defaults, options=self.options())
        return defaults

    def with_options(self, defaults: Defaults, given: Mapping[str, Any]) -> Defaults:
        """``defaults`` with the options that are given, texts from the command line or values.

        Raises UserError for an option that the method lacks, listing those it has, and for a value of another type.
        """
        options = with_options(defaults.options, given, f"the method {self.name}")
        return dataclasses.replace(defaults, options=options)

    @property
    def about(self) -> str:
        """Source, equation and what differs from the authors' code: the text at the top of the method's file."""
        module = inspect.getmodule(self.recipe)
        return inspect.cleandoc(module.__doc__ or "") if module else ""


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
    from .ace import ACE
    from .advanchor import ADVANCHOR
    from .advunlearn import ADVUNLEARN
    from .concept_ablation import CONCEPT_ABLATION
    from .controls import IDENTITY, PLACEBO, PLACEBO_NOISE
    from .erasediff import ERASEDIFF
    from .esd import ESD
    from .holdfast import HOLDFAST
    from .instance import INSTANCE
    from .mace import MACE
    from .neggrad import NEGGRAD
    from .ovw import OVW
    from .race import RACE
    from .rece import RECE
    from .saddle import SADDLE
    from .salun import SALUN
    from .scissorhands import SCISSORHANDS
    from .selective_amnesia import SELECTIVE_AMNESIA
    from .speed import SPEED
    from .spm import SPM
    from .uce import UCE

    ours = (
        *(ESD, OVW, SADDLE, SALUN, NEGGRAD, UCE, RECE, SPEED, CONCEPT_ABLATION, ACE, ERASEDIFF, SCISSORHANDS),
        *(SELECTIVE_AMNESIA, INSTANCE, ADVANCHOR, RACE, ADVUNLEARN, SPM, MACE, HOLDFAST),
        *(PLACEBO, PLACEBO_NOISE, IDENTITY),
    )
    return registry(
        "method",
        "fastunlearn.methods",
        {method.name: method for method in ours},
        lambda one: isinstance(one, Method),
        wanted="a fastunlearn.methods.Method",
        command="methods",
    )
