"""Integrity from two folders of images, whatever tool made them: pairs by file name -> distances -> records, report.

Several unlearned folders may be compared with one original at once (``also``): each is evaluated as if it were alone,
and the original's images are decoded, judged and passed through the trunk once.  Nothing but numbers is kept, and
nothing is written before all of it is known.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from ..errors import UserError
from ..files.atomic import write_lines
from ..files.images import read_image, unread_images
from ..files.run_folder import check_output, claimed, prepare_output
from ..judges import Judge, as_judge, check_concept, load_judge, record_of
from ..metrics.base import Metric, load_metrics
from ..metrics.distances import Distance, check_distance, device_of, load_perceptual, pairs_per_pass
from ..metrics.lpips import PerceptualDistance
from ..metrics.statistics import clustered_mean, quantiles, wilson
from ..models.runtime import resolve_device, versions
from ..record import plain
from ..reports.gallery import Gallery, GalleryRow
from ..reports.images import FoldersReport, write_folders_report
from ..schema import FolderDistances, FolderIntegrity, FoldersEvaluation
from ..worlds import get_world
from .calibration import calibrated, check_calibration
from .config import EvaluateImagesConfig
from .folder_scores import Scores, score_folders, stacked
from .image_pairs import Pair, find_pairs
from .judging import Sides, Unprompted, erasure_of, retained, share_of, verdict_of
from .summary import distance_interval

_SHOWN = 4  # pairs of each kind in the report


def evaluate_images(
    config: EvaluateImagesConfig,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    metric: Distance | None = None,
    metrics: Sequence[str | Metric] | None = None,
    judge: Judge | Callable[..., Any] | None = None,
) -> FoldersEvaluation:
    """Compare two folders of images and write pairs.jsonl, evaluation.json and report.html.

    ``metric``, ``metrics``, ``judge``: objects like what :func:`load_perceptual`, :func:`load_metric` and
    :func:`load_judge` return, in place of the names that the config gives; ``metrics`` may hold names too.

    Returns the content of evaluation.json, of ``unlearned_images`` where there are several.  ``on_progress(done,
    total)`` counts pairs.  Raises UserError, in one line, for anything wrong in the settings, the folders, an image or
    the prompt file.
    """
    found = evaluate_image_folders(config, on_progress, metric=metric, metrics=metrics, judge=judge)
    return next(iter(found.values()))


def evaluate_image_folders(
    config: EvaluateImagesConfig,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    metric: Distance | None = None,
    metrics: Sequence[str | Metric] | None = None,
    judge: Judge | Callable[..., Any] | None = None,
) -> dict[Path, FoldersEvaluation]:
    """As :func:`evaluate_images`, of every unlearned folder: what was found, by the folder it was written to."""
    folders = _unlearned(config)
    for output in folders:
        check_output(output, "evaluate-images", overwrite=config.overwrite)
    original = Path(config.original_images)
    all_pairs = [find_pairs(original, Path(folder), config.prompts) for folder in folders.values()]
    device = resolve_device(config.device)
    further = _further_metrics(config, device, metrics)
    if metric is not None and config.trunk_weights is not None:
        raise UserError("`trunk_weights` belongs to a metric by name: leave it out beside an object.")
    seer = _judge(config, device, judge)
    distance: Distance = check_distance(metric) if metric is not None else _named_distance(config, device)
    _set_precision(distance, config.mixed_precision)
    with claimed(Path(config.output)):
        workers, concept = config.num_workers or os.cpu_count() or 1, config.forget or ""
        all_scores = score_folders(all_pairs, distance, further, workers, on_progress, seer, concept)
        floor = [] if config.mixed_precision == "no" else [_rounding(all_pairs[0], distance)]
        found, unprompted = {}, {}
        for (output, folder), pairs, scores in zip(folders.items(), all_pairs, all_scores, strict=True):
            one = dataclasses.replace(config, unlearned_images=folder)
            unprompted[output] = _unprompted(pairs, scores, seer, concept)
            found[output] = summarize_folders(pairs, scores, distance, further, one, unprompted[output], seer, floor)
            if seer is not None and not config.trust_judge:
                insist = "insist with `--trust-judge`"
                check_calibration(seer, concept, found[output].calibration, insist)
        galleries = [_galleries(*each) for each in zip(all_pairs, (s.distances for s in all_scores), strict=True)]
        for number, (output, evaluation) in enumerate(found.items()):
            prepare_output(output, "evaluate-images", overwrite=config.overwrite)
            lines = _records(all_pairs[number], all_scores[number], unprompted[output], seer)
            written = write_lines(output / "pairs.jsonl", lines)
            found[output] = dataclasses.replace(evaluation, pairs_sha256=written)
            found[output].write(output / "evaluation.json")
            write_folders_report(output / "report.html", FoldersReport(evaluation, galleries[number]))
    return found


def _unlearned(config: EvaluateImagesConfig) -> dict[Path, str]:
    """Output folder -> folder of images: the first writes to the output itself, the others below it, by their names."""
    output = Path(config.output)
    result = {output: config.unlearned_images}
    for folder in config.also:
        below = output / Path(folder).expanduser().resolve().name
        if below in result:
            raise UserError(f"two folders of `--also` are called {below.name}, as their results would be. Rename one.")
        result[below] = folder
    return result


def _set_precision(distance: Distance, precision: Literal["no", "bf16"]) -> None:
    if precision == "no":
        return
    if not hasattr(distance, "trunk_precision"):
        raise UserError(f"the perceptual distance {distance.metric} has no bfloat16 trunk: use `--mixed-precision no`.")
    distance.trunk_precision = precision


def _rounding(pairs: Sequence[Pair], distance: Distance) -> str:
    """How far distances with a bfloat16 trunk are from float32's, measured on the first pairs of the run."""
    assert isinstance(distance, PerceptualDistance)
    chosen = pairs[: pairs_per_pass(distance)]
    before, after = (
        stacked([read_image(path) for path in side])
        for side in zip(*((pair.original, pair.unlearned) for pair in chosen), strict=True)
    )
    low = distance.distance(before, after)
    distance.trunk_precision = "no"
    high = distance.distance(before, after)
    distance.trunk_precision = "bf16"
    off, size = (low - high).abs(), float(high.mean())
    return (
        f"the trunk ran in bfloat16: on {len(chosen)} pairs the distance, {size:.2g} on average, is "
        f"{float(off.mean()):.2g} from float32's on average and {float(off.max()):.2g} at most. Less says nothing."
    )


# ---- what is asked for -----------------------------------------------------------------------------------------------


def _judge(config: EvaluateImagesConfig, device: torch.device, given: Any) -> Judge | None:
    """The judge that was asked for, and that it knows the concept."""
    judge = as_judge(given) if given is not None else load_judge(config.judge, device) if config.judge else None
    if judge is None:
        return None
    if config.forget is None or not config.forget.strip():
        raise UserError(f"the judge {judge.name} looks for a concept: name it with `--forget`.")
    if config.prompts is None:
        raise UserError(f"the judge {judge.name} needs to know who asks for the concept: give `--prompts FILE`.")
    check_concept(judge, config.forget)
    return judge


def _named_distance(config: EvaluateImagesConfig, device: torch.device) -> Distance:
    return load_perceptual(
        config.metric, device, trunk_weights=config.trunk_weights, micro_batch_size=config.batch_size
    )


def _further_metrics(
    config: EvaluateImagesConfig, device: torch.device, given: Sequence[str | Metric] | None
) -> list[Metric]:
    # A bundled world's distance says that the images are of that world.
    metrics = load_metrics(config.metrics if given is None else given, device, world=get_world(config.metric))
    for metric in metrics:
        if metric.needs_prompts and config.prompts is None:
            raise UserError(f"the metric {metric.name} needs the prompts of the images: give `--prompts FILE`.")
    return metrics


# ---- results ---------------------------------------------------------------------------------------------------------


def summarize_folders(
    pairs: Sequence[Pair],
    scores: Scores,
    distance: Distance,
    metrics: Sequence[Metric],
    config: EvaluateImagesConfig,
    unprompted: Unprompted,
    judge: Judge | None = None,
    notes: Sequence[str] = (),
) -> FoldersEvaluation:
    """evaluation.json: integrity over all pairs but those of forget groups and ``unprompted`` ones, every group, the
    further metrics, and what the judge says."""
    sides = Sides.of(judge, scores.judged, 0)
    prompts, to_forget = [pair.prompt for pair in pairs], np.array([pair.is_to_forget for pair in pairs])
    concept = config.forget or ""
    to_keep = ~to_forget & ~unprompted.where
    if not to_keep.any():
        raise UserError(
            f"the original shows “{concept}” in all images that are to be kept. Add images of prompts about other "
            "things."
        )
    kept = np.flatnonzero(to_keep).tolist()
    overall = _distances(pairs, scores.distances, kept)
    groups = {}
    for group in _groups(pairs):
        indices = [i for i, pair in enumerate(pairs) if pair.group == group and not unprompted.where[i]]
        if not indices:
            continue
        groups[group] = overall if indices == kept else _distances(pairs, scores.distances, indices)
        if sides is not None and pairs[indices[0]].is_to_forget:
            groups[group] = _with_shown(groups[group], sides, np.array(indices))
    fields = {field.name: getattr(overall, field.name) for field in dataclasses.fields(overall)}
    return FoldersEvaluation(
        judge=record_of(judge) if judge is not None else None,
        calibration=calibrated(sides, prompts, to_forget, concept) if sides else None,
        erasure=erasure_of(sides, to_forget, concept) if sides and to_forget.any() else None,
        unprompted=unprompted.still(sides) if sides else None,
        retain=retained(sides, to_keep, prompts) if sides else None,
        integrity=FolderIntegrity(
            **fields, metric=distance.metric, clusters="prompts" if config.prompts is not None else "pairs"
        ),
        groups=groups,
        notes=(*_unread(config), *_notes(scores.plain), *notes),
        metrics={
            metric.name: metric.aggregate(scores.rows[metric.name][kept], [pairs[index].prompt for index in kept])
            for metric in metrics
        },
        spec={
            "original_images": config.original_images,
            "unlearned_images": config.unlearned_images,
            "prompts": config.prompts,
            "height": scores.size[0],
            "width": scores.size[1],
            "batch_size": config.batch_size,
            "mixed_precision": config.mixed_precision,
            "device": str(device_of(distance)),
            "hashes": {"original_images": scores.digests[0], "unlearned_images": scores.digests[1]},
            "versions": versions(),
        },
    )


def _unprompted(pairs: Sequence[Pair], scores: Scores, judge: Judge | None, concept: str) -> Unprompted:
    sides = Sides.of(judge, scores.judged, 0)
    retain = np.array([not pair.is_to_forget for pair in pairs])
    return Unprompted(sides, [pair.prompt for pair in pairs], [concept], retain)


def _distances(pairs: Sequence[Pair], distances: npt.NDArray[np.float32], indices: list[int]) -> FolderDistances:
    values, prompts = distances[indices].astype(np.float64), [pairs[index].prompt for index in indices]
    mean = clustered_mean(values, prompts) if len(set(prompts)) > 1 else None
    return FolderDistances(
        mean=mean.mean if mean else float(values.mean()),
        ci95=distance_interval(mean) if mean else None,
        interval=mean.method if mean else "none: one prompt",
        quantiles=quantiles(values),
        unchanged=float((values == 0).mean()),
        n_pairs=len(values),
        n_prompts=len(set(prompts)),
    )


def _with_shown(group: FolderDistances, sides: Sides, indices: npt.NDArray[np.int_]) -> FolderDistances:
    """A group to forget, and in how many of its images of the unlearned folder the judge sees the concept."""
    shown = sides.shown(1)[indices]
    share, where = wilson(int(shown.sum()), len(shown)), np.zeros(len(sides.shown(1)), dtype=bool)
    where[indices] = True
    valid = share_of(sides.valid(1), where)
    return dataclasses.replace(group, shown=share.mean, shown_ci95=(share.low, share.high), valid=valid)


def _unread(config: EvaluateImagesConfig) -> list[str]:
    """What of the folders looks like an image and was not read."""
    notes = []
    for side in (config.original_images, config.unlearned_images):
        if unread := unread_images(Path(side).expanduser()):
            notes.append(f"{len(unread)} files in {side} are of kinds that are not read, such as {unread[0].name}.")
    return notes


def _notes(plain: npt.NDArray[np.bool_]) -> list[str]:
    """What a reader must know of images that are of one color: a safety checker leaves such behind."""
    notes, total = [], plain.shape[1]
    if both := int(plain.all(axis=0).sum()):
        pairs = "pair is" if both == 1 else "pairs are"
        notes.append(
            f"{both} of {total} {pairs} of one color on both sides, as a safety checker leaves them: they count as "
            "hardly changed. Generate them without it, or take them out of both folders."
        )
    for side, folder in enumerate(("original", "unlearned")):
        if alone := int((plain[side] & ~plain[1 - side]).sum()):
            images = "image is" if alone == 1 else "images are"
            notes.append(f"{alone} of {total} {images} of one color in the {folder} folder alone: look at them.")
    return notes


def _groups(pairs: Sequence[Pair]) -> list[str]:
    return list(dict.fromkeys(pair.group for pair in pairs))


def _records(
    pairs: Sequence[Pair], scores: Scores, unprompted: Unprompted, judge: Judge | None = None
) -> list[dict[str, Any]]:
    """A line per pair, with what the judge says of the unlearned image and, under ``original``, of the original's.

    ``unprompted`` stands where it is true.  Of the further metrics those that are one or two numbers, not features.
    """
    records = [
        {"file": pair.name, "group": pair.group, "prompt": pair.prompt, "distance": float(value)}
        for pair, value in zip(pairs, scores.distances, strict=True)
    ]
    for where in np.flatnonzero(unprompted.where).tolist():
        records[where]["unprompted"] = True
    for name, rows in scores.rows.items():
        if rows.shape[1] <= 2:
            for record, row in zip(records, rows.tolist(), strict=True):
                record[name] = plain(row[0] if len(row) == 1 else row)
    if judge is not None and scores.judged is not None:
        for index, record in enumerate(records):
            record |= verdict_of(judge, scores.judged, 1, index)
            record["original"] = verdict_of(judge, scores.judged, 0, index)
    return records


def _galleries(pairs: Sequence[Pair], distances: npt.NDArray[np.float32]) -> list[Gallery]:
    """The most changed, the median and the least changed pairs, read once more."""
    order = np.argsort(-distances, kind="stable").tolist()
    count = min(_SHOWN, len(order))
    middle = (len(order) - count) // 2
    chosen = {
        "The most changed": order[:count],
        "In the middle": order[middle : middle + count],
        "The least changed": order[::-1][:count],
    }
    galleries = []
    for title, indices in chosen.items():
        rows = []
        for index in indices:
            pair = pairs[index]
            images = [read_image(path).pixels for path in (pair.original, pair.unlearned)]
            label = pair.prompt if pair.prompt == pair.name else f"{pair.prompt} ({pair.name})"
            rows.append(GalleryRow(label, images, ["", f"distance {distances[index]:.4f}"]))
        galleries.append(Gallery(title, "", ["original", "unlearned"], rows))
    return galleries
