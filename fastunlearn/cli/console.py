"""What the commands print: the plan, progress bars, tables."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console as Terminal
from rich.console import JustifyMethod
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..models.adapter_files import FILE as ADAPTER
from ..progress import Reporter
from ..schema import Comparison, Ending, Evaluation, FoldersEvaluation

if TYPE_CHECKING:
    from ..evaluation.results import EvaluationReport


LOG_EVERY_S = 10.0  # between two lines of progress, where stderr is no terminal
_WORDS = {"loading": "load", "evaluation": "evaluate", "training": "train"}  # of the stages, where they differ


class Console(Reporter):
    """Prints plans to stdout, and progress to stderr: bars on a terminal, else a line every few seconds."""

    def __init__(self, *, plans: bool = True, quiet: bool = False) -> None:
        self.out = terminal(soft_wrap=True)
        self.plans, self.quiet = plans, quiet
        self.told: list[str] = []  # the plan
        error = terminal(stderr=True)
        self.logs = not quiet and not error.is_terminal
        self.bars = Progress(
            TextColumn("{task.description:10}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[note]}", markup=False),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=error,
            disable=quiet or not error.is_terminal,
        )
        self.task: TaskID | None = None
        self.begun = self.logged = time.monotonic()
        self.left: float | None = None  # of the concept, when it was last measured
        self.name = ""

    def __enter__(self) -> Console:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.bars.stop()

    def plan(self, name: str, lines: Sequence[str]) -> None:
        self.name, self.told = name, list(lines)
        if self.plans:
            for line in lines:
                self.out.print(line)

    def stage(self, name: str) -> None:
        if self.task is not None:
            self.bars.update(self.task, total=1, completed=1)  # of the stage before: it has ended
        self.begun, self.left = time.monotonic(), None
        # Until a number comes the bar says no more than that something goes on.
        self.task = self.bars.add_task(_WORDS.get(name, name), total=None, note="")

    def edited(self, facts: Mapping[str, float]) -> None:
        if self.plans and facts:
            told = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in facts.items())
            self.out.print(f"edited      {told}")

    def working(self, stage: str, done: int, total: int) -> None:
        self._advance(stage, done, total, "")

    def training(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        note = f"loss {metrics['loss']:.4g}"
        self.left = metrics.get("residual", self.left)
        if self.left is not None:
            note += f"  {self.left:.0%} of the concept left"
        self._advance(f"train {self.name}", step, total, "steps", note, metrics["steps_per_second"])

    def scoring(self, done: int, total: int) -> None:
        self._advance("evaluate", done, total, "images")

    def attacking(self, done: int, total: int) -> None:
        self._advance("attack", done, total, "U")

    def comparing(self, done: int, total: int) -> None:
        self._advance("compare", done, total, "pairs")

    def note(self, text: str) -> None:
        if not self.quiet:
            self.bars.console.print(f"note: {text}")

    def _advance(
        self, name: str, done: int, total: int, unit: str, note: str = "", per_second: float | None = None
    ) -> None:
        if self.task is None:
            self.task, self.begun = self.bars.add_task(name, total=total, note=""), time.monotonic()
        rate = done / max(time.monotonic() - self.begun, 1e-9) if per_second is None else per_second
        said = " ".join(filter(None, [f"{done:,}/{total:,}", unit, f"{rate:.{1 if rate < 100 else 0}f}/s", note]))
        self.bars.update(self.task, description=name, completed=done, total=total, note=said)
        now = time.monotonic()
        if self.logs and now - self.logged >= LOG_EVERY_S and done < total:
            left = f", {duration((total - done) / rate)} left" if rate else ""
            self.bars.console.print(f"{name}: {said}{left}")
            self.logged = now

    def result(self, folder: Path, model: Path | None = None, ending: Ending | None = None) -> None:
        """Say where things are, how the training ended, and the verdict if there was an evaluation."""
        from ..reports.sentences import how_it_ended, verdict

        path = folder / "evaluation.json"
        if path.is_file():
            evaluation = Evaluation.read(path)
            table([evaluation])
            self.out.print(verdict(evaluation))
            self.out.print(f"report: {folder / 'report.html'}")
        if model is not None and model.name == ADAPTER:
            self.out.print(f"adapter: {model}  (loads with load_lora_weights of diffusers, over its base)")
        elif model is not None and model.suffix == ".safetensors":
            self.out.print(f"delta:  {model}  (rebuild the model with `fastunlearn apply`)")
        elif model is not None:
            self.out.print(f"model:  {model}  (loads with diffusers.DiffusionPipeline.from_pretrained)")
        if ending is not None and (said := how_it_ended(ending)):
            self.out.print(said)

    def evaluated(self, report: EvaluationReport, folder: Path) -> None:
        """Say what an evaluation found and where it is."""
        from ..reports.sentences import verdict

        table([result.evaluation for result in report.results])
        for result in report.results:
            if result.name != report.placebo:
                name = f"{result.name}: " if len(report.results) > 1 else ""
                self.out.print(name + verdict(result.evaluation))
        self.out.print(f"report: {folder / 'report.html'}")


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def terminal(**options: Any) -> Terminal:
    """A terminal that shows texts as they are: what a user wrote in brackets or between colons is no markup."""
    return Terminal(markup=False, emoji=False, highlight=False, **options)


def table(evaluations: Sequence[Evaluation]) -> None:
    """The judge's calibration, and the models of an evaluation side by side."""
    from ..reports.sentences import calibration_sentence

    first = evaluations[0]
    if first.judge and first.erasure:
        terminal(soft_wrap=True).print(calibration_sentence(first.judge, first.calibration, first.concept))
    attributes = list(first.retain.attributes) if first.retain else []
    columns = ["model"]
    if first.erasure:
        columns += [f"{first.concept} shown", "valid"]
    columns += [f"{name} kept" for name in attributes] + ["judged the same"] * bool(attributes)
    columns += ["retention R", "95 % interval", "R color", "distance"]
    rows = [_row(evaluation, attributes, erased=first.erasure is not None) for evaluation in evaluations]
    out = terminal()
    if not out.is_terminal:
        out = terminal(width=120)
    # A heading may be broken between words, a cell may not.
    words = [[*name.split(), *(row[index] for row in rows)] for index, name in enumerate(columns)]
    fits = not out.is_terminal or sum(max(map(len, column)) + 2 for column in words) <= out.width
    out.print(_across(columns, rows) if fits else _down(columns, rows))
    if first.concepts:
        out.print(_concepts(evaluations))
    if first.judge:
        out.print(f"judge: {first.judge.name}, shown from a score of {first.judge.threshold:g} on")


def _row(evaluation: Evaluation, attributes: Sequence[str], *, erased: bool) -> list[str]:
    """One model's cells."""
    integrity, erasure, retain = evaluation.integrity, evaluation.erasure, evaluation.retain
    cells = [evaluation.name]
    if erased:
        cells += [_share(one) for one in ((erasure.shown, erasure.valid) if erasure else (None, None))]
    if attributes:
        accuracies = retain.attributes if retain else {}
        cells += [_share(accuracies[name].accuracy if name in accuracies else None) for name in attributes]
        cells.append(_share(retain.agreement if retain else None))
    low, high = integrity.retention_ci95
    color = integrity.color.retention if integrity.color else None
    cells += [f"{integrity.retention:.3f}", f"{low:.3f} to {high:.3f}"]
    return [*cells, "-" if color is None else f"{color:.3f}", f"{integrity.mean:.4f}"]


def _across(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A model a line."""
    grid = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in columns:
        # Wide enough for the longest word, so that none is cut.
        side: JustifyMethod = "left" if name == "model" else "right"
        width = max(map(len, name.split() or [""]))
        grid.add_column(name, justify=side, no_wrap=name == "95 % interval", min_width=width)
    for row in rows:
        grid.add_row(*row)
    return grid


def _down(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A model a column, where the lines would be too long for the terminal."""
    grid = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    grid.add_column(columns[0])
    for row in rows:
        grid.add_column(row[0], justify="right", overflow="fold")
    for name, *cells in list(zip(columns, *rows, strict=True))[1:]:
        grid.add_row(name, *cells)
    return grid


def pages(text: str) -> None:
    """Print a long text: on a terminal its paragraphs are broken anew, but for those that are indented."""
    out = terminal(soft_wrap=True)
    if not out.is_terminal:
        out.print(text)
        return
    parts = text.split("\n\n")
    whole = (
        part if any(line[:1].isspace() for line in part.splitlines()) else " ".join(part.split()) for part in parts
    )
    terminal().print("\n\n".join(whole))


def listed(rows: Sequence[tuple[str, str]]) -> Table:
    """Names, and beside each what is said of it, on the terminal's width: one line or several, broken at words."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column()
    for name, text in rows:
        grid.add_row(name, text)
    return grid


def _concepts(evaluations: Sequence[Evaluation]) -> Table:
    """Several concepts, a line each: how much is still shown of it; a star marks what a model was to forget."""
    grid = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("concept", "before", *(evaluation.name for evaluation in evaluations)):
        grid.add_column(name, justify="left" if name == "concept" else "right")
    for concept, first in (evaluations[0].concepts or {}).items():
        cells = []
        for evaluation in evaluations:
            one = (evaluation.concepts or {})[concept]
            interval = " to ".join(_share(end) for end in one.shown_ci95) if one.shown_ci95 else ""
            cells.append(f"{_share(one.shown)}{'*' * one.forgotten} {interval}".strip())
        grid.add_row(concept, _share(first.shown_original), *cells)
    return grid


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def comparison_table(result: Comparison) -> None:
    """What `compare` found, one line per pair of runs."""
    grid = Table()
    grid.add_column("difference in distance" if result.runs[0].retention is None else "difference in R")
    grid.add_column("", justify="right")
    grid.add_column("95 % interval", justify="right")
    grid.add_column("p (Holm)", justify="right")
    grid.add_column("verdict")
    for row in result.comparisons:
        low, high = row.ci95
        difference, interval = f"{row.difference:+.3f}", f"{low:+.3f} to {high:+.3f}"
        grid.add_row(f"{row.a} - {row.b}", difference, interval, f"{row.p_value_holm:.3g}", row.verdict)
    terminal().print(grid)


def images_table(evaluation: FoldersEvaluation, folder: Path) -> None:
    """What a comparison of two folders found."""
    from ..reports.sentences import calibration_sentence, folders_sentence

    if evaluation.judge and evaluation.erasure:
        said = calibration_sentence(evaluation.judge, evaluation.calibration, evaluation.erasure.concept)
        terminal(soft_wrap=True).print(said)
    grid = Table()
    for name in ("group", "pairs", "distance", "95 % interval", "q50", "q95", "unchanged"):
        grid.add_column(name, justify="left" if name == "group" else "right")
    for name, group in evaluation.groups.items():
        interval = "-" if group.ci95 is None else " to ".join(f"{value:.4f}" for value in group.ci95)
        spread = [f"{group.quantiles[level]:.4f}" for level in ("q50", "q95")]
        grid.add_row(name, str(group.n_pairs), f"{group.mean:.4f}", interval, *spread, f"{group.unchanged:.1%}")
    out = terminal(width=110)
    out.print(grid)
    for name, result in evaluation.metrics.items():
        out.print(f"{name}: {result['value']:.4f}  ({result['of']})")
    plain = terminal(soft_wrap=True)
    plain.print(folders_sentence(evaluation))
    for note in evaluation.notes:
        plain.print(f"note: {note}")
    plain.print(f"report: {folder / 'report.html'}")
