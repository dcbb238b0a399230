"""Pairs a second of `evaluate-images` beside the lpips package, on two folders of PNG files, from disk to distances.

The package comes in two ways: as its own script for two folders does it (lpips_2dirs.py: one pair at a time, the graph
recorded), and in batches without a graph.  All three have the same random trunk, decode with Pillow, and must agree.

    python -m pytest benchmarks/bench_evaluation.py --benchmark-enable --benchmark-json .benchmarks/evaluation.json
    python benchmarks/readme.py --evaluation-speed .benchmarks/evaluation.json
"""

from __future__ import annotations

import itertools
import os
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastunlearn.evaluation.folder_scores import score_folders
from fastunlearn.evaluation.image_pairs import find_pairs
from fastunlearn.metrics.lpips import from_lpips
from fastunlearn.models.runtime import mend_torchvision

CASES = {"alex": (100, 256), "vgg": (16, 128)}  # net: pairs a round and their side
ROUNDS = 5  # of other images each, every way on each
BATCH_SIZE = 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """For each net and round a folder with the sides ``before`` and ``after``: smooth images with a little grain."""
    generator = torch.Generator().manual_seed(0)
    made: dict[str, list[Path]] = {net: [tmp_path_factory.mktemp(net) for _ in range(ROUNDS)] for net in CASES}
    for net, (count, side) in CASES.items():
        for folder, name in itertools.product(made[net], ("before", "after")):
            (folder / name).mkdir()
            for index in range(count):
                coarse = torch.rand(1, 3, side // 8, side // 8, generator=generator)
                smooth = torch.nn.functional.interpolate(coarse, side, mode="bicubic")[0]
                grain = 0.03 * torch.randn(smooth.shape, generator=generator)
                pixels = (smooth + grain).clamp(0, 1).mul(255).byte().permute(1, 2, 0).numpy()
                Image.fromarray(pixels).save(folder / name / f"{index:04}.png")
    return made


def package(net: str):
    mend_torchvision()
    lpips = pytest.importorskip("lpips")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return lpips.LPIPS(net=net, pnet_rand=True, verbose=False)


def pixel_values(path: Path) -> torch.Tensor:
    """As the package's ``im2tensor(load_image(path))``: (1, 3, H, W) in [-1, 1]."""
    image = np.asarray(Image.open(path).convert("RGB"))
    return torch.Tensor((image / (255.0 / 2) - 1)[:, :, :, None].transpose((3, 2, 0, 1)))


def script(model, folder: Path) -> np.ndarray:
    result = []
    for name in sorted(os.listdir(folder / "before")):
        if (folder / "after" / name).exists():
            distance = model.forward(pixel_values(folder / "before" / name), pixel_values(folder / "after" / name))
            result.append(float(distance))  # the script prints it
    return np.array(result)


@torch.no_grad()
def batched(model, folder: Path) -> np.ndarray:
    names, result = sorted(os.listdir(folder / "before")), []
    for start in range(0, len(names), BATCH_SIZE):
        sides = [
            torch.cat([pixel_values(folder / side / name) for name in names[start : start + BATCH_SIZE]])
            for side in ("before", "after")
        ]
        result.append(model(*sides).flatten().numpy())
    return np.concatenate(result)


def ours(distance, folder: Path) -> np.ndarray:
    pairs = find_pairs(folder / "before", folder / "after")
    return score_folders([pairs], distance, [], os.cpu_count() or 1)[0].distances


WAYS = {"script": script, "batched": batched, "evaluate-images": ours}


@pytest.mark.parametrize("net", CASES)
def test_two_folders(benchmark, folders, net):
    count, side = CASES[net]
    theirs = package(net)
    distance = from_lpips(package(net), f"lpips/{net}", micro_batch_size=BATCH_SIZE)
    scorers = {"script": theirs, "batched": theirs, "evaluate-images": distance}
    waiting = list(folders[net])
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}

    def measure(way: str, folder: Path) -> np.ndarray:
        started = time.monotonic()
        result = WAYS[way](scorers[way], folder)
        seconds[way].append(time.monotonic() - started)
        return result

    def beside():
        """The package's two ways, right before ours: this machine's speed may drift."""
        folder = waiting.pop()
        expected = measure("script", folder)
        np.testing.assert_allclose(measure("batched", folder), expected, atol=1e-5)
        return (folder, expected), {}

    def run(folder, expected):
        result = measure("evaluate-images", folder)
        np.testing.assert_allclose(result, expected, atol=1e-5)
        assert (result > 1e-3).all()

    benchmark.pedantic(run, setup=beside, rounds=len(waiting), iterations=1)
    times = {way: np.divide(seconds[way], seconds["evaluate-images"]) for way in ("script", "batched")}
    benchmark.extra_info |= {
        "net": net,
        "pairs": count * ROUNDS,
        "side": side,
        "rounds": ROUNDS,
        "threads": torch.get_num_threads(),
        "batch_size": BATCH_SIZE,
        "pairs_per_second": {way: round(count / float(np.median(taken)), 1) for way, taken in seconds.items()},
        "times_as_fast_as": {way: round(float(np.median(ratio)), 2) for way, ratio in times.items()},
        "range": {way: [round(float(end), 2) for end in (ratio.min(), ratio.max())] for way, ratio in times.items()},
    }
