"""A method as another package would bring it: an option, a rule and a recipe of its own, from the public vocabulary."""

import dataclasses

from fastunlearn.methods import Method
from fastunlearn.methods.recipe import Defaults, Recipe, Row, option
from fastunlearn.methods.rules import Rule, Update


@dataclasses.dataclass(frozen=True)
class Options:
    share: float = option("stop forgetting below this share of the concept's strength", 0.5, above=0, at_most=1)
    verbose: bool = option("log the limit", False)


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
    rows = [Row("forget", c, c, {"": 1.0}) for c in concept.forget_prompts]
    return Recipe(rows + [Row("retain", r, r, {r: 1.0}) for r in concept.retain_prompts], Until(concept.options.share))


DEFAULTS = {"stable-diffusion": Defaults(4, 1e-3, 4, 1, "cross-attention-kv")}
THEIRS = Method("until", "a paper", "a concept", "forgets until it is enough", recipe, DEFAULTS, options=Options)
