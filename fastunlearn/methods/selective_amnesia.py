"""Selective Amnesia (Heng and Soh, NeurIPS 2023, arXiv 2305.10120): forgetting as continual learning.

The concept's prompt is trained to give images of a surrogate, the anchor, while images of other prompts are replayed
and each weight is held to where it was by how much those images depend on it (elastic weight consolidation):

    |S(x_t, t, c) - noise|^2 on images of a  +  gamma |S(x_t, t, r) - noise|^2  +  lambda sum_i F_i (w_i - w0_i)^2

F is the mean over the replayed images of the squared gradient of an image's likelihood, estimated by its denoising
loss summed over *all* timesteps before it is squared.  gamma is ``retain_weight``, lambda ``elastic_weight``.

Differs from the authors' code: images are the frozen teacher's latents; the sum over 1000 timesteps of an image is
estimated from the points of its trajectory, a batch at a time, where theirs takes one timestep of one image after the
other (about 4 million UNet evaluations); F lies on the device, where theirs is copied there in each step and added
twice, so their lambda of 50 counts as 100: as here by default.

On the bundled models lambda is 5: with 100 the weights are held so fast that the concept stays.  Some concepts stay in
part even so.

Defaults for Stable Diffusion: the authors' weights and rate; steps in place of their hundreds of epochs, untried.
"""

from __future__ import annotations

import dataclasses

from . import Method
from .recipe import NOISE, Concept, Defaults, Recipe, Row, option
from .rules import Sum


@dataclasses.dataclass(frozen=True)
class Options:
    elastic_weight: float = option("lambda: how hard the weights are held to where they were", 100.0, at_least=0)


def recipe(concept: Concept) -> Recipe:
    rows = [Row("forget", a, c, {NOISE: 1.0}) for c, a in concept.anchors.items()]
    rows += [Row("retain", r, r, {NOISE: 1.0}) for r in concept.retain_prompts]
    return Recipe(rows, Sum(concept.settings.retain_weight), elastic=concept.options.elastic_weight)


SELECTIVE_AMNESIA = Method(
    name="selective-amnesia",
    paper="Heng and Soh 2023, arXiv 2305.10120",
    needs="the concept, an anchor, retain prompts",
    summary="trains the concept on the anchor's images, holding each weight by what else depends on it",
    recipe=recipe,
    options=Options,
    anchor="needed",
    defaults={
        "shapes": Defaults(300, 1e-3, 16, 16, "all", "linear", options=Options(5.0)),
        "stable-diffusion": Defaults(1000, 1e-5, 8, 32, "all"),
    },
    needs_retain=True,
)
