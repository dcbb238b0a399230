"""What the edits in closed form forget and keep on eight concepts of the bundled world: a table of uce, rece and speed.

    python benchmarks/edits.py [--concepts ring,heart] [--seeds 1]

Writes benchmarks/results/edits.json, concept by concept; what is there is not measured again; and docs/edits.md from it
and from what edit_cost.py wrote.  Their settings were chosen on other concepts (``tuned_on`` in the file), and no
prompt of the evaluation but the empty one is of training.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "edits.json"
COST = RESULTS.with_name("edit_cost_cpu.json")
PAGE = ROOT / "docs" / "edits.md"
CONCEPTS = ("heart", "square", "circle", "yellow", "purple", "pink", "dotted", "gradient")
TUNED_ON = ("cross", "triangle", "star", "crescent", "ring", "blue", "green", "red", "orange", "checkered", "striped")
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
            assert found.erasure is not None
            assert found.retain is not None
            assert record is not None
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


def page(content: dict) -> str:
    """The results for people."""
    lines = [
        "# Edits in closed form",
        "",
        "Made by `python benchmarks/edits.py` from `benchmarks/results/`.",
        "",
        "`uce`, `rece` and `speed` compute the matrices that read the text states; nothing is trained. With their "
        "defaults on the bundled world, chosen on " + ", ".join(content["tuned_on"]) + ": the share of images that "
        "still show the concept, and the retention R with its 95 % interval.",
        "",
        "| concept | " + " | ".join(f"{name}: shown | R" for name in METHODS) + " |",
        "|---|" + "---|---|" * len(METHODS),
    ]
    for concept, one in content["concepts"].items():
        rows = [one["methods"][name] for name in METHODS]
        cells = [f"{r['shown']:.0%} | {r['retention']:.3f} ({_interval(r['retention_ci95'])})" for r in rows]
        lines.append(f"| {concept} | {' | '.join(cells)} |")
    told = content["summary"].values()
    cells = [
        f"{one['shown_mean']:.1%} | {one['retention_mean']:.3f}, least {one['retention_least']:.3f}" for one in told
    ]
    lines += [f"| mean | {' | '.join(cells)} |", ""]
    for name in METHODS[1:]:
        one = content["summary"][name]
        lines.append(f"`{name}` has the higher R on {one['keeps_more_than_uce']} of {one['concepts']} concepts.")
    lines.append(
        "Where intervals overlap, that tells no difference. None of this says how well an attack brings it back."
    )
    if COST.is_file():
        cost = json.loads(COST.read_text())
        lines += [
            "",
            "## Cost",
            "",
            f"On the shapes of real models with random weights and {cost['cases'][0]['concepts']} concepts, with "
            f"{cost['machine']['threads']} threads on {cost['machine']['cores']} cores (load at the end "
            f"{cost['load_average_at_end']:g}): seconds, seconds of all threads together, and memory above that of "
            f"the model, medians with the range over {cost['cases'][0]['rounds']} rounds. Encoding the prompts is not "
            "in it.",
            "",
            "| model | method | seconds | core seconds | memory, GiB | times the matrices' own |",
            "|---|---|---|---|---|---|",
        ]
        for one in cost["cases"]:
            told = [f"{one[name]:g} ({low:g} to {high:g})" for name, (low, high) in one["range"].items()]
            lines.append(f"| {one['model']} | {one['method']} | {' | '.join(told)} |")
    return "\n".join(lines) + "\n"


def _interval(ends: list) -> str:
    return f"{ends[0]:.3f} to {ends[1]:.3f}"


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
    PAGE.write_text(page(content))
    print(json.dumps(summary(done), indent=1))


if __name__ == "__main__":
    main()
