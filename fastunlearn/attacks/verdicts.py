"""What the judge says of an attack's images."""

from __future__ import annotations

import torch

from ..judges.base import Judge, judged
from .base import Verdict


def verdicts(judge: Judge, images: torch.Tensor, concept: str, batch_size: int) -> list[Verdict]:
    """The judge's word on images (N, 3, H, W) uint8.  Raises UserError like :func:`~fastunlearn.judges.judged`."""
    said = judged(judge, images, concept, batch_size)
    result = []
    for index, image in enumerate(images):
        score, valid = float(said.shown[0, index]), float(said.valid[0, index])
        is_valid = judge.valid_threshold is None or valid >= judge.valid_threshold
        result.append(
            Verdict(
                image,
                score,
                None if judge.valid_threshold is None else valid,
                is_valid and score >= judge.threshold,
            )
        )
    return result
