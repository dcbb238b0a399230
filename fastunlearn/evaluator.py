"""Scores unlearned models against the original: same prompts, same noise, one record a pair, then a summary.

Flow: keys (prompt, seed) -> pictures of the original and of every unlearned model in batches of one size -> distances
and the judge's labels -> records -> statistics.  Only records and a few pictures for the report are kept.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import prompts as prompt_lists
from .config import TrainConfig, from_yaml
from .generate import SamplerSpec, generate
from .models import Model, fingerprint, sampler_config, versions
from .perceptual import PerceptualDistance
from .shapes import load_classifier
from .shapes.classifier import HEADS
from .statistics import clustered_mean, quantiles, retention, wilson

_GALLERY = 6  # pictures a group that the report shows


@dataclasses.dataclass(frozen=True)
class PromptGroups:
    """The prompts of an evaluation.  ``concept`` is the forgotten word, if there is one to judge erasure by."""

    forget: tuple[str, ...]
    retain: tuple[str, ...]
    concept: str | None

    def __post_init__(self) -> None:
        if len(self.retain) < 2:
            raise ValueError(
                "integrity is measured on at least 2 retain prompts: give more, or mark them so in the column `group`."
            )
        prompt_lists.check_disjoint(self.forget, self.retain)


@dataclasses.dataclass(frozen=True)
class Shown:
    """A pair kept for the report.  Pictures are (3, H, W) uint8; ``unlearned`` has one a model."""

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
    pairs: list[dict[str, Any]]


@dataclasses.dataclass
class Evaluations:
    """The results for all models, in order, and the pictures that a report shows: some of each group, and for each
    model the retain pairs that changed most and least."""

    results: list[Evaluation]
    gallery: list[Shown]
    most_changed: list[list[Shown]]
    least_changed: list[list[Shown]]


def evaluate_models(
    original: Model,
    unlearned: dict[str, Model],
    groups: PromptGroups,
    metric: PerceptualDistance,
    spec: SamplerSpec,
    *,
    seeds_per_prompt: int = 1,
    describe: dict[str, dict[str, Any]] | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluations:
    """Evaluate every model of ``unlearned`` (by name) against ``original``.

    The ceiling is the distance between the original's pictures for one prompt and different seeds.  Before anything is
    scored, one batch of the original is made twice and must agree to the last bit.  ``describe`` adds fields to a
    model's summary.  ``on_progress(done, total)`` counts pictures.

    Raises ValueError for models that cannot be compared and RuntimeError if the repeat is not exact.
    """
    for name, model in unlearned.items():
        check_comparable(original, model, name)
    keys = [
        (group, prompt, seed)
        for group, prompts in (("forget", groups.forget), ("retain", groups.retain))
        for prompt in prompts
        for seed in range(seeds_per_prompt)
    ]
    redrawn_keys = [(prompt, seed) for group, prompt, seed in keys if group == "retain"]
    progress = _Progress(len(keys) * (1 + len(unlearned)) + len(redrawn_keys) + spec.micro_batch_size, on_progress)
    judge = _Judge(groups.concept) if groups.concept is not None and original.is_bundled else None
    keep = _Keeper(len(unlearned), [*_spread(groups.forget), *_spread(groups.retain)])

    def draw(model: Model, batch: Sequence[tuple[str, int]]) -> torch.Tensor:
        pictures = generate(model, [prompt for prompt, _ in batch], [seed for _, seed in batch], spec)
        progress.advance(len(batch))
        return pictures

    repeat: float | None = None
    records: list[list[dict[str, Any]]] = [[] for _ in unlearned]
    original_labels: list[dict[str, Any]] = []
    redrawn: list[dict[str, Any]] = []
    for batch in _batches(keys, spec.micro_batch_size):
        asked = [(prompt, seed) for _, prompt, seed in batch]
        before = draw(original, asked)
        if repeat is None:
            repeat = _repeat_control(metric, before, draw(original, asked))
        retained = [place for place, (group, _, _) in enumerate(batch) if group == "retain"]
        if judge:
            original_labels += judge.labels(before)
        afters = [draw(model, asked) for model in unlearned.values()]
        distances = [metric.distance(before, after) for after in afters]
        for rows, after, distance in zip(records, afters, distances, strict=True):
            labels = judge.labels(after) if judge else [{}] * len(batch)
            for (group, prompt, seed), d, label in zip(batch, distance.tolist(), labels, strict=True):
                rows.append({"group": group, "prompt": prompt, "seed": seed, "distance": d} | label)
        if retained:
            # Another seed of the same prompt; with several seeds a prompt these are the neighbours' own pictures, drawn
            # again so that no batch depends on another.
            others = [(asked[place][0], _other_seed(asked[place][1], seeds_per_prompt)) for place in retained]
            again = metric.distance(before[retained], draw(original, others))
            redrawn += [{"prompt": p, "distance": d} for (p, _), d in zip(others, again.tolist(), strict=True)]
        keep.offer(batch, before, afters, distances)
    assert repeat is not None
    progress.finish()
    results = []
    for place, (name, model) in enumerate(unlearned.items()):
        summary = _summarize(records[place], redrawn, repeat, metric, groups, judge, original_labels)
        spec_record = _spec_record(original, model, spec, seeds_per_prompt)
        described = {"name": name, "method": name, "concept": groups.concept or "the concept", "model": original.name}
        described |= (describe or {}).get(name, {})
        results.append(Evaluation(name, described | summary | {"spec": spec_record}, records[place]))
    return Evaluations(results, keep.gallery, keep.most(), keep.least())


def check_comparable(original: Model, unlearned: Model, name: str) -> None:
    """ValueError unless both are of one family, resolution and sampler: else a difference would not be unlearning's."""
    if original.family != unlearned.family:
        raise ValueError(f"{name} is of the family {unlearned.family}, the original of {original.family}.")
    if original.latent_shape != unlearned.latent_shape:
        raise ValueError(f"{name} has latents {unlearned.latent_shape}, the original {original.latent_shape}.")
    ours, theirs = sampler_config(original.source), sampler_config(unlearned.source)
    if ours != theirs:
        differing = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
        raise ValueError(
            f"{name} has another sampler than the original ({', '.join(differing)} differ), so their pictures cannot "
            "be compared. Give both the same scheduler/scheduler_config.json."
        )


class _Judge:
    """The bundled world's classifier, read as: does the picture show what the prompt names?"""

    def __init__(self, concept: str) -> None:
        self.classifier = load_classifier()
        self.domain, self.word = prompt_lists.domain_of(concept)

    def labels(self, pictures: torch.Tensor) -> list[dict[str, Any]]:
        predicted = self.classifier.predict(pictures)
        columns = {head: [names[i] for i in predicted[head].tolist()] for head, names in HEADS.items()}
        return [
            {"shape": s, "color": c, "background": b, "valid": v == "yes"}
            for s, c, b, v in zip(*(columns[head] for head in ("shape", "color", "background", "valid")), strict=True)
        ]


class _Keeper:
    """Chooses, while batches pass, the few pairs that a report shows."""

    def __init__(self, models: int, prompts: Sequence[str], extremes: int = 4) -> None:
        self.gallery: list[Shown] = []
        self._prompts = set(prompts)
        self._extremes = extremes
        # Heaps of (key, tie-breaker, pair); the tie-breaker keeps pairs themselves from being compared.
        self._most: list[list[tuple[float, int, Shown]]] = [[] for _ in range(models)]
        self._least: list[list[tuple[float, int, Shown]]] = [[] for _ in range(models)]
        self._seen = 0

    def offer(
        self,
        batch: Sequence[tuple[str, str, int]],
        before: torch.Tensor,
        afters: Sequence[torch.Tensor],
        distances: Sequence[torch.Tensor],
    ) -> None:
        for place, (group, prompt, seed) in enumerate(batch):
            self._seen += 1
            values = tuple(float(distance[place]) for distance in distances)
            pair = Shown(group, prompt, before[place], tuple(after[place] for after in afters), values)
            if seed == 0 and prompt in self._prompts:
                self.gallery.append(pair)
            if group == "retain":
                for model, value in enumerate(values):
                    _push(self._most[model], (value, -self._seen, pair), self._extremes)
                    _push(self._least[model], (-value, -self._seen, pair), self._extremes)

    def most(self) -> list[list[Shown]]:
        return [[pair for _, _, pair in sorted(heap, reverse=True)] for heap in self._most]

    def least(self) -> list[list[Shown]]:
        return [[pair for _, _, pair in sorted(heap, reverse=True)] for heap in self._least]


def _push(heap: list[tuple[float, int, Shown]], item: tuple[float, int, Shown], size: int) -> None:
    heapq.heappush(heap, item)
    if len(heap) > size:
        heapq.heappop(heap)


def _spread(prompts: Sequence[str]) -> list[str]:
    """A few prompts from all over the list."""
    count = min(_GALLERY, len(prompts))
    return [prompts[place * len(prompts) // count] for place in range(count)]


class _Progress:
    def __init__(self, total: int, report: Callable[[int, int], None]) -> None:
        self.done, self.total, self.report = 0, total, report

    def advance(self, count: int) -> None:
        self.done += count
        self.report(self.done, self.total)

    def finish(self) -> None:
        self.report(self.total, self.total)


def _batches(keys: list[tuple[str, str, int]], size: int) -> Iterator[list[tuple[str, str, int]]]:
    for start in range(0, len(keys), size):
        yield keys[start : start + size]


def _other_seed(seed: int, seeds_per_prompt: int) -> int:
    """Another seed for the same prompt: the next one, or past the last where there is but one."""
    return seed + 1 if seeds_per_prompt == 1 else (seed + 1) % seeds_per_prompt


def _repeat_control(metric: PerceptualDistance, first: torch.Tensor, second: torch.Tensor) -> float:
    worst = float(metric.distance(first, second).max())
    if worst != 0.0:
        raise RuntimeError(
            f"the original does not repeat itself: distance {worst:g} between two runs on the same noise, where it "
            "must be 0. Nothing was scored, since chance would be counted as damage."
        )
    return worst


def _summarize(
    records: list[dict[str, Any]],
    redrawn: list[dict[str, Any]],
    repeat: float,
    metric: PerceptualDistance,
    groups: PromptGroups,
    judge: _Judge | None,
    original_labels: list[dict[str, Any]],
) -> dict[str, Any]:
    retained = [record for record in records if record["group"] == "retain"]
    distances = np.array([record["distance"] for record in retained])
    clusters = [record["prompt"] for record in retained]
    ceiling = np.array([record["distance"] for record in redrawn])
    mean = clustered_mean(distances, clusters)
    kept = retention(distances, clusters, ceiling, [record["prompt"] for record in redrawn])
    return {
        "integrity": {
            "mean": mean.mean,
            "ci95": [mean.low, mean.high],
            "ceiling": clustered_mean(ceiling, [record["prompt"] for record in redrawn]).mean,
            "retention": kept.mean,
            "retention_ci95": [kept.low, kept.high],
            "n_pairs": len(retained),
            "n_prompts": len(set(clusters)),
            "metric": metric.metric,
            "interval": mean.method,
            "quantiles": quantiles(distances),
        },
        "erasure": _erasure(records, original_labels, groups, judge) if judge and groups.forget else None,
        "retain": _retained(records, original_labels) if judge else None,
        "controls": {"repeat": repeat, "redrawn": float(ceiling.mean())},
    }


def _erasure(
    records: list[dict[str, Any]], before: list[dict[str, Any]], groups: PromptGroups, judge: _Judge
) -> dict[str, Any]:
    """How often a prompt that names the concept still gives it.  A picture that is no valid one shows nothing."""
    places = [place for place, record in enumerate(records) if record["group"] == "forget"]

    def shows(label: dict[str, Any]) -> bool:
        return label[judge.domain] == judge.word

    after = [records[place] for place in places]
    share = wilson(sum(map(shows, after)), len(after))
    valid = [record for record in after if record["valid"]]
    return {
        "concept": judge.word,
        "forget_accuracy": share.mean,
        "forget_accuracy_ci95": [share.low, share.high],
        "forget_accuracy_original": sum(shows(before[place]) for place in places) / len(places),
        "forget_valid": len(valid) / len(after),
        # UA of the field, and UA that garbage cannot earn.
        "unlearning_accuracy": 1 - share.mean,
        "unlearning_accuracy_valid": sum(not shows(record) for record in valid) / len(after),
        "n_pictures": len(after),
    }


def _retained(records: list[dict[str, Any]], before: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares of retain pictures that show what their prompt names (IRA within the concept's attribute, CRA across)."""
    places = [place for place, record in enumerate(records) if record["group"] == "retain"]
    named = {place: prompt_lists.attributes(records[place]["prompt"]) for place in places}
    result: dict[str, Any] = {"n_pictures": len(places)}
    for attribute in ("shape", "color", "background"):
        asked = [place for place in places if attribute in named[place]]
        for suffix, labels in (("", records), ("_original", before)):
            right = sum(labels[place][attribute] == named[place][attribute] for place in asked)
            result[f"{attribute}_accuracy{suffix}"] = right / len(asked) if asked else None
    for suffix, labels in (("", records), ("_original", before)):
        result[f"valid{suffix}"] = sum(labels[place]["valid"] for place in places) / len(places)
    return result


def _spec_record(original: Model, unlearned: Model, spec: SamplerSpec, seeds_per_prompt: int) -> dict[str, Any]:
    sampler = sampler_config(original.source)
    return {
        "sampler": sampler["_class_name"],
        "sampler_config": sampler,
        "steps": spec.num_inference_steps,
        "guidance_scale": spec.guidance_scale,
        "dtype": "bfloat16 autocast" if spec.mixed_precision == "bf16" else "float32",
        "micro_batch_size": spec.micro_batch_size,
        "seeds_per_prompt": seeds_per_prompt,
        "device": original.device.type,
        "hashes": {"original": fingerprint(original.source), "unlearned": fingerprint(unlearned.source)},
        "versions": versions(),
    }


def shapes_groups(concept: str) -> PromptGroups:
    """The bundled world's evaluation prompts for a concept; no training of ours sees them."""
    forget, retain = prompt_lists.shapes_prompts(concept, "evaluate")
    return PromptGroups(tuple(forget), tuple(retain), concept)


def file_groups(value: str, concept: str | None) -> PromptGroups:
    """Prompts from a file or text; those of the group ``forget`` ask for the concept, all others are to be kept."""
    grouped = prompt_lists.parse_grouped_prompts(value)
    forget = tuple(prompt for prompt, group in grouped if group.startswith("forget"))
    return PromptGroups(forget, tuple(prompt for prompt, group in grouped if not group.startswith("forget")), concept)


def default_metric(model: Model) -> str:
    return "shapes" if model.is_bundled else "lpips-alex"


def config_of_run(unlearned: Path) -> TrainConfig | None:
    """The config beside a run's model folder; None where there is none of ours."""
    try:
        return from_yaml(unlearned.parent / "config.yaml", TrainConfig)
    except (ValueError, TypeError):
        return None
