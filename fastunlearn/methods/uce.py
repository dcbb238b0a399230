"""UCE: unified concept editing (Gandikota et al., WACV 2024, arXiv 2308.14761, equation 7).

Every matrix W that reads the text states c, in cross-attention the keys' and the values', gets the least-squares answer
to "the concept's states c_e give what the anchor's states c_g gave, states to keep c_p give what they gave":

    W' = argmin  s_e sum |W' c_e - W c_g|^2 + s_p sum |W' c_p - W c_p|^2 + lambda |W' - W|^2  =  W M
    M  = (lambda I + s_e sum c_g c_e^T + s_p sum c_p c_p^T) (lambda I + s_e sum c_e c_e^T + s_p sum c_p c_p^T)^-1

M does not depend on W: one solve serves all layers, where the authors' code inverts a matrix for each.  A layer with a
bias, W c + b, keeps its b: it stands on both sides and drops out (their FLUX code counts it twice).

Differs from the authors' code: all positions of a prompt's states take part, where theirs takes the last token of the
concept; position i of a forget prompt goes to position i of the prompt with the anchor; the prompts to keep are the
retain prompts and the empty one.  s_p is ``retain_weight``.  The sums and the solve are in float64.
"""

from __future__ import annotations

import dataclasses

from . import Method
from .closed_form import concept_edit
from .recipe import Concept, Defaults, Edit, option


@dataclasses.dataclass(frozen=True)
class Options:
    ridge: float = option("lambda: what holds the weights where no prompt says anything", 0.5, above=0)
    erase_weight: float = option("s_e: weight of the forget prompts", 1.0, above=0)


def recipe(concept: Concept) -> Edit:
    return concept_edit(concept)


UCE = Method(
    name="uce",
    paper="Gandikota et al. 2024, arXiv 2308.14761",
    needs="the concept, an anchor; retain prompts are kept",
    summary="maps the concept to the anchor in all text projections, in closed form, without training",
    recipe=recipe,
    options=Options,
    anchor="needed",
    defaults={
        "shapes": Defaults(0, 1e-3, 16, 16, "cross-attention-kv", retain_weight=2.5),
        "gallery": Defaults(0, 1e-3, 16, 16, "context_embedder,text_embedder.linear_1", retain_weight=2.5),
        "stable-diffusion": Defaults(0, 1e-5, 1, 16, "cross-attention-kv"),
    },
)
