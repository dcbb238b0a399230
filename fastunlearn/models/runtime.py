"""What a model runs on: diffusers and its like, imported late and silent; devices; versions."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

from ..errors import UserError


def mend_torchvision() -> None:
    """Make ``import torchvision`` work beside a CPU build of torch.

    The registry's torchvision is built for CUDA; without its compiled operators the import stops at
    ``operator torchvision::nms does not exist``, and with it transformers, diffusers and lpips.  Declaring the two
    operators' schemas is enough, since nothing here calls them.  Does nothing where torchvision imports as it is.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
    except ImportError:
        pass  # optional: only lpips needs it, and says so itself


def import_diffusers() -> ModuleType:
    """``diffusers``, importable also beside a CPU build of torch, and silent."""
    mend_torchvision()
    diffusers = importlib.import_module("diffusers")
    # What it logs as an error, it also raises: our one line says it.
    diffusers.utils.logging.set_verbosity(diffusers.utils.logging.CRITICAL)
    diffusers.utils.logging.disable_progress_bar()
    transformers = importlib.import_module("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return diffusers


def import_transformers() -> ModuleType:
    """``transformers``, likewise."""
    import_diffusers()
    return importlib.import_module("transformers")


def resolve_device(device: str | torch.device) -> torch.device:
    """``auto`` is a CUDA device where there is one.  UserError for a device that this machine lacks."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("`--device cuda` needs a CUDA device and this machine has none. Use `--device cpu`.")
    return device


def versions() -> dict[str, str]:
    """What a result was computed with, for the records of a run and of an evaluation."""
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "diffusers": import_diffusers().__version__,
    }
