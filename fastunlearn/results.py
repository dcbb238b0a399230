"""Writes what an evaluation found: records and summary for machines, grid and report for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from .evaluator import Evaluation, Evaluations, PromptGroups, Shown
from .report import Gallery, GalleryRow, Report, write_grid, write_report
from .run_folder import write_json, write_lines


def write_results(
    folder: Path, evaluations: Evaluations, groups: PromptGroups, *, unseen: bool = False, notes: Sequence[str] = ()
) -> None:
    """Write the report of one or several models and, of a single one, its records, all into ``folder``.

    ``unseen``: the retain prompts took part in no training, which the report then says.
    """
    if len(evaluations.results) == 1:
        write_records(folder, evaluations.results[0])
    names = [result.name for result in evaluations.results]
    shown = sorted(evaluations.gallery, key=lambda pair: pair.group)
    write_grid(
        folder / "grid.png",
        rows=["before", *(f"after {name}" for name in names)],
        columns=[pair.prompt for pair in shown],
        pictures=[
            [_pixels(pair.original) for pair in shown],
            *([_pixels(pair.unlearned[place]) for pair in shown] for place in range(len(names))),
        ],
        groups=[_heading(pair.group, groups.concept) for pair in shown],
    )
    retained = "prompts that no loss has seen" if unseen else "prompts about other things"
    concept = evaluations.results[0].summary["concept"]
    report = Report(
        title=f"Unlearning “{concept}”",
        concept=concept,
        evaluations=[result.summary for result in evaluations.results],
        galleries=_galleries(evaluations, names, shown, groups.concept),
        notes=list(notes),
        retain_prompts=retained,
    )
    write_report(folder / "report.html", report)


def write_records(folder: Path, evaluation: Evaluation) -> None:
    """pairs.jsonl, one line a pair, and evaluation.json."""
    write_lines(folder / "pairs.jsonl", evaluation.pairs)
    write_json(folder / "evaluation.json", evaluation.summary)


def _galleries(evaluations: Evaluations, names: list[str], shown: list[Shown], concept: str | None) -> list[Gallery]:
    columns = ["original", *names]
    galleries = []
    for group, caption in (
        ("forget", "Prompts that name the concept, before and after, from the same noise."),
        ("retain", "Prompts about other things, before and after, from the same noise: they should not change."),
    ):
        pairs = [pair for pair in shown if pair.group == group]
        if pairs:
            rows = [_row(pair, range(len(names))) for pair in pairs]
            galleries.append(Gallery(_heading(group, concept), caption, columns, rows))
    for place, name in enumerate(names):
        worst = [_row(pair, [place]) for pair in evaluations.most_changed[place]]
        best = [_row(pair, [place]) for pair in evaluations.least_changed[place]]
        pair_columns = ["original", name]
        galleries.append(
            Gallery(f"{name}: the most changed", "Retain pairs of the largest distance.", pair_columns, worst)
        )
        galleries.append(
            Gallery(f"{name}: the least changed", "Retain pairs of the smallest distance.", pair_columns, best)
        )
    return galleries


def _row(pair: Shown, places: Sequence[int]) -> GalleryRow:
    pictures = [_pixels(pair.original), *(_pixels(pair.unlearned[place]) for place in places)]
    return GalleryRow(pair.prompt, pictures, ["", *(f"distance {pair.distances[place]:.3f}" for place in places)])


def _heading(group: str, concept: str | None) -> str:
    if group == "forget":
        return f"to forget: {concept}" if concept else "to forget"
    return "to keep"


def _pixels(picture: torch.Tensor) -> np.ndarray:
    """(3, H, W) to (H, W, 3) uint8."""
    return picture.permute(1, 2, 0).contiguous().numpy()
