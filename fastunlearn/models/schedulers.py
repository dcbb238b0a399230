"""What a scheduler says of a model: whether it draws noise at every step, its settings, and how it mixes noise in.

It is the scheduler that decides this, not the family: Stable Diffusion XL comes with both kinds below.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from typing import Any

import torch

from ..errors import UserError
from ..record import plain
from .samplers import alternatives, is_flow, with_scheduler

__all__ = [
    "check_deterministic",
    "draws_noise",
    "dynamic_shift",
    "flow_timesteps",
    "is_flow",
    "noised",
    "sampler_config",
    "step_options",
    "with_scheduler",
]

# In the name of a class that draws noise at every step, whatever its settings.
_STOCHASTIC = ("Ancestral", "SDE", "Sde", "DDPM", "LCM", "SASolver", "UnCLIP", "RePaint", "CMStochastic", "SCM")


def draws_noise(scheduler: Any) -> str:
    """Why this sampler draws noise at every step, in words; empty for one that draws none."""
    name = type(scheduler).__name__
    config = getattr(scheduler, "config", {})
    reasons = {
        "algorithm_type": str(config.get("algorithm_type", "")).startswith("sde"),
        "stochastic_sampling": bool(config.get("stochastic_sampling", False)),
        "eta": bool(config.get("eta", 0.0)),
    }
    why = [f"{name} with {key} = {config[key]}" for key, is_reason in reasons.items() if is_reason]
    return why[0] if why else name if any(word in name for word in _STOCHASTIC) else ""


def check_deterministic(scheduler: Any) -> None:
    """UserError for a sampler whose images are no function of the noise that they start from.

    Noise that a sampler draws at every step is made such a function by :func:`step_options`, if it takes a generator.
    """
    if (why := draws_noise(scheduler)) and "generator" not in _arguments(scheduler):
        others = " or ".join(alternatives(scheduler))
        raise UserError(
            f"{why} adds noise at every step, so pairs cannot be compared. Use another by `--scheduler`"
            f"{f', such as {others}' if others else ''}."
        )


def step_options(scheduler: Any, noise: torch.Tensor) -> dict[str, Any]:
    """Further arguments of a sampler's ``step`` for a batch that starts from ``noise`` (B, C, H, W).

    Of one that draws noise, a generator for each row, keyed by SHA-256 of the noise that the row starts from, so that
    it depends on no other row.  ``eta`` is 0 where a step takes it, as in diffusers' pipelines.
    """
    options: dict[str, Any] = {"eta": 0.0} if "eta" in _arguments(scheduler) else {}
    if draws_noise(scheduler):
        options["generator"] = []
        for row in noise.detach().cpu().float().contiguous():
            key = hashlib.sha256(b"fastunlearn-step-noise-1|" + row.numpy().tobytes()).digest()
            options["generator"].append(torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1))
    return options


def _arguments(scheduler: Any) -> Any:
    """The arguments of ``step``, by name."""
    return inspect.signature(scheduler.step).parameters


def sampler_config(model: Any) -> dict[str, Any]:
    """The scheduler's class and all its settings, for comparing two models' samplers.

    It is plain JSON: a setting that is no finite number, such as DPM-Solver's ``lambda_min_clipped``, is a text.
    """
    config = json.loads(model.pipeline.scheduler.to_json_string())
    return {key: plain(value) for key, value in config.items() if key != "_diffusers_version"}


def dynamic_shift(scheduler: Any, tokens: int, max_shift: float = 1.15) -> float:
    """``mu`` of a flow scheduler's ``set_timesteps``: more tokens, more steps spent on much noise.

    Linear between two numbers of tokens that the scheduler's settings name; ``max_shift`` where they name none.
    """
    settings = scheduler.config
    few, many = settings.get("base_image_seq_len", 256), settings.get("max_image_seq_len", 4096)
    low, high = settings.get("base_shift", 0.5), settings.get("max_shift", max_shift)
    slope = (high - low) / (many - few)
    return tokens * slope + (low - slope * few)


def flow_timesteps(scheduler: Any, steps: int, tokens: int) -> dict[str, Any]:
    """Arguments of ``set_timesteps``: noise shares evenly from 1 to 1 / steps, which the scheduler then shifts."""
    mu = {"mu": dynamic_shift(scheduler, tokens)} if scheduler.config.get("use_dynamic_shifting") else {}
    if scheduler.config.get("use_flow_sigmas"):
        return {"num_inference_steps": steps, **mu}
    if "sigmas" not in inspect.signature(scheduler.set_timesteps).parameters:
        raise UserError(
            f"{type(scheduler).__name__} takes no noise levels, which this model chooses itself. "
            "Use FlowMatchEulerDiscreteScheduler."
        )
    return {"sigmas": torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).tolist(), **mu}


def noised(
    scheduler: Any, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the denoiser is asked, and what it should answer: ``(x_t, truth)``, both (T, C, H, W) float32.

    ``clean``: (C, H, W) or (T, C, H, W).  ``noise``: (T, C, H, W).  ``timesteps``: (T,) float32, fractions as they are.
    ``x_t`` is scaled as the scheduler scales the denoiser's input.
    """
    if hasattr(scheduler, "precondition_outputs"):
        return _noised_edm(scheduler, clean, noise, timesteps)
    if is_flow(scheduler):
        share = (timesteps.to(noise.device) / scheduler.config.num_train_timesteps).view(-1, *[1] * (noise.ndim - 1))
        return torch.lerp(clean.expand_as(noise), noise, share), noise - clean
    alphas = _alphas(scheduler, timesteps.to(noise.device)).view(-1, *[1] * (noise.ndim - 1))
    signal, sigma = alphas.sqrt(), (1 - alphas).sqrt()
    truths = {
        "epsilon": lambda: noise,
        "v_prediction": lambda: signal * noise - sigma * clean,
        "sample": lambda: clean.expand_as(noise),
    }
    return signal * clean + sigma * noise, _of(truths, scheduler)()


def levels(scheduler: Any, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(alpha, sigma) at timesteps (T,) float32: what the denoiser sees is alpha times the image and sigma times noise.

    Not for samplers that precondition their outputs.
    """
    if is_flow(scheduler):
        share = timesteps / scheduler.config.num_train_timesteps
        return 1 - share, share
    alphas = _alphas(scheduler, timesteps)
    return alphas.sqrt(), (1 - alphas).sqrt()


def split(
    scheduler: Any, latents: torch.Tensor, prediction: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(image, noise) that latents (B, C, H, W) are made of, by the denoiser's word."""
    if is_flow(scheduler):
        return latents - sigma * prediction, latents + alpha * prediction
    kinds = {
        "epsilon": lambda: ((latents - sigma * prediction) / alpha, prediction),
        "v_prediction": lambda: (alpha * latents - sigma * prediction, alpha * prediction + sigma * latents),
        "sample": lambda: (prediction, (latents - alpha * prediction) / sigma),
    }
    found: tuple[torch.Tensor, torch.Tensor] = _of(kinds, scheduler)()
    return found


def _alphas(scheduler: Any, timesteps: torch.Tensor) -> torch.Tensor:
    """Shares of the clean signal's variance, (T,).

    Between two timesteps of the table log sigma is linear, as samplers have it that choose sigmas first.
    """
    if scheduler.config.get("timestep_type") == "continuous" and scheduler.config.prediction_type == "v_prediction":
        return 1 / (1 + (8 * timesteps).exp())  # its timesteps are log(sigma) / 4
    if not hasattr(scheduler, "alphas_cumprod"):
        raise UserError(f"{type(scheduler).__name__} does not say how it adds noise. Use DDIM, PNDM or Euler.")
    table = scheduler.alphas_cumprod.to(timesteps.device, torch.float32)
    low = timesteps.long().clamp(0, len(table) - 1)
    high = (low + 1).clamp(max=len(table) - 1)
    odds = table.clamp(2**-24, 1 - 2**-24).logit()  # -2 log sigma; a zero signal has none
    between = torch.lerp(odds[low], odds[high], timesteps - low).sigmoid()
    return torch.where(timesteps == low, table[low], between)


def _noised_edm(
    scheduler: Any, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Karras et al. 2022 (arXiv 2206.00364), table 1: the denoiser sees ``c_in x`` and completes ``c_skip x``.

    A timestep is ``log(sigma) / 4``.  The truth is ``(clean - c_skip x) / c_out``, multiplied out.
    """
    data = scheduler.config.sigma_data
    sigma = (4 * timesteps.to(noise.device)).exp().view(-1, *[1] * (noise.ndim - 1))
    spread = (sigma.square() + data**2).sqrt()
    sign = _of({"epsilon": 1, "v_prediction": -1}, scheduler)
    truth = sign * (sigma * clean - data**2 * noise) / (data * spread)
    return (clean + sigma * noise) / spread, truth


def _of(kinds: dict[str, Any], scheduler: Any) -> Any:
    kind = scheduler.config.prediction_type
    if kind not in kinds:
        raise UserError(
            f"{type(scheduler).__name__} predicts {kind!r}, which is not served. Served: {', '.join(kinds)}."
        )
    return kinds[kind]
