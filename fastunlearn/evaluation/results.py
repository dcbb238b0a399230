"""What an evaluation found, and its files: records and summary for machines, grid and report for people."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import UserError
from ..files.atomic import write_json, write_lines
from ..reports.html import Gallery, GalleryRow, Report, write_grid, write_report
from .evaluator import Evaluation, Evaluations, Shown
from .summary import PromptGroups, is_forget


@dataclasses.dataclass(frozen=True)
class EvaluationReport:
    """The result of an evaluation of one or several models.

    ``evaluations``: None in a process that only took part in it.  ``unseen``: the retain prompts took part in no
    training, which the report then says.  ``placebo``: which model is a control only.
    """

    evaluations: Evaluations | None
    groups: PromptGroups
    placebo: str | None = None
    unseen: bool = False

    @property
    def results(self) -> list[Evaluation]:
        """One a model, in order, a placebo last."""
        return self.evaluations.results if self.evaluations else []

    @property
    def summary(self) -> dict[str, Any]:
        """The first model's evaluation.json."""
        return self.results[0].summary

    @property
    def pairs(self) -> list[dict[str, Any]]:
        """The first model's records, one per pair."""
        return self.results[0].pairs

    def to_json(self) -> str:
        """All models' summaries, by name."""
        return json.dumps({result.name: result.summary for result in self.results}, ensure_ascii=False, indent=2)

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with one row a pair and model, the model's name in the column ``model``."""
        try:
            import pandas
        except ImportError as error:
            raise UserError("`to_dataframe` needs the package pandas: pip install pandas, or use `pairs`.") from error
        return pandas.DataFrame([{"model": result.name, **line} for result in self.results for line in result.lines()])

    def html(self, path: str | Path) -> None:
        """Write the report for people, one self-contained file."""
        write_report(path, _report(self))


def write_results(folder: Path, found: EvaluationReport) -> None:
    """Write grid and report, and each model's records: into ``folder`` where one was evaluated, else, and for a
    placebo, into a folder of the model's name."""
    evaluations = found.evaluations
    assert evaluations is not None
    judged = [result.name for result in found.results if result.name != found.placebo]
    for result in found.results:
        write_records(folder if [result.name] == judged else folder / result.name, result)
    shown = _by_group(evaluations)
    names = [result.name for result in found.results]
    write_grid(
        folder / "grid.png",
        rows=["before", *(f"after {name}" for name in names)],
        columns=[pair.prompt for pair in shown],
        images=[
            [_pixels(pair.original) for pair in shown],
            *([_pixels(pair.unlearned[index]) for pair in shown] for index in range(len(names))),
        ],
        groups=[_heading(pair.group, found.groups.concept) for pair in shown],
    )
    found.html(folder / "report.html")


def write_records(folder: Path, evaluation: Evaluation) -> None:
    """pairs.jsonl, one line per pair, and evaluation.json."""
    folder.mkdir(exist_ok=True)
    write_lines(folder / "pairs.jsonl", evaluation.lines())
    write_json(folder / "evaluation.json", evaluation.summary)


def _report(found: EvaluationReport) -> Report:
    assert found.evaluations is not None
    concept = found.summary["concept"]
    return Report(
        title=f"Unlearning “{concept}”",
        concept=concept,
        evaluations=[result.summary for result in found.results],
        galleries=_galleries(found.evaluations, found.groups.concept),
        retain_prompts="prompts that no loss has seen" if found.unseen else "prompts about other things",
        distances={result.name: _retained(result) for result in found.results},
        redrawn=found.results[0].records.redrawn[np.isfinite(found.results[0].records.redrawn)],
    )


def _retained(result: Evaluation) -> np.ndarray:
    """The distances of the pairs that are to be kept."""
    records = result.records
    kept: np.ndarray = records.distances[result.index][np.isfinite(records.redrawn)]
    return kept


def _by_group(evaluations: Evaluations) -> list[Shown]:
    return sorted(evaluations.gallery, key=lambda pair: not is_forget(pair.group))


def _galleries(evaluations: Evaluations, concept: str | None) -> list[Gallery]:
    names = [result.name for result in evaluations.results]
    columns = ["original", *names]
    galleries = []
    for forget, caption in (
        (True, "Prompts that name the concept, before and after, from the same noise."),
        (False, "Prompts about other things, before and after, from the same noise: they should not change."),
    ):
        pairs = [pair for pair in evaluations.gallery if is_forget(pair.group) == forget]
        if pairs:
            rows = [_row(pair, range(len(names))) for pair in pairs]
            galleries.append(Gallery(_heading(pairs[0].group, concept), caption, columns, rows))
    for index, name in enumerate(names):
        for title, caption, chosen in (
            ("the most changed", "Retain pairs of the largest distance.", evaluations.most_changed),
            ("in the middle", "Retain pairs around the median distance.", evaluations.median_changed),
            ("the least changed", "Retain pairs of the smallest distance.", evaluations.least_changed),
        ):
            rows = [_row(pair, [index]) for pair in chosen[index]]
            galleries.append(Gallery(f"{name}: {title}", caption, ["original", name], rows))
    return galleries


def _row(pair: Shown, indices: Sequence[int]) -> GalleryRow:
    images = [_pixels(pair.original), *(_pixels(pair.unlearned[index]) for index in indices)]
    return GalleryRow(pair.prompt, images, ["", *(f"distance {pair.distances[index]:.3f}" for index in indices)])


def _heading(group: str, concept: str | None) -> str:
    if is_forget(group):
        return f"to forget: {concept}" if concept else "to forget"
    return "to keep"


def _pixels(image: torch.Tensor) -> np.ndarray:
    """(3, H, W) to (H, W, 3) uint8."""
    return image.permute(1, 2, 0).contiguous().numpy()
