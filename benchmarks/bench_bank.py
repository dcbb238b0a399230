"""Rows from a bank against the usual loop, on the bundled model: 200 training rows of ESD, one run, medians.

The usual loop is the authors' (erasing, esd_sd.py): for every row a fresh partial trajectory at batch 1, two separate
teacher calls and a student step at batch 1.  It is given the prompts encoded once, which theirs is not.

    python -m pytest benchmarks/bench_bank.py --benchmark-enable --benchmark-json benchmarks/results/bank_speed.json
"""

from __future__ import annotations

import pytest
import torch

from fastunlearn.bank import build_bank, plan_bank
from fastunlearn.engine import TorchEngine
from fastunlearn.masks import select_parameters
from fastunlearn.models import load_model
from fastunlearn.recipe import EMPTY, Recipe, Row, Sum
from fastunlearn.sampling import initial_noise
from fastunlearn.trainer import Schedule, Trainer

ROWS, STEPS, GUIDANCE, ETA = 200, 50, 3.0, 2.0
PROMPT = "a red star on a plain background"
RECIPE = Recipe([Row("forget", PROMPT, PROMPT, {PROMPT: 1 - ETA, EMPTY: ETA})], Sum())

_usual_seconds: list[float] = []


def new_engine(model):
    return TorchEngine(model.denoiser, select_parameters(model.denoiser, "cross-attention"), learning_rate=1e-4)


def usual_loop(rows=ROWS):
    """A fresh partial trajectory, two teacher calls and a student step for every row, all at batch 1."""
    teacher, student = load_model("shapes", "cpu"), load_model("shapes", "cpu")
    engine = new_engine(student)
    conditions = teacher.encode([EMPTY, PROMPT])
    empty, concept = conditions.of([EMPTY]), conditions.of([PROMPT])
    both = conditions.of([EMPTY, PROMPT])
    draws = torch.Generator().manual_seed(0)
    for row in range(rows):
        with torch.no_grad():
            stop = int(torch.randint(STEPS - 1, (1,), generator=draws))
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
    """The same number of rows, by the engine: bank and loop."""
    model = load_model("shapes", "cpu")
    plan = plan_bank(RECIPE, trajectories=trajectories, num_inference_steps=STEPS, guidance_scale=GUIDANCE, seed=0)
    bank = build_bank(model, RECIPE, plan)
    schedule = Schedule(ROWS // batch_size, batch_size, seed=0, log_every=1000, checkpoint_every=0)
    Trainer(model, bank, RECIPE.rule, new_engine(model), schedule, folder).run()


def test_usual_loop(benchmark):
    usual_loop(rows=2)
    benchmark.extra_info |= {"rows": ROWS, "threads": torch.get_num_threads()}
    benchmark.pedantic(usual_loop, rounds=1, iterations=1)  # 200 rows are an average already
    if benchmark.stats is not None:
        _usual_seconds.append(benchmark.stats.stats.median)


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("trajectories", [4, 8, 16, 50])
def test_bank(benchmark, tmp_path, trajectories, batch_size):
    benchmark.pedantic(with_bank, args=(tmp_path, trajectories, batch_size), rounds=3, iterations=1, warmup_rounds=1)
    benchmark.extra_info |= {"trajectories": trajectories, "batch_size": batch_size, "rows": ROWS}
    if benchmark.stats is not None and _usual_seconds:
        benchmark.extra_info["times_faster"] = round(_usual_seconds[0] / benchmark.stats.stats.median, 2)
