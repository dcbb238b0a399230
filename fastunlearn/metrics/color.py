"""A second distance, of another kind: how far colors move, where the perceptual distance is nearly blind to hue.

The two images' colors, as two clouds of points in CIELAB, are compared wherever in the image they stand: the sliced
Wasserstein distance of order 1 (Bonneel et al. 2015), on fixed directions, times 2, so that an image whose colors all
move by Delta E*ab (CIE 1976) is at about that distance: 2.3 is just noticeable.  It sees a turned hue, a tint, another
brightness, and another image's colors.  It does not see shape or texture, and not where things stand: read it beside
the other distance, which does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import nn

_CELLS = 32  # an image of more pixels a side is averaged, in linear light, to so many
_DIRECTIONS = 16
_FROM_LINEAR_RGB = (  # to XYZ, IEC 61966-2-1
    (0.4124564, 0.3575761, 0.1804375),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339, 0.1191920, 0.9503041),
)
_WHITE = (0.95047, 1.0, 1.08883)  # D65, 2 degrees


class ColorDistance:
    """The distance as :class:`~fastunlearn.metrics.distances.Distance` has it; it needs no weights."""

    metric = f"color-{_CELLS}-{_DIRECTIONS}"

    def distance(self, images0: torch.Tensor, images1: torch.Tensor) -> torch.Tensor:
        """(N,) float32 on the CPU of images (N, 3, H, W) uint8 and their partners; 0 for equal images."""
        return self.between(self.clouds(images0), self.clouds(images1))

    @torch.no_grad()
    def clouds(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Each image's colors, ready to be compared.  One by one, so that no bit depends on an image's company."""
        return [_projected(image[None]) for image in images]

    @torch.no_grad()
    def between(self, clouds0: Sequence[torch.Tensor], clouds1: Sequence[torch.Tensor]) -> torch.Tensor:
        """As :meth:`distance`, of what :meth:`clouds` made."""
        gaps = [(one - other).abs().mean((1, 2)) for one, other in zip(clouds0, clouds1, strict=True)]
        return 2 * torch.cat(gaps).float().cpu()


def _projected(images: torch.Tensor) -> torch.Tensor:
    """Each image's colors on each direction, sorted: (N, directions, cells)."""
    return (_directions(images.device) @ to_lab(images).flatten(2)).float().sort(dim=2).values


@functools.cache
def _directions(device: torch.device) -> torch.Tensor:
    """(directions, 3) float64: Fibonacci's sphere, evenly spread and the same everywhere."""
    steps = torch.arange(_DIRECTIONS, dtype=torch.float64)
    height = 1 - (2 * steps + 1) / _DIRECTIONS
    angle = steps * math.pi * (3 - math.sqrt(5))
    radius = (1 - height.square()).sqrt()
    return torch.stack([radius * angle.cos(), radius * angle.sin(), height], dim=1).to(device)


@functools.cache
def _to_xyz(device: torch.device) -> torch.Tensor:
    """(3, 3) float64: linear RGB to XYZ in units of the white."""
    matrix, white = (torch.tensor(values, dtype=torch.float64) for values in (_FROM_LINEAR_RGB, _WHITE))
    return (matrix / white[:, None]).to(device)


def to_lab(images: torch.Tensor) -> torch.Tensor:
    """Images (N, 3, H, W) uint8 in sRGB to CIELAB, float64, at most 32 cells a side."""
    value = images.double() / 255
    linear = torch.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    if max(images.shape[2:]) > _CELLS:
        linear = nn.functional.adaptive_avg_pool2d(linear, (min(images.shape[2], _CELLS), min(images.shape[3], _CELLS)))
    xyz = (_to_xyz(images.device) @ linear.flatten(2)).view(linear.shape)
    f = torch.where(xyz > (6 / 29) ** 3, xyz.clamp_min(1e-12) ** (1 / 3), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return torch.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], dim=1)
