"""The judge of the bundled world: names shape, color and background of an image and says whether it is a valid one.

Trained on fresh renders only, never on what a generator made.  Its features double as the world's perceptual trunk.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .world import BACKGROUNDS, COLORS, SHAPES, SIZE, Scenes, render, sample_scenes

HEADS = {"shape": SHAPES, "color": COLORS, "background": BACKGROUNDS, "valid": ("no", "yes")}
_WIDTHS = (16, 32, 64, 96)


class Classifier(nn.Module):
    """Four convolution stages (64, 32, 16, 8 pixels wide) and one linear head per attribute."""

    widths = _WIDTHS

    def __init__(self) -> None:
        super().__init__()
        stages, channels = [], 3
        for width in _WIDTHS:
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
        self.heads = nn.ModuleDict({name: nn.Linear(2 * channels, len(labels)) for name, labels in HEADS.items()})

    def features(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """``pixel_values``: (B, 3, H, W) float in [-1, 1].  Returns the output of each stage."""
        features = []
        for index, stage in enumerate(self.stages):
            pixel_values = stage(F.avg_pool2d(pixel_values, 2) if index else pixel_values)
            features.append(pixel_values)
        return features

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """``pixel_values``: (B, 3, 64, 64) float in [-1, 1].  Returns logits (B, labels) by head."""
        pooled = self.pooled(pixel_values)
        return {name: head(pooled) for name, head in self.heads.items()}

    def pooled(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 2 C): mean and maximum of each channel of the last stage."""
        last = self.features(pixel_values)[-1]
        return torch.cat([last.mean(dim=(2, 3)), last.amax(dim=(2, 3))], dim=1)

    @torch.inference_mode()
    def predict(self, images: torch.Tensor, batch_size: int = 128) -> dict[str, torch.Tensor]:
        """``images``: (N, 3, 64, 64) uint8.  Returns (N,) int64 label indices by head, on the CPU."""
        device = next(self.parameters()).device
        chunks = [self(to_pixel_values(chunk.to(device))) for chunk in images.split(batch_size)]
        return {name: torch.cat([chunk[name].argmax(1) for chunk in chunks]).cpu() for name in HEADS}


def to_pixel_values(images: torch.Tensor) -> torch.Tensor:
    """uint8 [0, 255] to float32 [-1, 1]."""
    return images.float() / 127.5 - 1


def training_batch(count: int, seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Fresh renders, a third of them spoilt.  Returns pixel values, labels by head, and which rows are valid."""
    generator = torch.Generator().manual_seed(seed)
    scenes = sample_scenes(count, seed)
    pixels = to_pixel_values(render(scenes))
    valid = torch.rand(count, generator=generator) > 1 / 3
    pixels = torch.where(valid[:, None, None, None], pixels, _spoil(scenes, pixels, generator))
    # What a good generator may do to an image: slight blur, noise, shift of contrast.
    blur = torch.rand(count, 1, 1, 1, generator=generator) * 0.8
    pixels = torch.lerp(pixels, F.avg_pool2d(pixels, 3, stride=1, padding=1, count_include_pad=False), blur)
    noise = torch.rand(count, 1, 1, 1, generator=generator) * 0.08
    pixels = pixels + noise * torch.randn(pixels.shape, generator=generator)
    gain = 1 + 0.1 * (torch.rand(count, 1, 1, 1, generator=generator) - 0.5)
    labels = {"shape": scenes.shape, "color": scenes.color, "background": scenes.background, "valid": valid.long()}
    return (pixels * gain).clamp(-1, 1), labels, valid


def _spoil(scenes: Scenes, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turn every image into an invalid one, by one of six ways."""
    count = len(pixels)
    other = pixels.roll(1, 0)
    coarse = torch.randn(count, 1, 6, 6, generator=generator)
    field = F.interpolate(coarse, SIZE, mode="bicubic", align_corners=False)
    blob = (field > 0.4).float()
    paint = scenes.rgb[:, :, None, None] * 2 - 1
    gray = pixels.mean(dim=1, keepdim=True).expand_as(pixels)
    noise = torch.randn(pixels.shape, generator=generator)
    left = (torch.arange(SIZE) < SIZE // 2).float()
    ways = torch.stack(
        [
            gray * (1 - blob) + paint * blob,  # a blob of the color, no shape
            pixels * left + other * (1 - left),  # two halves that do not belong together
            (pixels + other) / 2,  # two images at once
            pixels + 0.8 * noise,  # noise on top
            F.interpolate(F.avg_pool2d(pixels, 16), SIZE, mode="bilinear", align_corners=False),  # nothing but a smear
            F.interpolate(torch.randn(count, 3, 8, 8, generator=generator), SIZE, mode="bicubic", align_corners=False),
        ]
    )
    way = torch.randint(len(ways), (count,), generator=generator)
    return ways[way, torch.arange(count)].clamp(-1, 1)
