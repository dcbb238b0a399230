"""The world of shapes: a real, small Stable Diffusion pipeline, and the classifier that reads its images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..base import World
from .prompts import VOCABULARY, attributes, evaluation_prompts, train_prompts
from .world import BACKGROUNDS, COLORS, SHAPES

if TYPE_CHECKING:
    from .classifier import Classifier
    from .embedding import Embedding

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
    return WEIGHTS / "pipeline" if name == "shapes" else _assemble_gold(name.removeprefix("shapes-"))


def _assemble_gold(name: str) -> Path:
    import hashlib
    import os
    import shutil
    import tempfile

    parts = [path for part in ("pipeline", name) for path in sorted((WEIGHTS / part).rglob("*")) if path.is_file()]
    version = hashlib.sha256(b"".join(path.read_bytes() for path in parts)).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastunlearn"
    folder = cache / f"shapes-{name}-{version}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            unfinished = Path(scratch) / "pipeline"
            shutil.copytree(WEIGHTS / "pipeline", unfinished)
            shutil.copytree(WEIGHTS / name, unfinished, dirs_exist_ok=True)
            try:
                unfinished.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster
                    raise
    return folder


def is_shapes_pipeline(folder: Path) -> bool:
    """Whether a pipeline draws the bundled world: it has the bundled tokenizer and VAE configuration."""
    own = WEIGHTS / "pipeline"
    for part in ("tokenizer/tokenizer.json", "vae/config.json"):
        if not (folder / part).is_file() or _content(folder / part) != _content(own / part):
            return False
    return True


def _content(path: Path) -> dict:
    content = json.loads(path.read_text(encoding="utf-8"))
    return {key: value for key, value in content.items() if not key.startswith("_")}


def load_classifier(folder: Path = WEIGHTS) -> Classifier:
    """The world's classifier with its trained weights, in float32 and evaluation mode."""
    from safetensors.torch import load_file

    from .classifier import Classifier

    classifier = Classifier()
    weights = load_file(folder / "classifier.safetensors")
    classifier.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in weights.items()})
    return classifier.eval().requires_grad_(False)


def load_embedding() -> Embedding:
    """The world's network for metrics and for the distance, on the CPU."""
    from .embedding import Embedding

    return Embedding()


SHAPES_WORLD = World(
    name="shapes",
    vocabulary=VOCABULARY,
    models=MODELS,
    folder=pipeline_folder,
    is_pipeline=is_shapes_pipeline,
    attributes=attributes,
    train_prompts=train_prompts,
    evaluation_prompts=evaluation_prompts,
    load_network=load_embedding,
)
