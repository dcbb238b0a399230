"""The perceptual distances there are, and how one is loaded by its name.

Each bundled world that brings a network is one, under the world's name; ``lpips-alex``, ``lpips-vgg`` and
``lpips-squeeze`` are those of the field.  Other packages add distances through the entry-point group
``fastunlearn.distances``: an entry names a :class:`DistanceFactory`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from ..errors import UserError
from ..plugins import Registry, registry
from ..worlds import World, all_worlds
from .lpips import PerceptualDistance, lpips_distance_of, network_distance

#: The distance of models that no bundled world belongs to.
DEFAULT = "lpips-alex"

_NETS = {"alex": "AlexNet, the field's choice", "vgg": "VGG16", "squeeze": "SqueezeNet 1.1"}


@runtime_checkable
class Distance(Protocol):
    """What an evaluation asks of a distance.  :class:`~fastunlearn.metrics.lpips.PerceptualDistance` is one.

    ``metric``: a name with a hash of all weights, so that two results of one name compare.
    """

    @property
    def metric(self) -> str: ...

    def distance(self, images0: torch.Tensor, images1: torch.Tensor) -> torch.Tensor:
        """(N,) float32 on the CPU of images (N, 3, H, W) uint8 and their partners; 0 for equal images."""


@dataclasses.dataclass(frozen=True)
class DistanceFactory:
    """A distance before its network is loaded.

    ``summary``: one line for lists.  ``load``: (trunk_weights, micro_batch_size) -> the distance; ``trunk_weights``
    is None unless ``takes_trunk_weights``.  A distance that is a ``torch.nn.Module`` is then moved to the device.
    """

    name: str
    summary: str
    load: Callable[[str | Path | None, int], Distance]
    takes_trunk_weights: bool = False


def all_distances() -> dict[str, DistanceFactory]:
    """Every distance by name: ours, then those of installed packages that can be loaded."""
    return dict(_registry().items)


def broken_distances() -> dict[str, str]:
    """Distances of installed packages that cannot be loaded, by name, and why."""
    return dict(_registry().broken)


def default_distance(world: World | None) -> str:
    """The name of the distance for images of ``world``; None stands for a model of the user's own."""
    return world.name if world and world.load_network else DEFAULT


def load_perceptual(
    name: str,
    device: str | torch.device = "cpu",
    *,
    trunk_weights: str | Path | None = None,
    micro_batch_size: int = 32,
) -> Distance:
    """A distance by name: a bundled world's, ``lpips-alex|vgg|squeeze``, or one that another package adds.

    ``trunk_weights``: for the ``lpips-`` ones, a safetensors file of the trunk's weights with torchvision's names;
    without it torchvision fetches them once.  ``micro_batch_size``: pairs per pass.  Raises ``UserError`` for an
    unknown name and when the weights cannot be had or do not fit.
    """
    factory = _registry().get(name)
    if trunk_weights is not None and not factory.takes_trunk_weights:
        raise UserError(f"the perceptual distance `{name}` brings its own trunk: leave `--trunk-weights` out")
    distance = check_distance(factory.load(trunk_weights, micro_batch_size))
    if isinstance(distance, torch.nn.Module):
        distance.to(device)
    return distance


def check_distance(one: Any) -> Distance:
    """``one``, which must have the parts of a :class:`Distance`.  Raises UserError that names the first it lacks."""
    if isinstance(one, Distance):
        return one
    missing = next(part for part in ("metric", "distance") if not hasattr(one, part))
    raise UserError(
        f"a {type(one).__name__} is no perceptual distance, it lacks `{missing}`: give a name or an object with the "
        "parts of fastunlearn.metrics.distances.Distance."
    )


def device_of(distance: Distance) -> torch.device:
    """Where the distance runs; the CPU for an object that does not say."""
    return torch.device(getattr(distance, "device", "cpu"))


def pairs_per_pass(distance: Distance) -> int:
    """How many pairs the distance takes at once; 32 for an object that does not say."""
    return int(getattr(distance, "micro_batch_size", 32))


def _registry() -> Registry[DistanceFactory]:
    ours = [_of_world(world) for world in all_worlds().values() if world.load_network]
    ours += [
        DistanceFactory(f"lpips-{net}", f"LPIPS (Zhang et al. 2018) on {what}", functools.partial(_lpips, net), True)
        for net, what in _NETS.items()
    ]
    return registry(
        "perceptual distance",
        "fastunlearn.distances",
        {distance.name: distance for distance in ours},
        lambda one: isinstance(one, DistanceFactory),
        wanted="a fastunlearn.metrics.distances.DistanceFactory",
        command="info",
    )


def _lpips(net: str, trunk_weights: str | Path | None, micro_batch_size: int) -> PerceptualDistance:
    return lpips_distance_of(net, trunk_weights, micro_batch_size=micro_batch_size)


def _of_world(world: World) -> DistanceFactory:
    def load(trunk_weights: str | Path | None, micro_batch_size: int) -> PerceptualDistance:
        assert world.load_network is not None
        return network_distance(world.load_network(), micro_batch_size=micro_batch_size)

    return DistanceFactory(world.name, f"the LPIPS form on the network of the bundled world `{world.name}`", load)
