"""The three kinds of metrics: of sets of images, of pairs, and of image and prompt.

FID, KID and CMMD compare sets, not pairs, and FID falls with their number: compare values of equal numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ..batching import chunks, filled, filled_tensor, in_fixed_batches
from ..errors import UserError
from ..files.weights import hash_module
from ..worlds import Network, World
from .statistics import clustered_mean, difference

BATCH_SIZE = 32  # of every network pass, the last one filled: an image's features do not depend on its company

Float64s = npt.NDArray[np.float64]
#: Images (B, 3, H, W) uint8 on the CPU to vectors (B, F) float32 on the CPU.
Embed = Callable[[torch.Tensor], torch.Tensor]


class DistributionMetric:
    """Compares all images of one side with all of the other.  A row is the features of both, (2 F,).

    ``compare``: features (N, F) and (N, F), float64, to a number.
    """

    needs_prompts = False

    def __init__(self, name: str, of: str, embed: Embed, compare: Callable[[Float64s, Float64s], float]) -> None:
        self.name, self.of, self._embed, self._compare = name, of, embed, compare

    def measure(self, original: torch.Tensor, unlearned: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        sides = [in_fixed_batches(self._embed, images, BATCH_SIZE) for images in (original, unlearned)]
        return torch.cat(sides, dim=1)

    def aggregate(self, values: npt.NDArray[np.float32], prompts: Sequence[str]) -> dict[str, Any]:
        if len(values) < 2:
            raise UserError(f"the metric {self.name} compares sets of at least 2 images, got {len(values)}: add images")
        before, after = np.split(np.asarray(values, dtype=np.float64), 2, axis=1)
        return {"value": self._compare(before, after), "n_pairs": len(values), "of": self.of}


class PairedMetric:
    """One number per pair.  ``compare``: images (B, 3, H, W) uint8 of both sides to (B,)."""

    needs_prompts = False

    def __init__(self, name: str, of: str, compare: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        self.name, self.of, self._compare = name, of, compare

    def measure(self, original: torch.Tensor, unlearned: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return self._compare(original, unlearned)[:, None].float().cpu()

    def aggregate(self, values: npt.NDArray[np.float32], prompts: Sequence[str]) -> dict[str, Any]:
        mean = clustered_mean(values[:, 0], list(prompts))
        return {
            "value": mean.mean,
            "ci95": [mean.low, mean.high],
            "interval": mean.method,
            "n_pairs": mean.n,
            "n_prompts": mean.n_clusters,
            "of": self.of,
        }


class PromptMetric:
    """How well each side shows what the prompt says.  A row is both sides' match, (2,).

    ``match``: images (B, 3, H, W) uint8 on the CPU and B prompts to (B,) on the CPU; it gets batches of one size.
    """

    needs_prompts = True

    def __init__(self, name: str, of: str, match: Callable[[torch.Tensor, Sequence[str]], torch.Tensor]) -> None:
        self.name, self.of, self._match = name, of, match

    def measure(self, original: torch.Tensor, unlearned: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return torch.stack([self._side(images, prompts) for images in (original, unlearned)], dim=1)

    def _side(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        parts = zip(images.split(BATCH_SIZE), chunks(prompts, BATCH_SIZE), strict=True)
        matches = [
            self._match(filled_tensor(part, BATCH_SIZE), filled(words, BATCH_SIZE))[: len(part)]
            for part, words in parts
        ]
        return torch.cat(matches)

    def aggregate(self, values: npt.NDArray[np.float32], prompts: Sequence[str]) -> dict[str, Any]:
        before, after = (clustered_mean(values[:, side], list(prompts)) for side in (0, 1))
        change = difference(values[:, 1], values[:, 0], list(prompts))
        return {
            "value": after.mean,
            "ci95": [after.low, after.high],
            "original": before.mean,
            "change": change.mean,
            "change_ci95": [change.low, change.high],
            "interval": change.method,
            "n_pairs": after.n,
            "n_prompts": after.n_clusters,
            "of": self.of,
        }


def cosine_distance(embed: Embed) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """1 - cos of two images' vectors, for :class:`PairedMetric`."""

    def compare(original: torch.Tensor, unlearned: torch.Tensor) -> torch.Tensor:
        units = [nn.functional.normalize(in_fixed_batches(embed, side, BATCH_SIZE)) for side in (original, unlearned)]
        # Half the squared difference of unit vectors is 1 - cos, without cancelling where they are alike.
        return (units[0] - units[1]).square().sum(1) / 2

    return compare


def network_of(world: World, device: str | torch.device) -> tuple[Network, str]:
    """The world's network on ``device``, and its name with the first 12 hex digits of its weights' SHA-256."""
    assert world.load_network is not None
    network = world.load_network()
    network.module.to(device)
    return network, f"{network.name}@{hash_module(network.module)[:12]}"
