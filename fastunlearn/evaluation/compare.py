"""Compares evaluated models pair by pair: paired differences with intervals, and whether two count as equal.

It reads what evaluations wrote, so runs of different days can be compared, if they asked the same of the same original.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from ..files.atomic import whole_file, write_json, write_text
from ..files.run_folder import check_output, claimed, prepare_output
from ..metrics.statistics import Comparison, compare, holm
from ..reports.html import templates
from .config import CompareConfig
from .summary import is_forget

# What may differ between two evaluations whose pairs are compared: that their originals agree is checked by bits.
_FREE = ("hashes", "control_pairs", "threads", "versions", "device", "cpu", "gpu")


@dataclasses.dataclass(frozen=True)
class Run:
    """An evaluation as written: ``summary`` and, in key order, the pairs that are to be kept."""

    name: str
    folder: Path
    summary: dict[str, Any]
    keys: list[tuple[str, int]]
    groups: list[str]
    distances: npt.NDArray[np.float64]
    redrawn: npt.NDArray[np.float64]

    @property
    def prompts(self) -> list[str]:
        return [prompt for prompt, _ in self.keys]


def compare_runs(config: CompareConfig) -> dict[str, Any]:
    """Compare every two of ``config.runs`` and write compare.json, compare.png and compare.html; returns the former.

    Raises UserError for runs that cannot be read and for runs whose original, settings, metric or pairs differ.
    """
    folder = Path(config.output)
    check_output(folder, "compare", overwrite=config.overwrite)
    runs = _named([read_run(Path(run)) for run in config.runs])
    for run in runs[1:]:
        _check_comparable(runs[0], run)
    result = comparison(runs, config.margin)
    with claimed(folder):
        prepare_output(folder, "compare", overwrite=config.overwrite)
        write_json(folder / "compare.json", result)
        _write_plot(folder / "compare.png", result)
        _write_page(folder / "compare.html", result)
    return result


def read_run(folder: Path) -> Run:
    """The evaluation in ``folder``.  ValueError, in one line, where there is none or it is damaged."""
    folder = folder.expanduser()
    try:
        summary = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        with (folder / "pairs.jsonl").open(encoding="utf-8") as lines:
            records = [json.loads(line) for line in lines]
        records = sorted(
            (record for record in records if not is_forget(record["group"])),
            key=lambda record: (record["prompt"], record["seed"]),
        )
        run = Run(
            str(summary["name"]),
            folder,
            summary,
            [(record["prompt"], record["seed"]) for record in records],
            [record["group"] for record in records],
            np.array([record["distance"] for record in records], dtype=np.float64),
            np.array([record["redrawn"] for record in records], dtype=np.float64),
        )
        _ = summary["integrity"]["metric"], summary["integrity"]["retention"], summary["spec"]["hashes"]["original"]
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} holds no evaluation: {Path(str(error.filename)).name} is missing. Evaluate first, or name the "
            "folder of one of the models that were evaluated together."
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the evaluation in {folder} is damaged or of another version ({error!r}).") from None
    if not run.keys or len(set(run.keys)) < len(run.keys):
        raise UserError(f"the evaluation in {folder} is damaged: it has no pairs, or a pair twice.")
    return run


def comparison(runs: Sequence[Run], margin: float) -> dict[str, Any]:
    """Every two runs' difference in retention, in all and by group; ``margin`` in units of retention.

    Positive means that the first of the two keeps more.  P values of the differences are adjusted for their number
    (Holm).
    """
    pairs = list(itertools.combinations(runs, 2))
    everything = np.ones(len(runs[0].keys), dtype=bool)
    overall = [_difference(a, b, everything, margin) for a, b in pairs]
    adjusted = holm([one.p_value for one in overall])
    rows = []
    for (a, b), one, p_value in zip(pairs, overall, adjusted, strict=True):
        by_group = {}
        for group in sorted(set(a.groups)):
            where = np.array([name == group for name in a.groups])
            if len({prompt for prompt, wanted in zip(a.prompts, where, strict=True) if wanted}) > 1:
                by_group[group] = _row(_difference(a, b, where, margin))
        rows.append({"a": a.name, "b": b.name, "p_value_holm": p_value} | _row(one) | {"groups": by_group})
        rows[-1]["verdict"] = _verdict(a.name, b.name, one, p_value)
    return {
        "margin": margin,
        "unit": "difference in retention R: the distance, as a share of that of the original redrawn from other noise",
        "interval": overall[0].difference.method,
        "n_pairs": len(runs[0].keys),
        "n_prompts": len(set(runs[0].prompts)),
        "runs": [
            {
                "name": run.name,
                "folder": str(run.folder),
                "method": run.summary["method"],
                "retention": run.summary["integrity"]["retention"],
                "retention_ci95": run.summary["integrity"]["retention_ci95"],
                "mean": run.summary["integrity"]["mean"],
                "forget_accuracy": (run.summary["erasure"] or {}).get("forget_accuracy"),
                "hash": run.summary["spec"]["hashes"]["unlearned"],
            }
            for run in runs
        ],
        "comparisons": rows,
        "spec": {
            "metric": runs[0].summary["integrity"]["metric"],
            "original": runs[0].summary["spec"]["hashes"]["original"],
        }
        | {key: value for key, value in runs[0].summary["spec"].items() if key not in _FREE},
    }


def _difference(a: Run, b: Run, where: npt.NDArray[np.bool_], margin: float) -> Comparison:
    """How much more a keeps than b, in retention: the gap of their distances over the distance of redrawn images."""
    prompts = [prompt for prompt, wanted in zip(a.prompts, where, strict=True) if wanted]
    return compare(b.distances[where], a.distances[where], prompts, margin, scale=a.redrawn[where])


def _row(one: Comparison) -> dict[str, Any]:
    return {
        "difference": one.difference.mean,
        "ci95": [one.difference.low, one.difference.high],
        "p_value": one.p_value,
        "ci90": list(one.inner),
        "equivalence_p_value": one.equivalence_p_value,
        "equivalent": one.equivalent,
    }


def _verdict(a: str, b: str, one: Comparison, p_value: float) -> str:
    better, worse = (a, b) if one.difference.mean > 0 else (b, a)
    if one.equivalent and p_value < 0.05:
        return f"{better} keeps more, but by less than the margin: equivalent"
    if one.equivalent:
        return f"{a} and {b} are equivalent within the margin"
    if p_value < 0.05:
        return f"{better} keeps more than {worse}"
    return "undecided: neither a difference nor equivalence is shown"


def _named(runs: list[Run]) -> list[Run]:
    """With names that tell them apart: the folder's where two have the same."""
    names = [run.name for run in runs]
    return [dataclasses.replace(run, name=str(run.folder)) if names.count(run.name) > 1 else run for run in runs]


def _check_comparable(one: Run, other: Run) -> None:
    """ValueError unless both were measured alike: the same original, sampler, settings, metric, prompts and seeds."""
    between = f"{one.folder} and {other.folder} cannot be compared"
    if one.folder.resolve() == other.folder.resolve():
        raise UserError(f"{one.folder} is given twice. Name two runs.")
    ours, theirs = ({**run.summary["spec"], "metric": run.summary["integrity"]["metric"]} for run in (one, other))
    if ours["hashes"]["original"] != theirs["hashes"]["original"]:
        raise UserError(f"{between}: they are of different originals.")
    keys = [key for key in dict.fromkeys([*ours, *theirs]) if key not in _FREE]
    differing = [key for key in keys if ours.get(key) != theirs.get(key)]
    if differing:
        key = differing[0]
        raise UserError(f"{between}: {key} is {_short(ours.get(key))} and {_short(theirs.get(key))}.")
    if one.keys != other.keys:
        only = set(one.keys) ^ set(other.keys)
        raise UserError(f"{between}: {len(only)} pairs are in one of them only, such as {min(only)!r}.")
    if not np.array_equal(one.redrawn, other.redrawn):
        raise UserError(f"{between}: their originals drew different images, on different machines or versions.")


def _short(value: Any) -> str:
    text = str(value)
    return repr(text if len(text) <= 40 else text[:37] + "...")


def _write_plot(path: Path, result: dict[str, Any]) -> None:
    """Each comparison's difference with its 95 % interval (thin) and 90 % interval (thick) against the margins."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = result["comparisons"]
    figure = Figure(figsize=(8, 1.6 + 0.5 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    with matplotlib.rc_context({"font.size": 10}):
        axes = figure.add_subplot()
        axes.axvspan(-result["margin"], result["margin"], color="#dbe7f7", label="within the margin")
        axes.axvline(0, color="#6b7280", linewidth=1)
        for index, row in enumerate(reversed(rows)):
            axes.plot(row["ci95"], [index, index], color="#1d5fc4", linewidth=1.5)
            axes.plot(row["ci90"], [index, index], color="#1d5fc4", linewidth=4, alpha=0.5)
            axes.plot([row["difference"]], [index], "o", color="#1d5fc4")
        axes.set_yticks(range(len(rows)), [f"{row['a']} − {row['b']}" for row in reversed(rows)])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlabel("difference in retention R: to the right the first keeps more (95 %, thick: 90 %)")
        axes.legend(loc="best", frameon=False)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        with whole_file(path) as unfinished:
            figure.savefig(unfinished, format="png", dpi=120, metadata={"Software": None})


def _write_page(path: Path, result: dict[str, Any]) -> None:
    reach = max(
        [2 * result["margin"]]
        + [abs(end) * 1.05 for row in result["comparisons"] for end in (*row["ci95"], *row["ci90"])]
    )
    # Where a difference stands on a rail that is `reach` wide to both sides of 0.
    places = {"at": lambda value: f"{50 + 50 * value / reach:.2f}%", "width": f"{100 * result['margin'] / reach:.2f}%"}
    write_text(path, templates().get_template("compare.html.j2").render(found=result, **places))
