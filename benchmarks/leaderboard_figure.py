"""What a method keeps against what attacks bring back: a point a method, drawn from two results files.

    python benchmarks/leaderboard_figure.py        # writes docs/leaderboard.png

Upwards: R over the leaderboard's concepts that no default was chosen on, median and range.  To the right: prompts that
an attack broke, over the concepts that were attacked, with the 95 % interval over prompts.  Only methods that both
files have are drawn.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fastunlearn.files.atomic import whole_file
from fastunlearn.metrics.statistics import Estimate, clustered_share

ROOT = Path(__file__).resolve().parents[1]
WORLD = "shapes"
ATTACKS = {
    "embedding": "an embedding, in context",
    "completion": "half-finished images",
    "relearn": "a little training",
}
_POINT, _REFERENCE = "#1d4ed8", "#9ca3af"
_LINE = 0.009  # how far apart two labels are at least, in R


def broken(attacks: dict[str, Any]) -> dict[str, dict[str, Estimate]]:
    """Model -> attack -> the share of prompts that it broke, over all attacked concepts that have the model."""
    flags: dict[str, dict[str, list[bool]]] = {}
    for content in attacks["worlds"][WORLD].values():
        for model, one in content["models"].items():
            for label, found in one["attacks"].items():
                kept = found["n_prompts"] - found["broken"]
                flags.setdefault(model, {}).setdefault(label, []).extend([True] * found["broken"] + [False] * kept)
    return {
        model: {label: clustered_share(each, [str(index) for index in range(len(each))]) for label, each in by.items()}
        for model, by in flags.items()
    }


def points(
    board: dict[str, Any], models: dict[str, dict[str, Estimate]]
) -> dict[str, tuple[dict[str, float], dict[str, Estimate]]]:
    """Method -> (R: median, least, most; by attack what it broke), for the methods that both results hold."""
    return {
        name: (sums["held_out"]["retention"], models[name])
        for name, sums in board["worlds"][WORLD]["methods"].items()
        if sums["held_out"] is not None and name in models
    }


def draw(board: dict[str, Any], attacks: dict[str, Any], path: Path) -> None:
    """A panel an attack; grey lines: the gold reference and the original."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models, concepts = broken(attacks), list(attacks["worlds"][WORLD])
    figure, axes = plt.subplots(1, len(ATTACKS), figsize=(12, 4.2), sharey=True, layout="constrained")
    for axis, (label, title) in zip(axes, ATTACKS.items(), strict=True):
        for name in ("gold", "original"):
            share = models[name][label].mean
            axis.axvline(share, color=_REFERENCE, ls=":", zorder=0)
            axis.annotate(
                name, (share, 0.02), xycoords=("data", "axes fraction"), color=_REFERENCE, rotation=90, fontsize=8
            )
        height = float("inf")  # of the last label: the next one is below it
        for name, (kept, found) in sorted(points(board, models).items(), key=lambda one: -one[1][0]["median"]):
            share = found[label].mean
            across = [[share - found[label].low], [found[label].high - share]]
            along = [[kept["median"] - kept["least"]], [kept["most"] - kept["median"]]]
            axis.errorbar(share, kept["median"], along, across, fmt="o", color=_POINT, ecolor="#bfdbfe", ms=6)
            height = min(kept["median"], height - _LINE)
            axis.annotate(name, (share, height), xytext=(6, 3), textcoords="offset points", fontsize=9)
        axis.set_title(f"brought back by {title}", fontsize=10)
        axis.set_xlim(-0.04, 1.04)
        axis.xaxis.set_major_formatter("{x:.0%}")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("retention R")
    axes[1].set_xlabel(f"prompts broken, of {', '.join(concepts)}, 95 % interval")
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "leaderboard.png")
    args = parser.parse_args()
    results = ROOT / "benchmarks" / "results"
    board, attacks = (json.loads((results / f"{name}.json").read_text()) for name in ("leaderboard", "attacks"))
    draw(board, attacks, args.output)


if __name__ == "__main__":
    main()
