"""The embedding attack on 16 prompts in one batch, beside the usual loop: seconds per row, and what both spend in U.

    python -m pytest benchmarks/bench_attacks.py --benchmark-enable -q

The usual loop (P4D's, and ESD's before it) takes one prompt at a time and has its teacher inside: for each row it
samples the original up to a random point, asks it there, then the model under attack, forward and backward.
"""

from __future__ import annotations

import itertools
import time

import torch

from fastunlearn import load_judge, load_model
from fastunlearn.attacks import parse_attacks
from fastunlearn.attacks.base import Costs, Order
from fastunlearn.attacks.embedding import LOOKS
from fastunlearn.attacks.pictures import Pictures
from fastunlearn.attacks.rows import STEP
from fastunlearn.attacks.target import Target
from fastunlearn.evaluation.generators import PipelineSource
from fastunlearn.judges import Verdicts
from fastunlearn.judges.base import Judge
from fastunlearn.methods.recipe import UNCONDITIONAL
from fastunlearn.models.sampling import SamplerSpec, initial_noise, sample

PROMPTS = 16
STEPS = 120  # the attack's own
USUAL_ROWS = 12  # of the usual loop, which are timed


class Blind(Judge):
    """Never sees the concept, so that no prompt ends early; it works as hard as the judge that it asks."""

    def __init__(self, judge: Judge) -> None:
        self.name, self._judge = "blind", judge

    def judge(self, images: torch.Tensor, concept: str) -> Verdicts:
        seen = self._judge.judge(images, concept).shown
        return Verdicts(seen * 0)


def test_sixteen_prompts_at_once_beside_one_at_a_time(benchmark):
    original, unlearned = load_model("shapes", "cpu"), load_model("shapes-gold-star", "cpu")
    assert original.world is not None
    prompts = [prompt for prompt, _ in original.world.prompts_to_evaluate("star")[:PROMPTS]]
    spec = SamplerSpec()
    attack, option = parse_attacks("embedding")["embedding"]
    costs = Costs(40, 20, PROMPTS)

    def ours():
        judge = Blind(load_judge("shapes"))
        pictures = Pictures(original, spec, judge, "star")
        target = Target("unlearned", PipelineSource(unlearned, spec), pictures, judge, "star", costs)
        budget = LOOKS * costs.image + STEPS * STEP
        attempts = attack.run(target, Order(prompts, ["forget"] * PROMPTS, budget, option))
        assert {one.tries[-1].cost for one in attempts} == {budget}

    benchmark.pedantic(ours, rounds=1, iterations=1)
    ours_s = benchmark.stats.stats.min / (PROMPTS * STEPS * 2)
    usual_s, usual_u = usual_loop(original, unlearned, prompts[0])
    ratio = usual_s / ours_s
    benchmark.extra_info |= {
        "threads": torch.get_num_threads(),
        "seconds_per_row": {"ours, pictures and images included": ours_s, "usual": usual_s},
        "u_per_row": {"ours": 3 + 4 * costs.image / (2 * STEPS), "usual": usual_u},
        "ratio": round(ratio, 1),
    }
    assert ratio >= 6


def usual_loop(original, unlearned, prompt: str) -> tuple[float, float]:
    """Seconds and U of a row, the mean of some."""
    branches = [original.encode([text]).of([text]) for text in (UNCONDITIONAL, prompt)]
    states = unlearned.encode([prompt]).tensors["encoder_hidden_states"]
    offset = torch.zeros(1, 1, states.shape[-1], requires_grad=True)
    optimizer = torch.optim.Adam([offset], lr=0.03)
    spent = 0
    started = time.monotonic()
    for row in range(USUAL_ROWS):
        noise = initial_noise([prompt], [row], original.latent_shape)
        stop = 1 + row * 19 // (USUAL_ROWS - 1)  # points evenly over the trajectory, for a mean without luck
        points = sample(original, noise, branches, num_inference_steps=20, guidance_scale=3.0)
        *_, point = itertools.islice(points, stop)
        spent += 2 * stop
        conditions = {"encoder_hidden_states": states + offset}
        said = unlearned.predict(point.latents, point.timestep, conditions)
        loss = (said - point.predictions[1]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        spent += 3
    return (time.monotonic() - started) / USUAL_ROWS, spent / USUAL_ROWS
