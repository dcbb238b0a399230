"""Scores unlearned models against the original: same prompts, same noise, one record per pair, then a summary.

Flow: keys (prompt, seed), sorted -> images of the original and of every unlearned model in batches of one size ->
distances and the judge's verdicts -> records -> statistics.  Only records and a few images for the report are kept.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..batching import chunks, filled, filled_tensor
from ..concepts import title
from ..errors import UserError
from ..judges.base import Judge, Judged, judged, judged_for
from ..metrics.color import ColorDistance
from ..metrics.distances import Distance
from ..models.base import Model
from ..models.sampling import SamplerSpec
from ..prompts import PromptGroups
from .calibration import asking, calibration, check_calibration
from .generators import Key, Source, as_source, other_batch_size, other_precision
from .image_cache import ImageCache, Originals
from .journal import Journal, PairScores
from .judging import Mask, Sides, Unprompted
from .plan import Plan, default_judge, spread
from .results import EvaluationResult, ModelResult, ShownPair
from .summary import Control, Ladder, summarize_model

if TYPE_CHECKING:
    from ..metrics.base import Metric

_GALLERY = 6  # images per group that the report shows
_EXTREMES = 4  # pairs of the largest, of the middle and of the smallest distances that it shows
_TENSOR_BYTES = 1024  # that a tensor takes beside its elements
_CALIBRATED = 24  # of the original's images of each kind, on which the judge is tried before anything else
_COLOR = ColorDistance()
_KEPT_BYTES = 64 * 2**20  # of images held for the report; what is not among them is generated once more


def evaluate_models(
    original: Model | Source,
    unlearned: Mapping[str, Model] | Mapping[str, Source],
    groups: PromptGroups,
    metric: Distance,
    spec: SamplerSpec,
    *,
    seeds_per_prompt: int = 1,
    placebo: str | None = None,
    judge: Judge | None = None,
    describe: dict[str, dict[str, Any]] | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> EvaluationResult:
    """Evaluate every model of ``unlearned`` (by name) against ``original``, in memory.

    The ceiling is the distance between the original's images for one prompt and different seeds.  Before anything is
    scored, one batch of the original is made twice and must agree to the last bit.  ``placebo`` names the one of
    ``unlearned`` that is the placebo.  ``judge``: None takes the bundled world's, where there is one; one that cannot
    tell is not refused, but the results say it.  ``describe`` sets fields of a model's result.
    ``on_progress(done, total)`` counts images.

    Raises UserError for models that cannot be compared and RuntimeError if the repeat is not exact.
    """
    sources = {name: as_source(model, spec) for name, model in unlearned.items()}
    source = as_source(original, spec)
    judge = judge or default_judge(source, groups.concept)
    plan = Plan(source, sources, groups, metric, seeds_per_prompt, placebo, judge=judge)
    with Evaluator(plan, on_progress=on_progress, trust_judge=True) as evaluator:
        parts = list(evaluator.run(plan.keys()))
        return evaluator.conclude(PairScores.merge(parts), describe or {})


class Evaluator:
    """Generates and scores keys, and concludes from all records.  Use as a context manager."""

    def __init__(
        self,
        plan: Plan,
        *,
        cache: ImageCache | None = None,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
        trust_judge: bool = False,
    ) -> None:
        self.plan, self._cache, self._trust_judge = plan, cache, trust_judge
        self._kept_images: dict[Key, tuple[torch.Tensor, tuple[torch.Tensor, ...]]] = {}
        self._kept_bytes = 0
        self._report = on_progress
        # On a GPU a batch is decoded, scored and written while the next one is generated; on a CPU both would only
        # fight for the same cores.
        sources = (plan.original, *plan.unlearned.values())
        overlaps = plan.original.device.type == "cuda" and not any(source.takes_turns for source in sources)
        self._finish: Executor = ThreadPoolExecutor(1) if overlaps else _AtOnce()
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

    def run(self, keys: Sequence[Key], journal: Journal | None = None) -> Iterator[PairScores]:
        """Generate and score ``keys``; yields the scores of a batch at a time, after it was written to ``journal``."""
        plan, size = self.plan, self.plan.original.batch_size
        retained, controls = plan.retained(), plan.control_keys()
        parts = [list(part) for part in chunks(keys, size)]
        tried = self._keys_to_try(keys)
        needed: list[Key] = [*tried[0], *tried[1]]
        for chunk in parts:
            needed += chunk + [plan.other_seed(key) for key in chunk if key[0] in retained]
        # The controls' images are kept until they are compared, at the end.
        needed += controls
        self._total = len(set(needed)) + len(keys) * len(plan.unlearned) + min(size, len(keys)) + 2 * len(controls)
        self._done = 0
        self._originals = Originals(plan.original, needed, self._finish, self._cache, self._advance)
        if needed_first := [*tried[0], *tried[1]]:
            self._try_judge(*tried, self._originals.get(needed_first)())
        jobs: collections.deque[Future[PairScores]] = collections.deque()
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

    def conclude(self, scores: PairScores, describe: Mapping[str, Mapping[str, Any]]) -> EvaluationResult:
        """The results from the scores of all keys, in key order.

        ``describe``: by model the fields ``method``, ``concept``, ``model``, ``is_reconstruction``, where known.
        """
        plan = self.plan
        ladder = self._ladder()
        placebo = list(plan.unlearned).index(plan.placebo) if plan.placebo is not None else None
        group_of = dict(plan.grouped)
        prompts = [prompt for prompt, _ in scores.keys]
        unprompted = self._unprompted(scores, prompts)
        results = []
        for index, (name, source) in enumerate(plan.unlearned.items()):
            described = {
                "name": name,
                "method": name,
                "concept": plan.groups.concept or "the concept",
                "model": plan.original.name,
            } | dict(describe.get(name, {}))
            evaluation = summarize_model(
                scores,
                index,
                plan.groups,
                ladder,
                placebo,
                plan.judge,
                unprompted,
                metric=plan.metric.metric,
                metrics={m.name: m.aggregate(scores.rows[m.name][index], prompts) for m in plan.metrics},
                spec=plan.record(source),
                described=described,
            )
            if plan.judge is not None and not self._trust_judge:
                insist = "insist with `--trust-judge --resume`, which generates nothing again"
                check_calibration(plan.judge, evaluation.concept, evaluation.calibration, insist)
            results.append(ModelResult(name, evaluation, scores, index, group_of, plan.judge, unprompted.where))
        result = self._illustrated(results, scores, ~unprompted.where)
        self._report(self._total, self._total)
        return result

    def _unprompted(self, scores: PairScores, prompts: Sequence[str]) -> Unprompted:
        """UserError where they leave too little to be kept."""
        plan, retained = self.plan, self.plan.retained()
        sides = Sides.of(plan.judge, scores.judged, 0)
        found = Unprompted(sides, prompts, plan.groups.concepts, np.array([prompt in retained for prompt in prompts]))
        left = {prompt for prompt, out in zip(prompts, found.where, strict=True) if not out} & retained
        if len(left) < 2:
            raise UserError(
                f"of the prompts to keep {len(retained) - len(left)} leave “{title(plan.groups.concepts)}” open, and "
                "all the original's images of them show it, so too little is left to be kept. Name more prompts about "
                "other things."
            )
        return found

    def _score(
        self,
        chunk: Sequence[Key],
        before: Callable[[], torch.Tensor],
        kept: Sequence[int],
        again: Callable[[], torch.Tensor] | None,
        afters: Sequence[Callable[[], torch.Tensor]],
        journal: Journal | None,
    ) -> PairScores:
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
        colors = np.full((1 + len(generated), len(chunk)), np.nan, dtype=np.float32)
        clouds = _COLOR.clouds(original)
        for row, images in enumerate(generated, 1):
            colors[row] = _COLOR.between(clouds, _COLOR.clouds(images)).numpy()
        if again is not None:
            images = again()
            redrawn[list(kept)] = plan.metric.distance(original[list(kept)], images).numpy()
            colors[0, list(kept)] = _COLOR.between([clouds[index] for index in kept], _COLOR.clouds(images)).numpy()
        verdicts = None
        if plan.judge is not None:
            verdicts = Judged.joined([self._judged(chunk, side) for side in (original, *generated)], axis=0)
        rows = {metric.name: self._measure(metric, chunk, original, generated) for metric in plan.metrics}
        scores = PairScores(list(chunk), redrawn, distances, colors, verdicts, rows)
        _check_finite(scores, list(plan.unlearned))
        if journal:
            journal.append(scores)
        for index, key in enumerate(chunk):
            if self._kept_bytes < _KEPT_BYTES:
                pair = original[index].clone(), tuple(images[index].clone() for images in generated)
                self._kept_images[key] = pair
                self._kept_bytes += sum(image.numel() + _TENSOR_BYTES for image in (pair[0], *pair[1]))
        return scores

    def _judged(self, chunk: Sequence[Key], images: torch.Tensor) -> Judged:
        """One side.  Of several concepts, an image is looked at for those that its prompt asks for, or else for all."""
        judge, groups, size = self.plan.judge, self.plan.groups, self.plan.original.batch_size
        assert judge is not None
        if len(groups.concepts) < 2:
            return judged(judge, images, groups.concept or "", size)
        return judged_for(judge, images, [groups.asked.get(prompt) or groups.concepts for prompt, _ in chunk], size)

    def _measure(
        self, metric: Metric, chunk: Sequence[Key], original: torch.Tensor, generated: Sequence[torch.Tensor]
    ) -> np.ndarray:
        """(M, N, F); every call has as many rows as a full batch, so that no row depends on its company."""
        size = self.plan.original.batch_size
        prompts = filled([prompt for prompt, _ in chunk], size)
        first, *sides = (filled_tensor(side.contiguous(), size) for side in (original, *generated))
        rows = [metric.measure(first, side, prompts)[: len(chunk)] for side in sides]
        return np.stack([row.float().numpy() for row in rows])

    def _keys_to_try(self, keys: Sequence[Key]) -> tuple[list[Key], list[Key]]:
        """Some of the keys that ask for the concept and some that do not; their images are needed later anyway."""
        if self.plan.judge is None or self._trust_judge:
            return [], []
        every, retained = self.plan.keys(), self.plan.retained()
        to_forget = np.array([prompt not in retained for prompt, _ in every])
        kinds = asking([prompt for prompt, _ in every], to_forget, self.plan.groups.concept)
        asked, unasked = ({every[index] for index in np.flatnonzero(kind)} for kind in kinds)
        tried = ([key for key in keys if key in kind] for kind in (asked, unasked))
        first, second = (spread(kind, _CALIBRATED) for kind in tried)
        return first, second

    def _try_judge(self, asked: Sequence[Key], unasked: Sequence[Key], images: torch.Tensor) -> None:
        """Refuse a judge that cannot tell before any model but the original has generated anything."""
        judge, concept = self.plan.judge, self.plan.groups.concept or ""
        assert judge is not None
        seen = Sides(judge, self._judged([*asked, *unasked], images), 0).shown(0)
        asks = np.arange(len(images)) < len(asked)
        check_calibration(judge, concept, calibration(seen, asks, ~asks), "insist with `--trust-judge`")

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

    def _illustrated(self, results: list[ModelResult], scores: PairScores, wanted: Mask) -> EvaluationResult:
        """Choose the pairs that a report shows, from the scores alone, and have their images.

        ``wanted``: (N,) which pairs it may show.
        """
        group_of, retained = dict(self.plan.grouped), self.plan.retained()
        index_of = {key: index for index, key in enumerate(scores.keys)}
        keys = [key for key, is_wanted in zip(scores.keys, wanted, strict=True) if is_wanted]
        first = dict(reversed(keys))  # of each prompt the smallest seed, as keys are sorted
        gallery = []
        for of_retained in (False, True):
            prompts = [prompt for prompt, _ in self.plan.grouped if (prompt in retained) == of_retained]
            gallery += [(prompt, first[prompt]) for prompt in spread([p for p in prompts if p in first], _GALLERY)]
        kept = np.array([index_of[key] for key in keys if key[0] in retained])
        chosen: list[list[list[Key]]] = []  # by model: most, median, least
        for distances in scores.distances:
            order = kept[np.argsort(distances[kept], kind="stable")]
            middle = max(0, (len(order) - _EXTREMES) // 2)
            picks = order[::-1][:_EXTREMES], order[middle : middle + _EXTREMES], order[:_EXTREMES]
            chosen.append([[scores.keys[index] for index in pick] for pick in picks])
        self._generate_missing([*gallery, *(key for model in chosen for picks in model for key in picks)])

        def shown(key: Key) -> ShownPair:
            before, afters = self._kept_images[key]
            distances = tuple(float(d) for d in scores.distances[:, index_of[key]])
            return ShownPair(group_of[key[0]], key[0], before, afters, distances)

        most, median, least = ([[shown(key) for key in model[which]] for model in chosen] for which in range(3))
        return EvaluationResult(results, [shown(key) for key in gallery], most, median, least)

    def _generate_missing(self, keys: Sequence[Key]) -> None:
        missing = [key for key in dict.fromkeys(keys) if key not in self._kept_images]
        if not missing:
            return
        assert self._originals is not None
        before = self._originals.get(missing)()
        generated = [source.generate(missing) for source in self.plan.unlearned.values()]
        for index, key in enumerate(missing):
            self._kept_images[key] = before[index], tuple(images[index] for images in generated)

    def _advance(self, count: int) -> None:
        self._done += count
        self._report(min(self._done, self._total), self._total)


class _AtOnce(Executor):
    """Runs what is submitted there and then."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(function(*args, **kwargs))
        return done


def _size(images: torch.Tensor) -> str:
    return "x".join(str(side) for side in images.shape[1:])


def _check_finite(scores: PairScores, names: Sequence[str]) -> None:
    for name, distances in zip(names, scores.distances, strict=True):
        if not np.isfinite(distances).all():
            key = scores.keys[int(np.flatnonzero(~np.isfinite(distances))[0])]
            raise UserError(f"the distance of {name} for {key[0]!r}, seed {key[1]}, is no number: check the metric.")
