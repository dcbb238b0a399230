"""ACE: anti-editing concept erasure (Wang et al., CVPR 2025, arXiv 2501.01633).

An editor starts from the unconditional prediction, so that is turned against the concept, too.  On the concept's
trajectories, with ``eta`` = negative_guidance, ``w`` = anchor_guidance, and anchors a among the prompts to keep,

    null_weight * |S("") - [T("") + eta (T(c) - T("")) - w sum_a (T(a) - T(""))]|^2
      + (1 - null_weight) * |S(c) - [T("") - eta (T(c) - T(""))]|^2

weighs ``1 - prior_weight``, and ``prior_weight`` holds ``|S(a) - T(a)|^2`` at the same points.  Guidance then leads
from a prediction that already contains the concept to one that lacks it, whatever the prompt; the anchors are taken
out of the first, so that guidance towards them stays.

Differs from the authors' code: all weights that ``--trainable`` selects train, not a LoRA of rank 4 (with its rate of
1e-3); x_t is the frozen teacher's, where theirs is the student's; the anchors of a row are chosen once, evenly over
the prompts to keep, where theirs are drawn anew in each step, and all count the same (theirs may weigh them by a CLIP
score).  Their batches of one conditional and one unconditional row are rows here, so the sums are means over rows.

What it costs: every image is made of the unconditional prediction, so that on the bundled model much of what is to be
kept goes with the concept.

Defaults for Stable Diffusion: the authors' guidance and weights; steps and rate are their script's, untried without a
LoRA.
"""

from __future__ import annotations

import dataclasses

from . import Method
from .recipe import UNCONDITIONAL, Concept, Defaults, Recipe, Row, mix, option
from .rules import Sum


@dataclasses.dataclass(frozen=True)
class Options:
    negative_guidance: float = option("eta: how far the predictions are guided away from the concept", 3.0)
    anchor_guidance: float = option("w: how far the unconditional one is guided away from the anchors", 3.0)
    anchors_per_row: int = option("prompts to keep in each unconditional target", 2, at_least=0)
    null_weight: float = option("share of the unconditional loss in forgetting", 0.8, at_least=0, at_most=1)
    prior_weight: float = option("share of keeping in the whole loss", 0.5, at_least=0, at_most=1)


def recipe(concept: Concept) -> Recipe:
    options, retain = concept.options, concept.retain_prompts
    eta, w, width = options.negative_guidance, options.anchor_guidance, options.anchors_per_row
    # As many pairs as let every prompt to keep be an anchor, if there are trajectories for them.
    wanted = -(-len(retain) // max(width, 1))
    pairs = max(len(concept.forget_prompts), min(wanted, concept.settings.trajectories // 2))
    rows = []
    for n in range(pairs):
        c = concept.forget_prompts[n % len(concept.forget_prompts)]
        spread = max(len(retain) / (pairs * width), 1) if width else 1
        anchors = [retain[int(place * spread) % len(retain)] for place in range(n * width, (n + 1) * width)]
        away = mix((UNCONDITIONAL, 1 + eta), (c, -eta))
        towards = mix(
            (UNCONDITIONAL, 1 - eta), (c, eta), *((a, -w) for a in anchors), *((UNCONDITIONAL, w) for _ in anchors)
        )
        # A role's loss is the mean over its rows, half of which are of each kind.
        rows.append(Row("forget", c, c, away, weight=2 * (1 - options.null_weight)))
        rows.append(Row("forget", c, UNCONDITIONAL, towards, weight=2 * options.null_weight))
    for n, r in enumerate(retain):
        rows.append(Row("retain", concept.forget_prompts[n % len(concept.forget_prompts)], r, {r: 1.0}))
    return Recipe(rows, Sum(options.prior_weight, forget_weight=1 - options.prior_weight))


ACE = Method(
    name="ace",
    paper="Wang et al. 2025, arXiv 2501.01633",
    needs="the concept, retain prompts",
    summary="turns the unconditional prediction against the concept, too, so that editing cannot bring it back",
    recipe=recipe,
    options=Options,
    defaults={
        "shapes": Defaults(300, 1e-3, 16, 16, "cross-attention-kv", "linear"),
        "stable-diffusion": Defaults(1000, 1e-5, 4, 32, "cross-attention"),
    },
    needs_retain=True,
)
