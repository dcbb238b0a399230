"""What a run shows to people: one self-contained HTML file that needs no explanation beside it.

Everything here takes plain data (evaluations as of ``schema.py`` and uint8 images), nothing heavy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from ..files.atomic import write_text
from ..schema import ControlRecord, Evaluation
from .gallery import MAX_PIXELS, Gallery, check_gallery
from .pages import templates
from .sentences import (
    CONTROLS,
    LIMITS,
    calibration_sentence,
    erasure_sentence,
    forgot_badge,
    insight,
    judges_words,
    kept_badge,
    retention_sentence,
)


@dataclass(frozen=True)
class HtmlReport:
    """What ``write_report`` shows.

    ``evaluations``: in the order in which they are to appear.  ``galleries``: the first two, what was to go and what
    was to stay, stand right below the verdict.  ``notes``: sentences about this run.  ``retain_prompts``: what to call
    the retain prompts in a sentence, such as ``prompts that took no part in training``.  ``distances``: by
    model the distances of its retain pairs, and ``redrawn`` the original's to itself from other noise, for the
    histograms.
    """

    title: str
    concept: str
    evaluations: Sequence[Evaluation]
    galleries: Sequence[Gallery] = ()
    notes: Sequence[str] = field(default_factory=tuple)
    retain_prompts: str = "prompts about other things"
    distances: Mapping[str, npt.NDArray[np.floating]] = field(default_factory=dict)
    redrawn: npt.NDArray[np.floating] | None = None


def write_report(path: Path | str, report: HtmlReport) -> None:
    """Write ``report`` as one HTML file that loads nothing from elsewhere; the same report gives the same bytes.

    The file is whole or absent.  Raises ``UserError`` for no evaluation, a number of one that is not finite, and
    images that are not (H, W, 3) uint8 or do not match their columns.
    """
    if not report.evaluations:
        raise UserError("a report needs at least one evaluation, got none: pass the content of an evaluation.json")
    for evaluation in report.evaluations:
        _check_evaluation(evaluation, report.concept)
    for gallery in report.galleries:
        check_gallery(gallery)
    models = [verdict_card(evaluation, report.retain_prompts) for evaluation in report.evaluations]
    html = (
        templates()
        .get_template("report.html.j2")
        .render(
            report=report,
            models=models,
            verdicts=[model for model in models if not model["control"]] or models,
            controls=[model for model in models if model["control"]],
            concepts=list(report.evaluations[0].concepts or ()),
            attributes=_attributes(report.evaluations),
            judges=judges_words(one.judge for one in report.evaluations),
            calibrations=_calibrations(report.evaluations),
            insight=insight(report.evaluations),
            ladders=_ladders(report.evaluations),
            histograms=_histograms(report),
            changed_limits=_changed_limits(report.evaluations[0]),
            spec=_spec(report.evaluations),
            reconstructed=[one.name for one in report.evaluations if one.is_reconstruction],
            limits=LIMITS,
            max_pixels=MAX_PIXELS,
        )
    )
    write_text(Path(path), html)


def _check_evaluation(evaluation: Evaluation, concept: str) -> None:
    if evaluation.concept != concept:
        raise UserError(
            f"the report is about {concept!r}, evaluation {evaluation.name!r} about {evaluation.concept!r}: write one "
            "report per concept"
        )
    try:
        evaluation.to_dict()
    except UserError as error:
        raise UserError(f"the evaluation {evaluation.name!r} holds no number: {error}. Evaluate it again.") from None


# ---- what the template sees ------------------------------------------------------------------------------------------


def verdict_card(evaluation: Evaluation, retain_prompts: str) -> dict[str, Any]:
    erasure = evaluation.erasure
    return {
        "name": evaluation.name,
        "evaluation": evaluation,
        "control": CONTROLS.get(evaluation.method),
        "erasure_sentence": erasure_sentence(evaluation),
        "retention_sentence": retention_sentence(evaluation, retain_prompts),
        "shown": erasure and round(erasure.shown * erasure.n_images),
        "forgot": erasure and forgot_badge(erasure),
        "kept": kept_badge(evaluation.integrity.retention),
    }


def _calibrations(evaluations: Sequence[Evaluation]) -> dict[str, bool]:
    """Of each judge what it sees on the original's own images, and whether it cannot tell."""
    judged = [one for one in evaluations if one.judge is not None and one.erasure is not None]
    return {
        calibration_sentence(one.judge, one.calibration, one.concept): bool(
            one.calibration and one.calibration.verdict == "cannot tell"
        )
        for one in judged
        if one.judge is not None
    }


def _attributes(evaluations: Sequence[Evaluation]) -> list[str]:
    """What the judges know of retain images, in their order."""
    known = (e.retain.attributes for e in evaluations if e.retain is not None)
    return list(dict.fromkeys(name for attributes in known for name in attributes))


def _ladders(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """One ladder a metric, since distances of different metrics do not compare; positions in percent of its width."""
    ladders = []
    for metric in dict.fromkeys(e.integrity.metric for e in evaluations):
        group = [e for e in evaluations if e.integrity.metric == metric]
        rungs = [_rung("same model, run again", "control", max(e.controls.repeat for e in group))]
        for records in ([e.controls.numeric for e in group], [e.controls.precision for e in group]):
            different: dict[str, ControlRecord] = {one.what: one for one in records if one is not None}
            rungs += [_rung(one.what, "control", one.mean) for one in different.values()]
        for e in sorted(group, key=lambda e: e.integrity.mean):
            kind = "control" if e.method in CONTROLS else "model"
            rungs.append(_rung(e.name, kind, e.integrity.mean, e.integrity.ci95))
        ceilings = dict.fromkeys(e.controls.redrawn for e in group)
        for ceiling in ceilings:
            names = ", ".join(e.name for e in group if e.controls.redrawn == ceiling)
            label = "redrawn from other noise" + (f" ({names})" if len(ceilings) > 1 else "")
            rungs.append(_rung(label, "control", ceiling))
        width = max(rung["high"] for rung in rungs) or 1.0
        for rung in rungs:
            rung["at"] = {key: f"{100 * rung[key] / width:.2f}%" for key in ("mean", "low", "high")}
        ladders.append({"metric": metric, "rungs": rungs})
    return ladders


def _changed_limits(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """From which distance on an image counts as changed, by the control that the limit comes from."""
    words = {
        "numeric": "more than rounding",
        "precision": "more than a coarser precision",
        "placebo": "more than training without forgetting",
        "redrawn": "as if generated anew",
    }
    return {name: {"words": words[name], "limit": limit} for name, limit in evaluation.integrity.changed.items()}


def _histograms(report: HtmlReport, bins: int = 40) -> dict[str, Any]:
    """For each model how many pairs have which distance, beside the redrawn ones; heights and places in percent."""
    sides = [*report.distances.values(), *([report.redrawn] if report.redrawn is not None else [])]
    reach = max((float(np.max(side)) for side in sides if len(side)), default=0.0)
    if not report.distances or reach == 0:
        return {"reach": reach, "models": []}

    def heights(values: npt.NDArray[np.floating]) -> list[float]:
        return [float(share) for share in np.histogram(values, bins, (0, reach))[0] / len(values)]

    redrawn = heights(report.redrawn) if report.redrawn is not None and len(report.redrawn) else []
    models = []
    for name, values in report.distances.items():
        own = heights(values)
        top = max(own)
        # Each kind fills the height by itself: where they lie is the point, not how wide they are.
        models.append(
            {
                "name": name,
                "bars": [(100 * i / bins, 100 * h / top) for i, h in enumerate(own) if h],
                "redrawn": [(100 * i / bins, 100 * h / max(redrawn)) for i, h in enumerate(redrawn) if h],
                "width": 100 / bins,
            }
        )
    return {"reach": reach, "models": models}


def _rung(label: str, kind: str, mean: float, interval: Sequence[float] | None = None) -> dict[str, Any]:
    low, high = interval or (mean, mean)
    return {"label": label, "kind": kind, "mean": mean, "low": low, "high": high, "interval": interval}


def _spec(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """Settings all evaluations share, and for each what is its own."""
    flat = [dict(flatten(_settings(e))) for e in evaluations]
    shared = {key: value for key, value in flat[0].items() if all(other.get(key) == value for other in flat)}
    own = [
        (evaluation.name, {key: value for key, value in settings.items() if key not in shared})
        for evaluation, settings in zip(evaluations, flat, strict=True)
    ]
    return {"shared": shared, "own": [(name, settings) for name, settings in own if settings]}


def _settings(evaluation: Evaluation) -> dict[str, Any]:
    judge = {"judge": evaluation.judge.name} if evaluation.judge else {}
    if evaluation.judge and evaluation.judge.weights:
        judge["judge's weights"] = evaluation.judge.weights
    return {"model": evaluation.model, "metric": evaluation.integrity.metric, **judge, **evaluation.to_dict()["spec"]}


def flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, str(value)
