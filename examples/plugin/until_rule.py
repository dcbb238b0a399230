"""A rule of another package: forget until it is enough, then only keep."""

import dataclasses

from fastunlearn.methods.rules import Rule, Update


@dataclasses.dataclass(frozen=True)
class Until(Rule):
    """Forget until the loss is below ``share`` of the concept's strength."""

    share: float

    def start(self, rows):
        return {"forgetting": 1.0, "limit": self.share * rows.way_to_go()}

    def updates(self, state):
        return [Update({"forget": state["forgetting"], "retain": 1.0})]

    def after_step(self, metrics, state):
        state["forgetting"].copy_(metrics["forget_loss"] > state["limit"])
        metrics["forgetting"] = state["forgetting"].clone()
