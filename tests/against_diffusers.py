"""Every family with its samplers, as tiny pipelines, and what plain diffusers draws with them from the same noise."""

import torch
from tiny_models import (
    ZERO_SNR,
    auraflow,
    cosxl,
    ddim,
    diffusers,
    dynamic,
    euler,
    flow,
    flux,
    lumina2,
    pixart,
    playground,
    pndm,
    qwen_image,
    sana,
    scheduler,
    sd1,
    sd2,
    sd3,
    sd35,
    sdxl,
    z_image,
)

from fastunlearn.evaluation.generators import PipelineSource
from fastunlearn.models.sampling import SamplerSpec, initial_noise
from fastunlearn.models.schedulers import step_options

CASES = {
    "sd1 PNDM": sd1,
    "sd1 DDIM": lambda: sd1(ddim()),
    "sd1 Euler": lambda: sd1(euler()),
    "sd1 Euler linspace": lambda: sd1(scheduler("EulerDiscrete")),
    "sd1 Euler Karras": lambda: sd1(euler(use_karras_sigmas=True)),
    "sd1 Heun": lambda: sd1(scheduler("HeunDiscrete")),
    "sd1 LMS": lambda: sd1(scheduler("LMSDiscrete")),
    "sd1 KDPM2": lambda: sd1(scheduler("KDPM2Discrete")),
    "sd1 DPM++ 2M": lambda: sd1(scheduler("DPMSolverMultistep")),
    "sd1 DPM++ 2M Karras": lambda: sd1(scheduler("DPMSolverMultistep", use_karras_sigmas=True)),
    "sd1 DPM++ 2S": lambda: sd1(scheduler("DPMSolverSinglestep")),
    "sd1 UniPC": lambda: sd1(scheduler("UniPCMultistep")),
    "sd1 DEIS": lambda: sd1(scheduler("DEISMultistep")),
    "sd1 sample": lambda: sd1(ddim(prediction_type="sample")),
    "sd1 distilled": lambda: sd1(ddim(), time_cond_proj_dim=16),
    "sd1 LCM": lambda: sd1(scheduler("LCM"), time_cond_proj_dim=16),
    "sd1 Euler ancestral": lambda: sd1(scheduler("EulerAncestralDiscrete")),
    "sd1 KDPM2 ancestral": lambda: sd1(scheduler("KDPM2AncestralDiscrete")),
    "sd1 TCD": lambda: sd1(scheduler("TCD")),
    "sd1 DPM++ 2M SDE": lambda: sd1(scheduler("DPMSolverMultistep", algorithm_type="sde-dpmsolver++")),
    "sd2 v": sd2,
    "sd2 v PNDM": lambda: sd2(pndm(prediction_type="v_prediction")),
    "sd2 zero SNR": lambda: sd2(ddim(**ZERO_SNR, set_alpha_to_one=True)),
    "sd2 zero SNR Euler": lambda: sd2(euler(**ZERO_SNR)),
    "sdxl": sdxl,
    "sdxl encoded empty prompt": lambda: sdxl(zeros=False),
    "sdxl v": lambda: sdxl(euler(prediction_type="v_prediction", rescale_betas_zero_snr=True)),
    "sdxl Turbo": lambda: sdxl(scheduler("EulerAncestralDiscrete", timestep_spacing="trailing")),
    "sdxl Lightning": lambda: sdxl(euler(timestep_spacing="trailing")),
    "sdxl LCM": lambda: sdxl(scheduler("LCM")),
    "playground": playground,
    "cosxl": cosxl,
    "pixart alpha": lambda: pixart(alpha=True),
    "pixart sigma": pixart,
    "sd3": sd3,
    "sd3 dynamic": lambda: sd3(flow(use_dynamic_shifting=True)),
    "sd3 Heun": lambda: sd3(diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)),
    "sd3.5": sd35,
    "flux dev": flux,
    "flux schnell": lambda: flux(flow(shift=1.0), guidance=False),
    "sana": sana,
    "sana Euler": lambda: sana(flow(shift=3.0)),
    "lumina2": lumina2,
    "lumina2 dynamic": lambda: lumina2(dynamic()),
    "auraflow": auraflow,
    "qwen-image": qwen_image,
    "z-image": z_image,
}
PROMPTS = ["a painting by Van Gogh", "a photo of a dog"]
STEPS, GUIDANCE = 4, 3.5


def images_of(model, guidance=GUIDANCE, prompts=PROMPTS):
    """What we draw, (B, 3, H, W) int32."""
    spec = SamplerSpec(STEPS, guidance, len(prompts))
    return PipelineSource(model, spec).generate([(prompt, 0) for prompt in prompts]).int()


def images_of_diffusers(folder, guidance=GUIDANCE, prompts=PROMPTS, **options):
    """The same from the same noise, by the pipeline as a stranger would load it."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    return drawn_by(pipeline, guidance, prompts, **options)


def drawn_by(pipeline, guidance=GUIDANCE, prompts=PROMPTS, size=None, **options):
    """What a pipeline draws.  ``size``: (width, height) in pixels; ``options``: of its call."""
    pipeline.set_progress_bar_config(disable=True)
    if type(pipeline).__name__.startswith(("PixArt", "Sana")):
        options |= {"use_resolution_binning": False, "clean_caption": False}
    network = getattr(pipeline, "unet", None) or pipeline.transformer
    packed = isinstance(pipeline, diffusers.FluxPipeline | diffusers.QwenImagePipeline)
    channels, factor = network.config.in_channels // (4 if packed else 1), pipeline.vae_scale_factor
    width, height = size or [network.config.sample_size * factor] * 2
    noise = initial_noise(prompts, [0] * len(prompts), (channels, height // factor, width // factor))
    options |= {"generator": step_options(pipeline.scheduler, noise).get("generator")}
    noise = pipeline._pack_latents(noise, *noise.shape) if packed else noise
    options |= {"num_inference_steps": STEPS, "guidance_scale": guidance, "height": height, "width": width}
    if isinstance(pipeline, diffusers.QwenImagePipeline):  # its guidance scale is another thing
        options |= {"guidance_scale": None, "true_cfg_scale": guidance}
        options = {"negative_prompt": [""] * len(prompts)} | options
    images = pipeline(list(prompts), latents=noise, output_type="np", **options).images  # Z-Image writes into it
    return (torch.from_numpy(images).permute(0, 3, 1, 2) * 255).round().int()


def assert_same(ours, theirs):
    assert ours.shape == theirs.shape
    assert ours.float().std() > 5, "an image of one color compares with anything"
    assert (ours - theirs).abs().max() <= 1
