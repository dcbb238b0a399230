"""The network that judges a world's images: one trunk, one head per attribute.

A world trains it on its own images and brings the weights.  Its features double as the world's perceptual trunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

VALID = ("no", "yes")  # the words of the head "valid", which every classifier has beside its attributes


class Classifier(nn.Module):
    """Convolution stages, each at half the width and height of the one before, and one linear head per attribute.

    ``heads``: attribute -> its words, ``valid`` among them.  ``widths``: channels of the stages.
    """

    def __init__(self, heads: Mapping[str, Sequence[str]], widths: Sequence[int] = (16, 32, 64, 96)) -> None:
        super().__init__()
        self.labels, self.widths = heads, tuple(widths)
        stages, channels = [], 3
        for width in widths:
            stages.append(
                nn.Sequential(
                    nn.Conv2d(channels, width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                    nn.Conv2d(width, width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                )
            )
            channels = width
        self.stages = nn.ModuleList(stages)
        self.heads = nn.ModuleDict({name: nn.Linear(2 * channels, len(labels)) for name, labels in heads.items()})

    def features(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """``pixel_values``: (B, 3, H, W) float in [-1, 1].  Returns the output of each stage."""
        features = []
        for index, stage in enumerate(self.stages):
            pixel_values = stage(F.avg_pool2d(pixel_values, 2) if index else pixel_values)
            features.append(pixel_values)
        return features

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """``pixel_values``: (B, 3, H, W) float in [-1, 1].  Returns logits (B, labels) by head."""
        pooled = self.pooled(pixel_values)
        return {name: head(pooled) for name, head in self.heads.items()}

    def pooled(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 2 C): mean and maximum of each channel of the last stage."""
        last = self.features(pixel_values)[-1]
        return torch.cat([last.mean(dim=(2, 3)), last.amax(dim=(2, 3))], dim=1)

    @torch.inference_mode()
    def predict(self, images: torch.Tensor, batch_size: int = 128) -> dict[str, torch.Tensor]:
        """``images``: (N, 3, H, W) uint8.  Returns (N,) int64 label indices by head, on the CPU."""
        device = next(self.parameters()).device
        chunks = [self(to_pixel_values(chunk.to(device))) for chunk in images.split(batch_size)]
        return {name: torch.cat([chunk[name].argmax(1) for chunk in chunks]).cpu() for name in self.labels}


def to_pixel_values(images: torch.Tensor) -> torch.Tensor:
    """uint8 [0, 255] to float32 [-1, 1]."""
    return images.float() / 127.5 - 1


def load_weights(classifier: Classifier, path: Path) -> Classifier:
    """The classifier with the weights of a safetensors file, in float32 and evaluation mode."""
    from safetensors.torch import load_file

    weights = load_file(path)
    classifier.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in weights.items()})
    return classifier.eval().requires_grad_(False)
