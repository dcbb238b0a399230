"""What `fastunlearn attacks` and `fastunlearn attack` print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from ..attacks import all_attacks, broken_attacks
from ..attacks.base import Attack
from ..schema import Attacked, AttackRecord
from .console import listed, terminal


def attacks_table() -> None:
    """Every attack: what it does, what it looks for, whose it is, what it costs."""
    rows = [(one.name, _about(one)) for one in all_attacks().values()]
    out = terminal()
    out.print(listed(rows))
    out.print("U: a denoiser forward of one sample.")
    for name, why in broken_attacks().items():
        out.print(f"{name}: cannot be loaded ({why})")


def attacks_facts() -> list[dict[str, Any]]:
    """What is known of every attack, as JSON can hold it."""
    names = ("name", "summary", "unknown", "source", "cost")
    return [
        {name: getattr(one, name) for name in names} | {"options": list(one.options)} for one in all_attacks().values()
    ]


def _about(attack: Attack) -> str:
    options = f" Also as {', '.join(f'{attack.name}:{option}' for option in attack.options[1:])}."
    said = f"{attack.summary}.{options if attack.options[1:] else ''}\nUnknown: {attack.unknown}. "
    return f"{said}After: {attack.source}. Costs {attack.cost}.\n"


def attack_table(record: AttackRecord, folder: Path | None) -> None:
    """Prompts broken, by attack and model, and the verdict."""
    from ..reports.attack import attack_sentence, attack_verdict

    models = list(record.attacks[0].models)
    grid = Table()
    for name in ("attack", "U a prompt", *models, "control"):
        grid.add_column(name, justify="left" if name == "attack" else "right")
    for result in record.attacks:
        sides = [*(result.models[name] for name in models), result.control]
        grid.add_row(result.name, f"{result.budget:,}", *map(_cell, sides))
    terminal(width=110).print(grid)
    out = terminal(soft_wrap=True)
    out.print(attack_verdict(record))
    for result in record.attacks:
        out.print(attack_sentence(record, result))
    for note in record.notes:
        out.print(f"note: {note}")
    if folder is not None:
        out.print(f"report: {folder / 'report.html'}")


def _cell(side: Attacked) -> str:
    return f"{side.broken} of {side.n_prompts}"
