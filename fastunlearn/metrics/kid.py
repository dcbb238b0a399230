"""KID: the kernel distance of Inception features (Binkowski et al. 2018, arXiv 1801.01401), unbiased."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..worlds import World
from .base import MetricFactory
from .inception import Inception
from .kinds import DistributionMetric, Float64s, network_of
from .libraries import library_of

_SUBSET, _SUBSETS = 1000, 100


def kernel_distance() -> Callable[[Float64s, Float64s], float]:
    """torchmetrics' unbiased polynomial MMD, over everything or over 100 random subsets of 1000."""
    poly_mmd = library_of("kid", "torchmetrics.image.kid", "torchmetrics").poly_mmd

    def compare(first: Float64s, second: Float64s) -> float:
        sides = [torch.from_numpy(side) for side in (first, second)]
        if len(first) <= _SUBSET:
            return float(poly_mmd(*sides))
        draws = torch.Generator().manual_seed(0)
        subsets = [
            poly_mmd(*(side[torch.randperm(len(side), generator=draws)[:_SUBSET]] for side in sides))
            for _ in range(_SUBSETS)
        ]
        return float(torch.stack(subsets).mean())

    return compare


def _load(device: str | torch.device, world: World | None) -> DistributionMetric:
    if world is not None:
        network, of = network_of(world, device)
        return DistributionMetric("kid", of, network.averaged, kernel_distance())
    inception = Inception("kid", device)
    return DistributionMetric("kid", inception.name, inception.embed, kernel_distance())


KID = MetricFactory("kid", "kernel distance of the same features (Binkowski et al. 2018), unbiased", _load)
