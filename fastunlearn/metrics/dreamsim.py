"""DreamSim: a perceptual distance learned from human choices (Fu et al. 2023, arXiv 2306.09344)."""

from __future__ import annotations

import os

import torch

from ..files.images import to_pil
from ..files.weights import hash_module
from ..worlds import World
from .base import MetricFactory
from .kinds import PairedMetric, cosine_distance, network_of
from .libraries import fetching, library_of


class _Ensemble:
    """The ensemble that the dreamsim package recommends."""

    def __init__(self, device: str | torch.device) -> None:
        library = library_of("dreamsim", "dreamsim", "dreamsim")
        folder = os.path.join(torch.hub.get_dir(), "dreamsim")
        with fetching("dreamsim", "DreamSim ensemble", folder):
            os.makedirs(os.path.dirname(folder), exist_ok=True)
            self.model, self.preprocess = library.dreamsim(pretrained=True, device=str(device), cache_dir=folder)
        self.device = device
        self.name = f"dreamsim/ensemble@{hash_module(self.model)[:12]}"

    @torch.inference_mode()
    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) uint8 on the CPU to (B, F) float32 on the CPU."""
        shown = torch.cat([self.preprocess(image) for image in to_pil(images)])
        return self.model.embed(shown.to(self.device)).float().cpu()


def _load(device: str | torch.device, world: World | None) -> PairedMetric:
    if world is not None:
        network, of = network_of(world, device)
        return PairedMetric("dreamsim", f"{of} cosine", cosine_distance(network.pooled))
    model = _Ensemble(device)
    return PairedMetric("dreamsim", model.name, cosine_distance(model.embed))


DREAMSIM = MetricFactory("dreamsim", "DreamSim distance of the pair (Fu et al. 2023)", _load)
