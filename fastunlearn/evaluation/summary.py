"""From records to evaluation.json: distances put on the scale that the controls give, erasure, what was kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..metrics.statistics import Estimate, clustered_mean, difference, quantiles, retention, wilson
from ..prompts import PromptGroups, is_forget
from ..worlds.shapes import SHAPES_WORLD
from ..worlds.shapes.classifier import HEADS
from .journal import Batch

Mask = npt.NDArray[np.bool_]

#: Order of the classifier's heads in ``Batch.labels``.
LABELS = tuple(HEADS)


@dataclasses.dataclass(frozen=True)
class Control:
    """A rung of the ladder: distances (N,) of the original to itself on some ``keys``, and in words how it was made."""

    what: str
    keys: Sequence[tuple[str, int]]
    distances: npt.NDArray[np.float32]

    def summary(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "n_pairs": len(self.keys),
            "mean": _mean(self.distances, self.keys),
            "q99": float(np.quantile(self.distances.astype(np.float64), 0.99)),
            "max": float(self.distances.max()),
        }


@dataclasses.dataclass(frozen=True)
class Ladder:
    """The controls of an evaluation; ``placebo`` is the name of the model that is one, measured like all others."""

    repeat: float
    numeric: Control
    precision: Control | None = None
    placebo: str | None = None


def summarize(records: Batch, model: int, groups: PromptGroups, ladder: Ladder, placebo: int | None) -> dict[str, Any]:
    """The sections integrity, erasure, retain, controls and groups of evaluation.json for one model of ``records``.

    ``placebo``: which of the models is the placebo.  Everything is computed from the records in key order.
    """
    names = dict(groups.grouped())
    group_of = np.array([names[prompt] for prompt, _ in records.keys])
    kept = np.array([not is_forget(names[prompt]) for prompt, _ in records.keys])
    thresholds = _thresholds(records, kept, ladder, placebo)
    integrity = _integrity(records, model, kept, ladder, thresholds)
    if placebo is not None and placebo != model:
        beyond = difference(
            records.distances[model][kept], records.distances[placebo][kept], _prompts_of(records, kept)
        )
        integrity["minus_placebo"] = {"mean": beyond.mean, "ci95": [beyond.low, beyond.high]}
    judge = groups.concept if records.labels is not None else None
    redrawn = clustered_mean(records.redrawn[kept], _prompts_of(records, kept))
    return {
        "integrity": integrity,
        "erasure": _erasure(records, model, ~kept, judge) if judge and not kept.all() else None,
        "retain": _retained(records, model, kept) if judge else None,
        "groups": {
            str(name): _group(records, model, group_of == name, ladder, thresholds, judge)
            for name in sorted(set(group_of.tolist()), key=lambda name: (not is_forget(name), name))
        },
        "controls": {
            "repeat": ladder.repeat,
            "numeric": ladder.numeric.summary(),
            "precision": ladder.precision.summary() if ladder.precision else None,
            "placebo": _placebo(records, kept, ladder, placebo),
            "redrawn": redrawn.mean,
            "redrawn_ci95": _interval(redrawn),
        },
    }


def _integrity(
    records: Batch, model: int, where: Mask, ladder: Ladder, thresholds: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    distances, clusters = records.distances[model][where], _prompts_of(records, where)
    mean = clustered_mean(distances, clusters)
    floor = _floor(records, where, ladder)
    kept = retention(distances, clusters, records.redrawn[where], clusters, floor)
    return {
        "mean": mean.mean,
        "ci95": _interval(mean),
        "floor": float(np.mean(floor)),
        "ceiling": clustered_mean(records.redrawn[where], clusters).mean,
        "retention": kept.mean,
        "retention_ci95": [kept.low, kept.high],
        "n_pairs": int(where.sum()),
        "n_prompts": mean.n_clusters,
        "interval": mean.method,
        "quantiles": quantiles(distances),
        "changed": {
            name: dict(threshold) | _share(distances > threshold["threshold"], clusters)
            for name, threshold in thresholds.items()
        },
    }


def judged(labels: npt.NDArray[np.uint8]) -> dict[str, Any]:
    """What labels (heads,) say of one image, in words."""
    words = {head: HEADS[head][int(label)] for head, label in zip(LABELS, labels, strict=True)}
    return words | {"valid": words["valid"] == "yes"}


def _group(
    records: Batch,
    model: int,
    where: Mask,
    ladder: Ladder,
    thresholds: Mapping[str, Mapping[str, Any]],
    judge: str | None,
) -> dict[str, Any]:
    """What one group of prompts shows; for a single prompt without intervals over prompts, for ``forget`` without R."""
    distances, clusters = records.distances[model][where], _prompts_of(records, where)
    several = len(set(clusters)) > 1
    mean = clustered_mean(distances, clusters) if several else None
    result: dict[str, Any] = {
        "n_pairs": int(where.sum()),
        "n_prompts": len(set(clusters)),
        "mean": mean.mean if mean else _mean(distances, [records.keys[i] for i in np.flatnonzero(where)]),
        "ci95": _interval(mean) if mean else None,
        "quantiles": quantiles(distances),
    }
    redrawn = records.redrawn[where]
    if np.isnan(redrawn).any():
        if judge:
            shown = _shows(records, model + 1, where, judge)
            share = wilson(int(shown.sum()), len(shown))
            result |= {"forget_accuracy": share.mean, "forget_accuracy_ci95": [share.low, share.high]}
        return result
    result["changed"] = {
        name: float((distances > threshold["threshold"]).mean()) for name, threshold in thresholds.items()
    }
    floor = float(np.mean(_floor(records, where, ladder)))
    ceiling = clustered_mean(redrawn, clusters).mean if several else float(redrawn.astype(np.float64).mean())
    kept: Estimate | None = None
    if several and ceiling > floor:
        try:
            kept = retention(distances, clusters, redrawn, clusters, _floor(records, where, ladder))
        except ValueError:  # too few prompts vary with the seed for an interval
            kept = None
    value = kept.mean if kept else 1 - max(result["mean"] - floor, 0) / (ceiling - floor) if ceiling > floor else None
    return result | {
        "ceiling": ceiling,
        "retention": value,
        "retention_ci95": [kept.low, kept.high] if kept else None,
    }


def _floor(records: Batch, where: Mask, ladder: Ladder) -> float | npt.NDArray[np.float32]:
    """What numerics alone change: pair by pair where the control was measured on all of these, else its mean."""
    measured = dict(zip(ladder.numeric.keys, ladder.numeric.distances.tolist(), strict=True))
    keys = [records.keys[index] for index in np.flatnonzero(where)]
    if all(key in measured for key in keys):
        return np.array([measured[key] for key in keys], dtype=np.float32)
    return _mean(ladder.numeric.distances, ladder.numeric.keys)


def _thresholds(records: Batch, kept: Mask, ladder: Ladder, placebo: int | None) -> dict[str, dict[str, Any]]:
    """Distances above which an image counts as changed, each named after the control that it comes from."""

    def of(control: Control) -> dict[str, Any]:
        source = f"q99 of {len(control.keys)} pairs, {control.what}"
        return {"threshold": float(np.quantile(control.distances.astype(np.float64), 0.99)), "source": source}

    result = {"numeric": of(ladder.numeric)}
    if ladder.precision is not None:
        result["precision"] = of(ladder.precision)
    if placebo is not None:
        values = records.distances[placebo][kept].astype(np.float64)
        result["placebo"] = {"threshold": float(np.quantile(values, 0.95)), "source": "q95 of the placebo"}
    redrawn = float(np.median(records.redrawn[kept].astype(np.float64)))
    source = "median of the original redrawn from other noise"
    return result | {"redrawn": {"threshold": redrawn, "source": source}}


def _placebo(records: Batch, kept: Mask, ladder: Ladder, placebo: int | None) -> dict[str, Any] | None:
    if placebo is None:
        return None
    mean = clustered_mean(records.distances[placebo][kept], _prompts_of(records, kept))
    return {"name": ladder.placebo, "mean": mean.mean, "ci95": _interval(mean)}


def _erasure(records: Batch, model: int, where: Mask, concept: str) -> dict[str, Any]:
    """How often a prompt that names the concept still gives it.  An image that is no valid one shows nothing."""
    shown, before = _shows(records, model + 1, where, concept), _shows(records, 0, where, concept)
    valid = _column(records, model + 1, "valid")[where] == HEADS["valid"].index("yes")
    share = wilson(int(shown.sum()), len(shown))
    return {
        "concept": SHAPES_WORLD.find(concept)[1],
        "forget_accuracy": share.mean,
        "forget_accuracy_ci95": [share.low, share.high],
        "forget_accuracy_original": float(before.mean()),
        "forget_valid": float(valid.mean()),
        # UA of the field, and UA that garbage cannot earn.
        "unlearning_accuracy": 1 - share.mean,
        "unlearning_accuracy_valid": float((valid & ~shown).sum() / len(shown)),
        "n_images": len(shown),
    }


def _retained(records: Batch, model: int, where: Mask) -> dict[str, Any]:
    """Shares of retain images that show what their prompt names (IRA within the concept's attribute, CRA across)."""
    named = {prompt: SHAPES_WORLD.attributes(prompt) for prompt in {prompt for prompt, _ in records.keys}}
    prompts = [prompt for prompt, _ in records.keys]
    result: dict[str, Any] = {"n_images": int(where.sum())}
    for attribute in ("shape", "color", "background"):
        words = [named[prompt].get(attribute) for prompt in prompts]
        asked = where & np.array([word is not None for word in words])
        wanted = np.array([HEADS[attribute].index(word) if word is not None else 255 for word in words])
        for suffix, side in (("", model + 1), ("_original", 0)):
            right = _column(records, side, attribute)[asked] == wanted[asked]
            result[f"{attribute}_accuracy{suffix}"] = float(right.mean()) if asked.any() else None
    for suffix, side in (("", model + 1), ("_original", 0)):
        valid = _column(records, side, "valid")[where] == HEADS["valid"].index("yes")
        result[f"valid{suffix}"] = float(valid.mean())
    return result


def _shows(records: Batch, side: int, where: Mask, concept: str) -> Mask:
    domain, word = SHAPES_WORLD.find(concept)
    result: Mask = _column(records, side, domain)[where] == HEADS[domain].index(word)
    return result


def _column(records: Batch, side: int, head: str) -> npt.NDArray[np.uint8]:
    assert records.labels is not None
    column: npt.NDArray[np.uint8] = records.labels[side, :, LABELS.index(head)]
    return column


def _interval(distance: Estimate) -> list[float]:
    """The interval of a mean distance: one of t can leave what a distance can be."""
    return [max(0.0, distance.low), distance.high]


def _share(changed: Mask, clusters: Sequence[str]) -> dict[str, Any]:
    share = clustered_mean(changed.astype(np.float64), clusters)
    # A t interval can leave what a share can be.
    return {"share": share.mean, "ci95": [max(0.0, share.low), min(1.0, share.high)]}


def _mean(distances: npt.NDArray[np.float32], keys: Sequence[tuple[str, int]]) -> float:
    """Mean over prompts of the prompt's mean, the same for any order."""
    if len({prompt for prompt, _ in keys}) > 1:
        return clustered_mean(distances, [prompt for prompt, _ in keys], resamples=1).mean
    return float(np.sort(distances.astype(np.float64)).mean())


def _prompts_of(records: Batch, where: Mask) -> list[str]:
    return [records.keys[index][0] for index in np.flatnonzero(where)]
