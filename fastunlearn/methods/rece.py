"""RECE: reliable and efficient concept erasure (Gong et al., ECCV 2024, arXiv 2407.12383).

UCE, and then rounds against the attack that has a closed form: with W the original matrices and W' the edited ones, the
state that brings a state c of the concept back best is

    e* = argmin_e  sum_layers |W' e - W c|^2 + lambda_a |e|^2  =  (lambda_a I + sum W'^T W')^-1 (sum W'^T W) c

and each round erases these states as UCE erases the concept's, starting from the matrices that the last round left.

As UCE, every round multiplies all matrices by one factor, so that sum W'^T W' = M^T (sum W^T W) M, and nothing is
inverted by layer.

As in the authors' code: all positions take part, an attack goes where the state that it stands for goes, the attack
looks at all edited matrices together and always at the original ones, a round keeps what the last round gave, and its
ridge lambda holds it there.  Their defaults differ by task (1 to 5 rounds; lambda_a 1e-3, lambda 0.1 and s_p 0.1 for
objects).  Here UCE's settings serve all rounds.  The sums and the solves are in float64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import Method
from .closed_form import Sums, concept_edit, gram, identity_like, right_factor, solve
from .recipe import Concept, Defaults, Edit, Weights, option

if TYPE_CHECKING:
    from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Options:
    rounds: int = option("rounds of attack and erasure after UCE", 2, at_least=1, at_most=20)
    attack_ridge: float = option("lambda_a: what holds the attack's states small", 1e-3, above=0)
    ridge: float = option("lambda: what holds the weights where no prompt says anything", 0.5, above=0)
    erase_weight: float = option("s_e: weight of the forget prompts and of the attack", 1.0, above=0)


def recipe(concept: Concept) -> Edit:
    options = concept.options

    def attacked(factor: Tensor, told: Sums, held: Tensor, weights: Weights, names: Sequence[str]) -> Tensor:
        strength, facts = options.erase_weight, weights.facts
        original = gram(weights, names)
        small = options.attack_ridge * identity_like(original)
        for _ in range(options.rounds):
            # e* = K c for every state c, so that the sums over the attack follow from those over the concept.
            back = solve(small + factor.T @ original @ factor, factor.T @ original, facts)
            anchored, forgotten = told.anchored @ back.T, back @ told.forgotten @ back.T
            factor = factor @ right_factor(strength * anchored, strength * forgotten, held, facts)
        return factor

    return concept_edit(concept, attacked)


RECE = Method(
    name="rece",
    paper="Gong et al. 2024, arXiv 2407.12383",
    needs="the concept, an anchor; retain prompts are kept",
    summary="uce, then rounds that erase the text states which would bring the concept back, in closed form",
    recipe=recipe,
    options=Options,
    anchor="needed",
    defaults={
        "shapes": Defaults(0, 1e-3, 16, 16, "cross-attention-kv", retain_weight=5.0),
        "gallery": Defaults(0, 1e-3, 16, 16, "context_embedder,text_embedder.linear_1", retain_weight=2.5),
        "stable-diffusion": Defaults(0, 1e-5, 1, 16, "cross-attention-kv"),
    },
)
