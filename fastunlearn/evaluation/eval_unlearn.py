"""A technique of the package eval-unlearn, so that its runner scores what a run of ours left.

Its runner makes a technique from its own config file, and asks it for the images of one batch of prompts after another.
What answers here is the run's diffusers pipeline itself, with the noise that its own techniques draw: image i of a call
from a generator with the seed ``seed + i``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch

from ..batching import chunks
from ..config import at_least, check_types, setting
from ..errors import UserError
from ..models.loading import load_frozen
from ..models.sampling import SamplerSpec
from .generators import PipelineSource
from .inputs import check_runs, run_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class TechniqueConfig:
    """What stands in the runner's config under ``technique: config:``."""

    model: str = setting("a run's folder, or a name as for `load_model`", path=True)
    erase_concept: str | None = setting("what the runner's report says; checked against the run's record", None)
    device: Literal["auto", "cpu", "cuda"] = setting("auto takes a GPU where there is one", "auto")
    num_inference_steps: int = setting("sampler steps", 50)
    guidance_scale: float = setting("classifier-free guidance; 0 or 1: none", 7.5)
    batch_size: int = setting("images per forward", 4)
    seed: int = setting("of the first image, where the runner gives none; every later one has the next", 0)

    def __post_init__(self) -> None:
        check_types(self)
        at_least(self, 1, "num_inference_steps", "batch_size")
        at_least(self, 0, "guidance_scale", "seed")


class Technique:
    """Generates images for eval-unlearn's runner.

    Raises UserError for settings that it does not know, for a model that cannot be loaded or has changed since its run,
    and for another concept than the run's.
    """

    def __init__(self, **settings: Any) -> None:
        known = [field.name for field in dataclasses.fields(TechniqueConfig)]
        if "model" not in settings or (unknown := sorted(settings.keys() - set(known))):
            wrong = f"unknown: {', '.join(unknown)}" if "model" in settings else "`model` is missing"
            raise UserError(f"the technique's config: {wrong}. It has: {', '.join(known)}.")
        self.config = TechniqueConfig(**settings)
        run, concept = run_of(self.config.model), self.config.erase_concept
        if run is not None and concept is not None and concept.lower() not in map(str.lower, run.forgotten):
            raise UserError(
                f"`erase_concept` is {concept!r}, and {self.config.model} forgot {'; '.join(run.forgotten)}. Name that."
            )
        model = load_frozen(self.config.model, self.config.device)
        check_runs({"technique": run}, {"technique": PipelineSource(model, SamplerSpec())})
        self.pipe = model.pipeline
        self.pipe.set_progress_bar_config(disable=True)
        self._next = self.config.seed

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], seed: int | None = None, **settings: Any) -> list[Any]:
        """A PIL image per prompt.  ``seed``: of the first one; ``settings`` go to the pipeline."""
        first = self._next if seed is None else seed
        if seed is None:
            self._next += len(prompts)
        sampled = {
            "num_inference_steps": self.config.num_inference_steps,
            "guidance_scale": self.config.guidance_scale,
            **settings,
        }
        images: list[Any] = []
        for part in chunks(range(len(prompts)), self.config.batch_size):
            generators = [torch.Generator(self.pipe.device).manual_seed(first + index) for index in part]
            texts = [prompts[index] for index in part]
            images += self.pipe(prompt=texts, generator=generators, output_type="pil", **sampled).images
        return images
