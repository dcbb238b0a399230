"""The native library on a CPU beside its strongest peers and beside plain torch, interleaved, with 1 and 2 threads.

    python benchmarks/bench_cpu.py --output benchmarks/results/native_cpu.json     quiet machine, about ten minutes
    python benchmarks/bench_cpu.py --tiny --rounds 2 --output /dev/null            does it run?

In each round every way of a case runs once, in turn, on the same memory; a ratio is the median of the rounds' ratios,
with its range. The first way of a case is its peer. The floor is an in-place pass over as many bytes, which on a CPU is
about twice as fast as a copy. DeepSpeedCPUAdam is compiled on first use, which takes minutes: ``--deepspeed``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bench_kernels import Trunk, eager_loss, published_head, sd15_shapes
from fastunlearn_kernels import (
    MaskedAdamW,
    accumulate_saliency_,
    gradient_dots,
    launch,
    lpips_distance,
    native,
    noise_pred_loss,
    pack_bits,
    saliency_mask,
    traffic,
)
from torch import nn

Ways = dict[str, Callable[[], Any]]
DENSITY = 0.5


def timed(ways: Ways, rounds: int, inner: int = 1) -> dict[str, list[float]]:
    """Seconds of each way in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for run in ways.values():
        run()
    for _ in range(rounds):
        for name, run in ways.items():
            start = time.perf_counter()
            for _ in range(inner):
                run()
            seconds[name].append((time.perf_counter() - start) / inner)
    return seconds


def on(backend: str, run: Callable[[], Any], level: str | None = None) -> Callable[[], Any]:
    """``run`` on one backend, and one instruction set of the library."""

    def chosen() -> None:
        launch.CHOICE = backend
        if backend == "native":
            native.use_level(native.library(), level)
        try:
            run()
        finally:
            launch.CHOICE = None

    return chosen


def both(run: Callable[[], Any]) -> Ways:
    return {"plain torch": on("reference", run), "native": on("native", run)}


class Cases:
    """Every case: name, size, its ways, bytes that ours moves if there is a formula, and runs in a row."""

    def __init__(self, tiny: bool, with_deepspeed: bool) -> None:
        self.tiny, self.with_deepspeed = tiny, with_deepspeed

    def __iter__(self) -> Iterator[tuple[str, str, Ways, int | None, int]]:
        kv = [s for s in sd15_shapes() if s[1:] == (768,)]
        shapes = [(40, 96)] * 3 if self.tiny else kv
        size = "19.2 M in 32" if not self.tiny else "tiny"
        for dtype in (torch.float32, torch.bfloat16):
            yield "masked AdamW + clip", f"{size}, {name_of(dtype)}", *self.adamw(shapes, dtype), 1
        flat = [(4096,)] if self.tiny else [(100_000_000,)]
        yield "masked AdamW + clip", "100 M flat, float32", *self.adamw(flat, torch.float32), 1
        yield "training step, bundled UNet, all parameters, B=8", "4.0 M in 208", self.training(), None, 1
        numel = 4096 if self.tiny else 4_000_000
        scores = torch.randn(numel)
        yield (
            "saliency mask", f"{numel / 1e6:.3g} M",
            {"kthvalue": lambda: kthvalue(scores), **both(lambda: saliency_mask(scores, DENSITY))}, None, 1,
        )  # fmt: skip
        total, gradient = torch.zeros(numel * 5), torch.randn(numel * 5)
        yield (
            "accumulate saliency", f"{numel * 5 / 1e6:.3g} M",
            {"torch foreach": lambda: torch._foreach_add_([total], torch._foreach_abs([gradient])),
             **both(lambda: accumulate_saliency_([total], [gradient]))},
            traffic.accumulate_saliency_bytes(numel * 5, 4), 1,
        )  # fmt: skip
        yield (
            "dots of two gradients", f"{numel * 5 / 1e6:.3g} M",
            {"torch.dot, three times": lambda: [torch.dot(a, b) for a in (total, gradient) for b in (gradient,)]
             + [torch.dot(total, total)], **both(lambda: gradient_dots([total], [gradient]))},
            traffic.gradient_dots_bytes(numel * 5, 4, 4), 1,
        )  # fmt: skip
        sizes = ((4, 8), (8, 16), (4, 64), (16, 64), (256, 64)) if not self.tiny else ((4, 8),)
        for batch, side in sizes:
            yield "loss, forward + backward", f"B={batch}, 4x{side}x{side}", *self.loss(batch, side)
        yield from self.lpips()
        yield "evaluate-images, one original, 4 folders", "64 of 128x128", *self.folders()

    def adamw(self, shapes: list[Any], dtype: torch.dtype) -> tuple[Ways, int]:
        numel = sum(math.prod(shape) for shape in shapes)
        weights = [(torch.randn(shape) * 0.02).to(dtype) for shape in shapes]
        gradients = [torch.randn(shape).to(dtype) for shape in shapes]
        masks = [torch.rand(shape) < DENSITY for shape in shapes]

        def parameters() -> list[nn.Parameter]:  # all ways share weights and gradients: only speed matters here
            made = [nn.Parameter(weight) for weight in weights]
            for parameter, gradient in zip(made, gradients, strict=True):
                parameter.grad = gradient
            return made

        def peer(
            optimizer: torch.optim.Optimizer, params: list[nn.Parameter], masked: bool = True
        ) -> Callable[[], Any]:
            def run() -> None:
                if masked:
                    for param, mask in zip(params, masks, strict=True):
                        assert param.grad is not None
                        param.grad *= mask
                    torch.nn.utils.clip_grad_norm_(params, 1.0)
                optimizer.step()

            return run

        def ours(mode: str) -> Callable[[], Any]:
            params = parameters()
            packed: dict[torch.Tensor, torch.Tensor] = dict(zip(params, map(pack_bits, masks), strict=True))
            if mode == "dense":
                packed = {}
            optimizer = MaskedAdamW(params, 1e-5, grad_masks=packed, compact=mode == "compact")
            return lambda: optimizer.step(grad_scale=optimizer.clip_factor(1.0)[0])

        params = parameters()
        ways = {"torch fused + bool mask + clip": peer(torch.optim.AdamW(params, 1e-5, fused=True), params)}
        params = parameters()
        ways["torch fused alone, without mask and clip"] = peer(
            torch.optim.AdamW(params, 1e-5, fused=True), params, masked=False
        )
        if self.with_deepspeed:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            params = parameters()
            adam = DeepSpeedCPUAdam(params, lr=1e-5, adamw_mode=True, fp32_optimizer_states=True)
            ways["DeepSpeedCPUAdam alone, without mask and clip"] = peer(adam, params, masked=False)
        for mode in ("dense", "select", "compact"):
            # An optimizer keeps the backend of its first step.
            ways[f"plain torch, {mode}"] = on("reference", ours(mode))
            run = ours(mode)
            for level in native.LEVELS[1 : native.library().fu_best_level() + 1]:
                ways[f"native, {mode}, {native.NAMES[level]}"] = on("native", run, level)
        item = weights[0].element_size()
        selected = sum(int(mask.sum()) for mask in masks)
        moved = traffic.masked_adamw_bytes(numel, numel, selected, "compact", item, item)
        return ways, moved + traffic.gradient_dots_bytes(numel, item)

    def training(self) -> Ways:
        """Forward, loss, backward, clip and step by the trainer itself."""
        from training_worker import make_trainer

        from fastunlearn.distributed import ALONE

        ways: Ways = {}
        for name, density, backend in (
            ("mask 0.5, plain torch", DENSITY, "reference"),
            ("mask 0.5, native", DENSITY, "native"),
            ("dense, native", None, "native"),
        ):
            folder = Path(tempfile.mkdtemp())
            trainer = make_trainer({"stage": None, "density": density}, ALONE, folder)

            def step(trainer: Any = trainer) -> None:
                trainer._train_step()
                trainer.step += 1

            ways[name] = on(backend, step)
        return ways

    def loss(self, batch: int, side: int) -> tuple[Ways, int, int]:
        shape = (batch, 4, side, side)
        noise_pred = torch.randn(shape, requires_grad=True)
        rest = torch.randn(2, *shape), torch.randn(batch, 2), torch.ones(batch)

        def go(function: Callable[..., Any]) -> None:
            noise_pred.grad = None
            function(noise_pred, *rest)[0].backward()

        ways = {"eager": lambda: go(eager_loss), **both(lambda: go(noise_pred_loss))}
        inner = max(1, min(50, 200_000 // noise_pred.numel()))
        return ways, traffic.noise_pred_loss_bytes(noise_pred, 2, 4), inner

    def lpips(self) -> Iterator[tuple[str, str, Ways, int | None, int]]:
        side, batch = (64, 2) if self.tiny else (256, 8)
        torch.manual_seed(0)
        trunk = Trunk("alex").requires_grad_(False)
        laid = Trunk("alex").requires_grad_(False)
        laid.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        low = Trunk("alex").requires_grad_(False).to(torch.bfloat16)
        low.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the stubs lack this form
        heads = [torch.rand(c) for c in trunk.channels]
        images = torch.rand(2, batch, 3, side, side) * 2 - 1
        both_sides = images.flatten(0, 1).to(memory_format=torch.channels_last)
        with torch.no_grad():
            features = laid(both_sides)
        sides = [f[:batch] for f in features], [f[batch:] for f in features]
        size = f"{batch} of {side}x{side}"
        yield (
            "LPIPS alex, head", size,
            {"published operations": lambda: published_head(*sides, heads),
             **both(lambda: lpips_distance(*sides, heads))},
            traffic.lpips_distance_bytes(sides[0]), 1,
        )  # fmt: skip

        @torch.no_grad()
        def pair(net: Any, inputs: torch.Tensor) -> None:
            features = net(inputs)
            lpips_distance([f[:batch] for f in features], [f[batch:] for f in features], heads)

        @torch.no_grad()
        def package() -> None:
            published_head(trunk(images[0]), trunk(images[1]), heads)

        low_sides = both_sides.bfloat16()
        yield (
            "LPIPS alex, pairs", size,
            {"lpips' operations": package, "plain torch": on("reference", lambda: pair(laid, both_sides)),
             "native": on("native", lambda: pair(laid, both_sides)),
             "native, bfloat16 trunk": on("native", lambda: pair(low, low_sides))}, None, 1,
        )  # fmt: skip

    def folders(self) -> tuple[Ways, None, int]:
        """From files to distances; the package in batches, once a folder."""
        import numpy as np
        from bench_evaluation import batched, package
        from PIL import Image

        from fastunlearn.evaluation.folder_scores import score_folders
        from fastunlearn.evaluation.image_pairs import find_pairs
        from fastunlearn.metrics.lpips import from_lpips

        count, side = (3, 64) if self.tiny else (64, 128)
        root = Path(tempfile.mkdtemp())
        generator = np.random.default_rng(0)
        for name in ("before", *(f"after{i}" for i in range(4))):
            (root / name).mkdir()
            for index in range(count):
                pixels = generator.integers(0, 255, (side // 8, side // 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((side, side)).save(root / name / f"{index:03}.png")
        theirs, distance = package("alex"), from_lpips(package("alex"), "lpips/alex", micro_batch_size=8)

        class Folder(type(root)):  # type: ignore[misc]
            """The package's way pairs ``before`` with ``after``."""

            def __truediv__(self, other: str) -> Path:
                return root / (self.after if other == "after" else other)

        def four_times() -> None:
            for i in range(4):
                folder = Folder(root)
                folder.after = f"after{i}"
                batched(theirs, folder)

        folders = [find_pairs(root / "before", root / f"after{i}") for i in range(4)]

        def once() -> None:
            score_folders(folders, distance, [], os.cpu_count() or 1)

        return (
            {"lpips in batches, 4 times": four_times, "native, features of the original once": on("native", once)},
            None,
            1,
        )


def kthvalue(scores: torch.Tensor) -> torch.Tensor:
    magnitude = scores.abs()
    return magnitude >= magnitude.kthvalue(scores.numel() - int(scores.numel() * DENSITY) + 1).values


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def in_place_gb_per_s(threads: int, tiny: bool) -> float:
    values = torch.ones(2**12 if tiny else 2**26)
    times = timed({"": lambda: values.mul_(1.0000001)}, 5)[""]
    return 2 * values.nbytes / statistics.median(times) / 1e9


def measure(options: argparse.Namespace) -> dict[str, Any]:
    rows = []
    floors = {}
    cases = Cases(options.tiny, options.deepspeed)
    for threads in options.threads:
        torch.set_num_threads(threads)
        floors[threads] = round(in_place_gb_per_s(threads, options.tiny), 1)
        for operation, size, ways, num_bytes, inner in cases:
            if options.only and options.only not in operation:
                continue
            rounds = max(2, options.rounds // 3) if "100 M" in size or "folders" in operation else options.rounds
            seconds = timed(ways, rounds, inner)
            peer = next(iter(seconds))
            for way, times in seconds.items():
                ratios = sorted(a / b for a, b in zip(seconds[peer], times, strict=True))
                row = {
                    "operation": operation, "size": size, "threads": threads, "way": way, "beside": peer,
                    "median_ms": round(1e3 * statistics.median(times), 4),
                    "times_as_fast": round(statistics.median(ratios), 3),
                    "range": [round(ratios[0], 3), round(ratios[-1], 3)], "rounds": rounds,
                }  # fmt: skip
                if num_bytes is not None and way.startswith("native"):
                    least = num_bytes / floors[threads] / 1e9
                    row["times_the_floor"] = round(statistics.median(times) / least, 2)
                rows.append(row)
                print(f"{threads} threads  {operation}, {size}: {way}: {row['median_ms']} ms, {row['times_as_fast']}x")
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "best_level": native.describe().split(", ")[1],
        "in_place_gb_per_s": floors, "torch": torch.__version__, "python": platform.python_version(),
        "load_average": [round(x, 2) for x in os.getloadavg()], "rows": rows,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", help="operations whose name holds this")
    parser.add_argument("--tiny", action="store_true", help="sizes that show nothing but that it runs")
    parser.add_argument("--deepspeed", action="store_true", help="DeepSpeedCPUAdam, too, which it compiles first")
    options = parser.parse_args()
    if not native.is_available():
        print(f"bench_cpu: {native.why_not()}", file=sys.stderr)
        return 2
    if not options.tiny and os.getloadavg()[0] > 0.5:
        warnings.warn(f"the machine is busy (load {os.getloadavg()[0]:.1f}): times will not repeat", stacklevel=1)
    options.output.write_text(json.dumps(measure(options), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
