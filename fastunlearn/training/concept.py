"""What to forget, what takes its place, what to keep: from the user, else from the bundled world."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Sequence

from .. import prompts
from ..concept_prompts import KEPT_KINDS, concept_prompts
from ..concepts import Finder, Named, read_concepts
from ..errors import UserError
from ..methods import Method
from ..methods.recipe import EMPTY, UNCONDITIONAL, Concept, Defaults, Places
from ..models.base import Model
from .config import MaskConfig, TrainConfig
from .pictures import find_pictures

AUTO = "auto"  # in place of retain prompts: those that are proposed
_PROPOSED = 16  # of each kind, at most


def make_concept(config: TrainConfig, method: Method, model: Model, settings: Defaults) -> Concept:
    """What the method is told.  Raises UserError for prompts that contradict each other or that the method lacks."""
    named = read_concepts(config.forget)
    words = [one.concept for one in named]
    forget = forget_prompts(config, model, words)
    if config.retain_prompts and config.retain_prompts != AUTO:
        retain = prompts.parse_prompts(config.retain_prompts, concept=words)
    else:
        retain = _of_world(model, words)[1]
    if config.retain_prompts == AUTO:
        retain = [*(retain or _proposed(words, model)), EMPTY]
    prompts.check_disjoint(list(dict.fromkeys([*forget, *words])), retain)
    if method.needs_retain and not retain:
        raise UserError(
            f"the method {method.name} needs retain prompts: give `--retain-prompts` a FILE, 'TEXT;TEXT' or auto."
        )
    becomes = _anchors(config, method, model, named)
    anchors = _anchored(config, forget, words, becomes)
    same = [prompt for prompt, replaced in anchors.items() if replaced.lower() == prompt.lower()]
    if same:
        texts = ";".join(becomes[(Finder(words).named(same[0]) or words)[0]])
        raise UserError(f"`--anchor` {texts!r} leaves the forget prompt {same[0]!r} as it is. Name something else.")
    anchor = config.anchor
    if anchor is None and len(words) == 1 and becomes and named[0].anchor is None:
        anchor = becomes[words[0]][0]
    where = functools.partial(places, model)
    encode = lambda given: model.encode(given).of(given)  # noqa: E731 - a row for each prompt, repeats included
    return Concept(
        anchor,
        tuple(forget),
        anchors,
        tuple(retain),
        settings,
        encode=encode,
        concepts=tuple(words),
        without=_without(forget, words),
        pictures=find_pictures,
        places=where,
        is_guided=model.is_guided,
    )


def places(model: Model, prompt: str, names: Sequence[str]) -> Places:
    """Where a prompt names these concepts, in positions of its text states.

    Raises UserError where the tokenizer reads a name otherwise within the prompt than alone.
    """
    ids, nothing = model.tokens(prompt), model.tokens("")
    marks = len(nothing) - len(model.words(""))
    is_opened = bool(marks) and ids[:1] == nothing[:1]
    first, end = int(is_opened), len(ids) - (marks - int(is_opened))
    found: set[int] = set()
    for name in Finder(names).named(prompt) if names else ():
        word = model.words(name)
        at = [start for start in range(first, end - len(word) + 1) if ids[start : start + len(word)] == word]
        if not at:
            raise UserError(f"the tokenizer reads {name!r} otherwise within {prompt!r}. Use other `--forget-prompts`.")
        found |= {start + step for start in at for step in range(len(word))}
    return Places(tuple(sorted(found)) or tuple(range(first, end)), end)


def _proposed(words: Sequence[str], model: Model) -> list[str]:
    """What to keep of a model of the user's own: what is known to be near the concepts, and what has nothing to do with
    them; of several concepts as many as of one.
    """
    finder, share = Finder(words), max(1, _PROPOSED // len(words))
    made: dict[str, None] = {}
    for word in words:
        for kind, prompt in concept_prompts(word, per_kind=share):
            if kind in KEPT_KINDS and not finder.named(prompt) and model.count_tokens(prompt) <= model.max_tokens:
                made[prompt] = None
    return list(made)


def held_out_concept(config: TrainConfig, method: Method, model: Model, concept: Concept) -> Concept:
    """The concept by the prompts on which it is measured what is left of it.

    They are the user's, else those in which people would name it, whether or not the method trains on them all.
    """
    if config.forget_prompts:
        return concept
    words = concept.concepts
    if model.world:
        forget = forget_prompts(config, model, words)
    else:
        kinds, per_kind = ("name", "prefix", "short"), 3 if len(words) == 1 else 1
        made = [prompt for word in words for _, prompt in concept_prompts(word, list(kinds), per_kind=per_kind)]
        fit = [prompt for prompt in dict.fromkeys(made) if model.count_tokens(prompt) <= model.max_tokens]
        finder = Finder(words)
        forget = [prompt for prompt in fit if len(words) == 1 or finder.named(prompt)] or list(words)
    if tuple(forget) == concept.forget_prompts:
        return concept
    becomes = _anchors(config, method, model, read_concepts(config.forget))
    anchors = _anchored(config, forget, words, becomes)
    return dataclasses.replace(concept, forget_prompts=tuple(forget), anchors=anchors, without=_without(forget, words))


def forget_prompts(config: TrainConfig | MaskConfig, model: Model, words: Sequence[str]) -> list[str]:
    """The user's prompts that show the concepts, else the bundled world's, else the bare words."""
    if config.forget_prompts:
        forget = prompts.parse_prompts(config.forget_prompts, to_forget=True, concept=words)
    else:
        forget = _of_world(model, words)[0] or list(words)  # refuses a word that the world does not know
    for prompt in forget:
        tokens = model.count_tokens(prompt)
        if tokens == 0:
            raise UserError(f"the tokenizer turns the forget prompt {prompt!r} into nothing. Use other words.")
        if tokens > model.max_tokens:
            raise UserError(
                f"the forget prompt {prompt!r} has {tokens} tokens and the model reads {model.max_tokens}. Shorten it."
            )
    return forget


def _of_world(model: Model, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(forget, retain) prompts of the bundled world: those of any of the concepts, and what is of none of them."""
    if not model.world:
        return [], []
    forget: dict[str, None] = {}
    retain: dict[str, None] | None = None
    for word in words:
        own, others = model.world.prompts_to_train(word)
        forget |= dict.fromkeys(own)
        kept = dict.fromkeys(others)
        retain = kept if retain is None else {prompt: None for prompt in retain if prompt in kept}
    return list(forget), [prompt for prompt in retain or {} if prompt not in forget]


def _anchors(config: TrainConfig, method: Method, model: Model, named: Sequence[Named]) -> dict[str, list[str]]:
    """What each concept may become, by its name; of one concept several texts, of which each prompt draws one."""
    words, in_file = [one.concept for one in named], any(one.anchor is not None for one in named)
    if method.anchor == "none" and (in_file or config.anchor is not None):
        what = "`--anchor`. Leave it out." if not in_file else "anchors. Leave the column `anchor` out."
        raise UserError(f"the method {method.name} takes no {what}")
    given = None if config.anchor is None else [text.strip() for text in config.anchor.split(";") if text.strip()]
    given = [""] if given == [] else given
    if given is not None and len(words) > 1 and len(given) not in (1, len(words)):
        raise UserError(
            f"`--anchor` names {len(given)} texts for {len(words)} concepts: name one for all, one for each in their "
            "order, or give `--forget` a file with the columns concept and anchor."
        )
    becomes: dict[str, list[str]] = {}
    for index, one in enumerate(named):
        if one.anchor is not None:
            becomes[one.concept] = [one.anchor]
        elif given is not None:
            becomes[one.concept] = given if len(words) == 1 or len(given) == 1 else [given[index]]
        elif method.anchor == "needed":
            becomes[one.concept] = [model.world.anchor(one.concept, without=words) if model.world else ""]
    _check_anchors(model, words, becomes)
    return becomes


def _check_anchors(model: Model, words: Sequence[str], becomes: dict[str, list[str]]) -> None:
    finder = Finder(words)
    named = {anchor: finder.named(anchor) for texts in becomes.values() for anchor in texts}
    for word, texts in becomes.items():
        for anchor in texts:
            if other := [found for found in named[anchor] if found != word]:
                raise UserError(
                    f"the anchor {anchor!r} of {word!r} names {other[0]!r}, which is to be forgotten too. Name another."
                )
    if empty := [anchor for anchor in named if anchor and model.count_tokens(anchor) == 0]:
        raise UserError(
            f"the tokenizer turns the anchor {empty[0]!r} into nothing. Use other words, or '' for the empty prompt."
        )


def _without(forget: Sequence[str], words: Sequence[str]) -> dict[str, str]:
    """Every forget prompt without the concepts' words; the unconditional where that leaves nothing, or all of it."""
    finder = Finder(words)
    cut = {prompt: finder.replaced(prompt, dict.fromkeys(words, "")) for prompt in forget}
    return {prompt: rest if rest and finder.named(prompt) else UNCONDITIONAL for prompt, rest in cut.items()}


def _anchored(
    config: TrainConfig, forget: Sequence[str], words: Sequence[str], becomes: dict[str, list[str]]
) -> dict[str, str]:
    """Every forget prompt with what takes the concepts' places in it; the anchor alone where it names no concept."""
    if not becomes:
        return {}
    finder, draw = Finder(words), random.Random(config.seed)
    anchors = {}
    for prompt in forget:
        found = finder.named(prompt)
        if not found and len(words) > 1:
            raise UserError(
                f"the forget prompt {prompt!r} names none of the {len(words)} concepts, so that its anchor is not "
                "known. Name the concept in it."
            )
        chosen = {word: draw.choice(becomes[word]) for word in found or words if word in becomes}
        if found and chosen:
            anchors[prompt] = finder.replaced(prompt, chosen)
        elif chosen:
            anchors[prompt] = chosen[words[0]]
    return anchors
