"""What edits in closed form cost on the real shapes of SD 1.5 and SDXL, with random weights: seconds and memory.

    python benchmarks/edit_cost.py [--concepts 100] [--threads 2]

Writes benchmarks/results/edit_cost_cpu.json.  The matrices are those that read the text in diffusers' UNets with the
published settings.  Text states are random, of the model's length and width: an encoder's seconds are not in it.  Each
case runs in processes of its own, one a round; memory is the peak of the process above what it held before the edit.
Figures are medians, with the range.  On a machine that does other work too, ``core_seconds`` (of all threads together)
tell more than ``seconds``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "edit_cost_cpu.json"
#: (channels, transformer blocks with them) of the UNets' cross-attention, and the width of the text states.
SHAPES = {
    "sd15": ([(320, 5), (640, 5), (1280, 6)], 768),
    "sdxl": ([(640, 10), (1280, 60)], 2048),
}
METHODS = ("uce", "rece", "speed")
MEASURED = ("seconds", "core_seconds", "peak_above_start_gib", "peak_over_projections")
LENGTH = 77
RETAIN = 50  # prompts to keep


def matrices(model: str) -> dict:
    """The keys' and values' matrices of every cross-attention."""
    import torch

    blocks, width = SHAPES[model]
    generator = torch.Generator().manual_seed(0)
    names = [(f"{size}.{n}.to_{kind}", size) for size, count in blocks for n in range(count) for kind in "kv"]
    return {name: torch.randn(size, width, generator=generator) / width**0.5 for name, size in names}


def measure(model: str, name: str, concepts: int, threads: int) -> dict:
    """One edit, in this process."""
    import torch

    from fastunlearn.methods import get_method
    from fastunlearn.methods.recipe import Concept, Edit, Weights

    torch.set_num_threads(threads)
    weights, width = matrices(model), SHAPES[model][1]
    shared = torch.randn(LENGTH, width, generator=torch.Generator().manual_seed(1))  # what all prompts have in common

    def encode(prompts: Sequence[str]) -> dict:
        rows = []
        for prompt in prompts:
            generator = torch.Generator().manual_seed(int.from_bytes(prompt.encode()[-6:], "big") + 2)
            own = torch.randn(LENGTH, 24, generator=generator) @ torch.randn(24, width, generator=generator) / 24**0.5
            rows.append(shared + own)
        return {"encoder_hidden_states": torch.stack(rows)}

    method = get_method(name)
    forget = tuple(f"concept {n}" for n in range(concepts))
    retain = tuple(f"keep {n}" for n in range(RETAIN))
    concept = Concept(
        "a", forget, dict.fromkeys(forget, "anchor"), retain, method.defaults_for("stable-diffusion"), encode
    )
    torch.linalg.solve(torch.eye(64).double(), torch.linalg.eigh(torch.eye(64).double())[1])  # loads the library
    edit, given, peak = method.recipe(concept), Weights(weights, tuple(weights)), _Peak()
    assert isinstance(edit, Edit)
    started, used = time.monotonic(), time.process_time()
    with peak:
        new = edit.change(given)
    seconds, used = time.monotonic() - started, time.process_time() - used
    projections = sum(values.nbytes for values in weights.values())
    assert len(new) == len(weights)
    return {
        "model": model,
        "method": name,
        "concepts": concepts,
        "prompts_to_keep": RETAIN,
        "matrices": len(weights),
        "projections_gib": round(projections / 2**30, 4),
        "seconds": round(seconds, 2),
        "core_seconds": round(used, 2),
        "peak_above_start_gib": round(peak.bytes / 2**30, 4),
        "peak_over_projections": round(peak.bytes / projections, 2),
        "options": dataclasses.asdict(concept.options),
        "facts": given.facts,
    }


def middle(rounds: list[dict]) -> dict:
    """One case of several rounds: medians of what was measured, and ``range``, its least and most."""
    measured = {name: [one[name] for one in rounds] for name in MEASURED}
    medians = {name: statistics.median(values) for name, values in measured.items()}
    ranges = {name: [min(values), max(values)] for name, values in measured.items()}
    return rounds[0] | medians | {"rounds": len(rounds), "range": ranges}


class _Peak:
    """The most memory that the process holds above what it held at the beginning, looked at every 5 ms."""

    def __enter__(self) -> None:
        self._begin, self.bytes, self._stop = _resident(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def __exit__(self, *details: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.bytes = max(self.bytes, _resident() - self._begin)


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concepts", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", nargs=2)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(args.case[0], args.case[1], args.concepts, args.threads)))
        return
    import torch

    cases: list[dict] = []
    content: dict[str, object] = {
        "command": "python benchmarks/edit_cost.py",
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count(), "threads": args.threads},
        "torch": torch.__version__,
        "text_states": {"length": LENGTH, "what": "random, of rank 24 a prompt around one that all share"},
        "cases": cases,
    }
    for method in METHODS:
        for model in SHAPES:
            command = [sys.executable, __file__, "--case", model, method]
            command += ["--concepts", str(args.concepts), "--threads", str(args.threads)]
            environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads)}
            runs = [
                subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
                for _ in range(args.rounds)
            ]
            cases.append(middle([json.loads(run.stdout) for run in runs]))
            content["load_average_at_end"] = round(os.getloadavg()[0], 2)
            RESULTS.write_text(json.dumps(content, indent=1) + "\n")
            print({key: cases[-1][key] for key in ("model", "method", "seconds", "peak_over_projections")}, flush=True)


if __name__ == "__main__":
    main()
