"""Other words for the concept: every prompt of a list, or of templates, by kinds.

Kinds as in EMMA (arXiv 2512.17320): the name alone, a prefix, a variant, short and long prompts, and such as imply the
concept without naming it; also misspelt ones.
"""

from __future__ import annotations

from . import seeds
from .base import Attack

PROMPTS = Attack(
    name="prompts",
    summary="asks in other words: by kinds of prompts, from templates or the prompt file",
    unknown="the words",
    source="EMMA, arXiv 2512.17320",
    cost="an image per prompt and seed",
    run=seeds.run,
    default=lambda costs: 2 * costs.image,
    least=lambda costs: costs.image,
    asks_only=True,
)
