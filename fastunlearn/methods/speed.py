"""SPEED: scalable, precise and efficient concept erasure (Li et al., ICLR 2026, arXiv 2503.07392).

The change D of a matrix W that reads the text states may act only where the states to keep hardly reach: in the span of
the columns of U, orthonormal, the eigenvectors of their mean second moment whose eigenvalues are small.

    D = argmin  1/n sum |(W + D) c_e - W c_g|^2 + lambda |D|^2   over D = D U U^T with D k = 0 for the invariants k
      = W (A - T) U (lambda I + U^T T U)^-1 U^T,   T = 1/n sum c_e c_e^T,  A = 1/n sum c_g c_e^T,  n forget prompts

The invariants are held by taking their directions out of U, which gives the same D as the paper's multipliers.  What a
state to keep has outside of U is kept exactly, and the invariants are.

Which states to keep decide on U is the paper's refinement of the prior.  Filtering: those which a change without U
would move more than the mean.  Augmentation: each stands for ``augment`` further ones, moved at random along the
direction v that the matrices pass on least; on the mean that adds v v^T * augment / (1 + augment) to the second moment.

Differs from the authors' code (read, of 2026): all positions of the forget and retain prompts take part, where theirs
takes the last token; U is found once for all matrices, by the sum over them, where theirs finds one for each
(``by_layer=true`` does too, at an eigendecomposition a matrix); the augmentation is its mean and not a sample, and is
not filtered again; the threshold is relative to the mean eigenvalue, which is about 1 for the states of their model;
the invariants are the first state of the empty prompt and the leading directions of its others, where theirs are
centres of a k-means; keys change too, where theirs changes values alone (``--trainable`` with these).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..errors import UserError
from . import Method
from .closed_form import READERS, Read, Sums, by_input, gram, identity_like, multiplied, solve, states, sums
from .recipe import EMPTY, Concept, Defaults, Edit, Weights, option

if TYPE_CHECKING:
    from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Options:
    null_below: float = option("eigenvalues of the states to keep that count as none, of their mean", 0.1, above=0)
    ridge: float = option("lambda: what holds the weights", 1.0, above=0)
    augment: float = option("states that each one to keep stands for, beside itself", 10.0, at_least=0)
    filter_prior: bool = option("keep only what the change would move more than the mean", True)
    invariant_directions: int = option("of the empty prompt's states behind the first", 3, at_least=0)
    by_layer: bool = option("find the null space for each matrix by itself", False)


def recipe(concept: Concept) -> Edit:
    def change(weights: Weights) -> Mapping[str, Tensor]:
        new: dict[str, Tensor] = {}
        for names, read in by_input(weights):
            told = sums(concept, read)
            prior = [c[is_read].float() for c, is_read in states(concept, concept.retain_prompts or [EMPTY], read)]
            fixed = invariants(concept, read)
            for group in [[name] for name in names] if concept.options.by_layer else [names]:
                factor = null_space_factor(concept.options, weights, group, told, prior, fixed)
                new |= multiplied(weights, group, factor)
        return new

    return Edit(change, READERS)


def invariants(concept: Concept, read: Read | None) -> Tensor:
    """What no change may move, the columns of (D, m)."""
    import torch

    ((values, is_read),) = states(concept, [EMPTY], read)
    first, others = values[is_read][:1], values[is_read][1:]
    if not len(others):
        return first.T
    directions = torch.linalg.svd(others, full_matrices=False)[2][: concept.options.invariant_directions]
    return torch.cat([first, directions]).T


def null_space_factor(
    options: Options, weights: Weights, names: list[str], told: Sums, prior: list[Tensor], fixed: Tensor
) -> Tensor:
    """I + (A - T) U (lambda I + U^T T U)^-1 U^T, (D, D), for these matrices.

    ``prior``: states to keep, (n, D) each.  ``fixed``: of :func:`invariants`.
    """
    import torch

    target, moved = told.forgotten / told.prompts, (told.anchored - told.forgotten) / told.prompts
    eye, facts = identity_like(target), weights.facts
    passed = gram(weights, names)
    if options.filter_prior:
        free = solve(options.ridge * eye + target, moved.T, facts).T  # the change without U: W times this
        reach = free.T @ passed @ free
        influence = [((c.double() @ reach) * c).sum(1).clamp(min=0).sqrt() for c in prior]
        least = torch.cat(influence).mean()
        prior = [c[one >= least] for c, one in zip(prior, influence, strict=True)]
    count = sum(map(len, prior))
    moment = torch.stack([c.double().T @ c.double() for c in prior]).sum(0) / count
    if options.augment:
        rows = sum(len(weights.parameters[name]) for name in names)
        least_passed = torch.linalg.eigh(passed)[1][:, max(0, len(passed) - rows)]
        moment += options.augment / (1 + options.augment) * torch.outer(least_passed, least_passed)
    values, vectors = torch.linalg.eigh(moment)
    basis = vectors[:, values < options.null_below * values.mean()]
    basis = without(basis, fixed)
    if not basis.shape[1]:
        raise UserError(
            "speed has nothing left to change: the states to keep reach everywhere. Use fewer `--retain-prompts`, or a "
            "larger `null_below`, or fewer `invariant_directions`."
        )
    facts["null_space"] = min(basis.shape[1], facts.get("null_space", basis.shape[1]))
    facts["states_to_keep"] = max(count, facts.get("states_to_keep", 0))
    inner = options.ridge * torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device)
    return eye + moved @ basis @ solve(inner + basis.T @ target @ basis, basis.T, facts)


def without(basis: Tensor, fixed: Tensor) -> Tensor:
    """An orthonormal basis of what of the span of ``basis`` (D, k) is orthogonal to the columns of ``fixed``."""
    import torch

    if not basis.shape[1]:
        return basis
    inside = basis.T @ fixed / fixed.norm(dim=0).clamp(min=1e-300)
    left, values, _ = torch.linalg.svd(inside, full_matrices=True)
    return basis @ left[:, int((values > 1e-9).sum()) :]


SPEED = Method(
    name="speed",
    paper="Li et al. 2026, arXiv 2503.07392",
    needs="the concept, an anchor; retain prompts span what stays",
    summary="maps the concept to the anchor within the null space of the states to keep, in closed form",
    recipe=recipe,
    options=Options,
    anchor="needed",
    defaults={
        "shapes": Defaults(0, 1e-3, 16, 16, "cross-attention-kv", options=Options(null_below=0.02, filter_prior=False)),
        "gallery": Defaults(
            *(0, 1e-3, 16, 16, "context_embedder,text_embedder.linear_1"),
            options=Options(null_below=0.005, filter_prior=False, invariant_directions=0),
        ),
        "stable-diffusion": Defaults(0, 1e-5, 1, 16, "cross-attention-kv"),
    },
)
