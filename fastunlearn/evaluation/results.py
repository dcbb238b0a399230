"""What an evaluation found, and its files: records and summary for machines, grid and report for people."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from ..errors import UserError
from ..files.atomic import write_lines
from ..judges.base import Judge
from ..prompts import PromptGroups, is_forget
from ..schema import Evaluation
from .journal import PairScores
from .judging import verdict_of

if TYPE_CHECKING:
    from ..reports.gallery import Gallery, GalleryRow
    from ..reports.html import HtmlReport

#: With what a cell of a table may not begin: a spreadsheet would take it for a formula.
_FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\n")


@dataclasses.dataclass(frozen=True)
class ShownPair:
    """A pair kept for the report.  Images are (3, H, W) uint8; ``unlearned`` has one per model."""

    group: str
    prompt: str
    original: torch.Tensor
    unlearned: tuple[torch.Tensor, ...]
    distances: tuple[float, ...]

    @property
    def label(self) -> str:
        """The prompt as people read it."""
        return self.prompt or "(the empty prompt)"


@dataclasses.dataclass(frozen=True)
class ModelResult:
    """The result for one unlearned model: ``evaluation`` is evaluation.json, ``pairs`` the lines of pairs.jsonl.

    ``index``: of the model in ``scores``.  ``unprompted``: (N,) which pairs are not to be kept although their prompts
    do not ask for the concept: the original shows it.
    """

    name: str
    evaluation: Evaluation
    scores: PairScores
    index: int
    group_of: Mapping[str, str]
    judge: Judge | None
    unprompted: npt.NDArray[np.bool_]

    @property
    def to_keep(self) -> npt.NDArray[np.bool_]:
        """(N,) which pairs are to be kept."""
        return np.isfinite(self.scores.redrawn) & ~self.unprompted

    @functools.cached_property
    def summary(self) -> dict[str, Any]:
        """The content of evaluation.json, but for the hash of pairs.jsonl."""
        return self.evaluation.to_dict()

    @property
    def pairs(self) -> list[dict[str, Any]]:
        return list(self.lines())

    def lines(self) -> Iterator[dict[str, Any]]:
        """One record per pair, in key order.

        Group, prompt, seed, ``distance``; for what is to be kept ``redrawn``, the original's distance to itself from
        other noise; ``unprompted`` where it is true; ``color_distance``; and what the judge says of the unlearned
        model's image and, under ``original``, of the original's.
        """
        for row, (prompt, seed) in enumerate(self.scores.keys):
            record: dict[str, Any] = {"group": self.group_of[prompt], "prompt": prompt, "seed": seed}
            record["distance"] = float(self.scores.distances[self.index, row])
            redrawn = float(self.scores.redrawn[row])
            if redrawn == redrawn:
                record["redrawn"] = redrawn
            if self.unprompted[row]:
                record["unprompted"] = True
            record["color_distance"] = float(self.scores.colors[self.index + 1, row])
            if self.judge is not None and self.scores.judged is not None:
                record |= verdict_of(self.judge, self.scores.judged, self.index + 1, row)
                record["original"] = verdict_of(self.judge, self.scores.judged, 0, row)
            yield record


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """The results for all models, in order, and the images that a report shows: some of each group, and for each
    model the retain pairs that changed most, middling and least."""

    results: list[ModelResult]
    gallery: list[ShownPair]
    most_changed: list[list[ShownPair]]
    median_changed: list[list[ShownPair]]
    least_changed: list[list[ShownPair]]


@dataclasses.dataclass(frozen=True)
class EvaluationReport:
    """The result of an evaluation of one or several models.

    ``result``: None in a process that only took part in it.  ``seen``: the retain prompts that took part in training,
    which the report then says; None where that is not known.  ``placebo``: which model is a control only.
    """

    result: EvaluationResult | None
    groups: PromptGroups
    placebo: str | None = None
    seen: Set[str] | None = None

    @property
    def results(self) -> list[ModelResult]:
        """One per model, in order, a placebo last."""
        return self.result.results if self.result else []

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
        """A pandas DataFrame with one row per pair and model, the model's name in the column ``model``.

        What the judge says stands in columns such as ``original.shown``.  A text that a spreadsheet would take for a
        formula gets an apostrophe in front.
        """
        try:
            import pandas
        except ImportError as error:
            raise UserError("`to_dataframe` needs the package pandas: pip install pandas, or use `pairs`.") from error
        return pandas.DataFrame(
            [_flat({"model": result.name, **line}) for result in self.results for line in result.lines()]
        )

    def html(self, path: str | Path) -> None:
        """Write the report for people, one self-contained file."""
        from ..reports.html import write_report

        write_report(path, _report(self))


def write_results(folder: Path, report: EvaluationReport) -> None:
    """Write grid and report, and each model's records: into ``folder`` where one was evaluated, else, and for a
    placebo, into a folder of the model's name."""
    from ..reports.grid import write_grid

    assert report.result is not None
    attempts = [result.name for result in report.results if result.name != report.placebo]
    for result in report.results:
        write_records(folder if [result.name] == attempts else folder / result.name, result)
    shown = sorted(report.result.gallery, key=lambda pair: not is_forget(pair.group))
    names = [result.name for result in report.results]
    write_grid(
        folder / "grid.png",
        rows=["before", *(f"after {name}" for name in names)],
        columns=[pair.label for pair in shown],
        images=[
            [_pixels(pair.original) for pair in shown],
            *([_pixels(pair.unlearned[index]) for pair in shown] for index in range(len(names))),
        ],
        groups=[_heading(pair.group, report.groups.concept) for pair in shown],
    )
    report.html(folder / "report.html")


def write_records(folder: Path, result: ModelResult) -> None:
    """pairs.jsonl, one line per pair, and evaluation.json."""
    folder.mkdir(exist_ok=True)
    pairs = write_lines(folder / "pairs.jsonl", result.lines())
    dataclasses.replace(result.evaluation, pairs_sha256=pairs).write(folder / "evaluation.json")


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """One level of columns, without formulas."""
    cells: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            cells |= _flat(value, f"{prefix}{name}.")
        elif isinstance(value, str) and value.startswith(_FORMULAS):
            cells[prefix + name] = "'" + value
        else:
            cells[prefix + name] = value
    return cells


def _report(report: EvaluationReport) -> HtmlReport:
    from ..reports.html import HtmlReport

    assert report.result is not None
    first = report.results[0]
    concept = first.evaluation.concept
    return HtmlReport(
        title=f"Unlearning “{concept}”",
        concept=concept,
        evaluations=[result.evaluation for result in report.results],
        galleries=_galleries(report.result, report.groups.concept),
        retain_prompts=_named(report.seen),
        distances={one.name: one.scores.distances[one.index][one.to_keep] for one in report.results},
        redrawn=first.scores.redrawn[first.to_keep],
    )


def _named(seen: Set[str] | None) -> str:
    """What to call the retain prompts in a sentence, by those that took part in training."""
    if seen is None:
        return "prompts about other things"
    if not seen:
        return "prompts that took no part in training"
    if seen == {""}:
        return "prompts that took no part in training (but for the empty one)"
    return f"prompts about other things ({len(seen)} of which took part in a training)"


def _galleries(result: EvaluationResult, concept: str | None) -> list[Gallery]:
    from ..reports.gallery import Gallery

    names = [model.name for model in result.results]
    columns = ["original", *names]
    galleries = []
    for forget, caption in (
        (True, "Prompts that name the concept, before and after, from the same noise."),
        (False, "Prompts about other things, before and after, from the same noise: they should not change."),
    ):
        pairs = [pair for pair in result.gallery if is_forget(pair.group) == forget]
        if pairs:
            rows = [_row(pair, range(len(names))) for pair in pairs]
            galleries.append(Gallery(_heading(pairs[0].group, concept), caption, columns, rows))
    for index, name in enumerate(names):
        for title, caption, chosen in (
            ("the most changed", "Retain pairs of the largest distance.", result.most_changed),
            ("in the middle", "Retain pairs around the median distance.", result.median_changed),
            ("the least changed", "Retain pairs of the smallest distance.", result.least_changed),
        ):
            rows = [_row(pair, [index]) for pair in chosen[index]]
            galleries.append(Gallery(f"{name}: {title}", caption, ["original", name], rows))
    return galleries


def _row(pair: ShownPair, indices: Sequence[int]) -> GalleryRow:
    from ..reports.gallery import GalleryRow

    images = [_pixels(pair.original), *(_pixels(pair.unlearned[index]) for index in indices)]
    return GalleryRow(pair.label, images, ["", *(f"distance {pair.distances[index]:.3f}" for index in indices)])


def _heading(group: str, concept: str | None) -> str:
    if is_forget(group):
        return f"to forget: {concept}" if concept else "to forget"
    return "to keep"


def _pixels(image: torch.Tensor) -> np.ndarray:
    """(3, H, W) to (H, W, 3) uint8."""
    return image.permute(1, 2, 0).contiguous().numpy()
