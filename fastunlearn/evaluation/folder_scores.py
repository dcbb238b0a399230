"""Pairs of image files to distances: decoded by workers while earlier pairs are scored.

Of several unlearned folders beside one original each original image is decoded, and passed through the trunk, once.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from ..errors import UserError
from ..files.images import ImageFile, read_image
from ..judges import Judge, Judged, judged
from ..metrics.base import Metric
from ..metrics.distances import Distance, device_of, pairs_per_pass
from .image_pairs import Pair


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


def score_folders(
    folders: Sequence[Sequence[Pair]],
    distance: Distance,
    metrics: Sequence[Metric],
    num_workers: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    judge: Judge | None = None,
    concept: str = "",
) -> list[Scores]:
    """Decode and compare all pairs of each unlearned folder, in order; all have the same originals in the same order.

    Raises UserError for an image that is refused or of another size.
    """
    first = folders[0]
    assert all([p.original for p in pairs] == [p.original for p in first] for pairs in folders)
    totals = [_Totals.of(len(first), metrics) for _ in folders]
    size: tuple[int, int] | None = None
    done = 0
    # Where the distance itself takes every core, decoding beside it only disturbs.
    batch_size = pairs_per_pass(distance)
    ahead = 0 if device_of(distance).type == "cpu" else 1 + -(-2 * num_workers // batch_size)
    for batch, decoded in _decoded(folders, batch_size, num_workers, ahead):
        size = size or (decoded[0][0].pixels.shape[0], decoded[0][0].pixels.shape[1])
        for place, images in zip(batch, decoded, strict=True):
            paths = [first[place].original, *(pairs[place].unlearned for pairs in folders)]
            _check_size(paths, images, size)
        before, *after = (stacked([images[side] for images in decoded]) for side in range(len(folders) + 1))
        try:
            results = _distances(distance, before, after)
        except RuntimeError as error:
            raise _too_small(error, distance, size) from error
        for number, (total, pairs) in enumerate(zip(totals, folders, strict=True)):
            chosen = [pairs[place] for place in batch]
            total.add(done, chosen, [(images[0], images[number + 1]) for images in decoded], results[number])
            for metric in metrics:
                total.rows[metric.name].append(metric.measure(before, after[number], [pair.prompt for pair in chosen]))
        if judge is not None:
            original, *others = (judged(judge, images, concept, batch_size) for images in (before, *after))
            for total, verdicts in zip(totals, others, strict=True):
                total.seen.append(Judged.joined([original, verdicts], axis=0))
        done += len(batch)
        on_progress(done, len(first))
    assert size is not None
    return [total.scores(pairs, size) for total, pairs in zip(totals, folders, strict=True)]


def _distances(distance: Distance, before: torch.Tensor, after: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Of one original to each partner; a distance that has no features to keep compares pair by pair."""
    if hasattr(distance, "distances"):
        return list(distance.distances(before, after))
    return [distance.distance(before, images) for images in after]


@dataclasses.dataclass
class _Totals:
    """What one folder's batches add up to."""

    distances: npt.NDArray[np.float32]
    rows: dict[str, list[torch.Tensor]]
    digests: tuple[hashlib._Hash, hashlib._Hash]
    plain: npt.NDArray[np.bool_]
    seen: list[Judged]

    @classmethod
    def of(cls, count: int, metrics: Sequence[Metric]) -> _Totals:
        rows: dict[str, list[torch.Tensor]] = {metric.name: [] for metric in metrics}
        digests = hashlib.sha256(), hashlib.sha256()
        return cls(np.empty(count, dtype=np.float32), rows, digests, np.zeros((2, count), dtype=bool), [])

    def add(
        self, done: int, pairs: Sequence[Pair], decoded: Sequence[tuple[ImageFile, ImageFile]], result: torch.Tensor
    ) -> None:
        for pair, images in zip(pairs, decoded, strict=True):
            for digest, image in zip(self.digests, images, strict=True):
                digest.update(pair.name.encode() + b"\0" + image.digest)
        for side in (0, 1):
            self.plain[side, done : done + len(pairs)] = [_is_plain(images[side]) for images in decoded]
        self.distances[done : done + len(pairs)] = result.numpy()

    def scores(self, pairs: Sequence[Pair], size: tuple[int, int]) -> Scores:
        bad = np.flatnonzero(~np.isfinite(self.distances))
        if len(bad):
            raise UserError(f"the distance of {len(bad)} pairs is no number, for example {pairs[bad[0]].name}.")
        stacked = {name: torch.cat(parts).numpy() for name, parts in self.rows.items()}
        digests = self.digests[0].hexdigest(), self.digests[1].hexdigest()
        verdicts = Judged.joined(self.seen, axis=1) if self.seen else None
        return Scores(self.distances, stacked, digests, size, self.plain, verdicts)


def _decoded(
    folders: Sequence[Sequence[Pair]], batch_size: int, num_workers: int, ahead: int
) -> Iterator[tuple[Sequence[int], list[list[ImageFile]]]]:
    """Batches in order, an original and its partners each, while workers decode ``ahead`` more.

    Pillow decodes without Python's lock: threads do.
    """

    def read(place: int) -> list[ImageFile]:
        return [
            read_image(path) for path in (folders[0][place].original, *(pairs[place].unlearned for pairs in folders))
        ]

    places = range(len(folders[0]))
    batches = [places[start : start + batch_size] for start in range(0, len(places), batch_size)]
    waiting: deque[list[Future[list[ImageFile]]]] = deque()
    with ThreadPoolExecutor(num_workers, thread_name_prefix="decode") as workers:
        try:
            upcoming = iter(batches)
            for batch in batches:
                while len(waiting) <= ahead and (following := next(upcoming, None)) is not None:
                    waiting.append([workers.submit(read, place) for place in following])
                yield batch, [future.result() for future in waiting.popleft()]
        finally:
            workers.shutdown(wait=False, cancel_futures=True)


def stacked(images: Sequence[ImageFile]) -> torch.Tensor:
    """(B, 3, H, W) uint8, which lies in memory as it was decoded: channels last."""
    return torch.from_numpy(np.stack([image.pixels for image in images])).permute(0, 3, 1, 2)


def _is_plain(image: ImageFile) -> bool:
    """Whether the image is of one color."""
    pixels = image.pixels
    if (pixels[0] != pixels[0, 0]).any():
        return False
    return bool((pixels == pixels[0, 0]).all())


def _check_size(paths: Sequence[Path], images: Sequence[ImageFile], size: tuple[int, ...]) -> None:
    for path, image in zip(paths, images, strict=True):
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
