"""The world of shapes: a real, small Stable Diffusion pipeline, and the classifier that reads its images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..base import World
from ..bundle import assembled, is_same_world
from .prompts import VOCABULARY, attributes, evaluation_prompts, train_prompts
from .world import BACKGROUNDS, COLORS, SHAPES

if TYPE_CHECKING:
    from ..classifier import Classifier
    from ..embedding import Embedding

WEIGHTS = Path(__file__).parent / "weights"
MODELS = ("shapes", "shapes-gold-star")

__all__ = [
    "BACKGROUNDS",
    "COLORS",
    "MODELS",
    "SHAPES",
    "SHAPES_WORLD",
    "is_shapes_pipeline",
    "load_classifier",
    "pipeline_folder",
]


def pipeline_folder(name: str) -> Path:
    """The diffusers folder of a bundled model: ``shapes``, or ``shapes-gold-star``, retrained without any star.

    Of the gold only what differs is shipped; its full folder is put together once in the user's cache.
    """
    if name not in MODELS:
        raise ValueError(f"unknown bundled model {name!r}. There are: {', '.join(MODELS)}.")
    if name == "shapes":
        return WEIGHTS / "pipeline"
    return assembled(WEIGHTS, "pipeline", name.removeprefix("shapes-"), name)


def is_shapes_pipeline(folder: Path) -> bool:
    """Whether a pipeline draws the bundled world: it has the bundled tokenizer and VAE configuration."""
    return is_same_world(folder, WEIGHTS / "pipeline")


def load_classifier(folder: Path = WEIGHTS) -> Classifier:
    """The world's classifier with its trained weights, in float32 and evaluation mode."""
    from ..classifier import Classifier, load_weights
    from .classifier import HEADS

    return load_weights(Classifier(HEADS), folder / "classifier.safetensors")


def load_embedding() -> Embedding:
    """The world's network for metrics and for the distance, on the CPU."""
    from ..embedding import Embedding

    return Embedding("shapes-classifier", load_classifier(), attributes)


SHAPES_WORLD = World(
    name="shapes",
    vocabulary=VOCABULARY,
    models=MODELS,
    folder=pipeline_folder,
    is_pipeline=is_shapes_pipeline,
    attributes=attributes,
    train_prompts=train_prompts,
    evaluation_prompts=evaluation_prompts,
    default_concept="star",
    load_classifier=load_classifier,
    load_network=load_embedding,
    golds={"star": "shapes-gold-star"},
)
