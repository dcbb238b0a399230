"""What the gallery's model has been told about its images: phrasings, some of which leave something open."""

from __future__ import annotations

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


def fill(template: str, style: str, word: str, background: str) -> str:
    """A phrasing with its words, e.g. ``a fox in the style of noto``.  ``word``: of an object."""
    an = "an" if word[0] in "aeiou" else "a"
    return template.format(an=an, object=word, style=style, background=background)


def full_caption(style: str, word: str, background: str) -> str:
    """The caption that names everything, e.g. ``a fox in the style of noto on a blue background``."""
    return fill(TEMPLATES[0][0], style, word, background)


def paraphrase(style: str, word: str, background: str) -> str:
    """The same content in another phrasing of the training set."""
    return fill(TEMPLATES[2][0], style, word, background)


def without(attribute: str, style: str, word: str, background: str) -> str:
    """The phrasing of the training set that leaves one attribute open."""
    template = {
        "object": "a picture in the style of {style} on a {background} background",
        "style": "{an} {object} on a {background} background",
        "background": "{an} {object} in the style of {style}",
    }[attribute]
    assert any(template == known for known, _ in TEMPLATES)
    return fill(template, style, word, background)


def every_caption() -> list[str]:
    """All captions that training can produce, sorted, without repeats."""
    return sorted(
        {
            fill(template, style, word, background)
            for template, _ in TEMPLATES
            for style in STYLES
            for word in OBJECTS
            for background in BACKGROUNDS
        }
    )
