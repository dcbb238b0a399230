"""What the evaluator, the attacks and the report know of a judge: who says whether an image shows a concept.

The protocol is :class:`Judge`.  Any callable (images, concept) -> scores is one too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..batching import filled_tensor
from ..errors import UserError, is_expected, one_line
from ..schema import JudgeRecord

Scores = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """What a judge says of B images.

    ``shown``: (B,) scores from 0 to 1 that an image shows the concept.  ``valid``: (B,) scores that it is a sound image
    at all; None where the judge cannot tell.  ``attributes``: for each attribute of the judge B words of its
    vocabulary, or None where an image shows none of them.
    """

    shown: Any
    valid: Any = None
    attributes: Mapping[str, Sequence[str | None]] = dataclasses.field(default_factory=dict)


class Judge(ABC):
    """Says whether images show a concept.

    ``name``: who it is; ends in a hash of its weights, where it has any.  ``threshold``: from which score on an image
    counts as showing the concept.  ``valid_threshold``: from which score on it counts as valid; None for a judge that
    cannot tell.  ``vocabulary``: attribute -> the words that an image can show of it; empty for a judge that knows
    none.  ``weights_hash``: SHA-256 of its weights, where it has any.  ``note``: a sentence that every report of its
    verdicts must say, such as a license that binds.
    """

    name: str
    threshold: float = 0.5
    valid_threshold: float | None = None
    vocabulary: Mapping[str, Sequence[str]] = {}
    weights_hash: str = ""
    note: str = ""

    @abstractmethod
    def judge(self, images: torch.Tensor, concept: str) -> Verdicts:
        """Verdicts on ``images``, (B, 3, H, W) uint8 on the CPU.  An image's verdict depends on it alone."""

    def check(self, concept: str) -> None:  # noqa: B027 - most judges take any concept
        """Raises UserError for a concept that the judge does not know.  Called before anything is generated."""

    def asked(self, prompt: str) -> dict[str, str]:
        """The words that a prompt asks for, by attribute; empty where the judge does not know."""
        return {}


@dataclasses.dataclass
class Judged:
    """Verdicts as columns.  S sides, the original first; N images; A attributes of the judge.

    ``shown``: (S, N) float32.  ``valid``: (S, N) float32, NaN where the judge cannot tell.  ``words``: (S, N, A) int32
    indices into the words of each attribute, -1 for none.
    """

    shown: Scores
    valid: Scores
    words: npt.NDArray[np.int32]

    @classmethod
    def joined(cls, parts: Sequence[Judged], axis: int) -> Judged:
        """Several sides (axis 0) or several runs of images (axis 1) as one."""
        return cls(
            np.concatenate([part.shown for part in parts], axis=axis),
            np.concatenate([part.valid for part in parts], axis=axis),
            np.concatenate([part.words for part in parts], axis=axis),
        )

    def taken(self, order: Sequence[int]) -> Judged:
        """The images of these indices."""
        return Judged(self.shown[:, order], self.valid[:, order], self.words[:, order])


def record_of(judge: Judge) -> JudgeRecord:
    """What every result says of its judge."""
    return JudgeRecord(
        name=judge.name,
        threshold=float(judge.threshold),
        valid_threshold=None if judge.valid_threshold is None else float(judge.valid_threshold),
        attributes=tuple(judge.vocabulary),
        weights=judge.weights_hash,
        note=judge.note,
    )


def judged(judge: Judge, images: torch.Tensor, concept: str, batch_size: int) -> Judged:
    """One side: the verdicts on images (N, 3, H, W) uint8, asked for in batches of exactly ``batch_size``.

    Raises UserError where the judge's answer is none, and where a judge that is not ours raises anything.
    """
    parts = []
    # A network's last bits may depend on how its input lies in memory, and a batch that was filled up lies otherwise.
    for part in images.contiguous().split(batch_size):
        with theirs(judge.name, judge):
            verdicts = judge.judge(filled_tensor(part, batch_size), concept)
        parts.append(_columns(judge, verdicts, batch_size).taken(range(len(part))))
    return Judged.joined(parts, axis=1)


def logits_of(head: Any, features: torch.Tensor) -> torch.Tensor:
    """The outputs (B, K) of a linear layer for features (B, F), float64 on the CPU.

    In double precision: a product of floats, and what is computed from it, depends in its last bit on where in the
    batch an image stands, and with it on how many processes share the images.
    """
    bias = None if head.bias is None else head.bias.double()
    return torch.nn.functional.linear(features.double(), head.weight.double(), bias).cpu()


@contextlib.contextmanager
def theirs(name: str, what: Any) -> Iterator[None]:
    """Turns what a judge of somebody else raises into one line.  A fault of ours stays one."""
    try:
        yield
    except Exception as error:
        module = getattr(what, "__module__", None) or type(what).__module__
        is_ours = module.partition(".")[0] == __name__.partition(".")[0] and not isinstance(what, _Adapted)
        if is_ours or is_expected(error):
            raise
        raise UserError(
            f"the judge {name} failed: {type(error).__name__}: {one_line(error)}. Mend it, or take another "
            "(FASTUNLEARN_TRACEBACK=1 shows where)."
        ) from error


def check_concept(judge: Judge, concept: str) -> None:
    """UserError where the judge does not know the concept, and where a judge that is not ours fails."""
    with theirs(judge.name, judge):
        judge.check(concept)


def judged_for(judge: Judge, images: torch.Tensor, asked: Sequence[Sequence[str]], batch_size: int) -> Judged:
    """One side, each of the N images looked at for concepts of its own; the highest score counts.

    The rest of a verdict is that for the first of them.  Raises UserError like :func:`judged`.
    """
    result: Judged | None = None
    done = np.zeros(len(images), dtype=bool)
    for concept in dict.fromkeys(concept for concepts in asked for concept in concepts):
        mine = np.array([concept in concepts for concepts in asked])
        own = judged(judge, images[torch.from_numpy(mine)], concept, batch_size)
        if result is None:
            shown, valid = np.zeros((2, 1, len(images)), dtype=np.float32)
            result = Judged(shown, valid, np.zeros((1, len(images), own.words.shape[2]), dtype=np.int32))
        new = mine & ~done
        result.shown[:, mine] = np.where(done[mine], np.maximum(result.shown[:, mine], own.shown), own.shown)
        result.valid[:, new] = own.valid[:, new[mine]]
        result.words[:, new] = own.words[:, new[mine]]
        done |= mine
    assert result is not None
    return result


def as_judge(given: Any) -> Judge:
    """A judge from an object of the protocol or from a function (images, concept) -> scores.

    A function returns B scores, or :class:`Verdicts`.  It may have the attributes ``name``, ``threshold`` and
    ``valid_threshold``.  Raises UserError for anything else, and for a threshold that is none.
    """
    judge = given
    if not isinstance(given, Judge):
        ask = getattr(given, "judge", None) or (given if callable(given) else None)
        if isinstance(given, type) or not callable(ask):
            raise UserError(
                f"a judge is a name, a fastunlearn Judge or a function (images, concept) -> scores, got {given!r}."
            )
        judge = _Adapted(given, ask)
    if not isinstance(getattr(judge, "name", None), str) or not judge.name:
        raise UserError(f"the judge {given!r} has no name: give it a text `name`, which results show.")
    thresholds = [judge.threshold, *([] if judge.valid_threshold is None else [judge.valid_threshold])]
    if not all(isinstance(limit, int | float) and 0 <= limit <= 1 for limit in thresholds):
        raise UserError(f"the judge {judge.name} has the threshold {thresholds[0]!r}: it must be from 0 to 1.")
    for attribute, words in judge.vocabulary.items():
        if len(set(words)) < len(words) or isinstance(words, str):
            raise UserError(f"the judge {judge.name} must have a list of different words for {attribute!r}.")
    return judge


class _Adapted(Judge):
    """A function, or an object that has only some of the protocol."""

    def __init__(self, given: Any, ask: Callable[[torch.Tensor, str], Any]) -> None:
        named = getattr(given, "__name__", None) or type(given).__name__
        self.name = getattr(given, "name", None) or f"function {named}"
        self.threshold = getattr(given, "threshold", Judge.threshold)
        self.valid_threshold = getattr(given, "valid_threshold", None)
        self.vocabulary = getattr(given, "vocabulary", {})
        self.weights_hash = str(getattr(given, "weights_hash", ""))
        self.note = str(getattr(given, "note", ""))
        self._given, self._ask = given, ask

    def judge(self, images: torch.Tensor, concept: str) -> Verdicts:
        answer = self._ask(images, concept)
        return answer if isinstance(answer, Verdicts) else Verdicts(answer)

    def check(self, concept: str) -> None:
        if callable(own := getattr(self._given, "check", None)):
            with theirs(self.name, self):
                own(concept)

    def asked(self, prompt: str) -> dict[str, str]:
        own = getattr(self._given, "asked", None)
        with theirs(self.name, self):
            return dict(own(prompt)) if callable(own) else {}


def _columns(judge: Judge, verdicts: Any, count: int) -> Judged:
    """Verdicts on ``count`` images as one side.  Raises UserError where they are not what the protocol says."""
    if not isinstance(verdicts, Verdicts):
        raise UserError(f"the judge {judge.name} must return Verdicts, got {type(verdicts).__name__}.")
    if (verdicts.valid is None) != (judge.valid_threshold is None):
        what = "no scores of validity" if verdicts.valid is None else "scores of validity"
        raise UserError(
            f"the judge {judge.name} gives {what} and has valid_threshold = {judge.valid_threshold}: both or neither."
        )
    shown = _scores(judge, "shown", verdicts.shown, count)
    valid = np.full(count, math.nan, dtype=np.float32)
    if verdicts.valid is not None:
        valid = _scores(judge, "valid", verdicts.valid, count)
    words = np.empty((count, len(judge.vocabulary)), dtype=np.int32)
    for column, (attribute, vocabulary) in enumerate(judge.vocabulary.items()):
        index_of: dict[str | None, int] = {None: -1} | {word: index for index, word in enumerate(vocabulary)}
        seen = verdicts.attributes.get(attribute, ())
        if len(seen) != count or any(word not in index_of for word in seen):
            unknown = next((word for word in seen if word not in index_of), None)
            got = f"{len(seen)} for {count} images" if len(seen) != count else f"the word {unknown!r}, which it lacks"
            raise UserError(f"the judge {judge.name} must name a word of its {attribute!r} per image, got {got}.")
        words[:, column] = [index_of[word] for word in seen]
    return Judged(shown[None], valid[None], words[None])


def _scores(judge: Judge, what: str, given: Any, count: int) -> Scores:
    """(B,) float32 from what a judge gave: a tensor, an array, a list of numbers or of truth values."""
    if isinstance(given, torch.Tensor):
        given = given.detach().float().cpu().numpy()
    try:
        scores = np.asarray(given, dtype=np.float32)
    except (TypeError, ValueError):
        scores = np.empty(0, dtype=np.float32)
    if scores.shape != (count,) or not ((scores >= 0) & (scores <= 1)).all():
        inside = scores.shape == (count,)
        got = f"{float(scores[~((scores >= 0) & (scores <= 1))][0])}" if inside else f"the shape {scores.shape}"
        raise UserError(
            f"the judge {judge.name} must give {count} scores from 0 to 1 (`{what}`) for {count} images, got {got}."
        )
    return scores
