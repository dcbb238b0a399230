"""The families of models that can be served: ours, and those of other packages.

Other packages add one through the entry-point group ``fastunlearn.families``: an entry names a subclass of
:class:`~fastunlearn.models.base.Model`.
"""

from __future__ import annotations

from ..errors import UserError
from ..plugins import Registry, registry
from .auraflow import AuraFlow
from .base import Model
from .flux import Flux
from .lumina2 import Lumina2
from .pixart import PixArtSigma
from .qwen_image import QwenImage
from .sana import Sana
from .sd import StableDiffusion
from .sd3 import StableDiffusion3
from .sdxl import StableDiffusionXL
from .z_image import ZImage

OURS: tuple[type[Model], ...] = (
    StableDiffusion,
    StableDiffusionXL,
    StableDiffusion3,
    Flux,
    PixArtSigma,
    Sana,
    Lumina2,
    AuraFlow,
    QwenImage,
    ZImage,
)


def all_families() -> dict[str, type[Model]]:
    """Every family by name: ours, then those of installed packages that can be loaded."""
    return dict(_registry().items)


def family_of(pipeline: str, name: str) -> type[Model]:
    """The family that serves the diffusers class ``pipeline`` of the model ``name``.  UserError if none does."""
    families = _registry()
    for family in families.items.values():
        if pipeline in family.pipelines:
            return family
    supported = ", ".join(one for family in families.items.values() for one in family.pipelines)
    broken = "".join(f" {entry} of another package cannot be loaded: {why}." for entry, why in families.broken.items())
    raise UserError(
        f"{name} is a {pipeline}, a family not supported. Supported: {supported}; or, for an evaluation in Python, "
        f"pass a function (prompts, noise) -> images.{broken}"
    )


def _registry() -> Registry[type[Model]]:
    ours = {family.family: family for family in OURS}
    return registry(
        "family",
        "fastunlearn.families",
        ours,
        lambda one: isinstance(one, type) and issubclass(one, Model),
        wanted="a subclass of fastunlearn.models.base.Model",
    )
