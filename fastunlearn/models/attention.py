"""What computes attention: torch's own function, or that of a library, through diffusers.

Newer transformers ask diffusers' dispatcher; UNets and older transformers have a processor in every layer.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import UserError, one_line

_PACKAGES = {"xformers": "xformers", "flash": "flash-attn"}
# Layers whose processor diffusers exchanges for one of xformers that computes the same.
_EXCHANGED = ("AttnProcessor", "AttnProcessor2_0", "JointAttnProcessor2_0")


def set_attention(denoiser: Any, backend: str, name: str, *, is_masked: bool = False) -> None:
    """Have ``native``, ``xformers`` or ``flash`` compute the denoiser's attention.

    ``is_masked``: the denoiser leaves tokens out by a mask, which flash attention does not take.
    Raises UserError, in one line, where this machine or the denoiser of the model ``name`` cannot.
    """
    dispatches = _dispatches(denoiser)
    if backend == "native":
        if dispatches:  # else a variable of the environment decides
            denoiser.set_attention_backend("native")
        return
    if not dispatches and backend == "flash":
        raise UserError(
            f"`--attention flash`: {name}'s layers do not ask diffusers' dispatcher. Leave it out (torch's own takes "
            "flash attention where it can) or use xformers."
        )
    if not can_compute(denoiser, backend, is_masked=is_masked):
        raise UserError(f"`--attention {backend}`: {name} has layers that it cannot compute. Leave it out.")
    if not torch.cuda.is_available():
        raise UserError(f"`--attention {backend}` needs a CUDA device and this machine has none. Leave it out.")
    try:
        if dispatches:
            denoiser.set_attention_backend(backend)
        else:
            denoiser.enable_xformers_memory_efficient_attention()
    except Exception as error:
        raise UserError(
            f"`--attention {backend}` cannot run here: {one_line(error)} Install {_PACKAGES[backend]} for this "
            "torch, or leave it out."
        ) from error


def can_compute(denoiser: Any, backend: str, *, is_masked: bool = False) -> bool:
    """Whether ``xformers`` or ``flash`` can compute all of the denoiser's layers, on a machine that has it."""
    if backend == "flash" and is_masked:
        return False
    kinds = {type(processor).__name__ for processor in _processors(denoiser)}
    return _dispatches(denoiser) or (backend == "xformers" and kinds <= set(_EXCHANGED))


def _processors(denoiser: Any) -> list[Any]:
    return [module.processor for module in denoiser.modules() if hasattr(module, "processor")]


def _dispatches(denoiser: Any) -> bool:
    return any(hasattr(processor, "_attention_backend") for processor in _processors(denoiser))
