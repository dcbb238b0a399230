"""What the bundled model has been told about its pictures: captions, and the prompt lists that evaluations use.

Training sees many phrasings, some with attributes left out and a tenth empty (for classifier-free guidance).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..phrasings import Phrasings
from .world import BACKGROUNDS, COLORS, SHAPES, Scenes

# (phrasing, share of the training captions)
_TEMPLATES = (
    ("{an} {color} {shape} on a {background} background", 0.42),
    ("a picture of {an} {color} {shape} on a {background} background", 0.08),
    ("a {background} background with {an} {color} {shape}", 0.08),
    ("{an} {color} {shape}", 0.10),
    ("a {shape} on a {background} background", 0.06),
    ("a {shape}", 0.05),
    ("{shape}", 0.05),
    ("{color} {shape}", 0.03),
    ("{an} {color} shape on a {background} background", 0.02),
    ("a {background} background", 0.01),
    ("", 0.10),
)

#: Words in the order color, shape, background.
PHRASINGS = Phrasings(
    _TEMPLATES,
    {"color": COLORS, "shape": SHAPES, "background": BACKGROUNDS},
    article="color",
    open={
        "shape": "{an} {color} shape on a {background} background",
        "color": "a {shape} on a {background} background",
        "background": "{an} {color} {shape}",
    },
)
full_caption, paraphrase, without = PHRASINGS.full, PHRASINGS.paraphrase, PHRASINGS.without
every_caption = PHRASINGS.every


def sample_captions(scenes: Scenes, generator: torch.Generator) -> list[str]:
    """One caption a scene, the phrasing drawn with the shares above."""
    return PHRASINGS.sample((scenes.color, scenes.shape, scenes.background), generator)


def named(words: Sequence[str], caption: str) -> str | None:
    """The one of ``words`` that the caption names, or None."""
    spoken = caption.lower().split()
    return next((word for word in words if word in spoken), None)
