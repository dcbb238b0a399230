"""From what a caller of :func:`attack` has to what a plan needs: concept, prompts that ask for it, judge."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import prompts as prompt_lists
from ..concept_prompts import KEPT_KINDS, concept_prompts
from ..errors import UserError
from ..evaluation.generators import Source
from ..evaluation.inputs import judge_of
from ..evaluation.plan import spread
from ..judges.base import Judge
from ..prompts import PromptList, is_forget, read_prompts
from ..schema import RunRecord
from ..worlds import World

_PER_KIND = 4  # prompts of templates

Kinds = tuple[tuple[str, str], ...]  # (prompt, kind)


def concept_of(given: str | None, run: RunRecord | None) -> str:
    """What to look for."""
    if given is not None:
        return given.strip()
    if run is None:
        raise UserError("`--concept` is missing: the unlearned model has no record that says what it forgot.")
    return run.concept


def judge_for(given: Any, source: Source, concept: str) -> Judge:
    judge = judge_of(given, source, concept)
    if judge is None:
        raise UserError("an attack needs a judge, who says whether the concept came back: name one with `--judge`.")
    return judge


def prompts_for(
    given: Any, concept: str, world: World | None, count: int, *, worded: bool
) -> tuple[Kinds, Kinds, tuple[str, ...]]:
    """(prompts that ask for the concept, at most ``count``; those of the attack `prompts`; notes).

    ``worded``: whether that attack is wanted.  A prompt of the former is none of the latter.
    """
    notes: tuple[str, ...] = ()
    if given is not None:
        read = _read(given)
        notes = read.notes
        if read.seeds:
            notes = (*notes, "the seeds of the prompt file are not used: attacks try seeds from 0 on.")
        asking = [(prompt, kind) for prompt, kind in read.grouped if is_forget(kind)]
        others = [pair for pair in read.grouped if pair not in asking]
        if not asking:  # no group says so: all of them ask for it
            asking, others = [(prompt, "forget") for prompt, _ in read.grouped], []
    elif world is not None:
        asking = [(prompt, kind) for prompt, kind in world.prompts_to_evaluate(concept) if is_forget(kind)]
        others = []
    else:
        asking = [(prompt, "forget") for kind, prompt in concept_prompts(concept, ["prefix", "variant"])]
        others = []
    prompts = tuple(spread(sorted(asking), count))
    if worded and not others:
        others = [
            (prompt, kind) for kind, prompt in concept_prompts(concept, per_kind=_PER_KIND) if kind not in KEPT_KINDS
        ]
    taken = {prompt for prompt, _ in prompts}
    return prompts, tuple(pair for pair in others if pair[0] not in taken) if worded else (), notes


def unrelated_for(given: Any, concept: str, world: World | None) -> tuple[str, ...]:
    """Prompts about other things; none where nobody names any."""
    if given is not None:
        return tuple(prompt for prompt, _ in _read(given).grouped)
    return tuple(world.prompts_to_train(concept)[1]) if world is not None else ()


def _read(given: str | Path | Sequence[Any]) -> PromptList:
    if isinstance(given, str | Path):
        return read_prompts(str(given))
    return PromptList(prompt_lists.check_grouped_prompts(given))
