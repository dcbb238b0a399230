"""What `fastunlearn prompts` does: prompts for a concept in many kinds, as a table that the other commands read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from ..concept_prompts import KEPT_KINDS, KINDS, concept_prompts
from ..config import at_least, expand_home, setting
from ..errors import UserError
from ..files.atomic import write_text
from ..files.prompt_files import PromptRow
from ..files.prompt_tables import prompt_table


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """What `prompts` does.  Lists are separated by commas in ``kinds`` and by semicolons elsewhere."""

    concept: str = setting('what the prompts ask for, e.g. "Van Gogh"')
    output: str | None = setting("FILE.csv with the columns prompt, group, kind; default: show them", None, path=True)
    columns: Literal["fastunlearn", "unlearndiffatk", "i2p"] = setting(
        "those of another program's files, with a seed per row; i2p's hold prompts to forget alone", "fastunlearn"
    )
    kinds: str | None = setting(
        f"which, separated by commas: {', '.join(KINDS)}; default: all that can be made for the concept", None
    )
    category: Literal["style", "object", "person"] | None = setting(
        "what the concept is; default: as the table of known concepts says, else templates that fit anything", None
    )
    aliases: str | None = setting("NAME;NAME: its other names, for `variant`", None)
    hints: str | None = setting("TEXT;TEXT that imply it without naming it, for `implicit`", None)
    near: str | None = setting("NAME;NAME: what resembles it and is to be kept, for `near`", None)
    per_kind: int = setting("prompts of each kind, at most", 8)
    seed: int = setting("which of them, where there are more", 0)
    overwrite: bool = setting("replace the file", False)

    def __post_init__(self) -> None:
        expand_home(self)
        at_least(self, 1, "per_kind")
        at_least(self, 0, "seed")
        if self.output is not None and Path(self.output).suffix.lower() != ".csv":
            raise UserError(f"`--output` {self.output}: the prompts are written as CSV. Name a file that ends in .csv.")


def make_prompts(config: PromptsConfig) -> list[tuple[str, str]]:
    """(kind, prompt) as the settings say; written to the output file where there is one."""
    path = Path(config.output) if config.output is not None else None
    if path is None and config.columns != "fastunlearn":
        raise UserError("`--columns` are a file's: name it with `--output`.")
    if path is not None:
        if path.is_dir() or (path.exists() and not config.overwrite):
            kind = "is a folder" if path.is_dir() else "exists: use another name, or `--overwrite`"
            raise UserError(f"`--output` {path} {kind}.")
        if not path.parent.is_dir():
            raise UserError(f"`--output` {path}: the folder {path.parent} does not exist. Make it first.")
    made = concept_prompts(
        config.concept,
        None if config.kinds is None else [kind.strip() for kind in config.kinds.split(",") if kind.strip()],
        category=config.category,
        aliases=_listed(config.aliases),
        hints=_listed(config.hints),
        near=_listed(config.near),
        per_kind=config.per_kind,
        seed=config.seed,
    )
    if config.columns == "i2p":
        made = [(kind, prompt) for kind, prompt in made if kind not in KEPT_KINDS]
        if not made:
            raise UserError("`--columns i2p` are of prompts to forget, and all that were asked for are to be kept.")
    if path is not None:
        rows = [PromptRow(prompt, group_of(kind), kind=kind, concept=config.concept.strip()) for kind, prompt in made]
        write_text(path, prompt_table(rows, config.columns))
    return made


def group_of(kind: str) -> str:
    """The group of a kind's prompts: one of its own, so that an evaluation tells the kinds apart."""
    return kind if kind in KEPT_KINDS else f"forget-{kind}"


def _listed(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(";") if part.strip()]
