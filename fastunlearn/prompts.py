"""Turns what the user says about a concept into prompts: to forget, to keep, and what takes the concept's place."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from .errors import UserError


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
        raise UserError(f"{value!r} holds no prompt. Give a file with one prompt a line, or TEXT;TEXT.")
    return result


def check_grouped_prompts(given: Sequence[str] | Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Prompts, or (prompt, group), given as a list: each prompt once, its group ``retain`` unless it says another."""
    pairs = []
    for item in given:
        prompt, group = (item, "retain") if isinstance(item, str) else item
        if not isinstance(prompt, str) or not isinstance(group, str):
            raise UserError(f"a prompt is a text or a pair of texts (prompt, group), got {item!r}.")
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
            raise UserError(f"the prompt {prompt!r} is in two groups, {group!r} and {groups[prompt]!r}. Keep one.")
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
        raise UserError(
            f"{len(both)} forget prompt(s) are also retain prompts, for example {both[0]!r}. Take them out of one list."
        )


def is_forget(group: str) -> bool:
    """Groups named ``forget...`` ask for the concept; all others are to be kept."""
    return group.startswith("forget")


@dataclasses.dataclass(frozen=True)
class PromptGroups:
    """The prompts of an evaluation.

    ``concept`` is the forgotten word, if there is one to judge erasure by.  ``names`` gives a prompt's group where that
    is not simply ``forget`` or ``retain``.
    """

    forget: tuple[str, ...]
    retain: tuple[str, ...]
    concept: str | None
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.retain) < 2:
            raise UserError(
                "integrity is measured on at least 2 retain prompts: give more, or mark them so in the column `group`."
            )
        check_disjoint(self.forget, self.retain)

    @classmethod
    def of(cls, grouped: Sequence[tuple[str, str]], concept: str | None) -> PromptGroups:
        """From (prompt, group)."""
        forget = tuple(prompt for prompt, group in grouped if is_forget(group))
        retain = tuple(prompt for prompt, group in grouped if not is_forget(group))
        return cls(forget, retain, concept, dict(grouped))

    def grouped(self) -> list[tuple[str, str]]:
        """(prompt, group), sorted by prompt, so that the order they were given in changes nothing."""
        plain = dict.fromkeys(self.forget, "forget") | dict.fromkeys(self.retain, "retain")
        return sorted({prompt: self.names.get(prompt, group) for prompt, group in plain.items()}.items())


def _looks_like_file(value: str) -> bool:
    try:
        path = Path(value).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir() and value.strip() not in ("", ".")
    except (OSError, RuntimeError):  # a long text is no valid file name, and `~word` perhaps no user
        return False
    if is_folder and "/" in value:
        raise UserError(f"the prompt file {value!r} is a folder. Name a file in it.")
    if not is_file and path.suffix.lower() in (".txt", ".csv", ".tsv") and ";" not in value:
        raise UserError(f"the prompt file {value!r} does not exist. Check the path.")
    return is_file


def _read_file(path: Path) -> list[tuple[str, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt file {path} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    if path.suffix.lower() not in (".csv", ".tsv"):
        return [(line, "") for line in text.split("\n")]  # and not at what else Unicode calls the end of a line
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    if "prompt" not in (reader.fieldnames or []):
        raise UserError(f"the prompt file {path} has no column named `prompt`, but {reader.fieldnames}.")
    try:
        return [(row["prompt"] or "", row.get("group") or "") for row in reader]
    except csv.Error as error:
        raise UserError(f"the prompt file {path} is no proper CSV near line {reader.line_num}: {error}.") from error
