"""How a command speaks: to people, to machines with ``--json``, or not at all with ``--quiet``."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from .console import Console

Document = Mapping[str, Any] | Sequence[Any]


@dataclasses.dataclass(frozen=True)
class Done:
    """What a command did.  ``document``: for machines, what JSON can hold; ``say`` prints it for people."""

    document: Callable[[], Document]
    say: Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Voice:
    """``quiet``: nothing is printed but errors.  ``json``: stdout holds one JSON document."""

    quiet: bool = False
    json: bool = False

    def console(self, *, plans: bool = True, silent: bool = False) -> Console:
        """What reports progress; ``silent`` where another process speaks."""
        from .console import Console

        return Console(plans=plans and not (self.quiet or self.json), quiet=self.quiet or silent)

    def tell(self, done: Done) -> None:
        """Print what a command did, as it is to be heard."""
        if self.json:
            print(json.dumps(done.document(), indent=2, ensure_ascii=False, allow_nan=False))
        elif not self.quiet:
            done.say()

    def flags(self) -> list[str]:
        """For another process of the same command."""
        return ["--quiet"] * self.quiet + ["--json"] * self.json


def add_voice(parser: argparse.ArgumentParser, *, works: bool) -> None:
    """The flags of :class:`Voice`; a command that only shows something has no ``--quiet``."""
    parser.add_argument("--json", action="store_true", help="print one JSON document, for machines")
    if works:
        parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


def take_voice(flags: dict[str, Any]) -> Voice:
    """Take the voice out of the flags.  Raises UserError for one that is silent and speaks."""
    voice = Voice(flags.pop("quiet", False), flags.pop("json", False))
    if voice.quiet and voice.json:
        raise UserError("`--quiet` prints nothing, and `--json` a document. Give one of them.")
    return voice
