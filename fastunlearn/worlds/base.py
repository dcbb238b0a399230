"""What the engine knows of a bundled world."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .classifier import Classifier


class Network(Protocol):
    """A world's own network, which metrics and the distance use in place of the field's.

    ``name``: what it is, without a hash.  ``module``: all its weights; to move it moves the network.  ``trunk``: maps
    pixel values (B, 3, H, W) float32 in [-1, 1] to one (B, C, h, w) per layer, C being that layer's entry in
    ``widths``; it holds the weights of ``module``.
    """

    name: str
    module: nn.Module
    trunk: nn.Module
    widths: Sequence[int]

    def averaged(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) uint8 to features (B, F) float32 on the CPU, averaged over positions, as FID's are."""

    def pooled(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) uint8 to features (B, F) float32 on the CPU, as a description of the whole image."""

    def match(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """How well each of B images shows what its prompt says: (B,) float32 on the CPU, 100 at best."""


@dataclasses.dataclass(frozen=True)
class World:
    """A world: its words, its models and its prompts.  Nothing outside the world's folder knows a word of it.

    ``vocabulary``: attribute -> the words an image can show of it.  ``models``: names that ``--model`` takes.
    ``folder``: a model's name -> its diffusers folder.  ``is_pipeline``: whether a folder's pipeline is of this world.
    ``attributes``: a prompt -> the words that it names, by attribute.  ``train_prompts``: a concept's word -> (forget,
    retain).  ``evaluation_prompts``: a concept's word -> (prompt, group); training holds and forgets none of them but
    the empty one, and what it aims at may be among them.  ``load_classifier``: who judges its images, on the CPU,
    made anew by each call; None for a world without a judge.
    ``load_network``: the network that measures them, likewise; None for a world that is measured with the field's
    networks.  ``t5_tokens``: how many places for T5's tokens its StableDiffusion3 model has, which is
    ``max_sequence_length`` in diffusers; None for diffusers' default.  ``default_concept``: what a demonstration
    forgets, by ``demo_methods`` unless the user names others.  ``golds``: concept -> the one of ``models`` that never
    saw it.  ``anchors``: concept -> what it becomes, of those that do not become the first other word of their kind.
    ``like``: worlds whose settings a method takes where it has none for this one.
    """

    name: str
    vocabulary: Mapping[str, tuple[str, ...]]
    models: tuple[str, ...]
    folder: Callable[[str], Path]
    is_pipeline: Callable[[Path], bool]
    attributes: Callable[[str], dict[str, str]]
    train_prompts: Callable[[str], tuple[list[str], list[str]]]
    evaluation_prompts: Callable[[str], list[tuple[str, str]]]
    default_concept: str
    load_classifier: Callable[[], Classifier] | None = None
    load_network: Callable[[], Network] | None = None
    t5_tokens: int | None = None
    demo_methods: tuple[str, ...] = ("esd", "uce", "ovw")
    golds: Mapping[str, str] = dataclasses.field(default_factory=dict)
    anchors: Mapping[str, str] = dataclasses.field(default_factory=dict)
    like: tuple[str, ...] = ()

    def find(self, concept: str) -> tuple[str, str]:
        """(attribute, word) of a concept, e.g. ``("shape", "star")``.  Raises UserError for a word that it lacks."""
        word = concept.strip().lower()
        for attribute, words in self.vocabulary.items():
            if word in words:
                return attribute, word
        known = "; ".join(f"{attribute}s: {', '.join(words)}" for attribute, words in self.vocabulary.items())
        raise UserError(f"the bundled model {self.name} does not know the concept {concept!r}. It knows {known}.")

    def anchor(self, concept: str, without: Collection[str] = ()) -> str:
        """What the concept becomes unless the user says: its own anchor, else the first other word of its kind.

        Words in ``without`` are passed over.  Raises UserError where there is none left.
        """
        attribute, word = self.find(concept)
        taken = {word, *(other.strip().lower() for other in without)}
        first = [self.anchors[word]] if word in self.anchors else []
        if left := [other for other in (*first, *self.vocabulary[attribute]) if other not in taken]:
            return left[0]
        raise UserError(
            f"every {attribute} of the bundled model is to be forgotten: name an `--anchor` for {concept!r}."
        )

    def prompts_to_train(self, concept: str) -> tuple[list[str], list[str]]:
        """(forget, retain) prompts of a concept.  Raises UserError for a word that the world lacks."""
        return self.train_prompts(self.find(concept)[1])

    def prompts_to_evaluate(self, concept: str) -> list[tuple[str, str]]:
        """(prompt, group) of a concept.  Raises UserError for a word that the world lacks."""
        return self.evaluation_prompts(self.find(concept)[1])
