"""The bundled worlds: small models whose images a judge can read, with the prompts that belong to them."""

from __future__ import annotations

from pathlib import Path

from .base import Network, World

__all__ = ["Network", "World", "all_worlds", "get_world", "world_of", "world_with_model"]


def all_worlds() -> dict[str, World]:
    """Every world by name."""
    from .shapes import SHAPES_WORLD

    return {world.name: world for world in (SHAPES_WORLD,)}


def get_world(name: str) -> World | None:
    """The world called ``name``, which is also how its prompts are asked for."""
    return all_worlds().get(name)


def world_with_model(name: str) -> World | None:
    """The world that bundles a model called ``name``."""
    return next((world for world in all_worlds().values() if name in world.models), None)


def world_of(folder: Path) -> World | None:
    """The world whose images the pipeline in ``folder`` generates; None for a model of the user's own."""
    return next((world for world in all_worlds().values() if world.is_pipeline(folder)), None)
