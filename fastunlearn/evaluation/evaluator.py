"""Scores unlearned models against the original: same prompts, same noise, one record per pair, then a summary.

Flow: keys (prompt, seed), sorted -> images of the original and of every unlearned model in batches of one size ->
distances and the judge's labels -> records -> statistics.  Only records and a few images for the report are kept.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch

from ..batching import chunks, filled, filled_tensor
from ..errors import UserError
from ..metrics.lpips import PerceptualDistance
from ..models.generate import SamplerSpec
from ..models.loading import Model
from ..prompts import PromptGroups, is_forget, parse_grouped_prompts
from ..worlds import World
from ..worlds.shapes import load_classifier
from .generators import (
    Key,
    PipelineSource,
    Source,
    as_source,
    check_comparable,
    environment,
    other_batch_size,
    other_precision,
)
from .image_cache import ImageCache, Originals
from .journal import Batch, Journal
from .summary import LABELS, Control, Ladder, judged, summarize

CONTROL_PAIRS = 8  # on which the numeric controls are measured unless the caller says otherwise

_GALLERY = 6  # images per group that the report shows
_EXTREMES = 4  # pairs of the largest, of the middle and of the smallest distances that it shows
_TENSOR_BYTES = 1024  # that a tensor takes beside its elements
_KEPT_BYTES = 64 * 2**20  # of images held for the report; what is not among them is generated once more


class RowMetric(Protocol):
    """A further metric: one row of numbers a pair, summed up at the end (see ``metrics.py``)."""

    name: str

    def measure(self, original: torch.Tensor, unlearned: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Rows (B, F) float32 of images (B, 3, H, W) uint8 and their partners."""

    def summarize(self, values: np.ndarray, prompts: Sequence[str]) -> dict[str, Any]:
        """The result from the rows (N, F) of all pairs, in key order."""


@dataclasses.dataclass(frozen=True)
class Shown:
    """A pair kept for the report.  Images are (3, H, W) uint8; ``unlearned`` has one per model."""

    group: str
    prompt: str
    original: torch.Tensor
    unlearned: tuple[torch.Tensor, ...]
    distances: tuple[float, ...]


@dataclasses.dataclass
class Evaluation:
    """The result for one unlearned model: ``summary`` is evaluation.json, ``pairs`` the lines of pairs.jsonl."""

    name: str
    summary: dict[str, Any]
    records: Batch
    index: int  # of the model in ``records``
    group_of: Mapping[str, str]

    @property
    def pairs(self) -> list[dict[str, Any]]:
        return list(self.lines())

    def lines(self) -> Iterator[dict[str, Any]]:
        """One record per pair, in key order: group, prompt, seed, distance, what the classifier saw, and for what is to
        be kept ``redrawn``, the original's distance to itself from other noise."""
        labels = None if self.records.labels is None else self.records.labels[self.index + 1]
        for row, (prompt, seed) in enumerate(self.records.keys):
            record: dict[str, Any] = {"group": self.group_of[prompt], "prompt": prompt, "seed": seed}
            record["distance"] = float(self.records.distances[self.index, row])
            redrawn = float(self.records.redrawn[row])
            if redrawn == redrawn:
                record["redrawn"] = redrawn
            if labels is not None:
                record |= judged(labels[row])
            yield record


@dataclasses.dataclass
class Evaluations:
    """The results for all models, in order, and the images that a report shows: some of each group, and for each
    model the retain pairs that changed most, middling and least."""

    results: list[Evaluation]
    gallery: list[Shown]
    most_changed: list[list[Shown]]
    median_changed: list[list[Shown]]
    least_changed: list[list[Shown]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be evaluated: everything that decides the result, in the order of its keys."""

    original: Source
    unlearned: Mapping[str, Source]
    groups: PromptGroups
    metric: PerceptualDistance
    seeds_per_prompt: int = 1
    placebo: str | None = None
    metrics: Sequence[RowMetric] = ()
    control_pairs: int = CONTROL_PAIRS

    def __post_init__(self) -> None:
        for name, source in self.unlearned.items():
            check_comparable(self.original, source, name)
            if isinstance(source, PipelineSource) and isinstance(self.original, PipelineSource):
                source.share_text(self.original)
        if isinstance(self.original, PipelineSource):
            self.original.check_sampler()
        if self.groups.concept is not None and self.original.world:
            self.original.world.find(self.groups.concept)

    @functools.cached_property
    def grouped(self) -> list[tuple[str, str]]:
        return self.groups.grouped()

    def keys(self) -> list[Key]:
        return [(prompt, seed) for prompt, _ in self.grouped for seed in range(self.seeds_per_prompt)]

    def keys_of(self, rank: int, world_size: int) -> list[Key]:
        """A rank's share: all seeds of every n-th prompt."""
        mine = {prompt for prompt, _ in self.grouped[rank::world_size]}
        return [key for key in self.keys() if key[0] in mine]

    def retained(self) -> set[str]:
        return {prompt for prompt, group in self.grouped if not is_forget(group)}

    def other_seed(self, key: Key) -> Key:
        """The same prompt from other noise: the next seed, or past the last where there is but one."""
        prompt, seed = key
        return prompt, seed + 1 if self.seeds_per_prompt == 1 else (seed + 1) % self.seeds_per_prompt

    def control_keys(self) -> list[Key]:
        kept = self.retained()
        keys = [key for key in self.keys() if key[0] in kept]
        return _spread(keys, self.control_pairs)

    def spec(self) -> dict[str, Any]:
        """What must be the same for two parts of one evaluation."""
        return {
            "original": self.original.content(),
            "unlearned": {name: source.content() for name, source in self.unlearned.items()},
            "placebo": self.placebo,
            "prompts": self.grouped,
            "concept": self.groups.concept,
            "seeds_per_prompt": self.seeds_per_prompt,
            "metric": self.metric.metric,
            "metrics": [metric.name for metric in self.metrics],
            **self.original.settings(),
            **environment(self.original.device),
        }


def evaluate_models(
    original: Model | Source,
    unlearned: Mapping[str, Model] | Mapping[str, Source],
    groups: PromptGroups,
    metric: PerceptualDistance,
    spec: SamplerSpec,
    *,
    seeds_per_prompt: int = 1,
    placebo: str | None = None,
    describe: dict[str, dict[str, Any]] | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluations:
    """Evaluate every model of ``unlearned`` (by name) against ``original``, in memory.

    The ceiling is the distance between the original's images for one prompt and different seeds.  Before anything is
    scored, one batch of the original is made twice and must agree to the last bit.  ``placebo`` names the one of
    ``unlearned`` that is the placebo.  ``describe`` adds fields to a model's summary.  ``on_progress(done, total)``
    counts images.

    Raises UserError for models that cannot be compared and RuntimeError if the repeat is not exact.
    """
    sources = {name: as_source(model, spec) for name, model in unlearned.items()}
    plan = Plan(as_source(original, spec), sources, groups, metric, seeds_per_prompt, placebo)
    with Evaluator(plan, on_progress=on_progress) as evaluator:
        batches = list(evaluator.run(plan.keys()))
        return evaluator.conclude(Batch.merge(batches), describe or {})


class Evaluator:
    """Generates and scores keys, and concludes from all records.  Use as a context manager."""

    def __init__(
        self,
        plan: Plan,
        *,
        cache: ImageCache | None = None,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.plan, self._cache = plan, cache
        self._judge = _Judge(plan) if plan.groups.concept is not None and plan.original.world else None
        self._kept_images: dict[Key, tuple[torch.Tensor, tuple[torch.Tensor, ...]]] = {}
        self._kept_bytes = 0
        self._report = on_progress
        # On a GPU a batch is decoded, scored and written while the next one is generated; on a CPU both would only
        # fight for the same cores.
        self._finish: Executor = ThreadPoolExecutor(1) if plan.original.device.type == "cuda" else _AtOnce()
        self._repeat: float | None = None
        self._originals: Originals | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Evaluator:
        # For the whole time: these settings belong to the process, and two threads generate and score.
        flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        self._stack.enter_context(flags)
        return self

    def __exit__(self, *details: Any) -> None:
        self._finish.shutdown(wait=True, cancel_futures=True)
        self._stack.close()

    def run(self, keys: Sequence[Key], journal: Journal | None = None) -> Iterator[Batch]:
        """Generate and score ``keys``; yields a batch of records at a time, after it was written to ``journal``."""
        plan, size = self.plan, self.plan.original.batch_size
        retained, controls = plan.retained(), plan.control_keys()
        parts = [list(part) for part in chunks(keys, size)]
        needed: list[Key] = []
        for chunk in parts:
            needed += chunk + [plan.other_seed(key) for key in chunk if key[0] in retained]
        # The controls' images are kept until they are compared, at the end.
        needed += controls
        self._total = len(set(needed)) + len(keys) * len(plan.unlearned) + min(size, len(keys)) + 2 * len(controls)
        self._done = 0
        self._originals = Originals(plan.original, needed, self._finish, self._cache, self._advance)
        jobs: collections.deque[Future[Batch]] = collections.deque()
        for chunk in parts:
            before = self._originals.get(chunk)
            if self._repeat is None:
                self._check_repeat(chunk, before)
            kept = [index for index, key in enumerate(chunk) if key[0] in retained]
            again = self._originals.get([plan.other_seed(chunk[index]) for index in kept]) if kept else None
            afters = [source.start(chunk) for source in plan.unlearned.values()]
            self._advance(len(chunk) * len(afters))
            jobs.append(self._finish.submit(self._score, chunk, before, kept, again, afters, journal))
            while len(jobs) > 1:
                yield jobs.popleft().result()
        while jobs:
            yield jobs.popleft().result()

    def conclude(self, records: Batch, describe: Mapping[str, Mapping[str, Any]]) -> Evaluations:
        """The results from the records of all keys, in key order."""
        plan = self.plan
        ladder = self._ladder()
        placebo = list(plan.unlearned).index(plan.placebo) if plan.placebo is not None else None
        group_of = dict(plan.grouped)
        results = []
        for place, (name, source) in enumerate(plan.unlearned.items()):
            result = summarize(records, place, plan.groups, ladder, placebo)
            result["integrity"]["metric"] = plan.metric.metric
            described = {
                "name": name,
                "method": name,
                "concept": plan.groups.concept or "the concept",
                "model": plan.original.name,
            } | dict(describe.get(name, {}))
            metrics = {
                metric.name: metric.summarize(records.rows[metric.name][place], [prompt for prompt, _ in records.keys])
                for metric in plan.metrics
            }
            extra = {"metrics": metrics} if metrics else {}
            spec = self._spec_record(source)
            results.append(Evaluation(name, described | result | extra | {"spec": spec}, records, place, group_of))
        evaluations = self._illustrated(results, records)
        self._report(self._total, self._total)
        return evaluations

    def _score(
        self,
        chunk: Sequence[Key],
        before: Callable[[], torch.Tensor],
        kept: Sequence[int],
        again: Callable[[], torch.Tensor] | None,
        afters: Sequence[Callable[[], torch.Tensor]],
        journal: Journal | None,
    ) -> Batch:
        plan = self.plan
        original, generated = before(), [after() for after in afters]
        for name, images in zip(plan.unlearned, generated, strict=True):
            if images.shape != original.shape:
                raise UserError(
                    f"{name} generates images of {_size(images)}, the original of {_size(original)}: models of one "
                    "resolution can be compared."
                )
        distances = np.stack([plan.metric.distance(original, images).numpy() for images in generated])
        redrawn = np.full(len(chunk), np.nan, dtype=np.float32)
        if again is not None:
            redrawn[list(kept)] = plan.metric.distance(original[list(kept)], again()).numpy()
        labels = np.stack([self._judge.labels(side) for side in (original, *generated)]) if self._judge else None
        rows = {metric.name: self._measure(metric, chunk, original, generated) for metric in plan.metrics}
        batch = Batch(list(chunk), redrawn, distances, labels, rows)
        _check_finite(batch, list(plan.unlearned))
        if journal:
            journal.append(batch)
        for index, key in enumerate(chunk):
            if self._kept_bytes < _KEPT_BYTES:
                pair = original[index].clone(), tuple(images[index].clone() for images in generated)
                self._kept_images[key] = pair
                self._kept_bytes += sum(image.numel() + _TENSOR_BYTES for image in (pair[0], *pair[1]))
        return batch

    def _measure(
        self, metric: RowMetric, chunk: Sequence[Key], original: torch.Tensor, generated: Sequence[torch.Tensor]
    ) -> np.ndarray:
        """(M, N, F); every call has as many rows as a full batch, so that no row depends on its company."""
        size = self.plan.original.batch_size
        prompts = filled([prompt for prompt, _ in chunk], size)
        first = filled_tensor(original, size)
        rows = [metric.measure(first, filled_tensor(side, size), prompts)[: len(chunk)] for side in generated]
        return np.stack([row.float().numpy() for row in rows])

    def _check_repeat(self, chunk: Sequence[Key], before: Callable[[], torch.Tensor]) -> None:
        """The same keys once more, past the cache: anything but equal bits would be counted as damage."""
        first, second = before(), self.plan.original.start(chunk)()
        self._advance(len(chunk))
        if first.shape != second.shape or not torch.equal(first, second):
            worst = float(self.plan.metric.distance(first, second).max()) if first.shape == second.shape else 1.0
            raise UserError(
                f"the original does not repeat itself: distance {worst:g} between two runs on the same noise, where "
                "it must be 0. Nothing was scored, since chance would be counted as damage."
            )
        self._repeat = float(self.plan.metric.distance(first, second).max())

    def _ladder(self) -> Ladder:
        """The original against itself in another batch size and in another precision."""
        plan, keys = self.plan, self.plan.control_keys()
        if self._originals is None:  # nothing was left to score
            self._total, self._done = len(keys) * 3, 0
            self._originals = Originals(plan.original, keys, self._finish, self._cache, self._advance)
        images = self._originals.get(keys)()
        if self._repeat is None:
            self._check_repeat(keys[: plan.original.batch_size], lambda: images[: plan.original.batch_size])
        assert self._repeat is not None

        def control(source: Source, what: str) -> Control:
            generated = source.generate(keys)
            self._advance(len(keys))
            return Control(what, keys, plan.metric.distance(images, generated).numpy())

        sized = other_batch_size(plan.original)
        precise = other_precision(plan.original)
        words = f"the original in batches of {sized.batch_size} instead of {plan.original.batch_size}"
        ladder = Ladder(self._repeat, control(sized, words), placebo=plan.placebo)
        if precise is not None:
            dtype = "float32" if precise.spec.mixed_precision == "no" else "bfloat16"
            ladder = dataclasses.replace(ladder, precision=control(precise, f"the original in {dtype}"))
        return ladder

    def _illustrated(self, results: list[Evaluation], records: Batch) -> Evaluations:
        """Choose the pairs that a report shows, from the records alone, and have their images."""
        group_of, retained = dict(self.plan.grouped), self.plan.retained()
        index_of = {key: index for index, key in enumerate(records.keys)}
        gallery = []
        for wanted in (False, True):
            prompts = [prompt for prompt, _ in self.plan.grouped if (prompt in retained) == wanted]
            gallery += [(prompt, 0) for prompt in _spread(prompts, _GALLERY)]
        kept = np.array([index for index, (prompt, _) in enumerate(records.keys) if prompt in retained])
        chosen: list[list[list[Key]]] = []  # by model: most, median, least
        for distances in records.distances:
            order = kept[np.argsort(distances[kept], kind="stable")]
            middle = max(0, (len(order) - _EXTREMES) // 2)
            picks = order[::-1][:_EXTREMES], order[middle : middle + _EXTREMES], order[:_EXTREMES]
            chosen.append([[records.keys[index] for index in pick] for pick in picks])
        self._generate_missing([*gallery, *(key for model in chosen for picks in model for key in picks)])

        def shown(key: Key) -> Shown:
            before, afters = self._kept_images[key]
            distances = tuple(float(d) for d in records.distances[:, index_of[key]])
            return Shown(group_of[key[0]], key[0], before, afters, distances)

        most, median, least = ([[shown(key) for key in model[which]] for model in chosen] for which in range(3))
        return Evaluations(results, [shown(key) for key in gallery], most, median, least)

    def _generate_missing(self, keys: Sequence[Key]) -> None:
        missing = [key for key in dict.fromkeys(keys) if key not in self._kept_images]
        if not missing:
            return
        assert self._originals is not None
        before = self._originals.get(missing)()
        generated = [source.generate(missing) for source in self.plan.unlearned.values()]
        for index, key in enumerate(missing):
            self._kept_images[key] = before[index], tuple(images[index] for images in generated)

    def _spec_record(self, unlearned: Source) -> dict[str, Any]:
        plan = self.plan
        return {
            **plan.original.settings(),
            "seeds_per_prompt": plan.seeds_per_prompt,
            "control_pairs": plan.control_pairs,
            "hashes": {"original": plan.original.content(), "unlearned": unlearned.content()},
            **environment(plan.original.device),
        }

    def _advance(self, count: int) -> None:
        self._done += count
        self._report(min(self._done, self._total), self._total)


class _AtOnce(Executor):
    """Runs what is submitted there and then."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(function(*args, **kwargs))
        return done


class _Judge:
    """The bundled world's classifier: what does an image show?"""

    def __init__(self, plan: Plan) -> None:
        self.classifier = load_classifier()
        self.batch_size = plan.original.batch_size

    def labels(self, images: torch.Tensor) -> np.ndarray:
        """(N, heads) uint8, in batches of one size."""
        result = self.classifier.predict(filled_tensor(images, self.batch_size), self.batch_size)
        return torch.stack([result[head] for head in LABELS], dim=1)[: len(images)].to(torch.uint8).numpy()


def world_groups(world: World, concept: str) -> PromptGroups:
    """A bundled world's evaluation prompts for a concept; no training of ours sees them."""
    return PromptGroups.of(world.prompts_to_evaluate(concept), concept)


def file_groups(value: str, concept: str | None) -> PromptGroups:
    """Prompts from a file or text; groups named ``forget...`` ask for the concept, all others are to be kept."""
    return PromptGroups.of(parse_grouped_prompts(value), concept)


def default_metric(model: Model | Source) -> str:
    return model.world.name if model.world else "lpips-alex"


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most ``count`` items from all over the list."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def _size(images: torch.Tensor) -> str:
    return "x".join(str(side) for side in images.shape[1:])


def _check_finite(batch: Batch, names: Sequence[str]) -> None:
    for name, distances in zip(names, batch.distances, strict=True):
        if not np.isfinite(distances).all():
            key = batch.keys[int(np.flatnonzero(~np.isfinite(distances))[0])]
            raise UserError(f"the distance of {name} for {key[0]!r}, seed {key[1]}, is no number: check the metric.")
