"""A tokenizer for a world of few words."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from fastunlearn.models.runtime import import_diffusers


def word_tokenizer(captions: Iterable[str], max_tokens: int) -> Any:
    """A CLIP byte-level BPE tokenizer in which each word of the captions is one token and any other text is letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    import_diffusers()
    from transformers import CLIPTokenizer

    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    learner.train_from_iterator(
        captions, trainers.BpeTrainer(vocab_size=10_000, end_of_word_suffix="</w>", show_progress=False)
    )
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(pair) for pair in merges]
    pieces = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)}, merges=merges, model_max_length=max_tokens
    )
