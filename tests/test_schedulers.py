"""Schedulers: which draw noise, how they mix it in, and their settings as JSON."""

import inspect
import json
import types
from functools import partial

import pytest
import torch
from tiny_models import BETAS, ZERO_SNR, ddim, diffusers, euler, scheduler
from toys import MeanDifference

from fastunlearn import evaluate
from fastunlearn.errors import UserError
from fastunlearn.models.samplers import build, is_flow
from fastunlearn.models.schedulers import (
    check_deterministic,
    draws_noise,
    dynamic_shift,
    noised,
    sampler_config,
    step_options,
)

PLAIN = ("DDIM", "DDPM", "PNDM", "LMSDiscrete", "EulerDiscrete", "HeunDiscrete", "EulerAncestralDiscrete", "LCM", "TCD")
PLAIN += ("KDPM2Discrete", "KDPM2AncestralDiscrete", "DEISMultistep", "UniPCMultistep", "SASolver")
DPM = [("Multistep", kind) for kind in ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++")]
DPM += [("Singlestep", kind) for kind in ("dpmsolver", "dpmsolver++", "sde-dpmsolver++")]
SAMPLERS = {
    **{name: partial(scheduler, name) for name in PLAIN},
    **{
        f"{name} {kind}": partial(scheduler, f"DPMSolver{name}", algorithm_type=kind, final_sigmas_type="sigma_min")
        for name, kind in DPM
    },
    "EDM Euler": lambda: diffusers.EDMEulerScheduler(),
    "EDM multistep": lambda: diffusers.EDMDPMSolverMultistepScheduler(),
    "EDM multistep sde": lambda: diffusers.EDMDPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    "flow Euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
    "flow Euler stochastic": lambda: diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    "flow Heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(),
}


def final_latents(sampler, seed, **options):
    """What a fixed denoiser and the sampler come to, with torch's own noise seeded so.  ``options``: of a step."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sampler.set_timesteps(6)
        latents = torch.linspace(-1, 1, 16).view(1, 1, 4, 4)
        for timestep in sampler.timesteps:
            scaled = sampler.scale_model_input(latents, timestep) if hasattr(sampler, "scale_model_input") else latents
            latents = sampler.step(0.3 * scaled, timestep, latents, return_dict=False, **options)[0]
        return latents


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.filterwarnings(
    "ignore:__array_wrap__ must accept:DeprecationWarning", "ignore:.*is deprecated:FutureWarning"
)
def test_a_sampler_that_draws_noise_is_known_and_gets_ours(make):
    """Asked of the sampler itself: two seeds of torch's generator, one result or two; with our noise, one."""
    plain = step_options(make(), torch.zeros(0, 1, 4, 4)) | {"generator": None}
    plain = {name: value for name, value in plain.items() if name in inspect.signature(make().step).parameters}
    draws = not torch.equal(final_latents(make(), 0, **plain), final_latents(make(), 1, **plain))
    assert bool(draws_noise(make())) is draws
    check_deterministic(make())
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    one, other = (final_latents(make(), 0, **step_options(make(), noise[i : i + 1])) for i in (0, 1))
    assert torch.equal(one, final_latents(make(), 1, **step_options(make(), noise[:1])))
    assert torch.equal(one, other) is not draws


class Restless(diffusers.DDIMScheduler):
    """Named like those that draw noise, and takes no generator for it."""

    def step(self, model_output, timestep, sample, return_dict=True):
        return super().step(model_output, timestep, sample, return_dict=return_dict)


@pytest.mark.parametrize(
    ("settings", "named", "others"),
    [
        ({}, "RestlessSDE adds noise", "Euler or DDIM or DPMSolverMultistep"),
        ({"algorithm_type": "sde-x"}, "RestlessSDE with algorithm_type = sde-x adds", "Euler or DDIM"),
        ({"rescale_betas_zero_snr": True}, "RestlessSDE adds noise", "Euler or DDIM or DPMSolverMultistep"),
    ],
)
def test_a_sampler_whose_noise_cannot_be_ours_is_refused_with_others(settings, named, others):
    sampler = type("RestlessSDE", (Restless,), {})(**BETAS)
    sampler.register_to_config(**settings)
    with pytest.raises(UserError, match=rf"^{named}.*by `--scheduler`, such as {others}"):
        check_deterministic(sampler)


# ---- another sampler -------------------------------------------------------------------------------------------------


DIFFUSION = ("DDIM", "ddimscheduler", "PNDM", "Euler", "EulerDiscrete", "heun", "LMS", "KDPM2", "UniPC", "DEIS")
NAMED = [(name, ddim) for name in (*DIFFUSION, "DPMSolverMultistep", "DPMSolverSinglestep", "LCM", "EulerAncestral")]
NAMED += [(name, diffusers.FlowMatchEulerDiscreteScheduler) for name in ("Heun", "DPMSolverMultistep", "UniPC")]
NAMED += [("Euler", partial(diffusers.DPMSolverMultistepScheduler, use_flow_sigmas=True, flow_shift=3.0))]
NAMED += [("DPMSolverMultistep", diffusers.EDMEulerScheduler), ("Euler", diffusers.EDMDPMSolverMultistepScheduler)]


@pytest.mark.parametrize(("name", "make"), NAMED)
def test_a_sampler_by_name_keeps_what_is_the_models(name, make):
    own = make() if make is not NAMED[-3][1] else make(prediction_type="flow_prediction")
    built = build(own, name)
    assert name.lower().removesuffix("scheduler") in type(built).__name__.lower()
    assert is_flow(built) is is_flow(own)
    shared = {"beta_start", "beta_end", "num_train_timesteps", "sigma_data", "sigma_max"} & set(own.config)
    assert all(built.config[key] == own.config[key] for key in shared & set(built.config))
    shift = {own.config.get("shift"), own.config.get("flow_shift")} - {None}
    assert not is_flow(own) or {built.config.get("shift"), built.config.get("flow_shift")} >= shift


def test_noise_at_every_step_is_switched_off_where_it_is_a_setting():
    built = build(scheduler("DPMSolverMultistep", algorithm_type="sde-dpmsolver++"), "DPMSolverMultistep")
    assert built.config.algorithm_type == "dpmsolver++"
    assert not draws_noise(built)
    flow = build(diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "Euler")
    assert not draws_noise(flow)


REFUSED = {
    "unknown": (ddim, "Nonsense", "has no such sampler. Use Euler or DPMSolverMultistep."),
    "a scheduler of another thing": (ddim, "KarrasDiffusion", "has no such sampler"),
    "a flow's for a diffusion": (ddim, "FlowMatchEulerDiscrete", "samples flow models, and the model is a diffusion"),
    "a diffusion's for a flow": (diffusers.FlowMatchEulerDiscreteScheduler, "DDIM", "samples diffusion models"),
    "EDM": (diffusers.EDMEulerScheduler, "DDIM", "has no sigma_data, with which"),
    "zero SNR": (partial(ddim, **ZERO_SNR), "PNDM", "has no rescale_betas_zero_snr, with which the model is sampled"),
}


@pytest.mark.parametrize(("make", "name", "said"), REFUSED.values(), ids=REFUSED)
def test_a_sampler_that_cannot_sample_the_model_is_one_line(make, name, said):
    with pytest.raises(UserError, match=rf"^`--scheduler {name}`: .*{said}") as error:
        build(make(), name)
    assert len(str(error.value).splitlines()) == 1


# ---- mixing noise in -------------------------------------------------------------------------------------------------

SHAPE = (2, 3, 5)
CLEAN = torch.linspace(-2, 2, 30).view(SHAPE)


def noise_for(count):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("settings", [{}, {"prediction_type": "v_prediction"}, ZERO_SNR], ids=["epsilon", "v", "zero"])
@pytest.mark.parametrize("make", [ddim, euler], ids=["DDIM", "Euler"])
def test_at_whole_timesteps_noise_is_mixed_in_as_diffusers_does(make, settings):
    theirs = diffusers.DDPMScheduler(**BETAS | settings)
    timesteps = torch.tensor([0, 1, 250, 613, 998])
    noise = noise_for(5)
    latents, truth = noised(make(**settings), CLEAN, noise, timesteps.float())
    clean = CLEAN.expand_as(noise)
    torch.testing.assert_close(latents, theirs.add_noise(clean, noise, timesteps), atol=1e-5, rtol=1e-5)
    wanted = theirs.get_velocity(clean, noise, timesteps) if settings else noise
    torch.testing.assert_close(truth, wanted, atol=1e-5, rtol=1e-5)


def test_without_signal_the_input_is_the_noise_and_the_velocity_the_image():
    latents, truth = noised(ddim(**ZERO_SNR), CLEAN, noise_for(1), torch.tensor([999.0]))
    assert torch.equal(latents, noise_for(1))
    assert torch.equal(truth[0], -CLEAN)


def test_the_truth_of_sample_prediction_is_the_image():
    _, truth = noised(ddim(prediction_type="sample"), CLEAN, noise_for(2), torch.tensor([3.0, 700.0]))
    assert torch.equal(truth, CLEAN.expand_as(truth))


@pytest.mark.parametrize("spacing", [{"use_karras_sigmas": True}, {"use_exponential_sigmas": True}])
def test_between_timesteps_the_noise_level_is_the_samplers_own(spacing):
    sampler = euler(**spacing)
    sampler.set_timesteps(9)
    assert (sampler.timesteps != sampler.timesteps.round()).sum() > 5
    noise = noise_for(9)
    latents, _ = noised(sampler, CLEAN, noise, sampler.timesteps)
    sigmas = sampler.sigmas[:-1].view(-1, 1, 1, 1)
    wanted = (CLEAN + sigmas * noise) / (sigmas.square() + 1).sqrt()
    torch.testing.assert_close(latents, wanted, atol=1e-3, rtol=1e-3)


def test_continuous_timesteps_of_v_prediction_are_logarithms_of_sigma():
    sampler = euler(prediction_type="v_prediction", timestep_type="continuous", use_karras_sigmas=True)
    sampler.set_timesteps(5)
    noise = noise_for(5)
    latents, truth = noised(sampler, CLEAN, noise, sampler.timesteps)
    sigmas = sampler.sigmas[:-1].view(-1, 1, 1, 1)
    spread = (sigmas.square() + 1).sqrt()
    torch.testing.assert_close(latents, (CLEAN + sigmas * noise) / spread, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(truth, (noise - sigmas * CLEAN) / spread, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("data", [0.5, 1.0])
def test_an_edm_sampler_that_hears_the_truth_sees_the_image(kind, data):
    sampler = diffusers.EDMEulerScheduler(sigma_data=data, prediction_type=kind)
    sampler.set_timesteps(7)
    noise = noise_for(7)
    latents, truth = noised(sampler, CLEAN, noise, sampler.timesteps)
    for index, sigma in enumerate(sampler.sigmas[:-1]):
        noisy = CLEAN + sigma * noise[index]
        torch.testing.assert_close(latents[index], sampler.precondition_inputs(noisy, sigma), atol=1e-4, rtol=1e-4)
        seen = sampler.precondition_outputs(noisy, truth[index], sigma)
        torch.testing.assert_close(seen, CLEAN, atol=1e-3, rtol=1e-3)


def test_a_prediction_that_is_not_known_is_refused():
    with pytest.raises(UserError, match="predicts 'something', which is not served"):
        noised(ddim(prediction_type="something"), CLEAN, noise_for(1), torch.tensor([5.0]))


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DPMSolverMultistep", "DPMSolverSinglestep", "SASolver"])
@pytest.mark.parametrize("value", [-float("inf"), float("inf"), float("nan"), -5.1])
def test_a_samplers_settings_are_plain_json(name, value):
    key = "lambda_min_clipped"
    model = types.SimpleNamespace(pipeline=types.SimpleNamespace(scheduler=scheduler(name, **{key: value})))
    config = json.loads(json.dumps(sampler_config(model), allow_nan=False))
    assert config[key] == (value if value == -5.1 else str(value))
    assert config["_class_name"] == f"{name}Scheduler"


def test_a_model_with_a_dpm_solver_can_be_evaluated(pipeline_copy, tmp_path):
    scheduler("DPMSolverSinglestep", use_karras_sigmas=True).save_pretrained(pipeline_copy / "scheduler")
    index = pipeline_copy / "model_index.json"
    named = json.loads(index.read_text()) | {"scheduler": ["diffusers", "DPMSolverSinglestepScheduler"]}
    index.write_text(json.dumps(named))
    evaluate(
        str(pipeline_copy),
        str(pipeline_copy),
        ["a red ring", "a blue cross"],
        metric=MeanDifference(),
        num_inference_steps=2,
        batch_size=2,
        control_pairs=2,
        output=str(tmp_path / "evaluation"),
        device="cpu",
    )

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    written = (tmp_path / "evaluation" / "evaluation.json").read_text()
    json.loads(written, parse_constant=refuse)
    assert '"lambda_min_clipped": "-inf"' in written


# ---- flows -----------------------------------------------------------------------------------------------------------

FLOWS = {
    "Euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "Heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
}


@pytest.mark.parametrize("make", FLOWS.values(), ids=FLOWS)
def test_a_flow_mixes_noise_in_as_diffusers_does(make):
    sampler = make()
    sampler.set_timesteps(5)
    timesteps = sampler.timesteps.unique()
    noise = noise_for(len(timesteps))
    latents, truth = noised(sampler, CLEAN, noise, timesteps)
    for timestep, latent, one in zip(timesteps, latents, noise, strict=True):
        theirs = make()
        theirs.set_timesteps(5)
        assert torch.allclose(latent, theirs.scale_noise(CLEAN, timestep.view(1), one), atol=1e-6)
    assert torch.equal(truth, noise - CLEAN)


@pytest.mark.parametrize("name", ["DPMSolverMultistep", "UniPCMultistep"])
def test_a_solver_of_a_flow_reaches_the_image_by_the_truth(name):
    """Told the truth at every point, it ends at the clean image, and its points are on the line to the noise."""
    settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    sampler = getattr(diffusers, f"{name}Scheduler")(**settings)
    sampler.set_timesteps(8)
    noise = noise_for(1)
    latents = noise
    for timestep in sampler.timesteps:
        point, truth = noised(sampler, CLEAN, noise, timestep.float().view(1))
        assert torch.allclose(latents, point, atol=2e-2)  # timesteps are whole numbers of a thousand
        latents = sampler.step(truth, timestep, latents, return_dict=False)[0]
    assert torch.allclose(latents, CLEAN[None], atol=2e-2)


@pytest.mark.parametrize("settings", [{}, {"base_shift": 0.6, "max_shift": 1.0, "max_image_seq_len": 8192}])
def test_more_tokens_shift_a_flow_as_in_diffusers(settings):
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    sampler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **settings)
    theirs = {key: sampler.config[key] for key in ("base_shift", "max_shift")}
    theirs |= {"base_seq_len": sampler.config.base_image_seq_len, "max_seq_len": sampler.config.max_image_seq_len}
    assert dynamic_shift(sampler, 1234) == calculate_shift(1234, **theirs)
