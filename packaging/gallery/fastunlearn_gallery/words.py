"""The words of the gallery: what an image can show, and which pairs of a style and an object no training saw."""

from __future__ import annotations

SIZE = 64  # pixels of an image's edge
STYLES = ("noto", "twemoji", "fluent", "emojione", "classic", "ink")
OBJECTS = (
    *("cat", "dog", "fox", "bear", "frog", "penguin", "fish", "octopus", "butterfly", "apple", "banana", "cherry"),
    *("strawberry", "burger", "doughnut", "tulip", "mushroom", "cactus", "house", "castle", "rocket", "sailboat"),
    *("crown", "umbrella"),
)
BACKGROUNDS = ("white", "pink", "blue", "green", "yellow", "gray")
VOCABULARY = {"object": OBJECTS, "style": STYLES, "background": BACKGROUNDS}
HEADS = VOCABULARY | {"valid": ("no", "yes")}  # what the classifier says of an image
WIDTHS = (24, 48, 96, 128)  # channels of its stages

# What the gold, a model that never saw either, has to do without.
GOLD_STYLE = "twemoji"
GOLD_OBJECT = "cat"

# Two per style, no object twice: whether they are generated rightly says whether style and object can be combined anew.
HELD_OUT = frozenset(
    {
        *(("noto", "apple"), ("noto", "penguin"), ("twemoji", "strawberry"), ("twemoji", "frog")),
        *(("fluent", "cherry"), ("fluent", "umbrella"), ("emojione", "rocket"), ("emojione", "tulip")),
        *(("classic", "banana"), ("classic", "bear"), ("ink", "doughnut"), ("ink", "house")),
    }
)

# Words that lie next to each other: of another kind is what a forgotten word should touch least.
KINDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "object": (
        ("cat", "dog", "fox", "bear", "frog"),
        ("penguin", "fish", "octopus", "butterfly"),
        ("apple", "banana", "cherry", "strawberry", "burger", "doughnut"),
        ("tulip", "mushroom", "cactus"),
        ("house", "castle", "rocket", "sailboat"),
        ("crown", "umbrella"),
    ),
    "style": (("noto", "classic", "twemoji", "emojione"), ("fluent", "ink")),
    "background": (("white", "gray"), ("pink", "blue", "green", "yellow")),
}
