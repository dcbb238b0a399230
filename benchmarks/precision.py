"""What bfloat16 gives and takes: the bank of a training, and the images of an evaluation, on the bundled model.

    python benchmarks/precision.py [--concepts ring,blue] [--methods esd,ovw]        quiet machine, about ten minutes

For each concept and method: the same training from a bank in float32 and from one in bfloat16, seconds of the bank in
turns; and each trained model evaluated in both precisions, seconds of drawing in turns.  Writes
benchmarks/results/precision.json: seconds, the share of images that show the concept, R and D.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import torch

from fastunlearn import evaluate, unlearn
from fastunlearn.files.atomic import write_json
from fastunlearn.models.runtime import versions

RESULTS = Path(__file__).resolve().parent / "results" / "precision.json"
PRECISIONS: tuple[Literal["no", "bf16"], ...] = ("no", "bf16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concepts", default="ring,blue")
    parser.add_argument("--methods", default="esd,ovw")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows = []
    for concept, method in itertools.product(args.concepts.split(","), args.methods.split(",")):
        rows += measured(concept, method)
    write_json(args.output, {"threads": torch.get_num_threads(), "versions": versions(), "rows": rows})


def measured(concept: str, method: str) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for bank in PRECISIONS:
            run = unlearn(
                "shapes",
                concept,
                method,
                output=Path(folder) / bank,
                bank_precision=bank,
                evaluation_prompts="none",
            )
            assert run.record is not None
            for precision in PRECISIONS:
                started = time.perf_counter()
                report = evaluate("shapes", run.folder, forget=concept, mixed_precision=precision)
                found = report.results[0].evaluation
                assert found.erasure is not None
                rows.append(
                    {
                        "concept": concept,
                        "method": method,
                        "bank_precision": bank,
                        "evaluation_precision": precision,
                        "bank_s": run.record.seconds["bank_s"],
                        "evaluation_s": round(time.perf_counter() - started, 2),
                        "shown": found.erasure.shown,
                        "valid": found.erasure.valid,
                        "retention": found.integrity.retention,
                        "retention_ci95": found.integrity.retention_ci95,
                        "distance": found.integrity.mean,
                        "floor": found.integrity.floor,
                        "ceiling": found.integrity.ceiling,
                        "n_forget": found.erasure.n_images,
                        "n_retain": found.integrity.n_pairs,
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    return rows


if __name__ == "__main__":
    main()
