"""Another sampler in the place of a model's own, built from the settings of that one.

What the settings say of the model, its noise levels and what it predicts, must carry over whole; what they say of the
sampler may go.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from typing import Any

from ..errors import UserError, one_line
from .runtime import import_diffusers

# Settings of a scheduler that are the model's: a sampler that lacks one of them would sample another model.
_MODELS_OWN = {
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "timestep_type": "discrete",
    "use_dynamic_shifting": False,
    "shift_terminal": None,
    "sigma_data": None,
}
#: What is proposed in the place of a sampler that cannot be used, as far as it can be built.
_PROPOSED = ("Euler", "DDIM", "DPMSolverMultistep")


def is_flow(scheduler: Any) -> bool:
    """Whether its denoiser predicts the velocity of a rectified flow, on a straight line from the image to noise.

    A timestep is then the noise's share of the latents, times ``num_train_timesteps``.
    """
    return hasattr(scheduler, "scale_noise") or scheduler.config.get("prediction_type") == "flow_prediction"


def with_scheduler(pipeline: Any, name: str | None, model: str) -> Any:
    """The pipeline with the sampler ``name``; the given one keeps its own.  UserError if it cannot be built."""
    if name is None:
        return pipeline
    scheduler = build(pipeline.scheduler, name, model)
    pipeline = copy.copy(pipeline)
    pipeline.scheduler = scheduler
    return pipeline


def build(own: Any, name: str, model: str = "the model") -> Any:
    """The sampler ``name`` with the settings of ``own``, noise at every step switched off where that is a setting.

    ``name``: a class of diffusers, with or without "Scheduler", "Discrete" and the like.  Raises UserError, in one
    line, for an unknown one and for one that cannot sample this model.
    """
    try:
        return _built(own, name, model)
    except UserError as error:
        others = " or ".join(alternatives(own))
        raise UserError(f"`--scheduler {name}`: {error} {f'Use {others}.' if others else 'Leave it out.'}") from error


def alternatives(own: Any) -> list[str]:
    """Names of samplers that :func:`build` makes from these settings, other than the model's own."""
    found = []
    for name in _PROPOSED:
        with contextlib.suppress(UserError):
            built = _built(own, name, "the model")
            if type(built) is not type(own) or dict(built.config) != dict(own.config):
                found.append(name)
    return found


def _built(own: Any, name: str, model: str) -> Any:
    kind = _class_of(own, name)
    config = dict(own.config)
    changes = _without_noise(config)
    takes = inspect.signature(kind).parameters
    if is_flow(own) and "use_flow_sigmas" in takes:
        shift = config.get("flow_shift") or config.get("shift") or 1.0
        changes |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    elif is_flow(own) and "shift" in takes:
        changes["shift"] = config.get("flow_shift") or config.get("shift") or 1.0
    lost = [
        key
        for key, usual in _MODELS_OWN.items()
        if config.get(key, usual) not in (usual, "flow_prediction") and key not in takes and key not in changes
    ]
    if lost:
        raise UserError(f"{kind.__name__} has no {lost[0]}, with which {model} is sampled.")
    try:
        built = kind.from_config(config, **changes)
        built.set_timesteps(4, **({"mu": 1.0} if built.config.get("use_dynamic_shifting") else {}))
    except Exception as error:
        raise UserError(f"{kind.__name__} cannot be built from {model}'s settings: {one_line(error)}") from error
    if _nature(built) != _nature(own):
        raise UserError(f"{kind.__name__} samples {_nature(built)} models, and {model} is a {_nature(own)} model.")
    return built


def _nature(scheduler: Any) -> str:
    """What a model must be for this sampler: its timesteps and noise levels mean different things."""
    if hasattr(scheduler, "precondition_outputs"):
        return "EDM"
    return "flow" if is_flow(scheduler) else "diffusion"


def _class_of(own: Any, name: str) -> Any:
    """The class of diffusers that ``name`` means for a model with this sampler."""
    diffusers = import_diffusers()
    known = {one.removesuffix("Scheduler").lower(): one for one in dir(diffusers) if one.endswith("Scheduler")}
    wanted = name.strip().lower().removesuffix("scheduler")
    first = {"flow": "flowmatch", "EDM": "edm", "diffusion": ""}[_nature(own)]
    for start in dict.fromkeys((first, "")):
        for end in ("", "discrete", "multistep"):
            if (found := known.get(start + wanted + end)) is not None:
                kind = getattr(diffusers, found)
                if hasattr(kind, "from_config"):
                    return kind
    raise UserError("the installed diffusers has no such sampler.")


def _without_noise(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that switch noise at every step off."""
    changes: dict[str, Any] = {}
    algorithm = str(config.get("algorithm_type", ""))
    if algorithm.startswith("sde-"):
        changes["algorithm_type"] = algorithm.removeprefix("sde-")
    if config.get("stochastic_sampling"):
        changes["stochastic_sampling"] = False
    return changes
