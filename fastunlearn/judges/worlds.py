"""The judges of bundled worlds: each world's own classifier, which was trained on that world's images only."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from ..files.weights import hash_module
from ..worlds import World, all_worlds
from .base import Judge, Verdicts, logits_of
from .factory import JudgeFactory

if TYPE_CHECKING:
    from ..worlds.classifier import Classifier


class WorldJudge(Judge):
    """Knows the world's words, and whether an image is one that the world can have.

    The score of a concept is its word's probability against that of the likeliest other word: from 0.5 on it is the
    word that the classifier names.
    """

    threshold = 0.5
    valid_threshold = 0.5

    def __init__(self, world: World, device: str | torch.device = "cpu", option: str = "") -> None:
        assert world.load_classifier is not None
        self.world, self.device, self.vocabulary = world, device, world.vocabulary
        self.classifier: Classifier = world.load_classifier().to(device)
        self.weights_hash = hash_module(self.classifier)
        self.name = f"{world.name}@{self.weights_hash[:12]}"

    def check(self, concept: str) -> None:
        self.world.find(concept)

    def asked(self, prompt: str) -> dict[str, str]:
        return self.world.attributes(prompt)

    @torch.inference_mode()
    def judge(self, images: torch.Tensor, concept: str) -> Verdicts:
        from ..worlds.classifier import VALID, to_pixel_values

        attribute, word = self.world.find(concept)
        labels = self.classifier.labels
        pooled = self.classifier.pooled(to_pixel_values(images.to(self.device)))
        logits = {name: logits_of(head, pooled) for name, head in self.classifier.heads.items()}
        mine = labels[attribute].index(word)
        others = logits[attribute].clone()
        others[:, mine] = -torch.inf
        return Verdicts(
            shown=torch.sigmoid(logits[attribute][:, mine] - others.amax(1)),
            valid=logits["valid"].softmax(1)[:, VALID.index("yes")],
            attributes={
                name: [labels[name][index] for index in logits[name].argmax(1).tolist()] for name in self.vocabulary
            },
        )


def judges_of_worlds() -> list[JudgeFactory]:
    """A judge for every bundled world that has a classifier, under the world's name."""
    return [
        JudgeFactory(
            world.name,
            purpose=f"what the bundled model `{world.name}` can show, and whether an image is valid",
            needs="nothing: its classifier is bundled",
            license="Apache-2.0",
            make=functools.partial(WorldJudge, world),
            about=f"A small classifier of that world's words, trained on its images only. It knows nothing else. Its "
            f"words: {'; '.join(', '.join(words) for words in world.vocabulary.values())}.",
        )
        for world in all_worlds().values()
        if world.load_classifier
    ]
