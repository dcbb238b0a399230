"""The judge of the bundled world of shapes: its classifier, which was trained on fresh renders only."""

from __future__ import annotations

import torch

from ..files.weights import hash_module
from ..worlds.shapes import SHAPES_WORLD, load_classifier
from ..worlds.shapes.classifier import HEADS, to_pixel_values
from .base import Judge, Verdicts, logits_of
from .factory import JudgeFactory


class ShapesJudge(Judge):
    """Knows the world's shapes, colors and backgrounds, and whether an image is one that the world can have.

    The score of a concept is its word's probability against that of the likeliest other word: from 0.5 on it is the
    word that the classifier names.
    """

    threshold = 0.5
    valid_threshold = 0.5
    vocabulary = SHAPES_WORLD.vocabulary

    def __init__(self, device: str | torch.device = "cpu", option: str = "") -> None:
        self.classifier = load_classifier().to(device)
        self.device = device
        self.weights_hash = hash_module(self.classifier)
        self.name = f"shapes@{self.weights_hash[:12]}"

    def check(self, concept: str) -> None:
        SHAPES_WORLD.find(concept)

    def asked(self, prompt: str) -> dict[str, str]:
        return SHAPES_WORLD.attributes(prompt)

    @torch.inference_mode()
    def judge(self, images: torch.Tensor, concept: str) -> Verdicts:
        attribute, word = SHAPES_WORLD.find(concept)
        pooled = self.classifier.pooled(to_pixel_values(images.to(self.device)))
        logits = {name: logits_of(head, pooled) for name, head in self.classifier.heads.items()}
        mine = HEADS[attribute].index(word)
        others = logits[attribute].clone()
        others[:, mine] = -torch.inf
        return Verdicts(
            shown=torch.sigmoid(logits[attribute][:, mine] - others.amax(1)),
            valid=logits["valid"].softmax(1)[:, HEADS["valid"].index("yes")],
            attributes={
                name: [HEADS[name][index] for index in logits[name].argmax(1).tolist()] for name in self.vocabulary
            },
        )


SHAPES = JudgeFactory(
    "shapes",
    purpose="the shapes, colors and backgrounds of the bundled model, and whether an image is valid",
    needs="nothing: its classifier is bundled",
    license="Apache-2.0",
    make=ShapesJudge,
    about="A small classifier of that world's words, trained on fresh renders only. It knows nothing else.",
)
