"""SSIM: structural similarity (Wang et al. 2004, IEEE Trans. Image Processing 13, 600-612), 1 for equal images."""

from __future__ import annotations

import torch

from ..worlds import World
from .base import MetricFactory
from .kinds import PairedMetric
from .libraries import library_of


def _load(device: str | torch.device, world: World | None) -> PairedMetric:
    """No network: the same for every world, on the CPU."""
    library = library_of("ssim", "torchmetrics.functional.image", "torchmetrics")

    def compare(original: torch.Tensor, unlearned: torch.Tensor) -> torch.Tensor:
        pairs = [
            library.structural_similarity_index_measure(
                one[None].float(), other[None].float(), data_range=255.0, reduction="none"
            )
            for one, other in zip(unlearned, original, strict=True)
        ]
        return torch.cat(pairs) if pairs else torch.zeros(0)

    return PairedMetric("ssim", "torchmetrics", compare)


SSIM = MetricFactory("ssim", "structural similarity of the pair (Wang et al. 2004), 1 for equal images", _load)
