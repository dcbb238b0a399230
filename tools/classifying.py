"""What the trainings of the worlds' classifiers share: their loss, their running statistics, and how good they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from fastunlearn.worlds.classifier import Classifier

#: Pixel values (N, 3, H, W), labels (N,) by head, and which of the images are valid, (N,) bool.
Judged = tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]


def loss_of(model: Classifier, batch: Judged) -> torch.Tensor:
    """The cross-entropies of all heads, ``valid``'s over all images and the others' over valid ones."""
    pixels, labels, valid = batch
    with torch.autocast("cpu", torch.bfloat16):
        logits = {head: values.float() for head, values in model(pixels).items()}
    loss = F.cross_entropy(logits["valid"], labels["valid"])
    for head in logits:
        if head != "valid":
            loss = loss + F.cross_entropy(logits[head][valid], labels[head][valid])
    return loss


def remeasure(model: Classifier, batches: Iterable[Judged]) -> None:
    """Measure the running statistics anew: those of a training are of the live weights, not of the averaged ones."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        for pixels, _, _ in batches:
            model(pixels)
    model.eval()


def report(name: str, logits: Mapping[str, torch.Tensor], batch: Judged) -> None:
    """Print how often each head is right about fresh images."""
    _, labels, valid = batch
    for head, values in logits.items():
        rows = torch.ones_like(valid) if head == "valid" else valid
        right = (values.argmax(1) == labels[head])[rows].float().mean()
        print(f"{name}: {head} {right:.4f} on fresh images", flush=True)


def save(model: Classifier, path: Path) -> None:
    """The weights in half precision."""
    save_file({k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}, path)
