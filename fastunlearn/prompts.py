"""Turns what the user says about a concept into prompts: to forget, to keep, and what takes the concept's place."""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from .worlds import shapes
from .worlds.shapes.captions import full_caption, named, paraphrase

_DOMAINS = {"shape": shapes.SHAPES, "color": shapes.COLORS, "background": shapes.BACKGROUNDS}


def parse_prompts(value: str) -> list[str]:
    """``FILE`` (one prompt a line, or a CSV with a ``prompt`` column) or ``TEXT;TEXT``.  Each prompt once, in order."""
    return [prompt for prompt, _ in parse_grouped_prompts(value)]


def parse_grouped_prompts(value: str) -> list[tuple[str, str]]:
    """As :func:`parse_prompts`, with each prompt's group: the CSV's ``group`` column, else ``retain``.

    The prompt may be empty in the group ``empty``: what a model generates without being asked for anything.
    """
    if _looks_like_file(value):
        pairs = _read_file(Path(value).expanduser())
    else:
        pairs = [(text, "retain") for text in value.split(";")]
    result = _once(pairs)
    if not result:
        raise ValueError(f"{value!r} holds no prompt. Give a file with one prompt a line, or TEXT;TEXT.")
    return result


def check_grouped_prompts(given: Sequence[str] | Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Prompts, or (prompt, group), given as a list: each prompt once, its group ``retain`` unless it says another."""
    pairs = []
    for item in given:
        prompt, group = (item, "retain") if isinstance(item, str) else item
        if not isinstance(prompt, str) or not isinstance(group, str):
            raise ValueError(f"a prompt is a text or a pair of texts (prompt, group), got {item!r}.")
        pairs.append((prompt, group))
    return _once(pairs)


def _once(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Without spaces around, without lines that hold no prompt, and without repeats."""
    pairs = [(prompt.strip(), group.strip() or "retain") for prompt, group in pairs]
    # A line without a prompt is none, but where it says that it is meant.
    pairs = [(prompt, group) for prompt, group in pairs if prompt or group == "empty"]
    groups = dict(pairs)
    for prompt, group in pairs:
        if groups[prompt] != group:
            raise ValueError(f"the prompt {prompt!r} is in two groups, {group!r} and {groups[prompt]!r}. Keep one.")
    return list(groups.items())


def substitute(prompt: str, concept: str, anchor: str) -> str:
    """The prompt with the concept, a whole word in any case, replaced by the anchor; the anchor where it is absent."""
    pattern = re.compile(rf"(?<!\w){re.escape(concept.strip())}(?!\w)", re.IGNORECASE)
    if not pattern.search(prompt):
        return anchor
    return " ".join(pattern.sub(lambda _: anchor, prompt).split())


def check_disjoint(forget: Sequence[str], retain: Sequence[str]) -> None:
    """ValueError where a prompt is both to forget and to keep, compared without case and spacing."""
    keep = {" ".join(prompt.lower().split()) for prompt in retain}
    both = [prompt for prompt in forget if " ".join(prompt.lower().split()) in keep]
    if both:
        raise ValueError(
            f"{len(both)} forget prompt(s) are also retain prompts, for example {both[0]!r}. Take them out of one list."
        )


def domain_of(concept: str) -> tuple[str, str]:
    """(attribute, word) of a concept of the bundled world, e.g. ``("shape", "star")``."""
    word = concept.strip().lower()
    for domain, words in _DOMAINS.items():
        if word in words:
            return domain, word
    known = "; ".join(f"{domain}s: {', '.join(words)}" for domain, words in _DOMAINS.items())
    raise ValueError(f"the bundled model does not know the concept {concept!r}. It knows {known}.")


def shapes_anchor(concept: str) -> str:
    """What the concept becomes unless the user says: the first other word of its kind."""
    domain, word = domain_of(concept)
    return next(other for other in _DOMAINS[domain] if other != word)


def shapes_prompts(concept: str, split: str) -> tuple[list[str], list[str]]:
    """(forget, retain) prompts of the bundled world for a concept, for the split ``train`` or ``evaluate``.

    The splits share no prompt.  Each pairs every shape with every color on one background of its own; ``evaluate``
    asks for the concept on all backgrounds but training's, and also in a phrasing that training does not use.
    """
    _, word = domain_of(concept)
    forget: list[str] = []
    retain: list[str] = []
    for (s, shape), (c, color), (b, background) in itertools.product(
        enumerate(shapes.SHAPES), enumerate(shapes.COLORS), enumerate(shapes.BACKGROUNDS)
    ):
        combination = (color, shape, background)
        index = (b - s - c) % len(shapes.BACKGROUNDS)
        own = {"evaluate": index == 0, "train": index == 2}[split]
        if word not in combination:
            retain += [full_caption(*combination)] if own else []
        elif split == "train":
            forget += [full_caption(*combination)] if own else []
        else:
            forget += [full_caption(*combination)] if index != 2 else []
            forget += [paraphrase(*combination)] if own else []
    return ([word, f"a {word}", *forget] if split == "train" else forget), retain


def attributes(prompt: str) -> dict[str, str]:
    """What a prompt of the bundled world names, by attribute."""
    result = {domain: named(words, prompt) for domain, words in _DOMAINS.items()}
    return {domain: word for domain, word in result.items() if word is not None}


def _looks_like_file(value: str) -> bool:
    try:
        path = Path(value).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir() and value.strip() not in ("", ".")
    except (OSError, RuntimeError):  # a long text is no valid file name, and `~word` perhaps no user
        return False
    if is_folder and "/" in value:
        raise ValueError(f"the prompt file {value!r} is a folder. Name a file in it.")
    if not is_file and path.suffix.lower() in (".txt", ".csv", ".tsv") and ";" not in value:
        raise ValueError(f"the prompt file {value!r} does not exist. Check the path.")
    return is_file


def _read_file(path: Path) -> list[tuple[str, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt file {path} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    if path.suffix.lower() not in (".csv", ".tsv"):
        return [(line, "") for line in text.split("\n")]  # and not at what else Unicode calls the end of a line
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    if "prompt" not in (reader.fieldnames or []):
        raise ValueError(f"the prompt file {path} has no column named `prompt`, but {reader.fieldnames}.")
    try:
        return [(row["prompt"] or "", row.get("group") or "") for row in reader]
    except csv.Error as error:
        raise ValueError(f"the prompt file {path} is no proper CSV near line {reader.line_num}: {error}.") from error
