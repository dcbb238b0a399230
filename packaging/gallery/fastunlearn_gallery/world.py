"""What the engine knows of the gallery: its words, its models and its prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastunlearn.worlds.base import World
from fastunlearn.worlds.bundle import assembled, is_same_world

from .prompts import attributes, evaluation_prompts, train_prompts
from .words import GOLD_OBJECT, GOLD_STYLE, HEADS, VOCABULARY, WIDTHS

if TYPE_CHECKING:
    from fastunlearn.worlds.classifier import Classifier
    from fastunlearn.worlds.embedding import Embedding

__all__ = ["GALLERY", "MODELS", "WEIGHTS", "load_classifier", "pipeline_folder"]

WEIGHTS = Path(__file__).parent / "weights"
if not (WEIGHTS / "quality.json").is_file():  # the last that the tool writes
    raise ImportError("its weights are missing; in a clone `make gallery-weights` makes them")
MODELS = ("gallery", "gallery-gold")


def pipeline_folder(name: str) -> Path:
    """The diffusers folder of a model: ``gallery``, or ``gallery-gold``, which never saw one style and one object.

    Of the gold only what differs is shipped; its full folder is put together once in the user's cache.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}. There are: {', '.join(MODELS)}.")
    return WEIGHTS / "pipeline" if name == "gallery" else assembled(WEIGHTS, "pipeline", "gold", name)


def is_gallery_pipeline(folder: Path) -> bool:
    """Whether a pipeline generates images of the gallery: it has its tokenizer and VAE configuration."""
    return is_same_world(folder, WEIGHTS / "pipeline")


def load_classifier(folder: Path = WEIGHTS) -> Classifier:
    """The world's classifier with its trained weights, in float32 and evaluation mode."""
    from fastunlearn.worlds.classifier import Classifier, load_weights

    return load_weights(Classifier(HEADS, WIDTHS), folder / "classifier.safetensors")


def load_embedding() -> Embedding:
    """The world's network for metrics and for the distance, on the CPU."""
    from fastunlearn.worlds.embedding import Embedding

    return Embedding("gallery-classifier", load_classifier(), attributes)


GALLERY = World(
    name="gallery",
    vocabulary=VOCABULARY,
    models=MODELS,
    folder=pipeline_folder,
    is_pipeline=is_gallery_pipeline,
    attributes=attributes,
    train_prompts=train_prompts,
    evaluation_prompts=evaluation_prompts,
    default_concept=GOLD_STYLE,
    demo_methods=("ovw", "uce", "speed"),  # three minutes with one that trains
    load_classifier=load_classifier,
    load_network=load_embedding,
    t5_tokens=0,
    anchors={"emojione": "twemoji"},  # what noto never drew, the original draws as emojione does
    like=("shapes",),
    golds={GOLD_STYLE: "gallery-gold", GOLD_OBJECT: "gallery-gold"},
)
