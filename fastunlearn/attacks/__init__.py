"""Attacks: is the concept gone, also for somebody who looks for it?  Each file is one attack.

Other packages add attacks through the entry-point group ``fastunlearn.attacks``: an entry names an
:class:`~fastunlearn.attacks.base.Attack`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UserError
from ..plugins import Registry, registry

if TYPE_CHECKING:
    from .base import Attack

#: The control of all others, which is always run: on the unlearned model at least.
CONTROL = "seeds"


def all_attacks() -> dict[str, Attack]:
    """Every attack by name: ours, then those of installed packages that can be loaded."""
    return dict(_registry().items)


def broken_attacks() -> dict[str, str]:
    """Attacks of installed packages that cannot be loaded, by name, and why."""
    return dict(_registry().broken)


def parse_attacks(value: str) -> dict[str, tuple[Attack, str]]:
    """``NAME[:OPTION],...`` as (attack, option) by what the user wrote.

    Raises UserError for a name or an option that there is not, for a repeat and for none at all.
    """
    found: dict[str, tuple[Attack, str]] = {}
    for text in (part.strip() for part in value.split(",")):
        if not text:
            continue
        name, _, option = text.partition(":")
        attack = _registry().get(name)
        if option and option not in attack.options:
            has = f"It has: {', '.join(attack.options)}" if attack.options else "It has none"
            raise UserError(f"the attack {name} has no option {option!r}. {has}.")
        default = attack.options[0] if attack.options else ""
        label = f"{name}:{option}" if option and option != default else name
        if label in found:
            raise UserError(f"`--attacks` names {label!r} twice. Name it once.")
        found[label] = attack, option or default
    if not found:
        raise UserError(f"`--attacks` names no attack. There are: {', '.join(all_attacks())}.")
    return found


def _registry() -> Registry[Attack]:
    from .base import Attack
    from .completion import COMPLETION
    from .embedding import EMBEDDING
    from .noise import NOISE
    from .prompts import PROMPTS
    from .relearn import RELEARN
    from .seeds import SEEDS
    from .text import TEXT
    from .tokens import TOKENS

    ours = (SEEDS, PROMPTS, COMPLETION, NOISE, EMBEDDING, TOKENS, TEXT, RELEARN)
    return registry(
        "attack",
        "fastunlearn.attacks",
        {attack.name: attack for attack in ours},
        lambda one: isinstance(one, Attack),
        wanted="a fastunlearn.attacks.base.Attack",
        command="attacks",
    )
