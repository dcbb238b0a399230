"""The HTML report of a comparison of two folders of images: one self-contained file, like the one of `evaluate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.atomic import write_text
from .html import Gallery, distance_text, percent, templates


@dataclass(frozen=True)
class ImagesReport:
    """``summary``: the content of evaluation.json; ``galleries``: pairs of images to show."""

    summary: Mapping[str, Any]
    galleries: Sequence[Gallery]


def write_images_report(path: Path, report: ImagesReport) -> None:
    """Write one HTML file that loads nothing from elsewhere; the same report gives the same bytes."""
    template = templates().get_template("images.html.j2")
    write_text(
        path,
        template.render(
            summary=report.summary,
            galleries=report.galleries,
            sentence=image_sentence(report.summary),
            spec=_spec(report.summary["spec"]),
        ),
    )


def image_sentence(summary: Mapping[str, Any]) -> str:
    """What was found, in words."""
    integrity = summary["integrity"]
    interval = ""
    if integrity["ci95"] is not None:
        low, high = (distance_text(value) for value in integrity["ci95"])
        interval = f", 95\u00a0% interval {low} to {high}"
    return (
        f"On {integrity['n_pairs']:,} pairs the images are on average {distance_text(integrity['mean'])} apart "
        f"({integrity['metric']}{interval}), where 0 is the same image; {percent(integrity['unchanged'])} did not "
        "change. This is about what was kept: whether the concept is gone has to be shown on other images."
    )


def _spec(spec: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    for key, value in spec.items():
        lines += _spec(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(prefix + key, str(value))]
    return lines
