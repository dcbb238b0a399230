"""MACE: mass concept erasure (Lu et al., CVPR 2024, arXiv 2403.06135).

Keys and values of cross-attention, in three stages, for n concepts.  First, in closed form, what a prompt's *other*
words carry of a concept, since each state has seen the words before it: with c the states of all positions but those
that name a concept, and a those of the same words with the anchor in its place (equation 3),

    W' = argmin  sum |W' c - W a|^2 + retain_weight sum |W' p - W p|^2 + ridge |W' - W|^2

Then, for each concept by itself, a low-rank change D_i of W' is trained so that its own words are not looked at: on
images of the concept with noise, the attention on them falls (equation 4),

    sum over layers |A[.., words of the concept]|,   A = softmax(q k^T / sqrt(d)),

at timesteps drawn by ``sigmoid((t - 200) / 20) - sigmoid((t - 400) / 20)`` of 1000 (equation 5).  Last, all changes
become one, in closed form, each where its concept's prompts are (equation 6; e: all their states):

    W* = argmin  sum_i sum |W* e_i - (W' + D_i) e_i|^2 + retain_weight sum |W* p - W p|^2 + ridge |W* - W'|^2

Differs from the authors' code: attention falls at all pixels, as theirs does for styles and for nudity, where for
objects and faces theirs falls within masks that a detector and a segmenter draw; |.| is over heads, pixels and words of
one row, and the mean over rows is taken, where theirs has batches of one; x_t is in latents, at timesteps of the
sampler; prompts to keep are the retain prompts and the empty one, in the place of a cache over COCO captions; D_i is of
the concept's own forget prompts, where theirs are thirty templates.  Their cache of what is kept is counted twice in
the first stage, and their images are normalized for another network; neither is here.

It needs layers whose keys read the text states: UNets.  Joint attention, and texts that pass a projection first, are
refused.  Defaults for Stable Diffusion: the authors' for objects; untried.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from . import Method
from .closed_form import Read, by_input, identity_like, kept, multiplied, right_factor, solve, states
from .recipe import EMPTY, Concept, Defaults, Edit, Suppression, Weights, option

if TYPE_CHECKING:
    from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Options:
    ridge: float = option("what holds the weights, in both closed forms", 1000.0, above=0)
    attention_steps: int = option("steps on each concept's attention; 0: only the first stage", 50, at_least=0)
    attention_rate: float = option("AdamW's rate in them", 1e-5, above=0)
    attention_rank: int = option("rank of each concept's change", 1, at_least=1)
    suppress_end: bool = option("whether attention on the mark behind the prompt falls, too", True)
    importance_sampling: bool = option("draw timesteps as equation 5 says, or equally often", True)


def recipe(concept: Concept) -> Edit:
    options, weight = concept.options, concept.settings.retain_weight
    tasks = suppressions(concept) if options.attention_steps else {}

    def change(weights: Weights) -> Mapping[str, Tensor]:
        groups = by_input(dataclasses.replace(weights, pooled=()))
        refined: dict[str, Tensor] = {}
        stays: dict[Read | None, Tensor] = {}
        for names, read in groups:
            stays[read] = weight * kept(concept, [*concept.retain_prompts, EMPTY], read)
            anchored, forgotten = beside(concept, read)
            held = stays[read] + options.ridge * identity_like(stays[read])
            refined |= multiplied(weights, names, right_factor(anchored, forgotten, held, weights.facts))
        if not tasks:
            return refined
        changes = {name: weights.suppressed(refined, task) for name, task in tasks.items()}
        new: dict[str, Tensor] = {}
        for names, read in groups:
            new |= fused(names, read, stays[read], weights, refined, changes)
        return new

    def fused(
        names: Sequence[str],
        read: Read | None,
        stays: Tensor,
        weights: Weights,
        refined: Mapping[str, Tensor],
        changes: Mapping[str, Mapping[str, Tensor]],
    ) -> dict[str, Tensor]:
        """W* of the matrices ``names``, read through ``read``; ``stays``: the sum over what stays."""
        moments = {one: kept(concept, list(task.places), read) for one, task in tasks.items()}
        eye = identity_like(stays)
        of_refined = options.ridge * eye
        for moment in moments.values():
            of_refined = of_refined + moment
        inverse = solve(of_refined + stays, eye, weights.facts)
        new = {}
        for name in names:
            wanted = refined[name].double() @ of_refined + weights.parameters[name].double() @ stays
            for one, moment in moments.items():
                wanted += changes[one][name].double() @ moment
            new[name] = (wanted @ inverse).float()
        return new

    return Edit(change, ("text",), tuple(tasks.values()))


def suppressions(concept: Concept) -> dict[str, Suppression]:
    """Of each concept, by its name, that any forget prompt names; of a single one in all forget prompts."""
    options, result = concept.options, {}
    for name in concept.concepts:
        places = {}
        for prompt in concept.forget_prompts:
            whole, found = concept.places(prompt, ()), concept.places(prompt, [name])
            if len(concept.concepts) == 1 or found != whole or prompt.lower() == name.lower():
                places[prompt] = (*found.named, *([found.end] if options.suppress_end else []))
        if places:
            rank, steps, rate = options.attention_rank, options.attention_steps, options.attention_rate
            result[name] = Suppression(places, rank, steps, rate, importance if options.importance_sampling else None)
    return result


def importance(timestep: float) -> float:
    """How often a timestep of 1000 is drawn, to a factor: mostly from 200 to 400."""
    return 1 / (1 + math.exp(-0.05 * (timestep - 200))) - 1 / (1 + math.exp(-0.05 * (timestep - 400)))


def beside(concept: Concept, read: Read | None = None) -> tuple[Tensor, Tensor]:
    """The sums of a c^T and c c^T, (D, D), over the states c of all positions but those that name a concept.

    a: the state of the same word, or of the same padding, with the anchor in the concept's place.
    """
    import torch

    anchored = forgotten = None
    for prompt in concept.forget_prompts:
        replaced = concept.anchors[prompt]
        ((c, c_read),), ((a, a_read),) = states(concept, [prompt], read), states(concept, [replaced], read)
        found, end = concept.places(prompt, concept.concepts), concept.places(replaced, ()).end
        first, last = found.named[0], found.named[-1]
        positions = torch.arange(c.shape[1], device=c.device)
        theirs = torch.where(positions > last, positions + end - found.end, positions)
        is_beside = (positions < first) | ((positions > last) & (theirs < len(positions)))
        theirs = theirs.clamp(0, len(positions) - 1)
        is_beside &= c_read[0] & a_read[0, theirs]
        c, a = c[0, is_beside], a[0, theirs[is_beside]]
        anchored = a.T @ c if anchored is None else anchored.addmm_(a.T, c)
        forgotten = c.T @ c if forgotten is None else forgotten.addmm_(c.T, c)
    assert anchored is not None
    assert forgotten is not None
    return anchored, forgotten


MACE = Method(
    name="mace",
    paper="Lu et al. 2024, arXiv 2403.06135",
    needs="the concept, an anchor; retain prompts are kept; a UNet",
    summary="edits what other words carry of the concept, trains its own words to be unattended, fuses in closed form",
    recipe=recipe,
    options=Options,
    anchor="needed",
    defaults={
        "shapes": Defaults(0, 1e-3, 16, 16, "cross-attention-kv", retain_weight=2.5, options=Options(0.5, 50, 1e-3)),
        "stable-diffusion": Defaults(0, 1e-5, 1, 8, "cross-attention-kv"),
    },
)
