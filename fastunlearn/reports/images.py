"""The HTML report of a comparison of two folders of images: one self-contained file, like the one of `evaluate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.atomic import write_text
from ..schema import FoldersEvaluation
from .gallery import Gallery
from .pages import templates
from .sentences import calibration_sentence, folders_sentence, judges_words


@dataclass(frozen=True)
class FoldersReport:
    """``evaluation``: the content of evaluation.json; ``galleries``: pairs of images to show."""

    evaluation: FoldersEvaluation
    galleries: Sequence[Gallery]


def write_folders_report(path: Path, report: FoldersReport) -> None:
    """Write one HTML file that loads nothing from elsewhere; the same report gives the same bytes."""
    template = templates().get_template("images.html.j2")
    write_text(
        path,
        template.render(
            evaluation=report.evaluation,
            galleries=report.galleries,
            calibration=_calibration(report.evaluation),
            judges=judges_words([report.evaluation.judge]),
            sentence=folders_sentence(report.evaluation),
            spec=_spec(report.evaluation.to_dict()["spec"]),
        ),
    )


def _calibration(evaluation: FoldersEvaluation) -> str:
    if evaluation.judge is None or evaluation.erasure is None:
        return ""
    return calibration_sentence(evaluation.judge, evaluation.calibration, evaluation.erasure.concept)


def _spec(spec: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    for key, value in spec.items():
        lines += _spec(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(prefix + key, str(value))]
    return lines
