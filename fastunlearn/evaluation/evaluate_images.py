"""Integrity from two folders of images, whatever tool made them: pairs by file name -> distances -> records, report.

Files are decoded by workers while earlier pairs are scored; one trunk pass serves both sides.  Nothing but numbers is
kept, and nothing is written before all of it is known.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..errors import UserError
from ..files.atomic import write_lines
from ..files.images import ImageFile, read_image, unread_images
from ..files.run_folder import check_output, claimed, prepare_output
from ..judges import Judge, Judged, as_judge, check_concept, judged, load_judge, record_of
from ..metrics.base import Metric, load_metrics
from ..metrics.distances import Distance, check_distance, device_of, load_perceptual, pairs_per_pass
from ..metrics.statistics import clustered_mean, quantiles, wilson
from ..models.runtime import resolve_device, versions
from ..record import plain
from ..reports.gallery import Gallery, GalleryRow
from ..reports.images import FoldersReport, write_folders_report
from ..schema import FolderDistances, FolderIntegrity, FoldersEvaluation
from ..worlds import get_world
from .calibration import calibrated, check_calibration
from .config import EvaluateImagesConfig
from .image_pairs import Pair, find_pairs
from .judging import Sides, erasure_of, retained, share_of, verdict_of
from .summary import distance_interval

_SHOWN = 4  # pairs of each kind in the report


@dataclasses.dataclass(frozen=True)
class Scores:
    """Of N pairs: ``distances`` (N,) float32, each metric's rows (N, F) float32, the folders' digests, the size.

    ``plain``: (2, N) bool, which images of each side are of one color.  ``judged``: the judge's verdicts on both sides.
    """

    distances: npt.NDArray[np.float32]
    rows: dict[str, npt.NDArray[np.float32]]
    digests: tuple[str, str]
    size: tuple[int, int]
    plain: npt.NDArray[np.bool_]
    judged: Judged | None = None


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

    Returns the content of evaluation.json.  ``on_progress(done, total)`` counts pairs.  Raises UserError, in one line,
    for anything wrong in the settings, the folders, an image or the prompt file.
    """
    output = Path(config.output)
    check_output(output, "evaluate-images", overwrite=config.overwrite)
    pairs = find_pairs(Path(config.original_images), Path(config.unlearned_images), config.prompts)
    device = resolve_device(config.device)
    further = _further_metrics(config, device, metrics)
    if metric is not None and config.trunk_weights is not None:
        raise UserError("`trunk_weights` belongs to a metric by name: leave it out beside an object.")
    seer = _judge(config, device, judge)
    distance: Distance = check_distance(metric) if metric is not None else _named_distance(config, device)
    with claimed(output):
        workers = config.num_workers or os.cpu_count() or 1
        scores = score(pairs, distance, further, workers, on_progress, seer, config.forget or "")
        evaluation = summarize_folders(pairs, scores, distance, further, config, seer)
        if seer is not None and not config.trust_judge:
            insist = "insist with `--trust-judge`"
            check_calibration(seer, config.forget or "", evaluation.calibration, insist)
        galleries = _galleries(pairs, scores.distances)
        prepare_output(output, "evaluate-images", overwrite=config.overwrite)
        write_lines(output / "pairs.jsonl", _records(pairs, scores, seer))
        evaluation.write(output / "evaluation.json")
        write_folders_report(output / "report.html", FoldersReport(evaluation, galleries))
    return evaluation


# ---- scores ----------------------------------------------------------------------------------------------------------


def score(
    pairs: Sequence[Pair],
    distance: Distance,
    metrics: Sequence[Metric],
    num_workers: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    judge: Judge | None = None,
    concept: str = "",
) -> Scores:
    """Decode and compare all pairs, in order.  Raises UserError for an image that is refused or of another size."""
    distances = np.empty(len(pairs), dtype=np.float32)
    rows: dict[str, list[torch.Tensor]] = {metric.name: [] for metric in metrics}
    digests = hashlib.sha256(), hashlib.sha256()
    plain = np.zeros((2, len(pairs)), dtype=bool)
    size: tuple[int, int] | None = None
    seen: list[Judged] = []
    done = 0
    # Where the distance itself takes every core, decoding beside it only disturbs.
    batch_size = pairs_per_pass(distance)
    ahead = 0 if device_of(distance).type == "cpu" else 1 + -(-2 * num_workers // batch_size)
    for batch, decoded in _decoded(pairs, batch_size, num_workers, ahead):
        for pair, images in zip(batch, decoded, strict=True):
            size = size or (images[0].pixels.shape[0], images[0].pixels.shape[1])
            _check_size(pair, images, size)
            for digest, image in zip(digests, images, strict=True):
                digest.update(pair.name.encode() + b"\0" + image.digest)
        before, after = (_stack([images[side] for images in decoded]) for side in (0, 1))
        for side in (0, 1):
            plain[side, done : done + len(batch)] = [_is_plain(images[side]) for images in decoded]
        try:
            result = distance.distance(before, after)
        except RuntimeError as error:
            raise _too_small(error, distance, size) from error
        distances[done : done + len(batch)] = result.numpy()
        for metric in metrics:
            rows[metric.name].append(metric.measure(before, after, [pair.prompt for pair in batch]))
        if judge is not None:
            seen.append(Judged.joined([judged(judge, side, concept, batch_size) for side in (before, after)], axis=0))
        done += len(batch)
        on_progress(done, len(pairs))
    bad = np.flatnonzero(~np.isfinite(distances))
    if len(bad):
        raise UserError(f"the distance of {len(bad)} pairs is no number, for example {pairs[bad[0]].name}.")
    assert size is not None
    stacked = {name: torch.cat(parts).numpy() for name, parts in rows.items()}
    verdicts = Judged.joined(seen, axis=1) if seen else None
    return Scores(distances, stacked, (digests[0].hexdigest(), digests[1].hexdigest()), size, plain, verdicts)


def _decoded(
    pairs: Sequence[Pair], batch_size: int, num_workers: int, ahead: int
) -> Iterator[tuple[Sequence[Pair], list[tuple[ImageFile, ImageFile]]]]:
    """Batches in order, while workers decode ``ahead`` more.  Pillow decodes without Python's lock: threads do."""

    def read(pair: Pair) -> tuple[ImageFile, ImageFile]:
        return read_image(pair.original), read_image(pair.unlearned)

    batches = [pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)]
    waiting: deque[list[Future[tuple[ImageFile, ImageFile]]]] = deque()
    with ThreadPoolExecutor(num_workers, thread_name_prefix="decode") as workers:
        try:
            upcoming = iter(batches)
            for batch in batches:
                while len(waiting) <= ahead and (following := next(upcoming, None)) is not None:
                    waiting.append([workers.submit(read, pair) for pair in following])
                yield batch, [future.result() for future in waiting.popleft()]
        finally:
            workers.shutdown(wait=False, cancel_futures=True)


def _stack(images: Sequence[ImageFile]) -> torch.Tensor:
    """(B, 3, H, W) uint8, which lies in memory as it was decoded: channels last."""
    return torch.from_numpy(np.stack([image.pixels for image in images])).permute(0, 3, 1, 2)


def _is_plain(image: ImageFile) -> bool:
    """Whether the image is of one color."""
    pixels = image.pixels
    if (pixels[0] != pixels[0, 0]).any():
        return False
    return bool((pixels == pixels[0, 0]).all())


def _check_size(pair: Pair, images: tuple[ImageFile, ImageFile], size: tuple[int, ...]) -> None:
    for path, image in zip((pair.original, pair.unlearned), images, strict=True):
        if image.pixels.shape[:2] != size:
            height, width = image.pixels.shape[:2]
            raise UserError(
                f"the image {path} has {width} x {height} pixels, the first one {size[1]} x {size[0]}: distances of "
                "different sizes do not compare. Give all images of both folders one size."
            )


def _too_small(error: RuntimeError, distance: Distance, size: tuple[int, ...] | None) -> Exception:
    assert size is not None
    if "size" not in str(error) or min(size) >= 64:
        return error
    return UserError(f"images of {size[1]} x {size[0]} pixels are too small for {distance.metric}.")


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
    judge: Judge | None = None,
) -> FoldersEvaluation:
    """evaluation.json: integrity over all pairs but those of forget groups, every group, the further metrics, and what
    the judge says."""
    sides = Sides(judge, scores.judged, 0) if judge is not None and scores.judged is not None else None
    prompts, to_forget = [pair.prompt for pair in pairs], np.array([pair.is_to_forget for pair in pairs])
    concept = config.forget or ""
    kept = [index for index, pair in enumerate(pairs) if not pair.is_to_forget]
    overall = _distances(pairs, scores.distances, kept)
    groups = {}
    for group in _groups(pairs):
        indices = [index for index, pair in enumerate(pairs) if pair.group == group]
        groups[group] = overall if indices == kept else _distances(pairs, scores.distances, indices)
        if sides is not None and pairs[indices[0]].is_to_forget:
            groups[group] = _with_shown(groups[group], sides, np.array(indices))
    fields = {field.name: getattr(overall, field.name) for field in dataclasses.fields(overall)}
    return FoldersEvaluation(
        judge=record_of(judge) if judge is not None else None,
        calibration=calibrated(sides, prompts, to_forget, concept) if sides else None,
        erasure=erasure_of(sides, to_forget, concept) if sides and to_forget.any() else None,
        retain=retained(sides, ~to_forget, prompts) if sides else None,
        integrity=FolderIntegrity(
            **fields, metric=distance.metric, clusters="prompts" if config.prompts is not None else "pairs"
        ),
        groups=groups,
        notes=(*_unread(config), *_notes(scores.plain)),
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
            "device": str(device_of(distance)),
            "hashes": {"original_images": scores.digests[0], "unlearned_images": scores.digests[1]},
            "versions": versions(),
        },
    )


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


def _records(pairs: Sequence[Pair], scores: Scores, judge: Judge | None = None) -> list[dict[str, Any]]:
    """A line per pair, with what the judge says of the unlearned image and, under ``original``, of the original's.

    Of the further metrics those that are one or two numbers, not features.
    """
    records = [
        {"file": pair.name, "group": pair.group, "prompt": pair.prompt, "distance": float(value)}
        for pair, value in zip(pairs, scores.distances, strict=True)
    ]
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
