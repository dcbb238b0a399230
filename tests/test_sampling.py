"""Sampling: diffusers' own result, deterministic, and independent of the company in a batch."""

import pytest
import torch

from fastunlearn.evaluation.generators import PipelineSource
from fastunlearn.models.loading import load_model
from fastunlearn.models.runtime import import_diffusers
from fastunlearn.models.sampling import SamplerSpec, initial_noise, sample
from fastunlearn.models.schedulers import step_options

PROMPTS = ["a red star on a plain background", "a blue ring on a dotted background", "a circle"]


def run(model, prompts, seeds, steps=4, guidance=3.0):
    conditions = model.encode(["", *prompts])
    branches = [conditions.of([""] * len(prompts)), conditions.of(prompts)]
    noise = initial_noise(prompts, seeds, model.latent_shape)
    return list(sample(model, noise, branches, num_inference_steps=steps, guidance_scale=guidance))


def test_noise_is_a_function_of_prompt_and_seed_alone():
    shape = (8, 5, 3)
    together = initial_noise(PROMPTS, [0, 1, 2], shape)
    assert torch.equal(together[1], initial_noise([PROMPTS[1]], [1], shape)[0])
    assert not torch.equal(together[0], initial_noise([PROMPTS[0]], [1], shape)[0])
    assert not torch.equal(together[0], initial_noise([PROMPTS[1]], [0], shape)[0])
    assert abs(float(initial_noise(["x"], [0], (8, 64, 64)).std()) - 1) < 0.02


def test_noise_of_two_purposes_is_never_shared():
    evaluated = initial_noise(PROMPTS, [0, 1, 2], (2, 3, 3))
    trained = initial_noise(PROMPTS, [0, 1, 2], (2, 3, 3), "training")
    assert not (evaluated == trained).any()
    named = initial_noise(["training|" + prompt for prompt in PROMPTS], [0, 1, 2], (2, 3, 3))
    assert not (named == trained).any(), "nor by a prompt that names the purpose"


def test_noise_stays_the_same_between_versions():
    """Cached originals and published numbers depend on it."""
    value = initial_noise(["a red star"], [7], (1, 1, 4))[0].flatten()
    expected = torch.tensor([0.20401, 0.82213, -0.30908, -0.10001])
    torch.testing.assert_close(value, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
def test_latents_equal_those_of_the_diffusers_pipeline(bundled, scheduler):
    diffusers = import_diffusers()
    pipeline = bundled.pipeline
    before = pipeline.scheduler
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(before.config)
    try:
        pipeline.set_progress_bar_config(disable=True)
        noise = initial_noise(PROMPTS, [0, 1, 2], bundled.latent_shape)
        theirs = pipeline(
            PROMPTS, latents=noise.clone(), num_inference_steps=5, guidance_scale=3.0, output_type="latent"
        ).images
        ours = run(bundled, PROMPTS, [0, 1, 2], steps=5)[-1].next_latents
    finally:
        pipeline.scheduler = before
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


def test_the_sampler_calls_the_denoiser_once_a_step(bundled):
    calls = []
    hook = bundled.denoiser.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    try:
        points = run(bundled, PROMPTS, [0, 0, 0], steps=6)
    finally:
        hook.remove()
    assert calls == [2 * len(PROMPTS)] * 6
    assert len(points) == 6


def test_images_do_not_depend_on_their_place_in_a_batch(bundled):
    source = PipelineSource(bundled, SamplerSpec(num_inference_steps=3, micro_batch_size=4))
    keys = list(zip(PROMPTS, [0, 1, 2], strict=True))
    forward = source.generate(keys)
    backward = source.generate(keys[::-1])
    assert forward.dtype == torch.uint8
    assert forward.shape == (3, 3, 64, 64)
    assert torch.equal(forward, backward.flip(0))
    alone = source.generate(keys[1:2])  # padded to the same batch size
    assert torch.equal(alone[0], forward[1])


def test_more_keys_than_a_batch_give_the_same_images(bundled):
    source = PipelineSource(bundled, SamplerSpec(num_inference_steps=2, micro_batch_size=2))
    keys = list(zip(PROMPTS, [0, 1, 2], strict=True))
    three = source.generate(keys)
    assert torch.equal(three[:2], source.generate(keys[:2]))
    assert torch.equal(three[2:], source.generate(keys[2:]))


@pytest.mark.parametrize("scheduler", ["EulerAncestral", "DDPM", "LCM"])
def test_noise_of_every_step_depends_on_the_row_alone(scheduler):
    """Whatever torch's own generator does, and in whatever company."""
    source = PipelineSource(load_model("shapes", "cpu", scheduler=scheduler), SamplerSpec(3, micro_batch_size=3))
    keys = list(zip(PROMPTS, [0, 1, 2], strict=True))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        images = source.generate(keys)
        torch.manual_seed(1)
        assert torch.equal(source.generate(keys[::-1]).flip(0), images)
    assert not torch.equal(source.generate([(PROMPTS[0], 1)])[0], images[0])


def test_two_rows_do_not_share_the_noise_of_their_steps():
    scheduler = import_diffusers().LCMScheduler()
    noise = initial_noise(PROMPTS[:2], [0, 0], (2, 3, 3))
    draws = [torch.randn(5, generator=generator) for generator in step_options(scheduler, noise)["generator"]]
    again = [torch.randn(5, generator=generator) for generator in step_options(scheduler, noise)["generator"]]
    assert not torch.equal(*draws)
    assert all(map(torch.equal, draws, again))
    assert step_options(import_diffusers().PNDMScheduler(), noise) == {}
