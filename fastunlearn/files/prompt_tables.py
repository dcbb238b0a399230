"""Writes prompts as tables: with our columns, or with those that the field's own programs read.

What :mod:`.prompt_files` reads of each is what was written, but for the group, of which public tables know two values.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from .prompt_files import PromptRow, is_forget

#: The columns of each form: ours; of UnlearnDiffAtk and the ESD family; of I2P, which holds prompts to forget alone.
FORMS = {
    "fastunlearn": ("prompt", "group", "kind"),
    "unlearndiffatk": ("case_number", "prompt", "evaluation_seed", "evaluation_guidance", "type", "kind"),
    "i2p": ("prompt", "categories", "sd_seed", "sd_guidance_scale"),
}
GUIDANCE_SCALE = 7.5  # that the field's files have


def prompt_table(rows: Sequence[PromptRow], form: str, guidance_scale: float = GUIDANCE_SCALE) -> str:
    """The table as CSV.  ``form``: of ``FORMS``.  A row without a seed gets its number; of ``i2p`` those to keep go."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(FORMS[form])
    for number, row in enumerate(row for row in rows if form != "i2p" or is_forget(row.group)):
        seed = number if row.seed is None else row.seed
        cells = {
            "case_number": number,
            "prompt": row.prompt,
            "group": row.group,
            "kind": row.kind,
            "type": "erased" if is_forget(row.group) else "others",
            "categories": row.concept,
            **dict.fromkeys(("evaluation_seed", "sd_seed"), seed),
            **dict.fromkeys(("evaluation_guidance", "sd_guidance_scale"), f"{guidance_scale:g}"),
        }
        writer.writerow([cells[name] for name in FORMS[form]])
    return text.getvalue()
