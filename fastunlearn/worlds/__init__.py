"""The bundled worlds: small models whose images a judge can read, with the prompts that belong to them.

``shapes`` comes with this package.  Other packages add worlds through the entry-point group ``fastunlearn.worlds``: an
entry names a :class:`World`.  The gallery is one of these.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from ..plugins import Registry, registry
from .base import Network, World

__all__ = [
    "Network",
    "World",
    "all_worlds",
    "broken_worlds",
    "check_installed",
    "get_world",
    "world_of",
    "world_with_model",
]

#: Worlds of ours that are packages of their own: how what they bring begins -> the package.
ELSEWHERE = {"gallery": "fastunlearn-gallery"}


def all_worlds() -> dict[str, World]:
    """Every world by name: ours, then those of installed packages that can be loaded."""
    return dict(_registry().items)


def broken_worlds() -> dict[str, str]:
    """Worlds of installed packages that cannot be loaded, by name, and why."""
    return dict(_registry().broken)


def _registry() -> Registry[World]:
    from .shapes import SHAPES_WORLD

    return registry(
        "world", "fastunlearn.worlds", {"shapes": SHAPES_WORLD}, lambda one: isinstance(one, World), wanted="a World"
    )


def check_installed(name: str) -> None:
    """UserError that says what to install, for the name of a model or world that a package of ours would bring."""
    for world, package in ELSEWHERE.items():
        if name.split("-")[0] != world or world in (found := _registry()).items:
            continue
        if world in found.broken:
            raise UserError(f"{package} cannot be loaded: {found.broken[world]}. Mend that package.")
        raise UserError(
            f"{name!r} comes with the package {package}, which is not installed: `pip install {package}`, or in a "
            f"clone `pip install packaging/{world}`."
        )


def get_world(name: str) -> World | None:
    """The world called ``name``, which is also how its prompts are asked for."""
    return all_worlds().get(name)


def world_with_model(name: str) -> World | None:
    """The world that bundles a model called ``name``."""
    return next((world for world in all_worlds().values() if name in world.models), None)


def world_of(folder: Path) -> World | None:
    """The world whose images the pipeline in ``folder`` generates; None for a model of the user's own."""
    return next((world for world in all_worlds().values() if world.is_pipeline(folder)), None)
