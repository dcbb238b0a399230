"""What the bundled model has been told about its pictures: captions, and the prompt lists that evaluations use.

Training sees many phrasings, some with attributes left out and a tenth empty (for classifier-free guidance).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .world import BACKGROUNDS, COLORS, SHAPES, Scenes

# (phrasing, share of the training captions)
_TEMPLATES = (
    ("{a} {color} {shape} on a {background} background", 0.42),
    ("a picture of {a} {color} {shape} on a {background} background", 0.08),
    ("a {background} background with {a} {color} {shape}", 0.08),
    ("{a} {color} {shape}", 0.10),
    ("a {shape} on a {background} background", 0.06),
    ("a {shape}", 0.05),
    ("{shape}", 0.05),
    ("{color} {shape}", 0.03),
    ("{a} {color} shape on a {background} background", 0.02),
    ("a {background} background", 0.01),
    ("", 0.10),
)


def _fill(template: str, color: str, shape: str, background: str) -> str:
    return template.format(a="an" if color[0] in "aeiou" else "a", color=color, shape=shape, background=background)


def full_caption(color: str, shape: str, background: str) -> str:
    """The caption that names everything, e.g. ``a red star on a striped background``."""
    return _fill(_TEMPLATES[0][0], color, shape, background)


def paraphrase(color: str, shape: str, background: str) -> str:
    """The same content in another phrasing of the training set."""
    return _fill(_TEMPLATES[2][0], color, shape, background)


def without(attribute: str, color: str, shape: str, background: str) -> str:
    """The phrasing of the training set that leaves one attribute open."""
    template = {
        "shape": "{a} {color} shape on a {background} background",
        "color": "a {shape} on a {background} background",
        "background": "{a} {color} {shape}",
    }[attribute]
    assert any(template == known for known, _ in _TEMPLATES)
    return _fill(template, color, shape, background)


def every_caption() -> list[str]:
    """All captions that training can produce, sorted, without repeats."""
    return sorted(
        {
            _fill(template, color, shape, background)
            for template, _ in _TEMPLATES
            for color in COLORS
            for shape in SHAPES
            for background in BACKGROUNDS
        }
    )


def sample_captions(scenes: Scenes, generator: torch.Generator) -> list[str]:
    """One caption a scene, the phrasing drawn with the shares above."""
    shares = torch.tensor([share for _, share in _TEMPLATES])
    picks = torch.multinomial(shares, len(scenes), replacement=True, generator=generator).tolist()
    rows = zip(picks, scenes.color.tolist(), scenes.shape.tolist(), scenes.background.tolist(), strict=True)
    return [_fill(_TEMPLATES[p][0], COLORS[c], SHAPES[s], BACKGROUNDS[b]) for p, c, s, b in rows]


def named(words: Sequence[str], caption: str) -> str | None:
    """The one of ``words`` that the caption names, or None."""
    spoken = caption.lower().split()
    return next((word for word in words if word in spoken), None)
