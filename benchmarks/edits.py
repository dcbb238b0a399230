"""What the edits in closed form forget and keep on eight concepts of the bundled world: a table of uce, rece and speed.

    python benchmarks/edits.py [--concepts star,heart] [--seeds 1]

Writes benchmarks/results/edits.json, concept by concept; what is there is not measured again.  Their settings were
chosen on other concepts (``tuned_on`` in the file), and no prompt of the evaluation is one of training's.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "edits.json"
CONCEPTS = ("star", "heart", "crescent", "ring", "red", "yellow", "striped", "dotted")
TUNED_ON = ("cross", "triangle", "blue", "green", "checkered")
METHODS = ("uce", "rece", "speed")


def measure(concept: str, seeds: int) -> dict:
    """The three methods with their defaults on one concept, from the same originals."""
    from fastunlearn import evaluate, unlearn

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            name: unlearn("shapes", concept, name, output=Path(folder) / name, evaluation_prompts="none")
            for name in METHODS
        }
        models = {name: str(run.model) for name, run in runs.items()}
        report = evaluate("shapes", models, forget=concept, seeds_per_prompt=seeds)
        rows = {}
        for result in report.results:
            found, record = result.evaluation, runs[result.name].record
            rows[result.name] = {
                "shown": found.erasure.shown,
                "shown_ci95": found.erasure.shown_ci95,
                "shown_original": found.erasure.shown_original,
                "valid": found.erasure.valid,
                "retention": found.integrity.retention,
                "retention_ci95": found.integrity.retention_ci95,
                "judged_the_same": found.retain.agreement,
                "n_forget": found.erasure.n_images,
                "n_retain": found.integrity.n_pairs,
                "edit": record.edit,
                "edit_s": record.seconds["edit_s"],
            }
    return {"seeds_per_prompt": seeds, "seconds": round(time.monotonic() - started, 1), "methods": rows}


def summary(concepts: dict) -> dict:
    """Each method over all concepts, and on how many it beats uce."""
    result = {}
    for name in METHODS:
        rows = [one["methods"][name] for one in concepts.values()]
        uce = [one["methods"]["uce"] for one in concepts.values()]
        result[name] = {
            "shown_mean": sum(row["shown"] for row in rows) / len(rows),
            "shown_at_most_5_percent": sum(row["shown"] <= 0.05 for row in rows),
            "retention_mean": sum(row["retention"] for row in rows) / len(rows),
            "retention_least": min(row["retention"] for row in rows),
            "keeps_more_than_uce": sum(a["retention"] > b["retention"] for a, b in zip(rows, uce, strict=True)),
            "concepts": len(rows),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concepts", default=",".join(CONCEPTS))
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    import torch

    from fastunlearn.methods import get_method

    defaults = {name: get_method(name).defaults_for("shapes") for name in METHODS}
    settings = {
        name: {"retain_weight": one.retain_weight, "options": vars(one.options)} for name, one in defaults.items()
    }
    content = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    done = content.get("concepts", {}) if content.get("settings") == settings else {}
    for concept in args.concepts.split(","):
        if concept not in done:
            done[concept] = measure(concept, args.seeds)
            content = {
                "command": "python benchmarks/edits.py",
                "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads()},
                "tuned_on": TUNED_ON,
                "settings": settings,
                "summary": summary(done),
                "concepts": done,
            }
            RESULTS.write_text(json.dumps(content, indent=1) + "\n")
        rows = done[concept]["methods"]
        print(concept, {n: (round(r["shown"], 3), round(r["retention"], 3)) for n, r in rows.items()}, flush=True)
    print(json.dumps(summary(done), indent=1))


if __name__ == "__main__":
    main()
