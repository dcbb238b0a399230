"""What to forget, what takes its place, what to keep: from the user, else from the bundled world."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from .. import prompts
from ..concept_prompts import KEPT_KINDS, concept_prompts
from ..errors import UserError
from ..methods import Method
from ..methods.recipe import EMPTY, Concept, Defaults
from ..models.base import Model
from .config import MaskConfig, TrainConfig
from .pictures import find_pictures

AUTO = "auto"  # in place of retain prompts: those that are proposed
_PROPOSED = 16  # of each kind, at most


def make_concept(config: TrainConfig, method: Method, model: Model, settings: Defaults) -> Concept:
    """What the method is told.  Raises UserError for prompts that contradict each other or that the method lacks."""
    word = config.forget.strip()
    forget = forget_prompts(config, model)
    if config.retain_prompts and config.retain_prompts != AUTO:
        retain = prompts.parse_prompts(config.retain_prompts, concept=word)
    else:
        retain = model.world.prompts_to_train(word)[1] if model.world else []
    if config.retain_prompts == AUTO:
        retain = [*(retain or _proposed(word, model)), EMPTY]
    prompts.check_disjoint(forget, retain)
    if method.needs_retain and not retain:
        raise UserError(
            f"the method {method.name} needs retain prompts: give `--retain-prompts` a FILE, 'TEXT;TEXT' or auto."
        )
    anchor = config.anchor
    if anchor is not None and method.anchor == "none":
        raise UserError(f"the method {method.name} takes no `--anchor`. Leave it out.")
    if anchor is None and method.anchor == "needed":
        anchor = model.world.anchor(word) if model.world else ""
    anchors = _anchors(forget, word, anchor, config.seed)
    same = [prompt for prompt, replaced in anchors.items() if replaced.lower() == prompt.lower()]
    if same:
        raise UserError(f"`--anchor` {anchor!r} leaves the forget prompt {same[0]!r} as it is. Name something else.")
    encode = lambda given: model.encode(given).of(given)  # noqa: E731 - a row for each prompt, repeats included
    return Concept(anchor, tuple(forget), anchors, tuple(retain), settings, encode, find_pictures)


def _proposed(word: str, model: Model) -> list[str]:
    """What to keep of a model of the user's own: what is known to be near the concept, and what has nothing to do with
    it.
    """
    made = [prompt for kind, prompt in concept_prompts(word, per_kind=_PROPOSED) if kind in KEPT_KINDS]
    return [prompt for prompt in made if model.count_tokens(prompt) <= model.max_tokens]


def held_out_concept(config: TrainConfig, model: Model, concept: Concept) -> Concept:
    """The concept by the prompts on which it is measured what is left of it.

    They are the user's, else those in which people would name it, whether or not the method trains on them all.
    """
    word = config.forget.strip()
    if config.forget_prompts:
        return concept
    if model.world:
        forget = forget_prompts(config, model)
    else:
        made = [prompt for _, prompt in concept_prompts(word, ["name", "prefix", "short"], per_kind=3)]
        forget = [prompt for prompt in made if model.count_tokens(prompt) <= model.max_tokens] or [word]
    if tuple(forget) == concept.forget_prompts:
        return concept
    anchors = _anchors(forget, word, concept.anchor, config.seed)
    return dataclasses.replace(concept, forget_prompts=tuple(forget), anchors=anchors)


def _anchors(forget: Sequence[str], word: str, anchor: str | None, seed: int) -> dict[str, str]:
    """Every forget prompt -> the prompt with the anchor in the concept's place, one drawn where several are named."""
    if anchor is None:
        return {}
    choices = [text.strip() for text in anchor.split(";") if text.strip()] or [""]
    draw = random.Random(seed)
    return {prompt: prompts.substitute(prompt, word, draw.choice(choices)) for prompt in forget}


def forget_prompts(config: TrainConfig | MaskConfig, model: Model) -> list[str]:
    """The user's prompts that show the concept, else the bundled world's, else the bare word."""
    word = config.forget.strip()
    if config.forget_prompts:
        forget = prompts.parse_prompts(config.forget_prompts, to_forget=True, concept=word)
    else:
        own = model.world.prompts_to_train(word)[0] if model.world else []  # refuses a word it does not know
        forget = own or [word]
    for prompt in forget:
        tokens = model.count_tokens(prompt)
        if tokens == 0:
            raise UserError(f"the tokenizer turns the forget prompt {prompt!r} into nothing. Use other words.")
        if tokens > model.max_tokens:
            raise UserError(
                f"the forget prompt {prompt!r} has {tokens} tokens and the model reads {model.max_tokens}. Shorten it."
            )
    return forget
