"""Pairs a second of `evaluate-images` beside the lpips package, on two folders of PNG files, from disk to distances.

The package comes in two ways: as its own script for two folders does it (lpips_2dirs.py: one pair at a time, the graph
recorded), and in batches without a graph.  All three have the same random trunk, decode with Pillow, and must agree.

    python -m pytest benchmarks/bench_evaluation.py --benchmark-enable --benchmark-json .benchmarks/evaluation.json
    python benchmarks/readme.py --evaluation-speed .benchmarks/evaluation.json
"""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastunlearn.images import find_pairs, score
from fastunlearn.models import mend_torchvision
from fastunlearn.perceptual import from_lpips

# net: pairs and their side; one pass over so many is an average already
CASES = {"alex": (500, 256), "vgg": (40, 128)}
BATCH_SIZE = 8

_seconds: dict[tuple[str, str], float] = {}
_distances: dict[tuple[str, str], np.ndarray] = {}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with the sides ``before`` and ``after`` for each net: smooth pictures with a little grain."""
    made = {}
    for net, (count, side) in CASES.items():
        made[net] = tmp_path_factory.mktemp(net)
        for name, seed in (("before", 1), ("after", 2)):
            (made[net] / name).mkdir()
            generator = torch.Generator().manual_seed(seed)
            for place in range(count):
                coarse = torch.rand(1, 3, side // 8, side // 8, generator=generator)
                smooth = torch.nn.functional.interpolate(coarse, side, mode="bicubic")[0]
                grain = 0.03 * torch.randn(smooth.shape, generator=generator)
                pixels = (smooth + grain).clamp(0, 1).mul(255).byte().permute(1, 2, 0).numpy()
                Image.fromarray(pixels).save(made[net] / name / f"{place:04}.png")
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
    found = []
    for name in sorted(os.listdir(folder / "before")):
        if (folder / "after" / name).exists():
            distance = model.forward(pixel_values(folder / "before" / name), pixel_values(folder / "after" / name))
            found.append(float(distance))  # the script prints it
    return np.array(found)


@torch.no_grad()
def batched(model, folder: Path) -> np.ndarray:
    names, found = sorted(os.listdir(folder / "before")), []
    for start in range(0, len(names), BATCH_SIZE):
        sides = [
            torch.cat([pixel_values(folder / side / name) for name in names[start : start + BATCH_SIZE]])
            for side in ("before", "after")
        ]
        found.append(model(*sides).flatten().numpy())
    return np.concatenate(found)


def ours(distance, folder: Path) -> np.ndarray:
    return score(find_pairs(folder / "before", folder / "after"), distance, [], os.cpu_count() or 1).distances


WAYS = {"script": script, "batched": batched, "evaluate-images": ours}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("net", CASES)
def test_two_folders(benchmark, folders, net, way):
    count, side = CASES[net]
    scorer = package(net)
    if way == "evaluate-images":
        scorer = from_lpips(scorer, f"lpips/{net}", micro_batch_size=BATCH_SIZE)

    def run():
        started = time.monotonic()
        _distances[net, way] = WAYS[way](scorer, folders[net])
        _seconds[net, way] = time.monotonic() - started

    benchmark.pedantic(run, rounds=1, iterations=1)
    np.testing.assert_allclose(_distances[net, way], _distances[net, "script"], atol=1e-5)
    assert (_distances[net, way] > 1e-3).all()
    benchmark.extra_info |= {
        "net": net,
        "way": way,
        "pairs": count,
        "side": side,
        "threads": torch.get_num_threads(),
        "batch_size": 1 if way == "script" else BATCH_SIZE,
        "pairs_per_second": round(count / _seconds[net, way], 1),
        "times_the_script": round(_seconds[net, "script"] / _seconds[net, way], 2),
    }
