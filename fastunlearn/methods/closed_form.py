"""What edits in closed form share: the text states of prompts, sums over them, and solves that tell how sound they are.

The states are those that a prompt's mask lets the model read; without a mask, all of them.  Sums and solves are in
float64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ..errors import UserError
from .recipe import EMPTY, MASK, STATES, Concept, Edit, Reader, Weights

if TYPE_CHECKING:
    from torch import Tensor

_PROMPTS = 8  # that are encoded at a time: long prompts have hundreds of states of thousands of numbers
#: Of a matrix that is solved with.  Above it, fewer than four digits of a float64 solution mean anything.
MAX_CONDITION = 1e12

Read = Callable[[Mapping[str, "Tensor"]], "Tensor"]
Refine = Callable[["Tensor", "Sums", "Tensor", Weights, Sequence[str]], "Tensor"]


@dataclasses.dataclass(frozen=True)
class Sums:
    """Second moments of text states, (D, D) float64.

    ``anchored``: the sum of g c^T over the states c of the forget prompts and the states g that take their places.
    ``forgotten``: of c c^T.  ``prompts``: how many forget prompts there are.
    """

    anchored: Tensor
    forgotten: Tensor
    prompts: int


#: What an edit of both kinds of matrices changes.
READERS: tuple[Reader, ...] = ("text", "pooled")


def by_input(weights: Weights) -> list[tuple[list[str], Read | None]]:
    """The matrices that read the text, grouped by what stands between the text states and them: mostly nothing."""
    groups: dict[Read | None, list[str]] = {}
    for name in (*weights.text, *weights.pooled):
        groups.setdefault(weights.before.get(name), []).append(name)
    return [(names, read) for read, names in groups.items()]


def states(concept: Concept, prompts: Sequence[str], read: Read | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """For the prompts, some at a time: their states (n, L, D) float64, and which of them are read, (n, L) bool."""
    for start in range(0, len(prompts), _PROMPTS):
        encoded = concept.encode(prompts[start : start + _PROMPTS])
        values = (encoded[STATES] if read is None else read(encoded)).double()
        mask = encoded.get(MASK) if values.shape[1] > 1 else None  # a vector of the whole text has no places
        yield values, values.new_ones(values.shape[:2]).bool() if mask is None else mask.bool()


def sums(concept: Concept, read: Read | None = None) -> Sums:
    """Position i of a forget prompt becomes position i of the prompt with the anchor, or the last one that is read."""
    import torch

    forget = concept.forget_prompts
    wanted = [concept.anchors[prompt] for prompt in forget]
    anchored = forgotten = None
    for (c, c_read), (g, g_read) in zip(states(concept, forget, read), states(concept, wanted, read), strict=True):
        places = torch.arange(c.shape[1], device=c.device)
        last = torch.where(g_read, places, 0).amax(1, keepdim=True)
        there = torch.where(g_read, places, torch.minimum(places, last))
        rows, columns = c_read.nonzero(as_tuple=True)
        g, c = g[rows, there[rows, columns]], c[rows, columns]
        anchored = g.T @ c if anchored is None else anchored.addmm_(g.T, c)
        forgotten = c.T @ c if forgotten is None else forgotten.addmm_(c.T, c)
    assert anchored is not None
    assert forgotten is not None
    return Sums(anchored, forgotten, len(forget))


def kept(concept: Concept, prompts: Sequence[str], read: Read | None = None) -> Tensor:
    """The sum of p p^T over the states of prompts to keep, (D, D)."""
    total = None
    for values, is_read in states(concept, prompts, read):
        p = values[is_read]
        total = p.T @ p if total is None else total.addmm_(p.T, p)
    assert total is not None
    return total


def right_factor(anchored: Tensor, forgotten: Tensor, held: Tensor, facts: dict[str, float]) -> Tensor:
    """(held + anchored) (held + forgotten)^-1, (D, D): what minimises the least squares that these are the sums of.

    ``held``: the sum over what is to stay, the ridge in it.  Raises UserError like :func:`solve`.
    """
    return solve(held + forgotten, (held + anchored).T, facts).T  # the first is symmetric


def solve(matrix: Tensor, right: Tensor, facts: dict[str, float]) -> Tensor:
    """matrix^-1 right, for a symmetric positive matrix; the condition number goes to ``facts``, the worst one.

    Raises UserError for a matrix so ill-conditioned that the solution would mean nothing.
    """
    import torch

    condition = float("inf")
    if torch.isfinite(matrix).all():
        values = torch.linalg.eigvalsh(matrix)
        condition = float(values[-1] / values[0]) if values[0] > 0 else float("inf")
    if not condition <= MAX_CONDITION:
        raise UserError(
            f"the edit is ill-conditioned: its matrix has the condition number {condition:.1e}, and above "
            f"{MAX_CONDITION:.0e} its weights would mean nothing. Use a larger `ridge`, or smaller weights."
        )
    facts["condition"] = max(facts.get("condition", 0.0), condition)
    return torch.linalg.solve(matrix, right)


def multiplied(weights: Weights, names: Sequence[str], factor: Tensor) -> Mapping[str, Tensor]:
    """W M for these matrices, float32."""
    return {name: (weights.parameters[name].double() @ factor).float() for name in names}


def gram(weights: Weights, names: Sequence[str]) -> Tensor:
    """The sum of W^T W over these matrices, (D, D) float64."""
    total = None
    for name in names:
        w = weights.parameters[name].double()
        total = w.T @ w if total is None else total.addmm_(w.T, w)
    assert total is not None
    return total


def identity_like(matrix: Tensor) -> Tensor:
    import torch

    return torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def concept_edit(concept: Concept, refined: Refine | None = None) -> Edit:
    """UCE's edit, with what ``refined`` makes of the factor of each group of matrices, if anything.

    ``refined``: (M, the forget prompts' sums, the sum over what stays, weights, names) -> M, matrices (D, D) float64.
    The options must have UCE's.
    """
    options, retain_weight = concept.options, concept.settings.retain_weight

    def change(weights: Weights) -> Mapping[str, Tensor]:
        new: dict[str, Tensor] = {}
        for names, read in by_input(weights):
            held = retain_weight * kept(concept, [*concept.retain_prompts, EMPTY], read)
            held += options.ridge * identity_like(held)
            told, strength = sums(concept, read), options.erase_weight
            factor = right_factor(strength * told.anchored, strength * told.forgotten, held, weights.facts)
            if refined is not None:
                factor = refined(factor, told, held, weights, names)
            new |= multiplied(weights, names, factor)
        return new

    return Edit(change, READERS)
