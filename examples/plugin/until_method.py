"""A method of another package, with an option of its own: the concept becomes nothing, until it is enough.

`fastunlearn methods until` shows it, and `fastunlearn train --method until --set share=0.3 ...` trains by it.
"""

import dataclasses

from until_rule import Until

from fastunlearn.methods import Method
from fastunlearn.methods.recipe import UNCONDITIONAL, Defaults, Recipe, Row, option


@dataclasses.dataclass(frozen=True)
class Options:
    share: float = option("stop forgetting below this share of the concept's strength", 0.5, above=0, at_most=1)


def recipe(concept):
    rows = [Row("forget", c, c, {UNCONDITIONAL: 1.0}) for c in concept.forget_prompts]
    return Recipe(rows + [Row("retain", r, r, {r: 1.0}) for r in concept.retain_prompts], Until(concept.options.share))


UNTIL = Method(
    name="until",
    paper="none",
    needs="the concept, retain prompts",
    summary="forgets until it is enough",
    recipe=recipe,
    defaults={"stable-diffusion": Defaults(4, 1e-3, 4, 1, "cross-attention")},
    options=Options,
)
