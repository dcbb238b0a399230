"""What the commands print: the plan, progress bars, tables."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console as Terminal
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..evaluation.results import EvaluationReport
from ..progress import Reporter


class Console(Reporter):
    """Prints plans to stdout and draws bars on stderr, where it is a terminal."""

    def __init__(self, *, plans: bool = True, quiet: bool = False) -> None:
        self.out = Terminal(highlight=False, soft_wrap=True)
        self.plans = plans
        terminal = Terminal(stderr=True)
        self.bars = Progress(
            TextColumn("{task.description:10}"),
            BarColumn(bar_width=30),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(compact=True),
            console=terminal,
            disable=quiet or not terminal.is_terminal,
        )
        self.task: TaskID | None = None
        self.begun = 0.0  # the scoring
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
        self.name = name
        if self.plans:
            for line in lines:
                self.out.print(line, markup=False)

    def stage(self, name: str) -> None:
        self.task, self.begun = None, time.monotonic()

    def training(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        note = f"loss {metrics['loss']:.4g}  {metrics['steps_per_second']:.1f} steps/s"
        self._advance(f"train {self.name}", step, total, note)

    def scoring(self, done: int, total: int) -> None:
        rate = done / max(time.monotonic() - self.begun, 1e-9)
        self._advance("evaluate", done, total, f"images  {rate:.1f}/s" if done < total else "images")

    def comparing(self, done: int, total: int) -> None:
        self._advance("compare", done, total, "pairs")

    def note(self, text: str) -> None:
        self.bars.console.print(f"note: {text}", highlight=False)

    def _advance(self, name: str, done: int, total: int, note: str) -> None:
        if self.task is None:
            self.task = self.bars.add_task(name, total=total, note="")
        self.bars.update(self.task, completed=done, total=total, note=note)

    def result(self, folder: Path, model: Path | None = None) -> None:
        """Say where things are, and the verdict if there was an evaluation."""
        import json

        from ..reports.html import verdict

        evaluation = folder / "evaluation.json"
        if evaluation.is_file():
            summary = json.loads(evaluation.read_text(encoding="utf-8"))
            table([summary])
            self.out.print(verdict(summary))
            self.out.print(f"report: {folder / 'report.html'}")
        if model is not None and model.suffix == ".safetensors":
            self.out.print(f"delta:  {model}  (rebuild the model with `fastunlearn apply`)")
        elif model is not None:
            self.out.print(f"model:  {model}  (loads with diffusers.DiffusionPipeline.from_pretrained)")

    def evaluated(self, report: EvaluationReport, folder: Path) -> None:
        """Say what an evaluation found and where it is."""
        from ..reports.html import verdict

        table([result.summary for result in report.results])
        for result in report.results:
            if result.name != report.placebo:
                name = f"{result.name}: " if len(report.results) > 1 else ""
                self.out.print(name + verdict(result.summary))
        self.out.print(f"report: {folder / 'report.html'}")


def table(summaries: Sequence[dict[str, Any]]) -> None:
    """The models of an evaluation side by side."""
    grid = Table(title=None)
    first = summaries[0]
    grid.add_column("model")
    if first["erasure"]:
        grid.add_column(f"{first['erasure']['concept']} shown", justify="right")
    if first["retain"]:
        for name in ("shape", "color", "background"):
            grid.add_column(f"{name} kept", justify="right")
    grid.add_column("retention R", justify="right")
    grid.add_column("95 % interval", justify="right")
    grid.add_column("distance", justify="right")
    for summary in summaries:
        integrity = summary["integrity"]
        cells = [summary["name"]]
        if first["erasure"]:
            cells.append(f"{summary['erasure']['forget_accuracy']:.1%}")
        if first["retain"]:
            for name in ("shape", "color", "background"):
                value = summary["retain"][f"{name}_accuracy"]
                cells.append("-" if value is None else f"{value:.1%}")
        low, high = integrity["retention_ci95"]
        cells += [f"{integrity['retention']:.3f}", f"{low:.3f} to {high:.3f}", f"{integrity['mean']:.4f}"]
        grid.add_row(*cells)
    Terminal(width=110).print(grid)


def comparison_table(result: dict[str, Any]) -> None:
    """What `compare` found, one line per pair of runs."""
    grid = Table(title=None)
    grid.add_column("difference in R")
    grid.add_column("", justify="right")
    grid.add_column("95 % interval", justify="right")
    grid.add_column("p (Holm)", justify="right")
    grid.add_column("verdict")
    for row in result["comparisons"]:
        low, high = row["ci95"]
        difference, interval = f"{row['difference']:+.3f}", f"{low:+.3f} to {high:+.3f}"
        grid.add_row(f"{row['a']} - {row['b']}", difference, interval, f"{row['p_value_holm']:.3g}", row["verdict"])
    Terminal().print(grid)


def images_table(summary: dict[str, Any], folder: Path) -> None:
    """What a comparison of two folders found."""
    from ..reports.images import image_sentence

    grid = Table()
    for name in ("group", "pairs", "distance", "95 % interval", "q50", "q95", "unchanged"):
        grid.add_column(name, justify="left" if name == "group" else "right")
    for name, group in summary["groups"].items():
        interval = "-" if group["ci95"] is None else " to ".join(f"{value:.4f}" for value in group["ci95"])
        spread = [f"{group['quantiles'][level]:.4f}" for level in ("q50", "q95")]
        grid.add_row(
            name, str(group["n_pairs"]), f"{group['mean']:.4f}", interval, *spread, f"{group['unchanged']:.1%}"
        )
    out = Terminal(width=110, highlight=False)
    out.print(grid)
    for name, result in summary["metrics"].items():
        out.print(f"{name}: {result['value']:.4f}  ({result['of']})")
    plain = Terminal(highlight=False, soft_wrap=True)
    plain.print(image_sentence(summary))
    plain.print(f"report: {folder / 'report.html'}")


def methods_table() -> None:
    """Every method: paper, what it needs, what it changes."""
    from ..methods import all_methods, broken_methods
    from ..training.selection import GROUPS

    grid = Table()
    for name in ("method", "paper", "needs", "what it does", "changes by default"):
        grid.add_column(name)
    for method in all_methods().values():
        selector = method.defaults["stable-diffusion"].trainable
        changes = "nothing" if method.name == "identity" else f"{selector}: {GROUPS.get(selector, selector)}"
        grid.add_row(method.name, method.paper, method.needs, method.summary, changes)
    out = Terminal()
    out.print(grid)
    for name, why in broken_methods().items():
        out.print(f"{name}: cannot be loaded ({why})", markup=False, highlight=False)


def info() -> None:
    """Versions, devices, and which kernels and metrics can run here."""
    import torch

    from ..methods import all_methods
    from ..models.loading import import_diffusers

    out = Terminal(highlight=False, soft_wrap=True)
    out.print(f"python        {platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in ("fastunlearn", "torch", "triton", "diffusers", "transformers", "lpips", "deepspeed", "xformers"):
        out.print(f"{name:13} {_version(name)}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            out.print(f"device        cuda:{index} {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    out.print(f"device        cpu, {torch.get_num_threads()} threads")
    triton = torch.cuda.is_available() and _version("triton") != "not installed"
    out.print(
        "kernels       " + ("Triton on CUDA, plain torch on the CPU" if triton else "plain torch (Triton needs a GPU)")
    )
    import_diffusers()
    lpips = (
        "yes (their trunks' weights are fetched at first use)"
        if _version("lpips") != "not installed"
        else "no: pip install lpips"
    )
    out.print("metric        shapes: yes")
    out.print(f"metric        lpips-alex, lpips-vgg, lpips-squeeze: {lpips}")
    libraries = ("clean-fid", "torchmetrics", "open_clip_torch", "dreamsim")
    out.print("metrics       " + ", ".join(f"{name} {_version(name)}" for name in libraries))
    out.print(f"methods       {', '.join(all_methods())}")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
