"""Make a text-to-image diffusion model forget a concept, and prove that everything else it produces is unchanged."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Lazy: importing fastunlearn loads neither torch nor diffusers.
_PUBLIC = {
    "AttackConfig": "attacks.config",
    "AttackReport": "attacks.results",
    "EvaluateConfig": "evaluation.config",
    "UserError": "errors",
    "EvaluateImagesConfig": "evaluation.config",
    "TrainConfig": "training.config",
    "EvaluationReport": "evaluation.results",
    "Judge": "judges.base",
    "Metric": "metrics.base",
    "PerceptualDistance": "metrics.lpips",
    "Reporter": "progress",
    "UnlearnResult": "training.result",
    "Verdicts": "judges.base",
    "attack": "attacks.attack",
    "evaluate": "evaluation.evaluate",
    "evaluate_images": "evaluation.evaluate_images",
    "load_judge": "judges",
    "load_metric": "metrics.base",
    "load_model": "models.loading",
    "load_perceptual": "metrics.distances",
    "unlearn": "training.unlearn",
}

__all__ = [
    "AttackConfig",
    "AttackReport",
    "EvaluateConfig",
    "EvaluateImagesConfig",
    "EvaluationReport",
    "Judge",
    "Metric",
    "PerceptualDistance",
    "Reporter",
    "TrainConfig",
    "UnlearnResult",
    "UserError",
    "Verdicts",
    "__version__",
    "attack",
    "evaluate",
    "evaluate_images",
    "load_judge",
    "load_metric",
    "load_model",
    "load_perceptual",
    "unlearn",
]

if TYPE_CHECKING:
    from .attacks.attack import attack
    from .attacks.config import AttackConfig
    from .attacks.results import AttackReport
    from .errors import UserError
    from .evaluation.config import EvaluateConfig, EvaluateImagesConfig
    from .evaluation.evaluate import evaluate
    from .evaluation.evaluate_images import evaluate_images
    from .evaluation.results import EvaluationReport
    from .judges import Judge, Verdicts, load_judge
    from .metrics.base import Metric, load_metric
    from .metrics.distances import load_perceptual
    from .metrics.lpips import PerceptualDistance
    from .models.loading import load_model
    from .progress import Reporter
    from .training.config import TrainConfig
    from .training.result import UnlearnResult
    from .training.unlearn import unlearn


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
