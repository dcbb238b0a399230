"""Rows from a bank against the usual loop, on the bundled model: 200 training rows of ESD, side by side in one run.

The usual loop is the authors' (erasing, esd_sd.py): for every row a fresh partial trajectory at batch 1, two separate
teacher calls and a student step at batch 1.  It is given the prompts encoded once, which theirs is not.  Before every
round of a bank, 25 rows of the usual loop are timed, so that a machine whose speed drifts slows both alike; their
trajectories end at evenly spread steps, so that eight times their time is the time of 200.  Loading is on neither side.

    python -m pytest benchmarks/bench_bank.py --benchmark-enable --benchmark-json benchmarks/results/bank_speed.json
"""

from __future__ import annotations

import functools
import statistics
import time

import pytest
import torch

from fastunlearn.methods.recipe import UNCONDITIONAL, Recipe, Row
from fastunlearn.methods.rules import Sum
from fastunlearn.models.loading import load_model
from fastunlearn.models.sampling import initial_noise
from fastunlearn.training.bank import build_bank, plan_bank
from fastunlearn.training.engine import TorchEngine
from fastunlearn.training.selection import Selection, select_parameters
from fastunlearn.training.trainer import Schedule, Trainer

ROWS, USUAL_ROWS, STEPS, GUIDANCE, ETA = 200, 25, 50, 3.0, 2.0
ROUNDS = 3
PROMPT = "a red star on a plain background"
RECIPE = Recipe([Row("forget", PROMPT, PROMPT, {PROMPT: 1 - ETA, UNCONDITIONAL: ETA})], Sum())

load = functools.cache(lambda role: load_model("shapes", "cpu"))


def new_engine(model):
    names = select_parameters(model.denoiser, "cross-attention")
    return TorchEngine(model.denoiser, Selection.of(model.denoiser, names), learning_rate=1e-4)


def usual_loop(rows=USUAL_ROWS):
    """A fresh partial trajectory, two teacher calls and a student step for every row, all at batch 1."""
    teacher, student = load("teacher"), load("student")
    engine = new_engine(student)
    conditions = teacher.encode([UNCONDITIONAL, PROMPT])
    empty, concept = conditions.of([UNCONDITIONAL]), conditions.of([PROMPT])
    both = conditions.of([UNCONDITIONAL, PROMPT])
    for row in range(rows):
        with torch.no_grad():
            stop = row * (STEPS - 1) // (rows - 1)  # 0 to 49, as the authors' uniform draw
            scheduler = teacher.new_scheduler(STEPS)
            latents = initial_noise([PROMPT], [row], teacher.latent_shape)
            for timestep in scheduler.timesteps[:stop]:
                uncond, text = teacher.predict(latents.repeat(2, 1, 1, 1), timestep, both).chunk(2)
                latents = scheduler.step(uncond + GUIDANCE * (text - uncond), timestep, latents, return_dict=False)[0]
            timestep = scheduler.timesteps[stop]
            text = teacher.predict(latents, timestep, concept)
            uncond = teacher.predict(latents, timestep, empty)
            target = text - ETA * (text - uncond)
        loss = torch.nn.functional.mse_loss(student.predict(latents, timestep, concept), target)
        engine.backward(loss)
        engine.step()


def with_bank(folder, trajectories, batch_size):
    """200 rows by the engine: bank and loop."""
    model = load("bank")
    plan = plan_bank(
        model, RECIPE, trajectories=trajectories, num_inference_steps=STEPS, guidance_scale=GUIDANCE, seed=0
    )
    bank = build_bank(model, RECIPE, plan)
    schedule = Schedule(ROWS // batch_size, batch_size, seed=0, log_every=1000, checkpoint_every=0)
    Trainer(model, bank, RECIPE.rule, new_engine(model), schedule, folder).run()


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("trajectories", [4, 8, 16, 50])
def test_bank(benchmark, tmp_path, trajectories, batch_size):
    usual_seconds = []

    def setup():
        started = time.perf_counter()
        usual_loop()
        usual_seconds.append((time.perf_counter() - started) * ROWS / USUAL_ROWS)
        return (tmp_path, trajectories, batch_size), {}

    usual_loop(rows=2)
    with_bank(tmp_path, trajectories, batch_size)
    benchmark.pedantic(with_bank, setup=setup, rounds=ROUNDS)
    benchmark.extra_info |= {"trajectories": trajectories, "batch_size": batch_size, "rows": ROWS}
    if benchmark.stats is not None:
        ratios = [usual / ours for usual, ours in zip(usual_seconds, benchmark.stats.stats.data, strict=True)]
        benchmark.extra_info |= {
            "threads": torch.get_num_threads(),
            "usual_seconds": statistics.median(usual_seconds),
            "times_faster": round(statistics.median(ratios), 2),
            "times_faster_range": [round(min(ratios), 2), round(max(ratios), 2)],
        }
