"""Compares evaluated models pair by pair: paired differences with intervals, and whether two count as equal.

It reads what evaluations wrote, so runs of different days can be compared, if they asked the same of the same original.
Of two folders of images the distances are compared: there is no redrawn original that would give retention its scale.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UserError, one_line
from ..files.run_folder import check_output, claimed, prepare_output
from ..metrics import statistics
from ..metrics.statistics import holm
from ..prompts import is_forget
from ..schema import ComparedPair, ComparedRun, Comparison, Evaluation, FoldersEvaluation, GapRecord, read_evaluation
from .config import CompareConfig

# What may differ between two evaluations whose pairs are compared: that their originals agree is checked by bits.
_FREE = ("hashes", "control_pairs", "threads", "versions", "device", "cpu", "gpu")
_FREE_OF_FOLDERS = (*_FREE, "original_images", "unlearned_images", "prompts")

_MARGIN = 0.05  # of retention
_UNIT = "difference in retention R: the distance, as a share of that of the original redrawn from other noise"
_UNIT_OF_FOLDERS = "difference in distance: how much closer the first is to the original's images"
_UNTESTED = 1.0  # a margin where none was given: what follows from it is not used


@dataclasses.dataclass(frozen=True)
class Run:
    """An evaluation as written, and, in key order, the pairs that are to be kept.

    ``keys``: what tells pairs apart.  ``redrawn``: None of folders of images.
    """

    name: str
    folder: Path
    evaluation: Evaluation | FoldersEvaluation
    keys: list[tuple[str, int]]
    prompts: list[str]
    groups: list[str]
    distances: npt.NDArray[np.float64]
    redrawn: npt.NDArray[np.float64] | None

    @property
    def hash_of_original(self) -> str:
        of_folders = isinstance(self.evaluation, FoldersEvaluation)
        result: str = self.evaluation.spec["hashes"]["original_images" if of_folders else "original"]
        return result

    @property
    def settings(self) -> dict[str, Any]:
        """What must be alike in two runs that are compared."""
        free = _FREE_OF_FOLDERS if isinstance(self.evaluation, FoldersEvaluation) else _FREE
        settings = {key: value for key, value in self.evaluation.spec.items() if key not in free}
        if isinstance(self.evaluation, FoldersEvaluation):
            settings["clusters"] = self.evaluation.integrity.clusters
        return settings | {"metric": self.evaluation.integrity.metric}


def compare_runs(config: CompareConfig) -> Comparison:
    """Compare every two of ``config.runs`` and write compare.json, compare.png and compare.html; returns the former.

    Raises UserError for runs that cannot be read and for runs whose original, settings, metric or pairs differ.
    """
    from ..reports.compare import write_page, write_plot

    folder = Path(config.output)
    check_output(folder, "compare", overwrite=config.overwrite)
    runs = _named([read_run(Path(run)) for run in config.runs])
    for run in runs[1:]:
        _check_comparable(runs[0], run)
    result = comparison(runs, config.margin)
    with claimed(folder):
        prepare_output(folder, "compare", overwrite=config.overwrite)
        result.write(folder / "compare.json")
        write_plot(folder / "compare.png", result)
        write_page(folder / "compare.html", result)
    return result


def read_run(folder: Path) -> Run:
    """The evaluation in ``folder``.  UserError where there is none, and where it is damaged or of another version."""
    folder = folder.expanduser()
    try:
        evaluation = read_evaluation(folder / "evaluation.json")
        content = (folder / "pairs.jsonl").read_bytes()
        if evaluation.pairs_sha256 not in (None, hashlib.sha256(content).hexdigest()):
            raise _damaged(folder, "pairs.jsonl has changed since it was written")
        lines = [json.loads(line) for line in content.split(b"\n") if line]
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} holds no evaluation: {Path(str(error.filename)).name} is missing. Evaluate first, or name the "
            "folder of one of the models that were evaluated together."
        ) from None
    except UserError:
        raise
    except ValueError as error:
        raise _damaged(folder, f"pairs.jsonl: {one_line(error)}") from None
    of_folders = isinstance(evaluation, FoldersEvaluation)
    try:
        lines = [line for line in lines if not is_forget(line["group"]) and not line.get("unprompted")]
        kept = sorted(lines, key=_file if of_folders else _key)
        run = Run(
            folder.resolve().name if isinstance(evaluation, FoldersEvaluation) else evaluation.name,
            folder,
            evaluation,
            [(_file if of_folders else _key)(line) for line in kept],
            [str(line["prompt"]) for line in kept],
            [str(line["group"]) for line in kept],
            np.array([line["distance"] for line in kept], dtype=np.float64),
            None if of_folders else np.array([line["redrawn"] for line in kept], dtype=np.float64),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(folder, f"a line of pairs.jsonl has no proper {one_line(error)}") from None
    if len(run.keys) != evaluation.integrity.n_pairs or len(set(run.keys)) < len(run.keys):
        raise _damaged(folder, "pairs.jsonl has no pairs, too few of them, or a pair twice")
    return run


def _key(line: dict[str, Any]) -> tuple[str, int]:
    return line["prompt"], line["seed"]


def _file(line: dict[str, Any]) -> tuple[str, int]:
    return line["file"], 0


def _damaged(folder: Path, what: str) -> UserError:
    return UserError(f"the evaluation in {folder} is damaged: {what}. Evaluate again.")


def comparison(runs: Sequence[Run], margin: float | None = None) -> Comparison:
    """Every two runs' difference, in all and by group; positive means that the first of the two keeps more.

    ``margin``: the largest harmless difference in retention, 0.05 where it is None; of folders of images in distance,
    and where it is None nothing is said of equivalence.  P values of the differences are adjusted for their number
    (Holm).
    """
    of_folders = runs[0].redrawn is None
    if margin is None and not of_folders:
        margin = _MARGIN
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
                by_group[group] = GapRecord(**_gap(_difference(a, b, where, margin), margin))
        verdict = _verdict(a.name, b.name, one, margin, p_value)
        row = _gap(one, margin)
        rows.append(ComparedPair(a=a.name, b=b.name, p_value_holm=p_value, groups=by_group, verdict=verdict, **row))
    return Comparison(
        margin=margin,
        unit=_UNIT_OF_FOLDERS if of_folders else _UNIT,
        interval=overall[0].difference.method,
        n_pairs=len(runs[0].keys),
        n_prompts=len(set(runs[0].prompts)),
        runs=tuple(_compared(run) for run in runs),
        comparisons=tuple(rows),
        spec={"original": runs[0].hash_of_original, **runs[0].settings},
    )


def _compared(run: Run) -> ComparedRun:
    one = run.evaluation
    if isinstance(one, FoldersEvaluation):
        made_by = one.spec["hashes"]["unlearned_images"]
        return ComparedRun(name=run.name, folder=str(run.folder), mean=one.integrity.mean, hash=made_by)
    return ComparedRun(
        name=run.name,
        folder=str(run.folder),
        mean=one.integrity.mean,
        hash=one.spec["hashes"]["unlearned"],
        method=one.method,
        retention=one.integrity.retention,
        retention_ci95=one.integrity.retention_ci95,
        shown=one.erasure.shown if one.erasure else None,
        valid=one.erasure.valid if one.erasure else None,
        judge=one.judge,
    )


def _difference(a: Run, b: Run, where: npt.NDArray[np.bool_], margin: float | None) -> statistics.Comparison:
    """How much more a keeps than b: the gap of their distances, over the distance of redrawn images if it is known."""
    prompts = [prompt for prompt, wanted in zip(a.prompts, where, strict=True) if wanted]
    scale = None if a.redrawn is None else a.redrawn[where]
    return statistics.compare(b.distances[where], a.distances[where], prompts, margin or _UNTESTED, scale=scale)


def _gap(one: statistics.Comparison, margin: float | None) -> dict[str, Any]:
    return {
        "difference": one.difference.mean,
        "ci95": (one.difference.low, one.difference.high),
        "p_value": one.p_value,
        "ci90": one.inner,
        "equivalence_p_value": one.equivalence_p_value if margin is not None else None,
        "equivalent": one.equivalent if margin is not None else None,
    }


def _verdict(a: str, b: str, one: statistics.Comparison, margin: float | None, p_value: float) -> str:
    better, worse = (a, b) if one.difference.mean > 0 else (b, a)
    equivalent = one.equivalent and margin is not None
    if equivalent and p_value < 0.05:
        return f"{better} keeps more, but by less than the margin: equivalent"
    if equivalent:
        return f"{a} and {b} are equivalent within the margin"
    if p_value < 0.05:
        return f"{better} keeps more than {worse}"
    return "undecided: no difference is shown" + (" and no equivalence" if margin is not None else "")


def _named(runs: list[Run]) -> list[Run]:
    """With names that tell them apart: the folder's where two have the same."""
    names = [run.name for run in runs]
    return [dataclasses.replace(run, name=str(run.folder)) if names.count(run.name) > 1 else run for run in runs]


def _check_comparable(one: Run, other: Run) -> None:
    """UserError unless both were measured alike: the same original, sampler, settings, metric, prompts and seeds."""
    between = f"{one.folder} and {other.folder} cannot be compared"
    if one.folder.resolve() == other.folder.resolve():
        raise UserError(f"{one.folder} is given twice. Name two runs.")
    if one.evaluation.kind != other.evaluation.kind:
        raise UserError(
            f"{between}: one is a result of `fastunlearn {one.evaluation.command}`, the other of `fastunlearn "
            f"{other.evaluation.command}`. Name results of one command."
        )
    if one.hash_of_original != other.hash_of_original:
        raise UserError(f"{between}: they are of different originals.")
    ours, theirs = one.settings, other.settings
    differing = [key for key in dict.fromkeys([*ours, *theirs]) if ours.get(key) != theirs.get(key)]
    if differing:
        key = differing[0]
        raise UserError(f"{between}: {key} is {_short(ours.get(key))} and {_short(theirs.get(key))}.")
    if one.keys != other.keys:
        only = set(one.keys) ^ set(other.keys)
        raise UserError(f"{between}: {len(only)} pairs are in one of them only, such as {min(only)!r}.")
    if one.prompts != other.prompts or one.groups != other.groups:
        raise UserError(f"{between}: their prompt files name other prompts or groups for the same images.")
    if one.redrawn is not None and not np.array_equal(one.redrawn, np.asarray(other.redrawn)):
        raise UserError(f"{between}: their originals drew different images, on different machines or versions.")


def _short(value: Any) -> str:
    text = str(value)
    return repr(text if len(text) <= 40 else text[:37] + "...")
