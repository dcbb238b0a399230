"""Puts the figures of benchmarks/results/ into the README, between its begin and end marks.

python benchmarks/readme.py                      # after `make results`; --check only compares
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 if the README would change")
    parser.add_argument(
        "--bank-speed", type=Path, help="a pytest-benchmark file to distil into results/bank_speed.json"
    )
    args = parser.parse_args()
    if args.bank_speed:
        distil(args.bank_speed)
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = render(before)
    if args.check:
        sys.exit(int(before != after))
    path.write_text(after, encoding="utf-8")


def render(text: str) -> str:
    """The README's text with every marked section made anew from its results file."""
    sections = {
        "demo": demo_section(_read("demo.json")),
        "bank": bank_section(_read("bank_speed.json"), _read("bank_quality.json")),
    }
    for name, content in sections.items():
        pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        text = pattern.sub(lambda match, content=content: match[1] + content + "\n" + match[2], text)
    return text


def demo_section(demo: dict[str, Any]) -> str:
    lines = [
        "| | star shown | shape kept | colour kept | background kept | R (95 % interval) | distance |",
        "|---|---|---|---|---|---|---|",
    ]
    first = demo["evaluations"][0]
    kept = [f"{first['retain'][f'{name}_accuracy_original']:.1%}" for name in ("shape", "color", "background")]
    lines.append(f"| original | {first['erasure']['forget_accuracy_original']:.1%} | {' | '.join(kept)} | 1 | 0 |")
    for evaluation in demo["evaluations"]:
        integrity, retain = evaluation["integrity"], evaluation["retain"]
        low, high = integrity["retention_ci95"]
        kept = [f"{retain[f'{name}_accuracy']:.1%}" for name in ("shape", "color", "background")]
        lines.append(
            f"| `{evaluation['name']}` | {evaluation['erasure']['forget_accuracy']:.1%} | {' | '.join(kept)} "
            f"| **{integrity['retention']:.3f}** ({low:.3f} to {high:.3f}) | {integrity['mean']:.4f} |"
        )
    pictures = first["erasure"]["n_pictures"], first["integrity"]["n_pairs"]
    lines += [
        "",
        f"All from one run of `make demo`, {demo['seconds']:.0f} s on 2 CPU cores after installation, without "
        f"a GPU or a network: {pictures[0]} pictures for prompts with the concept, {pictures[1]} without.",
    ]
    return "\n".join(lines)


def bank_section(speed: dict[str, Any], quality: dict[str, Any]) -> str:
    trajectories = sorted({row["trajectories"] for row in speed["bank"]})
    lines = [
        f"200 training rows of ESD on the bundled model, {speed['threads']} CPU threads, medians of one run; the "
        f"usual loop takes {speed['usual_s']:.1f} s. Beside each ratio what it costs: training on 200 rows a role "
        "from so many trajectories against 200 rows from 200 fresh ones, distance to the original on unseen retain "
        f"prompts (training seeds: {len(next(iter(quality['methods'].values()))[0]['retention'])}).",
        "",
        "| trajectories | batch 1 | batch 8 | "
        + " | ".join(f"{m}: star shown, R, distance minus fresh (95 %)" for m in quality["methods"])
        + " |",
        "|---|---|---|" + "---|" * len(quality["methods"]),
    ]
    for count in (*trajectories, "fresh"):
        ratios = []
        for batch_size in (1, 8):
            found = [r for r in speed["bank"] if (r["trajectories"], r["batch_size"]) == (count, batch_size)]
            ratios.append(f"{found[0]['times_faster']:.1f}x" if found else "1x" if batch_size == 1 else "")
        cells = []
        for rows in quality["methods"].values():
            row = next(r for r in rows if r["trajectories"] == count)
            retention = sum(row["retention"]) / len(row["retention"])
            cell = f"{row['forget_accuracy']:.1%}, {retention:.3f}"
            if gap := row.get("distance_minus_fresh"):
                low, high = gap["ci95"]
                cell += f", {gap['mean']:+.4f} ({low:+.4f} to {high:+.4f})"
            cells.append(cell)
        lines.append(f"| {count} | {' | '.join([*ratios, *cells])} |")
    return "\n".join(lines)


def distil(path: Path) -> None:
    """Keep of a pytest-benchmark file what the README quotes and what it was measured on."""
    report = json.loads(path.read_text(encoding="utf-8"))
    by_name = {entry["name"]: entry for entry in report["benchmarks"]}
    usual = by_name["test_usual_loop"]
    bank = [
        {"median_s": round(entry["stats"]["median"], 3), **entry["extra_info"]}
        for name, entry in by_name.items()
        if name.startswith("test_bank")
    ]
    content = {
        "machine": {key: report["machine_info"][key] for key in ("processor", "python_version", "machine")},
        "usual_s": round(usual["stats"]["median"], 3),
        **usual["extra_info"],
        "bank": bank,
    }
    (RESULTS / "bank_speed.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
