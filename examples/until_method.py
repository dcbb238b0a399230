"""A method that another package brings, with an option and a rule of its own: forget until it is enough.

Its package says so in pyproject.toml, and `fastunlearn train --method until --set share=0.3 ...` finds it:
    [project.entry-points."fastunlearn.methods"]
    until = "until_method:UNTIL"
"""

import dataclasses

from fastunlearn.methods import Method
from fastunlearn.methods.recipe import UNCONDITIONAL, Defaults, Recipe, Row, option
from fastunlearn.methods.rules import Rule, Update


@dataclasses.dataclass(frozen=True)
class Options:
    share: float = option("stop forgetting below this share of the concept's strength", 0.5, above=0, at_most=1)


@dataclasses.dataclass(frozen=True)
class Until(Rule):
    """Forget until the loss is below a share of the concept's strength, then only keep."""

    share: float

    def start(self, rows):
        return {"forgetting": 1.0, "limit": self.share * rows.concept_strength()}

    def updates(self, state):
        return [Update({"forget": state["forgetting"], "retain": 1.0})]

    def after_step(self, metrics, state):
        state["forgetting"].copy_(metrics["forget_loss"] > state["limit"])
        metrics["forgetting"] = state["forgetting"].clone()


def recipe(concept):
    rows = [Row("forget", c, c, {UNCONDITIONAL: 1.0}) for c in concept.forget_prompts]
    return Recipe(rows + [Row("retain", r, r, {r: 1.0}) for r in concept.retain_prompts], Until(concept.options.share))


DEFAULTS = {"stable-diffusion": Defaults(4, 1e-3, 4, 1, "cross-attention-kv")}
UNTIL = Method("until", "none", "the concept", "forgets until it is enough", recipe, DEFAULTS, options=Options)
