"""CLIPScore: how well an image shows its prompt (Hessel et al. 2021, arXiv 2104.08718), as 100 times the cosine."""

from __future__ import annotations

import torch

from ..worlds import World
from .base import MetricFactory
from .clip import Clip
from .kinds import PromptMetric, network_of


def _load(device: str | torch.device, world: World | None) -> PromptMetric:
    if world is not None:
        network, of = network_of(world, device)
        return PromptMetric("clip-score", f"{of} heads", network.match)
    clip = Clip("ViT-B-32-quickgelu", "openai", "clip-score", device)
    return PromptMetric("clip-score", clip.name, clip.match)


CLIP_SCORE = MetricFactory("clip-score", "100 times the cosine of image and prompt in CLIP (Hessel et al. 2021)", _load)
