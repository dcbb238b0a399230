"""What the judge of the shapes learns from: fresh renders only, never what a generator made."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..classifier import VALID, to_pixel_values
from .world import BACKGROUNDS, COLORS, SHAPES, SIZE, Scenes, render, sample_scenes

HEADS = {"shape": SHAPES, "color": COLORS, "background": BACKGROUNDS, "valid": VALID}


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
