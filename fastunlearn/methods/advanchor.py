"""AdvAnchor: adversarial anchors (Zhao et al. 2024, arXiv 2501.00054).

A good anchor is near the concept and lacks what makes it: so it is the concept's own text states with an offset d,
found on the frozen teacher before training, with the prompt that has the anchor in the concept's place as the neutral
one, n:

    d:       mean( (T(x_t, c + d) - T(x_t, n)) * (T(x_t, c) - T(x_t, n)) ) falls until it is below 0
    weights: |S(x_t, t, c) - T(x_t, t, c + d)|^2 + retain_weight |S(x_t, t, n) - T(x_t, t, n)|^2

at points of the concept's own trajectories.  ``relative_search`` false leaves n out of the first line, which is their
L_adv1.

Differs from the authors' code: one offset serves all points of a concept's prompt, found first (their second order of
optimisation); it is added to the text states, behind the first position, where theirs goes to the positions of the
concept's words by a file that they do not publish; neither of their optimizers ever forgets a gradient, which adds up
over the steps, and both do here; their attributes for nudity are not built.

Defaults for Stable Diffusion: the authors' steps, rates and weight of 10.
"""

from __future__ import annotations

import dataclasses

from . import Method
from .recipe import Concept, Defaults, Recipe, Row, Search, found, option
from .rules import Sum


@dataclasses.dataclass(frozen=True)
class Options:
    search_steps: int = option("the most steps of the search for an offset", 30, at_least=0)
    search_rate: float = option("Adam's rate in that search", 1e-4, above=0)
    relative_search: bool = option("whether the neutral prediction is taken off both (L_adv2), or not (L_adv1)", True)


def recipe(concept: Concept) -> Recipe:
    options = concept.options
    rows, searches = [], []
    for c, n in concept.anchors.items():
        neutral = n if options.relative_search else None
        searches.append(Search(c, c, c, neutral, options.search_steps, options.search_rate))
        rows.append(Row("forget", c, c, {found(c): 1.0}))
        rows.append(Row("retain", c, n, {n: 1.0}))
    return Recipe(rows, Sum(concept.settings.retain_weight), searches=searches)


ADVANCHOR = Method(
    name="advanchor",
    paper="Zhao et al. 2024, arXiv 2501.00054",
    needs="the concept, an anchor",
    summary="overwrites the concept by an anchor that is searched for: near it, without what makes it",
    recipe=recipe,
    options=Options,
    anchor="needed",
    defaults={
        "shapes": Defaults(
            *(400, 1e-3, 16, 40, "cross-attention-kv", "linear", 10.0),
            options=Options(60, 0.02),
            stop_residual=0.06,
        ),
        "stable-diffusion": Defaults(50, 1e-5, 1, 16, "cross-attention", retain_weight=10.0),
    },
)
