"""A world's classifier as an embedding of images: what metrics and the distance use in place of the field's nets."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from .classifier import Classifier, to_pixel_values


class Trunk(nn.Module):
    """The classifier's stages: (B, 3, H, W) float32 in [-1, 1] to one (B, C, h, w) per stage."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        return self.classifier.features(pixel_values)


class Embedding:
    """A world's :class:`~fastunlearn.worlds.base.Network`.  Images are (B, 3, H, W) uint8 on any device.

    ``attributes``: a prompt -> the words that it names, by attribute.
    """

    def __init__(self, name: str, classifier: Classifier, attributes: Callable[[str], dict[str, str]]) -> None:
        self.name, self.attributes, self.classifier = name, attributes, classifier
        self.module: nn.Module = classifier
        self.trunk: nn.Module = Trunk(classifier)
        self.widths: Sequence[int] = classifier.widths

    def _last(self, images: torch.Tensor) -> torch.Tensor:
        device = next(self.module.parameters()).device
        return self.classifier.features(to_pixel_values(images.to(device)))[-1]

    @torch.inference_mode()
    def averaged(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C), the last stage averaged over positions, as Inception's is for FID."""
        return self._last(images).mean(dim=(2, 3)).cpu()

    @torch.inference_mode()
    def pooled(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 2 C), the mean and the largest of each channel."""
        last = self._last(images)
        return torch.cat([last.mean(dim=(2, 3)), last.amax(dim=(2, 3))], dim=1).cpu()

    @torch.inference_mode()
    def match(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """100 times the mean probability of what each prompt names; where it names nothing, of a valid image."""
        device = next(self.module.parameters()).device
        logits = self.classifier(to_pixel_values(images.to(device)))
        heads = self.classifier.labels
        result = torch.cat([logits[head].softmax(1) for head in heads], dim=1).cpu()
        columns = [(head, label) for head, labels in heads.items() for label in labels]
        asked = [list(self.attributes(prompt).items()) or [("valid", "yes")] for prompt in prompts]
        rows = [[columns.index(named) for named in names] for names in asked]
        return torch.tensor([100 * float(row[indices].mean()) for row, indices in zip(result, rows, strict=True)])
