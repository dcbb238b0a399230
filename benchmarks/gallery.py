"""A style and a thing forgotten by the gallery's model, in closed form: the README's picture, and its figures.

    python benchmarks/gallery.py [--concepts twemoji,cat] [--method uce] [--cache DIR]

Writes benchmarks/results/gallery.json, an evaluation for each concept, and docs/gallery.png, the grid of the first.
The gallery comes with `pip install ./packaging/gallery`.  Two minutes on two cores.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

from fastunlearn import evaluate, unlearn
from fastunlearn.files.atomic import write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gallery.json"
PICTURE = ROOT / "docs" / "gallery.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concepts", default="twemoji,cat")
    parser.add_argument("--method", default="uce")
    parser.add_argument("--cache", type=Path, help="where the original's images are kept for the next time")
    args = parser.parse_args()
    found: list[dict[str, Any]] = []
    for concept in args.concepts.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            run = unlearn("gallery", concept, args.method, output=Path(scratch) / "run", evaluation_prompts="none")
            assert run.record is not None
            output = Path(scratch) / "evaluation"
            report = evaluate("gallery", run.folder, forget=concept, output=output, cache=args.cache)
            if not found:
                shutil.copyfile(output / "grid.png", PICTURE)
        found.append({"edit_s": run.record.seconds.get("edit_s"), "evaluation": report.summary})
        print(report.summary["concept"], report.summary["erasure"], report.summary["integrity"], flush=True)
    write_json(RESULTS, {"results": found})


if __name__ == "__main__":
    main()
