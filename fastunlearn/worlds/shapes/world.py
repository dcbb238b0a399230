"""The world of the bundled model: what an image can show, and how it is drawn.

An image is 64x64 RGB and shows one colored shape on a patterned gray background.  :class:`Scenes` holds the
parameters of a batch of images, :func:`sample_scenes` draws them from a seed, :func:`render` turns them into pixels
with analytic anti-aliasing (signed distance functions), so an image is a pure function of its parameters.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

SIZE = 64
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "crescent", "heart")
COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
BACKGROUNDS = ("plain", "striped", "checkered", "dotted", "gradient")

_RGB = torch.tensor(
    [
        [0.86, 0.10, 0.12],
        [0.98, 0.52, 0.06],
        [0.96, 0.88, 0.12],
        [0.12, 0.62, 0.20],
        [0.10, 0.82, 0.86],
        [0.12, 0.22, 0.84],
        [0.48, 0.14, 0.66],
        [0.98, 0.56, 0.76],
    ]
)


@dataclasses.dataclass
class Scenes:
    """Parameters of N images.  Lengths are pixels, angles radians, light levels are in [0, 1].

    ``shape``, ``color``, ``background``: (N,) int64, indices into the tuples above.  ``center``: (N, 2) as (x, y).
    ``radius``, ``angle``: (N,).  ``rgb``: (N, 3) the shape's color.  ``light``: (N, 2) the background's two grays.
    ``period``, ``phase``, ``tilt``: (N,), (N, 2), (N,) of the background's pattern.
    """

    shape: torch.Tensor
    color: torch.Tensor
    background: torch.Tensor
    center: torch.Tensor
    radius: torch.Tensor
    angle: torch.Tensor
    rgb: torch.Tensor
    light: torch.Tensor
    period: torch.Tensor
    phase: torch.Tensor
    tilt: torch.Tensor

    def __len__(self) -> int:
        return len(self.shape)

    def __getitem__(self, index: slice | torch.Tensor) -> Scenes:
        return Scenes(**{f.name: getattr(self, f.name)[index] for f in dataclasses.fields(self)})


def sample_scenes(count: int, seed: int, shapes: Sequence[str] = SHAPES) -> Scenes:
    """Draw ``count`` scenes from the seed; every (shape, color, background) is drawn equally often, up to one."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *size: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, *size, generator=generator)

    allowed = torch.tensor([SHAPES.index(name) for name in shapes])
    cells = len(allowed) * len(COLORS) * len(BACKGROUNDS)
    cell = torch.randperm(max(count, cells), generator=generator)[:count] % cells
    color = cell // len(allowed) % len(COLORS)
    light = uniform(0.50, 0.62)
    return Scenes(
        shape=allowed[cell % len(allowed)],
        color=color,
        background=cell // (len(allowed) * len(COLORS)),
        center=SIZE / 2 + uniform(-7.0, 7.0, 2),
        radius=uniform(15.0, 20.0),
        angle=uniform(-0.2, 0.2),
        rgb=(_RGB[color] + uniform(-0.03, 0.03, 3)).clamp(0, 1),
        light=torch.stack([light, light + uniform(0.24, 0.34)], dim=1),
        period=uniform(17.0, 20.0),
        phase=uniform(0.0, 1.0, 2),
        tilt=uniform(-0.1, 0.1),
    )


def render(scenes: Scenes) -> torch.Tensor:
    """Draw the scenes.  Returns (N, 3, 64, 64) uint8."""
    axis = torch.arange(SIZE, dtype=torch.float32) + 0.5
    x = axis[None, None, :].expand(len(scenes), SIZE, SIZE)
    y = axis[None, :, None].expand(len(scenes), SIZE, SIZE)
    background = _draw_background(scenes, x, y)
    inside = _coverage(_shape_distance(scenes, x, y))[:, None]
    image = background[:, None] * (1 - inside) + scenes.rgb[:, :, None, None] * inside
    return (image * 255).round().clamp(0, 255).to(torch.uint8)


def _coverage(distance: torch.Tensor) -> torch.Tensor:
    """The share of a pixel that lies inside, for a signed distance in pixels (negative inside)."""
    return (0.5 - distance).clamp(0, 1)


def _rotate(x: torch.Tensor, y: torch.Tensor, angle: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    return x * cos + y * sin, y * cos - x * sin


def _draw_background(scenes: Scenes, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Gray levels (N, 64, 64): dark + share * (light - dark), the share from the pattern."""
    u, v = _rotate(x - SIZE / 2, y - SIZE / 2, scenes.tilt)
    period = scenes.period[:, None, None]
    u = u / period + scenes.phase[:, 0, None, None]
    v = v / period + scenes.phase[:, 1, None, None]

    def band(t: torch.Tensor) -> torch.Tensor:
        """Signed distance in pixels to the half-period band of t."""
        return ((t % 1 - 0.5).abs() - 0.25) * period

    # The product of two signed bands, scaled back to about a pixel's slope at the edges.
    checker = -band(u) * band(v) / (period / 4)
    dots = torch.hypot(u % 1 - 0.5, v % 1 - 0.5) * period - 0.26 * period
    share = torch.stack(
        [
            torch.ones_like(u),
            _coverage(band(v)),
            _coverage(checker),
            1 - _coverage(dots),
            (y / SIZE).clamp(0, 1),
        ]
    )
    share = share[scenes.background, torch.arange(len(scenes))]
    dark, light = scenes.light[:, 0, None, None], scenes.light[:, 1, None, None]
    return dark + share * (light - dark)


def _polygon(radii: Sequence[float], start: float = -math.pi / 2) -> torch.Tensor:
    """Corners (V, 2) at equal angles, the k-th at ``radii[k]``."""
    angles = start + torch.arange(len(radii)) * (2 * math.pi / len(radii))
    return torch.tensor(radii)[:, None] * torch.stack([angles.cos(), angles.sin()], dim=1)


def _heart() -> torch.Tensor:
    t = torch.arange(40) * (2 * math.pi / 40)
    x = 16 * t.sin() ** 3
    y = 13 * t.cos() - 5 * (2 * t).cos() - 2 * (3 * t).cos() - (4 * t).cos()
    return torch.stack([x, -(y + 2.5)], dim=1) / 15.5


def _cross(arm: float) -> torch.Tensor:
    quarter = torch.tensor([(-arm, -1.0), (arm, -1.0), (arm, -arm)])
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    return torch.cat([quarter @ torch.linalg.matrix_power(turn, k) for k in range(4)])


_POLYGONS = {
    "square": torch.tensor([(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)]),
    "triangle": _polygon([1.12] * 3) + torch.tensor([0.0, 0.16]),
    "star": _polygon([1.15, 0.46] * 5),
    "cross": _cross(0.33),
    "heart": _heart(),
}


def _shape_distance(scenes: Scenes, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Signed distance in pixels from each pixel to its image's shape, (N, 64, 64)."""
    u, v = _rotate(x - scenes.center[:, 0, None, None], y - scenes.center[:, 1, None, None], scenes.angle)
    radius = scenes.radius[:, None, None]
    u, v = u / radius, v / radius
    distance = torch.empty_like(u)
    for index, name in enumerate(SHAPES):
        chosen = scenes.shape == index
        if chosen.any():
            distance[chosen] = _unit_distance(name, u[chosen], v[chosen])
    return distance * radius


def _unit_distance(name: str, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Signed distance to the shape of radius about 1 at the origin."""
    if name == "circle":
        return torch.hypot(u, v) - 0.95
    if name == "ring":
        return (torch.hypot(u, v) - 0.78).abs() - 0.24
    if name == "crescent":
        return torch.maximum(torch.hypot(u, v) - 1.05, 0.82 - torch.hypot(u - 0.5, v))
    corners = _POLYGONS[name]
    inside = torch.zeros_like(u, dtype=torch.bool)
    nearest = torch.full_like(u, math.inf)
    for (ax, ay), (bx, by) in zip(corners.tolist(), corners.roll(-1, 0).tolist(), strict=True):
        ex, ey = bx - ax, by - ay
        along = (((u - ax) * ex + (v - ay) * ey) / (ex * ex + ey * ey)).clamp(0, 1)
        nearest = torch.minimum(nearest, (u - ax - along * ex).square() + (v - ay - along * ey).square())
        if ey:
            inside ^= ((ay > v) != (by > v)) & (u < ex * (v - ay) / ey + ax)
    return torch.where(inside, -1.0, 1.0) * nearest.sqrt()
