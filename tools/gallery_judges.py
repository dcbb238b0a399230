"""Trains the gallery's judges on drawn scenes: the one that is shipped, and one of style that checks a claim of it."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence

import torch
from classifying import Judged, loss_of, remeasure, report, save
from fastunlearn_gallery.words import HEADS, STYLES, WIDTHS
from fitting import Fit, run
from gallery_art import COPIES, OTHER_COPIES, OTHERS, Scenes, draw
from torch.nn import functional as F

from fastunlearn.worlds.classifier import Classifier, load_weights, to_pixel_values

STYLE_JUDGE = "style-judge"
STYLE_HEADS = {"style": STYLES, "valid": HEADS["valid"]}


def _judged_batch(pool: Scenes, count: int, seed: int) -> Judged:
    """Scenes, a third of them spoilt.  Returns pixel values, labels by head, and which rows are valid."""
    chance = torch.Generator().manual_seed(seed)

    def uniform() -> torch.Tensor:
        return torch.rand(count, 1, 1, 1, generator=chance)

    rows = torch.randint(len(pool), (count,), generator=chance)
    pixels = to_pixel_values(pool.pixels[rows])
    pixels = torch.where(uniform() < 0.3, pixels.flip(3), pixels)
    valid = uniform() > 1 / 3
    pixels = torch.where(valid, pixels, _spoilt(pixels, chance))
    # What a good generator may do to an image: slight blur, noise, shift of contrast.
    soft = F.avg_pool2d(pixels, 3, stride=1, padding=1, count_include_pad=False)
    pixels = torch.lerp(pixels, soft, uniform() * 0.8)
    pixels = pixels + 0.08 * uniform() * torch.randn(pixels.shape, generator=chance)
    pixels = (pixels * (1 + 0.06 * (uniform() - 0.5))).clamp(-1, 1)
    labels = {"style": pool.style[rows], "object": pool.object[rows], "background": pool.background[rows]}
    return pixels, labels | {"valid": valid.flatten().long()}, valid.flatten()


def _spoilt(pixels: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
    """Turn every image into an invalid one, in one of eight ways."""
    count, size = len(pixels), pixels.shape[-1]
    other = pixels.roll(1, 0)
    left = (torch.arange(size) < size // 2).float()
    tiles = pixels.unflatten(2, (4, size // 4)).unflatten(4, (4, size // 4))
    tiles = tiles[:, :, torch.randperm(4, generator=chance)][:, :, :, :, torch.randperm(4, generator=chance)]
    corner = pixels[:, :, :1, :1].expand_as(pixels)  # the background's color
    field = F.interpolate(torch.randn(count, 1, 6, 6, generator=chance), size, mode="bicubic", align_corners=False)
    drawn = pixels.amin((2, 3), keepdim=True).expand_as(pixels)
    ways = torch.stack(
        [
            torch.where(field > 0.4, drawn, corner),  # a blob
            pixels * left + other * (1 - left),  # two halves that do not belong together
            (pixels + other) / 2,  # two images at once
            tiles.flatten(4, 5).flatten(2, 3),  # pieces in the wrong places
            pixels + 0.8 * torch.randn(pixels.shape, generator=chance),
            F.interpolate(F.avg_pool2d(pixels, 16), size, mode="bilinear", align_corners=False),  # nothing but a smear
            F.interpolate(torch.randn(count, 3, 8, 8, generator=chance), size, mode="bicubic", align_corners=False),
            torch.lerp(corner, torch.rand(count, 3, 1, 1, generator=chance) * 2 - 1, 0.3),  # nothing at all
        ]
    )
    way = torch.randint(len(ways), (count,), generator=chance)
    return ways[way, torch.arange(count)].clamp(-1, 1)


def _train_classifier(args: argparse.Namespace, name: str, heads: Mapping[str, Sequence[str]], pool: Scenes) -> None:
    """A classifier of these heads, ``valid`` one of them, trained on scenes alone; kept as ``name``.safetensors."""
    torch.manual_seed(args.seed)
    model = Classifier(heads, WIDTHS)

    def loss_at(step: int) -> torch.Tensor:
        return loss_of(model, _judged_batch(pool, 48, args.seed * 1_000_003 + step))

    fit = Fit({"classifier": model}, outer=("heads", "stages.0.0"), lr=0.01, outer_lr=3e-3)
    run(name, fit, loss_at, args.judge_steps, args.judge_steps // 2, args.work / f"{name}.pt", decay=0.98)
    remeasure(model, (_judged_batch(pool, 96, 10_000_000 + step) for step in range(40)))
    save(model, args.work / f"{name}.safetensors")


def train_judge(args: argparse.Namespace) -> None:
    path = args.work / "classifier.safetensors"
    if path.exists():
        return
    _train_classifier(args, "classifier", HEADS, draw(args.work / "sets", COPIES))
    model = load_weights(Classifier(HEADS, WIDTHS), path)
    batch = _judged_batch(draw(args.work / "sets", 2, args.seed + 1), 1200, 20_000_000)
    with torch.inference_mode():
        logits = [model(part) for part in batch[0].split(100)]
    report("judge", {head: torch.cat([one[head] for one in logits]) for head in HEADS}, batch)


def train_style_judge(args: argparse.Namespace) -> None:
    """A judge of style that never saw the held-out pairs: what it says of their drawings is the most that it can say.

    The judge that is shipped knows each of them by heart.
    """
    if (args.work / f"{STYLE_JUDGE}.safetensors").exists():
        return
    known, others = draw(args.work / "sets", COPIES), draw(args.work / "sets", OTHER_COPIES, words=OTHERS)
    known = known[known.without_held_out()]
    pool = Scenes(*(torch.cat([getattr(one, f.name) for one in (known, others)]) for f in dataclasses.fields(Scenes)))
    _train_classifier(args, STYLE_JUDGE, STYLE_HEADS, pool)
