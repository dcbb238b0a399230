"""Attempts as records: a line per unit of work, in memory or in the journal of an unfinished attack."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..evaluation.records import Records
from ..reports.gallery import MAX_PIXELS, fit
from .base import Attempt, Try


class Attempts(Records):
    """An unfinished attack: the attempts of every finished unit."""

    command, result, what = "attack", "attack.json", "attack"
    form = 1

    def append(self, unit: str, attempts: Sequence[Attempt]) -> None:
        self.write([[unit, packed(attempts)]])

    def finished(self) -> dict[str, list[Attempt]]:
        """The attempts of all units that are done, by any rank."""
        return {line[0]: unpacked(line[1]) for lines in self.read().values() for line in lines}


def packed(attempts: Sequence[Attempt]) -> list[list[Any]]:
    """Attempts as JSON holds them, their images as small as the report shows them."""
    return [
        [
            one.prompt,
            one.kind,
            [[t.cost, t.what, t.score, t.valid, t.shown] for t in one.tries],
            one.asked,
            _png(one.image),
        ]
        for one in attempts
    ]


def unpacked(content: Sequence[Sequence[Any]]) -> list[Attempt]:
    return [
        Attempt(prompt, kind, tuple(Try(*one) for one in tries), asked, _image(image))
        for prompt, kind, tries, asked, image in content
    ]


def lines_of(label: str, model: str, attempts: Sequence[Attempt]) -> list[Mapping[str, Any]]:
    """The lines of attempts.jsonl."""
    result: list[Mapping[str, Any]] = []
    for one in attempts:
        line: dict[str, Any] = {"attack": label, "model": model, "prompt": one.prompt, "kind": one.kind}
        if one.asked is not None:
            line["asked"] = one.asked
        line["broken_at"] = one.broken_at
        line["tries"] = [
            {"cost": t.cost, "what": t.what, "score": t.score}
            | ({} if t.valid is None else {"valid": t.valid})
            | {"shown": t.shown}
            for t in one.tries
        ]
        result.append(line)
    return result


def _png(image: torch.Tensor) -> str:
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    if max(picture.size) > MAX_PIXELS:
        picture = fit(picture, MAX_PIXELS)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _image(text: str) -> torch.Tensor:
    picture = Image.open(io.BytesIO(base64.b64decode(text)), formats=("PNG",))
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()
