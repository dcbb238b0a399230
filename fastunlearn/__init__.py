"""Make a text-to-image diffusion model forget a concept, and prove that everything else it produces is unchanged."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Lazy: importing fastunlearn loads neither torch nor diffusers.
_PUBLIC = {
    "EvaluateConfig": "config",
    "EvaluateImagesConfig": "config",
    "TrainConfig": "config",
    "EvaluationReport": "results",
    "PerceptualDistance": "perceptual",
    "Reporter": "api",
    "evaluate": "evaluation",
    "evaluate_images": "images",
    "load_model": "models",
    "load_perceptual": "perceptual",
    "unlearn": "api",
}

__all__ = [
    "EvaluateConfig",
    "EvaluateImagesConfig",
    "EvaluationReport",
    "PerceptualDistance",
    "Reporter",
    "TrainConfig",
    "__version__",
    "evaluate",
    "evaluate_images",
    "load_model",
    "load_perceptual",
    "unlearn",
]

if TYPE_CHECKING:
    from .api import Reporter, unlearn
    from .config import EvaluateConfig, EvaluateImagesConfig, TrainConfig
    from .evaluation import evaluate
    from .images import evaluate_images
    from .models import load_model
    from .perceptual import PerceptualDistance, load_perceptual
    from .results import EvaluationReport


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
