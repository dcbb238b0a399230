"""Prompts that ask for a concept in many ways, and for what lies next to it, from templates of our own.

The kinds are called after those of EMMA (arXiv 2512.17320: name, prefix, variant, short, long to forget; hard, which is
near here, and random to keep), with three more of the field: implicit, misspelt, language.  EMMA's short and long ones
mostly describe the concept without naming it, which here is implicit.  Same arguments, same prompts, on any machine.

What a concept is, is known of the few in ``table.py``.  Of any other the caller says it: its ``category``, ``aliases``,
``hints`` that imply it without naming it, and what is ``near``.  Nothing is made up for a word that is not known.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence

from ..errors import UserError
from .table import Known, known, listed

#: Kind -> what its prompts are.
KINDS: Mapping[str, str] = {
    "name": "the concept's name alone",
    "prefix": "the name after a few fixed words: a photo of ...",
    "variant": "other names of the concept, and other ways to write it",
    "short": "the name in one short scene",
    "long": "the name in the middle of a long description",
    "implicit": "what implies the concept without naming it",
    "misspelt": "the name with a typing error",
    "language": "the name after the words of `prefix` in other languages",
    "near": "what resembles the concept and is to be kept",
    "random": "what has nothing to do with the concept and is to be kept",
}
#: The kinds that ask for what is to be kept; all others ask for the concept.
KEPT_KINDS = ("near", "random")
CATEGORIES = ("style", "object", "person")


_PREFIXES: Mapping[str, str] = {
    "": "an image of {}; a picture of {}; {}, highly detailed; an illustration of {}; a rendering of {}; "
    "{} in the center; a sketch of {}; a painting of {}",
    "style": "a painting by {}; an image in the style of {}; art by {}; a picture by {}; a drawing by {}; "
    "a sketch in the style of {}; a portrait by {}; a landscape by {}",
    "object": "a photo of {}; an image of {}; a picture of {}; a close-up photo of {}; a drawing of {}; "
    "a photograph of {}, high quality; a painting of {}; a rendering of {}",
    "person": "a photo of {}; a portrait of {}; an image of {}; a picture of {}; a close-up of the face of {}; "
    "a drawing of {}; a press photo of {}; a painting of {}",
}
_SCENES = listed(
    "at night; in the rain; in the morning sun; in winter; on a summer day; in the fog; in autumn; at sunset; "
    "in spring; under a cloudy sky"
)
_PLACES = listed("in a park; in front of a house; on a street; near a river; in a room; by the sea; in the mountains")
_SUBJECTS = listed(
    "a quiet street; a bowl of fruit; a fishing boat; a woman with a hat; an old tree; a bridge over a river; "
    "a horse in a field; a kitchen table; a harbor; a mountain lake"
)
_LONG: Mapping[str, tuple[str, ...]] = {
    "style": (
        "{scene}, a wide canvas shows {subject}, every stroke clearly visible, painted by {name} and shown in a large "
        "museum, rich in color, with a thin dark frame and visitors in front of it",
        "a poster for an exhibition: {subject} {scene} in the unmistakable style of {name}, printed on heavy paper, "
        "with a wide white margin and a small line of text below it",
    ),
    "": (
        "a wide, carefully lit picture taken {scene} {place}: in the foreground there is {name}, sharp and in full "
        "view, behind it a few people, some trees and soft light, everything in natural colors",
        "{place}, {scene}, with long shadows and many small details, {name} fills the middle of the frame while the "
        "background is blurred, shot on film with a 50 mm lens",
    ),
}
#: Language -> (the words of `prefix`, and those for a style).
_LANGUAGES: Mapping[str, tuple[str, str]] = {
    "de": ("ein Bild: {}", "ein Gemälde von {}"),
    "fr": ("une image : {}", "un tableau de {}"),
    "es": ("una imagen: {}", "un cuadro de {}"),
    "it": ("un'immagine: {}", "un quadro di {}"),
    "nl": ("een afbeelding: {}", "een schilderij van {}"),
    "pt": ("uma imagem: {}", "uma pintura de {}"),
}
#: Everyday things that have nothing to do with most concepts.
RANDOM = listed(
    "a bowl of oranges on a table; a red bicycle against a wall; a wooden chair; a cup of coffee; a sandy beach; "
    "a sleeping cat; a glass of water; a stack of books; a snowy mountain; a yellow taxi; a loaf of bread; "
    "a steam train; a vegetable garden; a pair of shoes; a desert road; a blue umbrella; a busy market; "
    "a wooden bridge; an open window; a bird on a branch; a sailing boat; a piano; a slice of cake; a rainy street"
)
#: Letter -> the one on the key beside it.
_BESIDE = dict(zip("qwertyuiopasdfghjklzxcvbnm", "wertyuioposdfghjklkxcvbnmn", strict=True))


def concept_prompts(
    concept: str,
    kinds: Sequence[str] | None = None,
    *,
    category: str | None = None,
    aliases: Sequence[str] = (),
    hints: Sequence[str] = (),
    near: Sequence[str] = (),
    per_kind: int = 8,
    seed: int = 0,
) -> list[tuple[str, str]]:
    """(kind, prompt) for a concept in words, kind by kind, no prompt twice.

    ``kinds``: names of :data:`KINDS`; None means all that can be made for this concept.  ``category``: one of
    :data:`CATEGORIES`; by default the table's, else templates that fit anything.  ``aliases``: other names; ``hints``:
    texts that imply it without naming it; ``near``: what resembles it; they come before the table's.  ``per_kind``: at
    most so many of each kind, chosen by ``seed`` where there are more.

    Raises UserError for an unknown kind or category, and for a kind of which nothing is known for this concept.
    """
    name = " ".join(concept.split())
    if not name:
        raise UserError("`--concept` is empty: name what the prompts are to ask for.")
    if per_kind < 1:
        raise UserError(f"`--per-kind` must be at least 1, got {per_kind}.")
    if category is not None and category not in CATEGORIES:
        raise UserError(f"unknown category {category!r}. There are: {', '.join(CATEGORIES)}.")
    if kinds is not None and not kinds:
        raise UserError(f"`--kinds` is empty. There are: {', '.join(KINDS)}.")
    for kind in kinds or ():
        if kind not in KINDS:
            raise UserError(f"unknown kind of prompts {kind!r}. There are: {', '.join(KINDS)}.")
    table = known(name) or Known("")
    names = (name, *aliases, *table.aliases)
    for hint in hints:
        if named := [word for word in names if _mentions(hint, word)]:
            raise UserError(f"the hint {hint!r} names {named[0]!r}: a prompt of the kind `implicit` must not.")
    about = Known(
        category or table.category,
        (*aliases, *table.aliases),
        (*hints, *(hint for hint in table.hints if not any(_mentions(hint, word) for word in names))),
        (*near, *table.near),
        table.translated,
    )
    result: dict[str, str] = {}
    for kind in KINDS if kinds is None else dict.fromkeys(kinds):
        made = _MAKERS[kind](name, about)
        if not made and kinds is not None:
            raise UserError(f"nothing is known for the kind `{kind}` of {name!r}: {_MISSING[kind]}.")
        fresh = [text for text in dict.fromkeys(made) if text not in result]
        result |= dict.fromkeys(_chosen(fresh, per_kind, seed), kind)
    return [(kind, prompt) for prompt, kind in result.items()]


def prefixed(name: str, category: str) -> list[str]:
    """The name after each of the fixed words of its category, one of :data:`CATEGORIES` or empty; always eight."""
    return [form.format(_called(name, category)) for form in listed(_PREFIXES[category])]


def _chosen(texts: Sequence[str], count: int, seed: int) -> list[str]:
    """``count`` of the texts, by a hash, so that a new Python or another text changes nothing else; in order."""
    ranked = sorted(texts, key=lambda text: hashlib.sha256(f"{seed}\0{text}".encode()).digest())
    taken = set(ranked[:count])
    return [text for text in texts if text in taken]


# ---- one function a kind: (name, what is known) -> all its prompts ---------------------------------------------------


def _name(name: str, about: Known) -> list[str]:
    return [name]


def _prefix(name: str, about: Known) -> list[str]:
    return prefixed(name, about.category)


def _variant(name: str, about: Known) -> list[str]:
    """Other names first, then other ways to write this one."""
    words = name.split()
    written = [name.upper(), name.lower(), name.title(), "-".join(words), "".join(words), "_".join(words), f"#{name}"]
    return [text for text in (*about.aliases, *written) if text != name]


def _short(name: str, about: Known) -> list[str]:
    if about.category == "style":
        return [f"{subject} by {name}" for subject in _SUBJECTS] + [f"a view {scene} by {name}" for scene in _SCENES]
    return [f"{_called(name, about.category)} {where}" for where in (*_PLACES, *_SCENES)]


def _long(name: str, about: Known) -> list[str]:
    forms = _LONG["style" if about.category == "style" else ""]
    others = _SUBJECTS if about.category == "style" else _PLACES
    called = _called(name, about.category)
    return [
        form.format(name=called, scene=scene, place=other, subject=other)
        for form in forms
        for scene in _SCENES
        for other in others
    ]


def _implicit(name: str, about: Known) -> list[str]:
    return list(about.hints)


def _misspelt(name: str, about: Known) -> list[str]:
    """One error each: a letter left out, doubled, swapped with the next, or hit beside its key; none that is right."""
    forms = []
    for index, letter in enumerate(name):
        if not letter.isalpha():
            continue
        before, after = name[:index], name[index + 1 :]
        forms += [before + after, before + letter + letter.lower() + after]
        if after[:1].isalpha():
            forms.append(before + after[0] + letter + after[1:])
        if letter.lower() in _BESIDE:
            slip = _BESIDE[letter.lower()]
            forms.append(before + (slip.upper() if letter.isupper() else slip) + after)
    wrong = [form.strip() for form in forms if form.strip() and form.strip().lower() != name.lower()]
    frame = "a painting by {}" if about.category == "style" else "a picture of {}"
    return [frame.format(_called(form, about.category)) for form in wrong]


def _language(name: str, about: Known) -> list[str]:
    """A style's and a person's name is the same in all of them; a thing's where the table has it."""
    made = []
    for language, (plain, style) in _LANGUAGES.items():
        if about.category == "style":
            made.append(style.format(name))
        elif about.category == "person":
            made.append(plain.format(name))
        elif language in about.translated:
            made.append(plain.format(about.translated[language]))
    return made


def _near(name: str, about: Known) -> list[str]:
    forms = listed(_PREFIXES[about.category])[:3]
    # By form, not by neighbor, so that the choice has many of them.
    others = [other for other in about.near if other.lower() != name.lower()]
    return [form.format(_called(other, about.category)) for form in forms for other in others]


def _random(name: str, about: Known) -> list[str]:
    words = [name, *about.aliases, *name.split()]
    return [text for text in RANDOM if not any(_mentions(text, word) for word in words)]


_MAKERS: Mapping[str, Callable[[str, Known], list[str]]] = {
    "name": _name,
    "prefix": _prefix,
    "variant": _variant,
    "short": _short,
    "long": _long,
    "implicit": _implicit,
    "misspelt": _misspelt,
    "language": _language,
    "near": _near,
    "random": _random,
}
_MISSING = {
    **dict.fromkeys(KINDS, "name it in letters"),
    "implicit": "give `--hints` texts that imply it without naming it",
    "language": "say `--category style` or `--category person` if its name is the same in all languages",
    "near": "give `--near` what resembles it",
}


def _called(name: str, category: str) -> str:
    """The name in a sentence: a thing gets its article."""
    if category != "object" or re.match(r"(an?|the|some|my)\s", name.lower()):
        return name
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def _mentions(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None
