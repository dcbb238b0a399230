"""What is to be forgotten, as the user says it: one concept or several, each perhaps with what it becomes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from .errors import UserError
from .files.concept_files import SUFFIXES, read_concept_file

_SHOWN = 3  # concepts that a title names


@dataclasses.dataclass(frozen=True)
class Named:
    """A concept by its name.  ``anchor``: what it becomes; None where its file does not say."""

    concept: str
    anchor: str | None = None


def read_concepts(value: str) -> list[Named]:
    """``NAME``, ``NAME;NAME`` or ``FILE`` (see :mod:`.files.concept_files`): the concepts, each once, in order.

    A name with a semicolon in it is written in a file.  Raises UserError for a file that cannot be read, for none, and
    for a concept that has two anchors.
    """
    path = _file(value)
    if path is None:
        rows: list[tuple[str, str | None]] = [(name.strip(), None) for name in value.split(";") if name.strip()]
    else:
        rows = read_concept_file(path)
    named: dict[str, Named] = {}
    for concept, anchor in rows:
        before = named.setdefault(concept.lower(), Named(concept, anchor))
        if before.anchor != anchor:
            raise UserError(f"{value!r} names {concept!r} twice, with different anchors. Keep one.")
    if not named:
        raise UserError(f"{value!r} names no concept: give NAME, NAME;NAME or a file with the column `concept`.")
    return list(named.values())


def from_anywhere(value: str) -> str:
    """``FILE`` with its whole path, so that it means the same in any working folder; names as they are."""
    path = _file(value)
    return value if path is None else str(path.resolve())


def names_a_file(value: str) -> bool:
    """Whether the concepts stand in a file."""
    return _file(value) is not None


def title(concepts: Sequence[str]) -> str:
    """What several concepts are called together; one is called by its name."""
    more = f"; {len(concepts) - _SHOWN} more" if len(concepts) > _SHOWN else ""
    return "; ".join(concepts[:_SHOWN]) + more


class Finder:
    """Finds the concepts that prompts name: whole words, in any case, the longest first."""

    def __init__(self, concepts: Sequence[str]) -> None:
        self._known: Mapping[str, str] = {concept.lower(): concept for concept in concepts}
        longest = sorted(self._known, key=len, reverse=True)
        self._pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest))})(?!\w)", re.IGNORECASE)

    def named(self, prompt: str) -> list[str]:
        """The concepts that the prompt names, each once, in its order."""
        return list(dict.fromkeys(self._known.get(found.lower(), found) for found in self._pattern.findall(prompt)))

    def replaced(self, prompt: str, by: Mapping[str, str]) -> str:
        """The prompt with every concept that it names replaced by what it becomes, where ``by`` says so."""
        words = {concept.lower(): text for concept, text in by.items()}
        return " ".join(self._pattern.sub(lambda found: words.get(found[0].lower(), found[0]), prompt).split())


def _file(value: str) -> Path | None:
    path = Path(value.strip()).expanduser() if value.strip().lower().endswith(SUFFIXES) and ";" not in value else None
    if path is not None and not path.is_file():
        raise UserError(f"the concept file {value!r} does not exist. Check the path.")
    return path
