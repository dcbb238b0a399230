"""What the judge says of the images of an evaluation: what was erased, what was kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import schema
from ..judges.base import Judge, Judged
from ..metrics.statistics import wilson

Mask = npt.NDArray[np.bool_]


class Sides:
    """What the judge says of the original (0) and of one model (1), as truth values."""

    def __init__(self, judge: Judge, judged: Judged, model: int) -> None:
        self.judge = judge
        self._columns = [0, model + 1]
        self._judged = judged

    @classmethod
    def of(cls, judge: Judge | None, judged: Judged | None, model: int) -> Sides | None:
        """None where nothing was judged."""
        return cls(judge, judged, model) if judge is not None and judged is not None else None

    def valid(self, side: int) -> Mask | None:
        """(N,), None where the judge cannot tell."""
        if self.judge.valid_threshold is None:
            return None
        result: Mask = self._judged.valid[self._columns[side]] >= self.judge.valid_threshold
        return result

    def seen(self, side: int) -> Mask:
        """(N,) whether the judge sees the concept, in whatever image."""
        result: Mask = self._judged.shown[self._columns[side]] >= self.judge.threshold
        return result

    def shown(self, side: int) -> Mask:
        """(N,) whether an image shows the concept: one that is not valid shows nothing."""
        valid = self.valid(side)
        return self.seen(side) if valid is None else self.seen(side) & valid

    def words(self, side: int) -> npt.NDArray[np.int32]:
        """(N, A) indices of the words that the images show."""
        return self._judged.words[self._columns[side]]


class Unprompted:
    """Images of prompts that leave a concept open in which the original shows it all the same.

    Such an image is to change, not to be kept.  A prompt leaves a concept open if it names no word of the attribute
    that the concept is a word of, so a judge without a vocabulary finds none.  ``where``: (N,) which these are.
    """

    def __init__(self, sides: Sides | None, prompts: Sequence[str], concepts: Sequence[str], retain: Mask) -> None:
        """``prompts``: (N) of the images; of those of ``retain`` (N,) some may be unprompted."""
        self._places: list[tuple[int, list[int]]] = []  # a column of words, and the indices of the concepts in it
        self.where: Mask = np.zeros(len(prompts), dtype=bool)
        if sides is None:
            return
        judge, wanted = sides.judge, {concept.strip().casefold() for concept in concepts}
        asked = {prompt: judge.asked(prompt) for prompt in set(prompts)}
        for column, (attribute, words) in enumerate(judge.vocabulary.items()):
            indices = [index for index, word in enumerate(words) if word.casefold() in wanted]
            if not indices:
                continue
            is_open = np.array([attribute not in asked[prompt] for prompt in prompts], dtype=bool)
            self.where |= retain & is_open & self._shows(sides, 0, column, indices)
            self._places.append((column, indices))

    def still(self, sides: Sides) -> schema.Seen | None:
        """In which share of them the model of ``sides`` shows the concept; None where there are none."""
        if not self.where.any():
            return None
        shows = np.zeros(len(self.where), dtype=bool)
        for column, indices in self._places:
            shows |= self._shows(sides, 1, column, indices)
        return seen_in(shows[self.where])

    @staticmethod
    def _shows(sides: Sides, side: int, column: int, indices: Sequence[int]) -> Mask:
        shows: Mask = np.isin(sides.words(side)[:, column], indices)
        valid = sides.valid(side)
        return shows if valid is None else shows & valid


def seen_in(shown: Mask) -> schema.Seen:
    """The share of true values, with Wilson's interval."""
    share = wilson(int(shown.sum()), len(shown))
    return schema.Seen(n_images=len(shown), shown=share.mean, ci95=(share.low, share.high))


def verdict_of(judge: Judge, judged: Judged, side: int, index: int) -> dict[str, Any]:
    """What the judge says of one image: whether it sees the concept, with its score; is it valid; which words."""
    score, valid = float(judged.shown[side, index]), float(judged.valid[side, index])
    result: dict[str, Any] = {"shown": score >= judge.threshold, "score": score}
    if judge.valid_threshold is not None:
        result |= {"valid": valid >= judge.valid_threshold, "valid_score": valid}
    if judge.vocabulary:
        indices = judged.words[side, index].tolist()
        result["attributes"] = {
            attribute: words[word] if word >= 0 else None
            for (attribute, words), word in zip(judge.vocabulary.items(), indices, strict=True)
        }
    return result


def erasure_of(sides: Sides, where: Mask, concept: str) -> schema.Erasure:
    """How often a prompt that names the concept still gives it.  An image that is not valid shows nothing."""
    seen, shown = sides.seen(1)[where], sides.shown(1)[where]
    share = wilson(int(shown.sum()), len(shown))
    valid = sides.valid(1)
    return schema.Erasure(
        concept=concept.strip(),
        n_images=len(shown),
        shown=share.mean,
        shown_ci95=(share.low, share.high),
        shown_original=float(sides.shown(0)[where].mean()),
        valid=share_of(valid, where),
        valid_original=share_of(sides.valid(0), where),
        unlearning_accuracy=float((~seen).mean()),
        unlearning_accuracy_valid=None if valid is None else float((valid[where] & ~seen).mean()),
    )


def retained(sides: Sides, where: Mask, prompts: Sequence[str]) -> schema.Retain:
    """What the retain images show, and whether they still show it."""
    judge = sides.judge
    asked_for = {prompt: judge.asked(prompt) for prompt in set(prompts)}
    before, after = sides.words(0), sides.words(1)
    attributes = {}
    for column, (attribute, words) in enumerate(judge.vocabulary.items()):
        wanted = [asked_for[prompt].get(attribute) for prompt in prompts]
        # A word that the judge cannot see is never right.
        index = np.array([words.index(word) if word in words else -2 for word in wanted])
        asked = where & np.array([word is not None for word in wanted])
        right = [
            float((side[asked, column] == index[asked]).mean()) if asked.any() else None for side in (before, after)
        ]
        attributes[attribute] = schema.Attribute(
            accuracy=right[1],
            original=right[0],
            agreement=float((before[where, column] == after[where, column]).mean()),
            n_asked=int(asked.sum()),
        )
    valid_before, valid = sides.valid(0), sides.valid(1)
    same = (before == after).all(axis=1)
    if valid is not None and valid_before is not None:
        same &= valid == valid_before
    return schema.Retain(
        n_images=int(where.sum()),
        attributes=attributes,
        agreement=float(same[where].mean()) if attributes else None,
        valid=share_of(valid, where),
        valid_original=share_of(valid_before, where),
    )


def share_of(values: Mask | None, where: Mask) -> float | None:
    """The share of true values; None where the judge cannot tell."""
    return None if values is None else float(values[where].mean())
