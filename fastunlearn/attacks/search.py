"""Searches for words: embeddings move by gradient and are read as the nearest tokens of the vocabulary.

The forward always sees tokens that exist; the gradient goes past the choice of them, straight to the embeddings
(PEZ, Wen et al. 2023, arXiv 2302.03668; UnlearnDiffAtk relaxes a one-hot choice instead).  What is found counts only as
text: the words as anybody can type them, read by the tokenizer once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import UserError
from ..models.base import Model, Tensors
from .injection import Slots

_WORD_END = "</w>"  # how CLIP's vocabulary marks the end of a word


class WordSearch:
    """``count`` unknown words in front of each of P prompts, in the first text encoder that reads them.

    ``avoid``: a text whose tokens may not be found.  Raises UserError for a model whose vocabulary has no such words.
    """

    def __init__(self, model: Model, prompts: Sequence[str], count: int, seed: int, avoid: str = "") -> None:
        self._prompts, self._count = list(prompts), count
        self._tokenizer = model.pipeline.tokenizer
        ids = _words(self._tokenizer, avoid)
        holder = _placeholder(self._tokenizer, ids, count, prompts)
        if holder is None:
            raise UserError(
                f"words cannot be searched for in {model.name} ({model.family}): its tokenizer has no whole words to "
                "choose from. Leave the attacks `tokens` and `text` out."
            )
        run = " ".join([holder] * count)
        self._texts = [f"{run} {prompt}".strip() for prompt in prompts]
        self._slots = Slots(model, run, self._texts, first_only=True)
        if not self._slots.slots:
            raise UserError(
                f"words cannot be searched for in {model.name} ({model.family}): none of its text encoders sees "
                f"{count} words in front of a prompt. Leave the attacks `tokens` and `text` out."
            )
        self._ids = torch.tensor(ids)
        self._vocabulary = self._slots.slots[0].embedded(ids)
        self._directions = torch.nn.functional.normalize(self._vocabulary, dim=1)
        self.size = float(self._vocabulary.square().mean().sqrt())
        generator = torch.Generator().manual_seed(seed)
        first = torch.randint(len(ids), (len(prompts), count), generator=generator)
        self.embeddings = self._vocabulary[first.to(self._vocabulary.device)].clone().requires_grad_()

    @torch.no_grad()
    def nearest(self, left: Sequence[int]) -> torch.Tensor:
        """The tokens that the embeddings of some prompts are read as: (P, count) places in the vocabulary."""
        directions = torch.nn.functional.normalize(self.embeddings[list(left)], dim=2)
        return (directions @ self._directions.T).argmax(2)

    def conditions(self, left: Sequence[int]) -> Tensors:
        """The denoiser's conditions with the nearest tokens, and a gradient to the embeddings."""
        moving = self.embeddings[list(left)]
        read = self._vocabulary[self.nearest(left)] + (moving - moving.detach())
        return self._slots.encode([self._texts[index] for index in left], [read])

    def text(self, index: int, found: torch.Tensor) -> str | None:
        """The words (count,) in front of a prompt; None where the tokenizer would read them as others."""
        ids = self._ids[found.cpu()].tolist()
        words = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip()
        if self._tokenizer(words, add_special_tokens=False).input_ids != ids:
            return None
        return f"{words} {self._prompts[index]}".strip()


def _words(tokenizer: Any, avoid: str) -> list[int]:
    """The tokens that are whole words, or all where the vocabulary does not tell."""
    names = tokenizer.get_vocab()
    banned = {*tokenizer.all_special_ids}
    if avoid:
        for spelt in (avoid, f" {avoid}", avoid.lower()):
            banned |= {*tokenizer(spelt, add_special_tokens=False).input_ids}
    marked = any(name.endswith(_WORD_END) for name in names)
    kept = [
        index
        for name, index in names.items()
        if index not in banned and (name.endswith(_WORD_END) if marked else any(sign.isalnum() for sign in name))
    ]
    return sorted(kept)


def _placeholder(tokenizer: Any, ids: Sequence[int], count: int, prompts: Sequence[str]) -> str | None:
    """A word of one token that no prompt holds, so that a run of it is found again."""
    used = {token for prompt in prompts for token in tokenizer(prompt, add_special_tokens=False).input_ids}
    for index in ids:
        if index in used:
            continue
        word = tokenizer.decode([index]).strip()
        if word and list(tokenizer(" ".join([word] * count), add_special_tokens=False).input_ids) == [index] * count:
            return word
    return None
