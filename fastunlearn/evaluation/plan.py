"""What is to be evaluated: the models, the prompts, the measures, and the order of the keys."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from ..concepts import Finder
from ..errors import UserError
from ..judges import load_judge, record_of
from ..judges.base import Judge, check_concept
from ..metrics.base import Metric
from ..metrics.distances import Distance, default_distance
from ..models.base import Model
from ..prompts import PromptGroups, is_forget, mentions, read_prompts
from ..worlds import World
from .generators import Key, PipelineSource, Source, check_comparable, environment

CONTROL_PAIRS = 8  # on which the numeric controls are measured unless the caller says otherwise


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that decides the result, in the order of its keys.

    ``placebo`` names the one of ``unlearned`` that is the placebo.  ``judge`` says what the images show of the concept
    of ``groups``; without one, erasure is not measured.
    """

    original: Source
    unlearned: Mapping[str, Source]
    groups: PromptGroups
    metric: Distance
    seeds_per_prompt: int = 1
    placebo: str | None = None
    metrics: Sequence[Metric] = ()
    control_pairs: int = CONTROL_PAIRS
    judge: Judge | None = None

    def __post_init__(self) -> None:
        for name, source in self.unlearned.items():
            check_comparable(self.original, source, name)
            if isinstance(source, PipelineSource) and isinstance(self.original, PipelineSource):
                source.share_text(self.original)
        if isinstance(self.original, PipelineSource):
            self.original.check_sampler()
        if self.groups.seeds and self.seeds_per_prompt != 1:
            raise UserError("the prompt file gives the seeds: leave `--seeds-per-prompt` out.")
        if self.judge is not None:
            if self.groups.concept is None:
                raise UserError(f"the judge {self.judge.name} looks for a concept: name it with `--forget`.")
            for concept in self.groups.concepts:
                check_concept(self.judge, concept)

    @functools.cached_property
    def grouped(self) -> list[tuple[str, str]]:
        return self.groups.grouped()

    def keys(self) -> list[Key]:
        return [(prompt, seed) for prompt, _ in self.grouped for seed in sorted(self.seeds_of(prompt))]

    def seeds_of(self, prompt: str) -> Sequence[int]:
        """The prompt's seeds: those of its file, else so many from 0 on."""
        return self.groups.seeds.get(prompt, range(self.seeds_per_prompt))

    def keys_of(self, rank: int, world_size: int) -> list[Key]:
        """A rank's share: all seeds of every n-th prompt."""
        mine = {prompt for prompt, _ in self.grouped[rank::world_size]}
        return [key for key in self.keys() if key[0] in mine]

    def retained(self) -> set[str]:
        return {prompt for prompt, group in self.grouped if not is_forget(group)}

    def other_seed(self, key: Key) -> Key:
        """The same prompt from other noise: the next seed, or past the last where there is but one."""
        prompt, seed = key
        seeds = self.seeds_of(prompt)
        return prompt, seed + 1 if len(seeds) == 1 else seeds[(seeds.index(seed) + 1) % len(seeds)]

    def control_keys(self) -> list[Key]:
        kept = self.retained()
        keys = [key for key in self.keys() if key[0] in kept]
        return spread(keys, self.control_pairs)

    def notes(self) -> list[str]:
        """What a reader of the result should know of the prompts."""
        notes, kept = list(self.groups.notes), [prompt for prompt, group in self.grouped if not is_forget(group)]
        if named := [prompt for prompt in kept if any(mentions([prompt], one) for one in self.groups.concepts)]:
            notes.append(
                f"{len(named)} of {len(kept)} prompts to keep name “{self.groups.concept}”, for example {named[0]!r}: "
                "they count as kept, not as erased."
            )
        if lost := [
            prompt for prompt, asked in self.groups.asked.items() if len(self.groups.concepts) > 1 and not asked
        ]:
            notes.append(
                f"{len(lost)} prompts to forget name none of the {len(self.groups.concepts)} concepts, for example "
                f"{lost[0]!r}: they count in the whole alone. A group such as `forget {self.groups.concepts[0]}` says "
                "which concept a prompt asks for."
            )
        if isinstance(self.original, PipelineSource):
            prompts = [prompt for prompt, _ in self.grouped]
            if cut := self.original.model.too_long(prompts):
                notes.append(
                    f"{len(cut)} of {len(prompts)} prompts are longer than the {self.original.model.max_tokens} tokens "
                    f"that the model reads, for example {cut[0]!r}: their ends have no effect."
                )
        return notes

    def spec(self) -> dict[str, Any]:
        """What must be the same for two parts of one evaluation."""
        return {
            "original": self.original.content(),
            "unlearned": {name: source.content() for name, source in self.unlearned.items()},
            "placebo": self.placebo,
            "prompts": self.grouped,
            "concept": self.groups.concept,
            "concepts": list(self.groups.concepts),
            "seeds_per_prompt": self.seeds_per_prompt,
            "seeds": sorted(self.groups.seeds.items()),
            "metric": self.metric.metric,
            "metrics": [metric.name for metric in self.metrics],
            "judge": dataclasses.asdict(record_of(self.judge)) if self.judge is not None else None,
            **self.original.settings(),
            **environment(self.original.device),
        }

    def record(self, unlearned: Source) -> dict[str, Any]:
        """The settings that a model's result states."""
        return {
            **self.original.settings(),
            "seeds_per_prompt": "as the prompts say" if self.groups.seeds else self.seeds_per_prompt,
            "control_pairs": self.control_pairs,
            "hashes": {"original": self.original.content(), "unlearned": unlearned.content()},
            **environment(self.original.device),
        }


def world_groups(world: World, concepts: str | Sequence[str]) -> PromptGroups:
    """A bundled world's evaluation prompts for a concept, or several; no training of ours sees them.

    Of several, those that ask for one are in a group of its name, and what asks for none of them is kept.
    """
    if isinstance(concepts, str) or len(concepts) == 1:
        concept = concepts if isinstance(concepts, str) else concepts[0]
        return PromptGroups.of(world.prompts_to_evaluate(concept), concept)
    lists = {concept: dict(world.prompts_to_evaluate(concept)) for concept in concepts}
    finder, grouped = Finder(concepts), {}
    for prompt in dict.fromkeys(prompt for own in lists.values() for prompt in own):
        asking = [concept for concept, own in lists.items() if is_forget(own.get(prompt, ""))]
        if asking:
            grouped[prompt] = f"{lists[asking[0]][prompt]} {' + '.join(asking)}"
        elif not finder.named(prompt):  # what is near one concept may name another
            grouped[prompt] = next(own[prompt] for own in lists.values() if prompt in own)
    return PromptGroups.of(list(grouped.items()), concepts)


def file_groups(value: str, concept: str | Sequence[str] | None) -> PromptGroups:
    """Prompts from a file or text; groups named ``forget...`` ask for the concept, all others are to be kept."""
    return PromptGroups.of_list(read_prompts(value, concept), concept)


def default_metric(model: Model | Source) -> str:
    """The name of the perceptual distance of a bundled world, or of that of the field."""
    return default_distance(model.world)


def default_judge(source: Source, concept: str | None) -> Judge | None:
    """The judge of a bundled world, which has the world's name; None elsewhere and without a concept."""
    if concept is None or source.world is None:
        return None
    return load_judge(source.world.name, source.device)


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most ``count`` items from all over the list."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]
