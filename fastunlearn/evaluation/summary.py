"""From records to evaluation.json: distances put on the scale that the controls give, erasure, what was kept."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import schema
from ..concepts import title
from ..judges.base import Judge, record_of
from ..metrics.color import ColorDistance
from ..metrics.statistics import Estimate, clustered_mean, clustered_share, difference, quantiles, retention, wilson
from ..prompts import PromptGroups, is_forget
from .calibration import calibrated
from .journal import PairScores
from .judging import Sides, Unprompted, erasure_of, retained, share_of

Mask = npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class Control:
    """A rung of the ladder: distances (N,) of the original to itself on some ``keys``, and in words how it was made."""

    what: str
    keys: Sequence[tuple[str, int]]
    distances: npt.NDArray[np.float32]

    def record(self) -> schema.ControlRecord:
        return schema.ControlRecord(
            what=self.what,
            n_pairs=len(self.keys),
            mean=_mean(self.distances, self.keys),
            q99=float(np.quantile(self.distances.astype(np.float64), 0.99)),
            max=float(self.distances.max()),
        )

    def threshold(self) -> tuple[float, str]:
        """The distance above which an image counts as changed, and in words where it is from."""
        source = f"q99 of {len(self.keys)} pairs, {self.what}"
        return float(np.quantile(self.distances.astype(np.float64), 0.99)), source


@dataclasses.dataclass(frozen=True)
class Ladder:
    """The controls of an evaluation; ``placebo`` is the name of the model that is one, measured like all others."""

    repeat: float
    numeric: Control
    precision: Control | None = None
    placebo: str | None = None


def summarize_model(
    scores: PairScores,
    model: int,
    groups: PromptGroups,
    ladder: Ladder,
    placebo: int | None,
    judge: Judge | None,
    unprompted: Unprompted,
    *,
    metric: str,
    metrics: Mapping[str, Any],
    spec: Mapping[str, Any],
    described: Mapping[str, Any],
) -> schema.Evaluation:
    """evaluation.json for one model of ``scores``, everything from the scores in key order.

    ``placebo``: which of the models is the placebo.  ``unprompted``: images that are not to be kept.
    ``metric``: the name of the distance.  ``metrics``: results of the further ones.
    ``described``: ``name``, ``method``, ``concept``, ``model``, perhaps ``is_reconstruction``, and of several concepts
    perhaps ``forgotten``, those that this model is to have forgotten, all unless it says.
    """
    described = dict(described)
    forgotten = described.pop("forgotten", groups.concepts)
    names, prompts = dict(groups.grouped()), [prompt for prompt, _ in scores.keys]
    group_of = np.array([names[prompt] for prompt in prompts])
    to_forget = np.array([is_forget(names[prompt]) for prompt in prompts])
    kept = ~to_forget & ~unprompted.where
    thresholds = _thresholds(scores, kept, ladder, placebo)
    sides = Sides.of(judge, scores.judged, model)
    several = len(groups.concepts) > 1
    # Of several concepts a model answers for its own.
    own = to_forget & np.array([set(groups.asked.get(p) or groups.concepts) <= set(forgotten) for p in prompts])
    redrawn = clustered_mean(scores.redrawn[kept], _prompts_of(scores, kept))
    return schema.Evaluation(
        **described,
        integrity=_integrity(scores, model, kept, ladder, thresholds, placebo, metric),
        judge=record_of(judge) if judge is not None else None,
        calibration=calibrated(sides, prompts, to_forget, groups.concept) if sides else None,
        erasure=erasure_of(sides, own, title(forgotten)) if sides and groups.concepts and own.any() else None,
        concepts=_concepts(scores, model, groups, sides, forgotten) if several else None,
        unprompted=unprompted.still(sides) if sides else None,
        retain=retained(sides, kept, prompts) if sides else None,
        groups={
            str(name): _group(scores, model, (group_of == name) & ~unprompted.where, ladder, thresholds, sides)
            for name in sorted(set(group_of[kept | to_forget].tolist()), key=lambda name: (not is_forget(name), name))
        },
        controls=schema.Controls(
            repeat=ladder.repeat,
            numeric=ladder.numeric.record(),
            precision=ladder.precision.record() if ladder.precision else None,
            placebo=_placebo(scores, kept, ladder, placebo),
            redrawn=redrawn.mean,
            redrawn_ci95=distance_interval(redrawn),
        ),
        metrics=dict(metrics),
        spec=dict(spec),
    )


# ---- distances -------------------------------------------------------------------------------------------------------


def distance_interval(distance: Estimate) -> schema.Interval:
    """The interval of a mean distance: one of t can leave what a distance can be."""
    return max(0.0, distance.low), distance.high


def _integrity(
    scores: PairScores,
    model: int,
    where: Mask,
    ladder: Ladder,
    thresholds: Mapping[str, tuple[float, str]],
    placebo: int | None,
    metric: str,
) -> schema.Integrity:
    distances, clusters = scores.distances[model][where], _prompts_of(scores, where)
    mean = clustered_mean(distances, clusters)
    floor = _floor(scores, where, ladder)
    kept = retention(distances, clusters, scores.redrawn[where], clusters, floor)
    beyond = None
    if placebo is not None and placebo != model:
        gap = difference(distances, scores.distances[placebo][where], clusters)
        beyond = schema.Difference(mean=gap.mean, ci95=(gap.low, gap.high))
    return schema.Integrity(
        mean=mean.mean,
        ci95=distance_interval(mean),
        floor=float(np.mean(floor)),
        ceiling=clustered_mean(scores.redrawn[where], clusters).mean,
        retention=kept.mean,
        retention_ci95=(kept.low, kept.high),
        n_pairs=int(where.sum()),
        n_prompts=mean.n_clusters,
        interval=mean.method,
        quantiles=quantiles(distances),
        changed={
            name: _changed(distances > threshold, clusters, threshold, source)
            for name, (threshold, source) in thresholds.items()
        },
        metric=metric,
        minus_placebo=beyond,
        color=_color(scores, model, where),
    )


def _color(scores: PairScores, model: int, where: Mask) -> schema.ColorRecord:
    """The second distance, on the scale that the original redrawn from other noise gives it."""
    distances, redrawn = scores.colors[1 + model][where], scores.colors[0][where]
    clusters = _prompts_of(scores, where)
    mean, ceiling = clustered_mean(distances, clusters), clustered_mean(redrawn, clusters)
    kept: Estimate | None = None
    with contextlib.suppress(ValueError):  # too few prompts, or colors that no noise changes: there is no scale
        kept = retention(distances, clusters, redrawn, clusters, 0.0)
    return schema.ColorRecord(
        metric=ColorDistance.metric,
        mean=mean.mean,
        ci95=distance_interval(mean),
        ceiling=ceiling.mean,
        retention=kept.mean if kept else None,
        retention_ci95=(kept.low, kept.high) if kept else None,
    )


def _group(
    scores: PairScores,
    model: int,
    where: Mask,
    ladder: Ladder,
    thresholds: Mapping[str, tuple[float, str]],
    sides: Sides | None,
) -> schema.Group:
    """What one group of prompts shows; for a single prompt without intervals over prompts, for ``forget`` without R."""
    distances, clusters = scores.distances[model][where], _prompts_of(scores, where)
    several = len(set(clusters)) > 1
    mean = clustered_mean(distances, clusters) if several else None
    group = schema.Group(
        n_pairs=int(where.sum()),
        n_prompts=len(set(clusters)),
        mean=mean.mean if mean else _mean(distances, [scores.keys[i] for i in np.flatnonzero(where)]),
        ci95=distance_interval(mean) if mean else None,
        quantiles=quantiles(distances),
    )
    redrawn = scores.redrawn[where]
    if np.isnan(redrawn).any():
        if sides is None:
            return group
        shown = sides.shown(1)[where]
        share = wilson(int(shown.sum()), len(shown))
        valid = share_of(sides.valid(1), where)
        return dataclasses.replace(group, shown=share.mean, shown_ci95=(share.low, share.high), valid=valid)
    floor = float(np.mean(_floor(scores, where, ladder)))
    ceiling = clustered_mean(redrawn, clusters).mean if several else float(redrawn.astype(np.float64).mean())
    kept: Estimate | None = None
    if several and ceiling > floor:
        try:
            kept = retention(distances, clusters, redrawn, clusters, _floor(scores, where, ladder))
        except ValueError:  # too few prompts vary with the seed for an interval
            kept = None
    value = kept.mean if kept else 1 - max(group.mean - floor, 0) / (ceiling - floor) if ceiling > floor else None
    return dataclasses.replace(
        group,
        changed={name: float((distances > threshold).mean()) for name, (threshold, _) in thresholds.items()},
        ceiling=ceiling,
        retention=value,
        retention_ci95=(kept.low, kept.high) if kept else None,
    )


def _floor(scores: PairScores, where: Mask, ladder: Ladder) -> float | npt.NDArray[np.float32]:
    """What numerics alone change: pair by pair where the control was measured on all of these, else its mean."""
    measured = dict(zip(ladder.numeric.keys, ladder.numeric.distances.tolist(), strict=True))
    keys = [scores.keys[index] for index in np.flatnonzero(where)]
    if all(key in measured for key in keys):
        return np.array([measured[key] for key in keys], dtype=np.float32)
    return _mean(ladder.numeric.distances, ladder.numeric.keys)


def _thresholds(scores: PairScores, kept: Mask, ladder: Ladder, placebo: int | None) -> dict[str, tuple[float, str]]:
    """Distances above which an image counts as changed, each named after the control that it comes from."""
    result = {"numeric": ladder.numeric.threshold()}
    if ladder.precision is not None:
        result["precision"] = ladder.precision.threshold()
    if placebo is not None:
        values = scores.distances[placebo][kept].astype(np.float64)
        result["placebo"] = float(np.quantile(values, 0.95)), "q95 of the placebo"
    redrawn = float(np.median(scores.redrawn[kept].astype(np.float64)))
    return result | {"redrawn": (redrawn, "median of the original redrawn from other noise")}


def _placebo(scores: PairScores, kept: Mask, ladder: Ladder, placebo: int | None) -> schema.PlaceboRecord | None:
    if placebo is None:
        return None
    mean = clustered_mean(scores.distances[placebo][kept], _prompts_of(scores, kept))
    return schema.PlaceboRecord(name=ladder.placebo or "", mean=mean.mean, ci95=distance_interval(mean))


def _changed(changed: Mask, clusters: Sequence[str], threshold: float, source: str) -> schema.Changed:
    share = clustered_share(changed, clusters)
    return schema.Changed(threshold=threshold, source=source, share=share.mean, ci95=(share.low, share.high))


def _mean(distances: npt.NDArray[np.float32], keys: Sequence[tuple[str, int]]) -> float:
    """Mean over prompts of the prompt's mean, the same for any order."""
    if len({prompt for prompt, _ in keys}) > 1:
        return clustered_mean(distances, [prompt for prompt, _ in keys], resamples=1).mean
    return float(np.sort(distances.astype(np.float64)).mean())


def _prompts_of(scores: PairScores, where: Mask) -> list[str]:
    return [scores.keys[index][0] for index in np.flatnonzero(where)]


def _concepts(
    scores: PairScores, model: int, groups: PromptGroups, sides: Sides | None, forgotten: Sequence[str]
) -> dict[str, schema.ConceptShares]:
    """A model's row of the matrix: each concept by itself, from the prompts that ask for it alone."""
    result = {}
    for concept in groups.concepts:
        where = np.array([groups.asked.get(prompt) == (concept,) for prompt, _ in scores.keys])
        look = sides if where.any() else None
        before, after = ((wilson(int(look.shown(i)[where].sum()), int(where.sum())) if look else None) for i in (0, 1))
        prompts = _prompts_of(scores, where)
        distance = clustered_mean(scores.distances[model][where], prompts) if len(set(prompts)) > 1 else None
        result[concept] = schema.ConceptShares(
            forgotten=concept in forgotten,
            n_images=int(where.sum()),
            shown=after.mean if after else None,
            shown_ci95=(after.low, after.high) if after else None,
            shown_original=before.mean if before else None,
            shown_original_ci95=(before.low, before.high) if before else None,
            valid=share_of(look.valid(1), where) if look else None,
            distance=distance.mean if distance else None,
            distance_ci95=distance_interval(distance) if distance else None,
        )
    return result
