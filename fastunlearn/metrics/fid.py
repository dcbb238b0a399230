"""FID: the Frechet distance of Inception features (Heusel et al. 2017, arXiv 1706.08500)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from ..worlds import World
from .base import MetricFactory
from .inception import Inception
from .kinds import DistributionMetric, network_of


def frechet_distance(features0: npt.ArrayLike, features1: npt.ArrayLike) -> float:
    """|m0 - m1|^2 + tr(S0 + S1 - 2 (S0 S1)^(1/2)) of features (N, F) and (M, F), in float64.

    With S = R^T R from a QR decomposition of the centered features, the trace of the root is the sum of the singular
    values of R0 R1^T: real and not negative, and precise also where there are fewer images than features, which the
    usual eigenvalues of S0 S1 are not.
    """
    first, second = np.asarray(features0, dtype=np.float64), np.asarray(features1, dtype=np.float64)
    means = [features.mean(axis=0) for features in (first, second)]
    roots = [
        np.linalg.qr(features - mean, mode="r") / np.sqrt(len(features) - 1)
        for features, mean in zip((first, second), means, strict=True)
    ]
    overlap = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    distance = np.square(means[0] - means[1]).sum() + sum(np.square(root).sum() for root in roots) - 2 * overlap
    return max(float(distance), 0.0)  # of equal sets, rounding can leave less than nothing


def _load(device: str | torch.device, world: World | None) -> DistributionMetric:
    if world is not None:
        network, of = network_of(world, device)
        return DistributionMetric("fid", of, network.averaged, frechet_distance)
    inception = Inception("fid", device)
    return DistributionMetric("fid", inception.name, inception.embed, frechet_distance)


FID = MetricFactory(
    "fid", "Frechet distance of Inception features (Heusel et al. 2017), clean-fid's network and resizing", _load
)
