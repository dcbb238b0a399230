"""The prompt lists of the world: what a training may see of a concept, and what an evaluation asks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from .captions import full_caption, named, paraphrase, without
from .world import BACKGROUNDS, COLORS, SHAPES

VOCABULARY = {"shape": SHAPES, "color": COLORS, "background": BACKGROUNDS}


def train_prompts(word: str) -> tuple[list[str], list[str]]:
    """(forget, retain): the bare word, and every shape in every color on one background of its own.

    Some of what is kept leaves the concept's attribute open, as people do, in other words than evaluations do.
    """
    forget: list[str] = [word, f"a {word}"]
    retain: list[str] = []
    for combination, place in _combinations():
        if place == 2:
            (forget if word in combination else retain).append(full_caption(*combination))
    asked = _open_prompts(word)
    retain += [prompt for shift in (1, 2) for prompt in _open_prompts(word, shift) if prompt not in asked]
    return forget, list(dict.fromkeys(retain))


def evaluation_prompts(word: str) -> list[tuple[str, str]]:
    """(prompt, group).  Training holds or forgets none but the empty one; what it aims at may be among them.

    What is to be kept is every shape in every color on one background; as ``open``, prompts that leave the concept's
    attribute open, and as ``empty`` the empty prompt, where damage shows that the others hide.  The concept is asked
    for on all backgrounds but training's, and as ``forget-paraphrase`` in a phrasing that training does not use.
    """
    forget: list[tuple[str, str]] = []
    retain: list[tuple[str, str]] = []
    for combination, place in _combinations():
        if word not in combination:
            retain += [(full_caption(*combination), "retain")] if place == 0 else []
            continue
        forget += [(full_caption(*combination), "forget")] if place != 2 else []
        forget += [(paraphrase(*combination), "forget-paraphrase")] if place == 0 else []
    return forget + retain + [(prompt, "open") for prompt in _open_prompts(word)] + [("", "empty")]


def _open_prompts(word: str, shift: int = 0) -> list[str]:
    """Prompts that name neither the concept nor anything of its kind; another ``shift`` pairs other words."""
    attribute = next(name for name, words in VOCABULARY.items() if word in words)
    count = max(len(SHAPES), len(COLORS))
    prompts = [
        without(
            attribute,
            COLORS[index % len(COLORS)],
            SHAPES[(3 * index + shift) % len(SHAPES)],
            BACKGROUNDS[(index + shift) % len(BACKGROUNDS)],
        )
        for index in range(count)
    ]
    return list(dict.fromkeys(prompts))


def attributes(prompt: str) -> dict[str, str]:
    """What a prompt of the world names, by attribute."""
    result = {attribute: named(words, prompt) for attribute, words in VOCABULARY.items()}
    return {attribute: word for attribute, word in result.items() if word is not None}


def _combinations() -> Iterator[tuple[tuple[str, str, str], int]]:
    """Every (color, shape, background), and which of five designs it belongs to: each pairs all shapes and colors."""
    for (s, shape), (c, color), (b, background) in itertools.product(
        enumerate(SHAPES), enumerate(COLORS), enumerate(BACKGROUNDS)
    ):
        yield (color, shape, background), (b - s - c) % len(BACKGROUNDS)
