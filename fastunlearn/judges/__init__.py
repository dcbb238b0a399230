"""Judges: who says whether an image shows a concept, and whether it is a sound image at all.

Other packages add judges through the entry-point group ``fastunlearn.judges``: an entry names a class, or a function,
that is called with (device, option) and returns a :class:`Judge` or a function (images, concept) -> scores.
``option`` is what the user wrote behind the colon of ``--judge NAME:OPTION``, or empty.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..plugins import Registry, registry
from .base import Judge, Judged, Verdicts, as_judge, check_concept, judged, record_of, theirs

if TYPE_CHECKING:
    import torch

__all__ = [
    "Judge",
    "Judged",
    "Verdicts",
    "all_judges",
    "as_judge",
    "broken_judges",
    "check_concept",
    "find_judge",
    "judged",
    "load_judge",
    "record_of",
]

Factory = Callable[..., Any]


def all_judges() -> list[str]:
    """The names of all judges: ours, then those of installed packages that can be loaded."""
    return list(_registry().items)


def find_judge(name: str) -> Factory:
    """What makes the judge of this name, of ours a :class:`~.factory.JudgeFactory`.  UserError for an unknown name."""
    return _registry().get(name)


def broken_judges() -> dict[str, str]:
    """Judges of installed packages that cannot be loaded, by name, and why."""
    return dict(_registry().broken)


def load_judge(name: str, device: str | torch.device = "cpu") -> Judge:
    """The judge that ``NAME`` or ``NAME:OPTION`` says.

    Raises UserError for an unknown name, and where what the judge needs is not there.
    """
    name, _, option = name.partition(":")
    make = _registry().get(name)
    with theirs(name, make):
        made = make(device, option)
    return as_judge(made)


def _registry() -> Registry[Factory]:
    from .clip import CLIP
    from .imagenet import IMAGENET
    from .nsfw import NSFW, NUDENET
    from .worlds import judges_of_worlds

    ours: dict[str, Factory] = {one.name: one for one in (*judges_of_worlds(), CLIP, IMAGENET, NSFW, NUDENET)}
    wanted = "a function (device, option) -> Judge"
    return registry("judge", "fastunlearn.judges", ours, callable, wanted=wanted, command="judges")
