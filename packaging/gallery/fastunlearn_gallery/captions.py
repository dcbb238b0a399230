"""What the gallery's model has been told about its images: phrasings, some of which leave something open."""

from __future__ import annotations

from fastunlearn.worlds.phrasings import Phrasings

from .words import BACKGROUNDS, OBJECTS, STYLES

# (phrasing, share of the training captions)
TEMPLATES = (
    ("{an} {object} in the style of {style} on a {background} background", 0.40),
    ("a picture of {an} {object} in the style of {style} on a {background} background", 0.08),
    ("a {background} background with {an} {object} in the style of {style}", 0.08),
    ("{an} {object} in the style of {style}", 0.08),
    ("{style} {object}", 0.03),
    ("{an} {object} on a {background} background", 0.08),
    ("{an} {object}", 0.03),
    ("{object}", 0.02),
    ("a picture in the style of {style} on a {background} background", 0.04),
    ("in the style of {style}", 0.02),
    ("{style}", 0.02),
    ("a {background} background", 0.02),
    ("", 0.10),
)

#: Words in the order style, object, background.
PHRASINGS = Phrasings(
    TEMPLATES,
    {"style": STYLES, "object": OBJECTS, "background": BACKGROUNDS},
    article="object",
    open={
        "object": "a picture in the style of {style} on a {background} background",
        "style": "{an} {object} on a {background} background",
        "background": "{an} {object} in the style of {style}",
    },
)
fill, full_caption, paraphrase, without = PHRASINGS.fill, PHRASINGS.full, PHRASINGS.paraphrase, PHRASINGS.without
every_caption = PHRASINGS.every


#: The phrasing of the training set that names one word and says of what kind it is.
_ALONE = {"style": "in the style of {style}", "object": "{an} {object}", "background": "a {background} background"}


def alone(attribute: str, word: str) -> str:
    """A word by itself, in the training's phrasing that says of what kind it is, e.g. ``an octopus``."""
    words = {"style": STYLES[0], "object": OBJECTS[0], "background": BACKGROUNDS[0]} | {attribute: word}
    return fill(_ALONE[attribute], *words.values())
