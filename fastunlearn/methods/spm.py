"""SPM: one-dimensional adapters (Lyu et al., CVPR 2024, arXiv 2312.16145); without its anchoring, LECO.

A low-rank adapter, by default of rank 1, learns on the concept's trajectories, with ``g`` = negative_guidance and n the
anchor or, where none is given, the unconditional,

    |S(x_t, t, c) - [T(n) - g (T(c) - T(n))]|^2  +  retain_weight * |S(x_t, t, e) - T(x_t, t, e)|^2

The e are no prompts but noise in the place of text states: latent anchors, which hold what the model does everywhere.
One is drawn from a normal distribution, scaled to 0.8 to 1.2 times the norm of the concept's states, and kept with the
probability ``1 - cos(e, c)``, or always where that is above 1, so that the fewest lie near the concept.

LECO is the same without anchors and with any rank: ``--retain-weight 0 --rank 4``.

Differs from the authors' code: x_t is the frozen teacher's, where theirs is the student's; anchors are drawn once, one
for each trajectory, where theirs are new in each step; in their code half of the anchors that are paid for are the
unconditional again, since they are stacked in another order than they are divided in; the adapter is on the layers of
``--trainable``, theirs on all layers of the transformer blocks, which are ``--trainable attentions`` of a UNet; forget
prompts count the same, where theirs may be drawn from templates; the rate is constant, where theirs warms up and then
restarts along a cosine.  Facilitated transport, by which their adapter is as strong as the prompt is near the concept,
is not built: no format of adapters can carry it.

Defaults for Stable Diffusion: the authors' steps, rate, guidance and weight; untried.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from . import Method
from .recipe import EMPTY, MASK, UNCONDITIONAL, Concept, Defaults, Recipe, Row, mix, option
from .rules import Sum

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Options:
    negative_guidance: float = option("g: how far the prediction is guided away from the concept", 1.0)


def recipe(concept: Concept) -> Recipe:
    g, prompts, weight = concept.options.negative_guidance, concept.forget_prompts, concept.settings.retain_weight
    rows = []
    for c in prompts:
        n = concept.anchors.get(c, UNCONDITIONAL)
        rows.append(Row("forget", c, c, mix((n, 1 + g), (c, -g))))
    anchors: dict[str, LatentAnchor] = {}
    for number in range(max(concept.settings.trajectories, len(prompts)) if weight else 0):
        name, c = f"\0latent anchor/{number}", prompts[number % len(prompts)]
        anchors[name] = LatentAnchor(concept, c, number)
        rows.append(Row("retain", c, name, {name: 1.0}))
    return Recipe(rows, Sum(weight), embeddings=anchors)


class LatentAnchor(Mapping[str, "Tensor"]):
    """Noise, drawn from the seed, in the place of what a prompt is encoded to; what is no text, or a mask, stays.

    It is made when it is first read: a plan may be of a model without weights.
    """

    def __init__(self, concept: Concept, prompt: str, seed: int) -> None:
        self.concept, self.prompt, self.seed = concept, prompt, seed

    @functools.cached_property
    def _tensors(self) -> dict[str, Tensor]:
        import torch

        generator, tensors = torch.Generator().manual_seed(self.seed), {}
        for name, (states, empty) in self.concept.encode([self.prompt, EMPTY]).items():
            is_text = states.is_floating_point() and name != MASK and not torch.equal(states, empty)
            tensors[name] = _near_in_norm(states, generator) if is_text else states
        return tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _near_in_norm(states: Tensor, generator: torch.Generator) -> Tensor:
    """Noise of the shape of ``states`` and about their norm; the nearer to them in direction, the seldomer."""
    import torch

    while True:
        noise = torch.randn(states.shape, generator=generator).to(states)
        scale, chance = torch.rand(2, generator=generator).tolist()
        noise *= (0.8 + 0.4 * scale) * states.norm() / noise.norm()
        if chance < 1 - torch.cosine_similarity(noise.flatten(), states.flatten(), dim=0):
            return noise


SPM = Method(
    name="spm",
    paper="Lyu et al. 2024, arXiv 2312.16145",
    needs="the concept (an anchor if wanted)",
    summary="guides away from the concept by an adapter of rank 1, held where text states are noise",
    recipe=recipe,
    options=Options,
    anchor="optional",
    adapter_rank=1,
    defaults={
        "shapes": Defaults(200, 1e-2, 16, 16, "cross-attention-kv", "linear", 100.0),
        "stable-diffusion": Defaults(3000, 1e-4, 4, 32, "cross-attention", retain_weight=1000.0),
    },
)
