"""Which of ImageNet's 1000 classes a concept or a prompt names.  The names are WordNet's, as timm ships them."""

from __future__ import annotations

import collections
import difflib
import functools
import re
from collections.abc import Sequence

from ..errors import UserError

_SHOWN = 6  # names in an error


class Classes:
    """``names``: of each class its synset's names, the usual one first; ``synsets``: its WordNet id, n03028079."""

    def __init__(self, names: Sequence[Sequence[str]], synsets: Sequence[str]) -> None:
        self.names, self.synsets = names, list(synsets)
        self.by_name: dict[str, list[int]] = collections.defaultdict(list)
        for index, own in enumerate(names):
            for name in dict.fromkeys(_plain(one) for one in own):
                self.by_name[name].append(index)
        firsts = collections.Counter(own[0] for own in names)
        #: A different word for each class: its usual name, with the id where two classes share it.
        self.labels = [
            own[0] if firsts[own[0]] == 1 else f"{own[0]} ({synset})"
            for own, synset in zip(names, synsets, strict=True)
        ]
        words = sorted(self.by_name, key=len, reverse=True)
        self._named = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)")

    def find(self, concept: str) -> int:
        """The one class that the concept names: an exact name in any case, with or without an article, or an id.

        Raises UserError where no class or more than one has this name; it then names classes.
        """
        word = _plain(concept)
        if word in self.synsets:
            return self.synsets.index(word)
        found = self.by_name.get(word, [])
        if len(found) == 1:
            return found[0]
        if found:
            choices = " or ".join(f"imagenet:{self.synsets[index]} ({', '.join(self.names[index])})" for index in found)
            raise UserError(f"the concept {concept!r} is the name of {len(found)} ImageNet classes: say {choices}.")
        raise UserError(f"ImageNet has no class {concept!r}. {self._near(word)}")

    def find_all(self, given: str) -> list[int]:
        """The classes of ``NAME;NAME``, each a name or an id.  Raises UserError like :meth:`find`."""
        found = [self.find(part) for part in given.split(";") if part.strip()]
        if not found:
            raise UserError(f"`--judge imagenet:{given}` names no class: write imagenet:NAME;NAME.")
        return sorted(set(found))

    def named_in(self, prompt: str) -> int | None:
        """The class that a prompt names, where it names exactly one; of two names in one place the longer counts."""
        found = {index for name in self._named.findall(_plain(prompt)) for index in self.by_name[name]}
        return found.pop() if len(found) == 1 else None

    def _near(self, word: str) -> str:
        """What may be meant: classes with the word in their name, then names that are spelled alike."""
        having = [name for name in self.by_name if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", name)]
        alike = difflib.get_close_matches(word, list(self.by_name), _SHOWN, 0.75)
        near = list(dict.fromkeys([*having, *alike]))
        more = f" and {len(near) - _SHOWN} more" if len(near) > _SHOWN else ""
        meant = f"Near names: {', '.join(near[:_SHOWN])}{more}. " if near else ""
        return f"{meant}Name classes that stand for it, `--judge imagenet:NAME;NAME`, or take another judge."


@functools.cache
def imagenet_classes() -> Classes:
    """The 1000 classes, in the order of every classifier of them."""
    from ..models.runtime import mend_torchvision

    mend_torchvision()
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    names = [[name.strip() for name in info.index_to_description(index).split(",")] for index in range(1000)]
    return Classes(names, [info.index_to_label_name(index) for index in range(1000)])


def _plain(text: str) -> str:
    """In small letters, one space between words, without an article in front."""
    return re.sub(r"^(?:an?|the) ", "", " ".join(text.lower().replace("_", " ").split()))
