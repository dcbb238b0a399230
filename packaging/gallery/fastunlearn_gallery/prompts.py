"""The prompt lists of the gallery: what a training may see of a concept, and what an evaluation asks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from .captions import alone, full_caption, paraphrase, without
from .words import BACKGROUNDS, HELD_OUT, KINDS, OBJECTS, STYLES, VOCABULARY

_TRAINED = 2  # the design that trainings use
_KEPT = 0  # the design from which evaluations take what is to be kept
_ASKED = 4  # the design in which evaluations ask for the concept, beside the one above


def train_prompts(word: str) -> tuple[list[str], list[str]]:
    """(forget, retain): the bare word, and every object in every style on one background of its own.

    Some of what is kept leaves the concept's attribute open, as people do, in other words than evaluations do.
    """
    attribute = next(name for name, words in VOCABULARY.items() if word in words)
    forget = [word, alone(attribute, word)]
    retain: list[str] = []
    for (style, thing, background), design in _combinations():
        if design == _TRAINED:
            named = word in (style, thing, background)
            (forget if named else retain).append(full_caption(style, thing, background))
    asked = _open_prompts(attribute)
    retain += [prompt for shift in (1, 2) for prompt in _open_prompts(attribute, shift) if prompt not in asked]
    return forget, list(dict.fromkeys(retain))


def evaluation_prompts(word: str) -> list[tuple[str, str]]:
    """(prompt, group).  No prompt is one of training's.

    ``forget`` asks for the concept, and ``forget-paraphrase`` does in a phrasing that training does not use.  What is
    to be kept is a third of the other combinations of a design: ``near`` what lies next to the concept
    (:data:`~.words.KINDS`), ``far`` the others; ``open``, prompts that leave the concept's attribute open; ``empty``,
    the empty prompt.
    """
    attribute = next(name for name, words in VOCABULARY.items() if word in words)
    near = next(kind for kind in KINDS[attribute] if word in kind)
    forget: list[tuple[str, str]] = []
    kept: list[tuple[str, str]] = []
    for (style, thing, background), design in _combinations():
        named = {"style": style, "object": thing, "background": background}[attribute]
        third = (STYLES.index(style) + 2 * OBJECTS.index(thing)) % 3 == 0
        caption = full_caption(style, thing, background)
        if named != word:
            if design == _KEPT and third:
                kept.append((caption, "near" if named in near else "far"))
            continue
        # An object in every style twice; a style or a background with every object once.
        if design in (_KEPT, _ASKED) and (attribute == "object" or third == (design == _KEPT)):
            forget.append((caption, "forget"))
        if design == _KEPT and (attribute == "object" or third):
            forget.append((paraphrase(style, thing, background), "forget-paraphrase"))
    return forget + kept + [(prompt, "open") for prompt in _open_prompts(attribute)] + [("", "empty")]


def _open_prompts(attribute: str, shift: int = 0) -> list[str]:
    """Prompts that name nothing of the attribute; another ``shift`` pairs other words."""
    prompts = [
        without(
            attribute,
            STYLES[index % len(STYLES)],
            OBJECTS[(5 * index + shift) % len(OBJECTS)],
            BACKGROUNDS[(index + index // len(BACKGROUNDS) + shift) % len(BACKGROUNDS)],
        )
        for index in range(12)
    ]
    return list(dict.fromkeys(prompts))


def attributes(prompt: str) -> dict[str, str]:
    """What a prompt of the gallery names, by attribute."""
    spoken = prompt.lower().split()
    found = {name: next((word for word in words if word in spoken), None) for name, words in VOCABULARY.items()}
    return {name: word for name, word in found.items() if word is not None}


def _combinations() -> Iterator[tuple[tuple[str, str, str], int]]:
    """Every (style, object, background) and which of six designs it belongs to: each pairs all styles and objects.

    Without the pairs that no training of the original saw: what it makes of them is no measure of what is kept.
    """
    for (s, style), (o, word), (b, background) in itertools.product(
        enumerate(STYLES), enumerate(OBJECTS), enumerate(BACKGROUNDS)
    ):
        if (style, word) not in HELD_OUT:
            yield (style, word, background), (b - s - o) % len(BACKGROUNDS)
