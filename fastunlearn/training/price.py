"""`--retain-weight auto`: how a method's losses are weighed is found while training, where there is a target to reach.

Its rule gives way to :class:`~fastunlearn.methods.rules.Constrained`: as little deviation as possible, with no more of
the concept left than ``--stop-residual`` says.
"""

from __future__ import annotations

import dataclasses

from ..errors import UserError
from ..methods.recipe import Edit, Recipe, has_no_teacher
from ..methods.rules import Constrained

AUTO_WEIGHT = "auto"
BOUND = 0.1  # where neither the user nor the method says how much may be left


def priced(method: str, recipe: Recipe | Edit, bound: float) -> Recipe:
    """The recipe with its rule replaced.  Raises UserError for one that is no trade of forgetting against keeping."""
    if isinstance(recipe, Edit) or not recipe.rows:
        raise _refused(method, "trains nothing")
    if not any(row.role == "retain" for row in recipe.rows):
        raise _refused(method, "has no retain rows, so that there is nothing to weigh")
    if not recipe.rule.takes_weight:
        raise _refused(method, "weighs by a rule of its own")
    forget = [row for row in recipe.rows if row.role == "forget"]
    if not forget or any(map(has_no_teacher, forget)):
        raise _refused(method, "has no target that the original's prediction for the concept is to become")
    return dataclasses.replace(recipe, rule=Constrained(bound))


def _refused(method: str, why: str) -> UserError:
    return UserError(f"`--retain-weight auto`: the method {method} {why}. Give a number, or leave it out.")
