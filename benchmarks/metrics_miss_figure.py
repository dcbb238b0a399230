"""The figure of ``metrics_miss``: rows metrics, columns concepts, a block a method; filled where the metric sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastunlearn.files.atomic import whole_file

#: How figure and tables call what results know by its key.
LABELS = {
    "pairs": "distance of pairs (LPIPS form)",
    "dreamsim": "distance of pairs (DreamSim-like)",
    "fid": "FID, same noise",
    "fid-other": "FID, other noise (usual)",
    "kid-other": "KID, other noise (usual)",
    "clip-score": "CLIPScore-like",
    "accuracy": "accuracy of the prompts",
}
_SEEN, _UNSEEN, _KEPT = "#c2410c", "#e5e7eb", "#1d4ed8"


def columns(content: dict[str, Any]) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """Method -> (concept, its model's entry) of all worlds, the gold references last.

    With each entry goes ``harmless``: the least and the largest R of its world's harmless trainings.
    """
    found: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for world in content["worlds"].values():
        kept = [one["retention"] for one in world["harmless"]]
        harmless = {"harmless": (min(kept), max(kept))}
        for concept, entry in world["concepts"].items():
            for name, model in entry["models"].items():
                found.setdefault(name.removesuffix(f"-{concept}"), []).append((concept, model | harmless))
    return dict(sorted(found.items(), key=lambda item: item[0] == "gold"))


def draw(content: dict[str, Any], path: Path) -> None:
    """A dot a model and metric, as large as the power; R of every model above."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    blocks = columns(content)
    widths = [len(block) for block in blocks.values()]
    figure, axes = plt.subplots(
        2,
        len(blocks),
        figsize=(12.5, 6.2),
        sharex="col",
        sharey="row",
        gridspec_kw={"height_ratios": [1, 2.2], "width_ratios": widths},
        layout="constrained",
        squeeze=False,
    )
    rows = list(LABELS)
    for (method, block), top, bottom in zip(blocks.items(), axes[0], axes[1], strict=True):
        places = range(len(block))
        top.bar(places, [model["retention"] for _, model in block], color=_KEPT, width=0.6)
        for place, (_, model) in zip(places, block, strict=True):
            low, high = model["harmless"]
            top.fill_between([place - 0.42, place + 0.42], low, high, color="#111827", alpha=0.45, lw=0)
        top.set_title(method if method != "gold" else "never saw it", fontsize=12)
        top.set_ylim(0, 1)
        for row, metric in enumerate(rows):
            shares = [model["power"][metric] for _, model in block]
            colors = [_SEEN if share >= content["power"] else _UNSEEN for share in shares]
            bottom.scatter(places, [row] * len(block), s=190, c=colors, edgecolors="#6b7280", linewidths=0.6)
            for place, share in zip(places, shares, strict=True):
                color = "white" if share >= content["power"] else "#374151"
                bottom.text(place, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=6.5, color=color)
        bottom.set_xticks(places, [concept for concept, _ in block], rotation=60, ha="right")
        bottom.set_yticks(range(len(rows)), [LABELS[metric] for metric in rows])
        bottom.set_ylim(len(rows) - 0.5, -0.5)
        bottom.set_xlim(-0.6, len(block) - 0.4)
        for axis in (top, bottom):
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(length=0)
    axes[0, 0].set_ylabel("retention R")
    dots: list[Any] = [
        plt.Line2D([], [], ls="", marker="o", ms=12, mfc=color, mec="#6b7280", label=label)
        for color, label in ((_SEEN, f"{content['power']:.0%} or more: sees it"), (_UNSEEN, "less: does not"))
    ]
    dots.append(plt.Rectangle((0, 0), 1, 1, fc="#111827", alpha=0.45, label="R of harmless trainings, least to most"))
    title = "in % of resamples told from harmless training:"
    figure.legend(handles=dots, title=title, loc="outside lower center", ncols=3, frameon=False)
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
