"""How a world's training speaks of its images: phrasings, some of which leave something open, and what they make."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class Phrasings:
    """``templates``: (phrasing, its share of the training captions), the full one first, another full one third.

    ``words``: attribute -> its words, in the order in which every method takes a word of each.  ``article``: the
    attribute before whose word ``{an}`` stands.  ``open``: attribute -> the phrasing that leaves it open.
    """

    templates: Sequence[tuple[str, float]]
    words: Mapping[str, Sequence[str]]
    article: str
    open: Mapping[str, str]

    def __post_init__(self) -> None:
        known = {template for template, _ in self.templates}
        if not known.issuperset(self.open.values()):
            raise ValueError("a phrasing that leaves something open must be one of the training's")

    def fill(self, template: str, *words: str) -> str:
        """A phrasing with its words, e.g. ``a red star``."""
        named = dict(zip(self.words, words, strict=True))
        return template.format(an="an" if named[self.article][0] in "aeiou" else "a", **named)

    def full(self, *words: str) -> str:
        """The caption that names everything, e.g. ``a red star on a striped background``."""
        return self.fill(self.templates[0][0], *words)

    def paraphrase(self, *words: str) -> str:
        """The same content in another phrasing of the training set."""
        return self.fill(self.templates[2][0], *words)

    def without(self, attribute: str, *words: str) -> str:
        """The phrasing of the training set that leaves one attribute open."""
        return self.fill(self.open[attribute], *words)

    def every(self) -> list[str]:
        """All captions that training can produce, sorted, without repeats."""
        of_all = list(itertools.product(*self.words.values()))
        return sorted({self.fill(template, *words) for template, _ in self.templates for words in of_all})

    def sample(self, labels: Sequence[torch.Tensor], generator: torch.Generator) -> list[str]:
        """One caption an image, phrased with the shares above.  ``labels``: of each attribute (N,) indices of words."""
        import torch

        shares = torch.tensor([share for _, share in self.templates])
        picks = torch.multinomial(shares, len(labels[0]), replacement=True, generator=generator).tolist()
        rows = zip(*(of_one.tolist() for of_one in labels), strict=True)
        return [
            self.fill(self.templates[pick][0], *(words[i] for words, i in zip(self.words.values(), row, strict=True)))
            for pick, row in zip(picks, rows, strict=True)
        ]
