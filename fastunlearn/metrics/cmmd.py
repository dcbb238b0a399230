"""CMMD: the kernel distance of CLIP features (Jayasumana et al. 2024, arXiv 2401.09603), times 1000."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
import torch

from ..errors import UserError
from ..worlds import World
from .base import MetricFactory
from .clip import Clip
from .kinds import DistributionMetric, network_of

_SIGMA, _SCALE = 10.0, 1000.0
_CHUNK = 2048  # rows of a kernel matrix held at once


def rbf_distance(features0: npt.ArrayLike, features1: npt.ArrayLike, sigma: float | None = None) -> float:
    """1000 times the squared MMD under exp(-|x - y|^2 / 2 sigma^2), the biased estimate that CMMD uses.

    ``features0``, ``features1``: (N, F) and (M, F).  ``sigma``: None takes the median distance between the first
    side's features.
    """
    first, second = (torch.as_tensor(np.asarray(f, dtype=np.float64)) for f in (features0, features1))
    if sigma is None:
        sigma = float(torch.nn.functional.pdist(first[:_CHUNK]).median())
        if sigma == 0:
            raise UserError(
                "all images of the original side have the same features, so CMMD has no scale to compare on: "
                "use prompts whose images differ, or leave the metric out"
            )

    def kernel(x: torch.Tensor, y: torch.Tensor) -> float:
        chunks = [torch.cdist(rows, y, compute_mode="donot_use_mm_for_euclid_dist") for rows in x.split(_CHUNK)]
        return float(sum(torch.exp(chunk.square() / (-2 * sigma**2)).sum() for chunk in chunks)) / (len(x) * len(y))

    return _SCALE * (kernel(first, first) + kernel(second, second) - 2 * kernel(first, second))


def _load(device: str | torch.device, world: World | None) -> DistributionMetric:
    if world is not None:
        network, of = network_of(world, device)
        return DistributionMetric("cmmd", of, network.pooled, rbf_distance)
    clip = Clip("ViT-L-14-336-quickgelu", "openai", "cmmd", device)
    return DistributionMetric("cmmd", clip.name, clip.embed, functools.partial(rbf_distance, sigma=_SIGMA))


CMMD = MetricFactory("cmmd", "kernel distance of CLIP features (Jayasumana et al. 2024), times 1000", _load)
