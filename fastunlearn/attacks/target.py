"""One model under attack: it is asked, or made to draw from given conditions, and the judge looks at what comes out."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from ..batching import chunks, filled, filled_tensor
from ..evaluation.generators import Key, PipelineSource, Source
from ..judges.base import Judge
from ..models.base import Model, Tensors
from ..models.sampling import decode, denoise, initial_noise
from .base import ROWS, Costs, Verdict
from .pictures import Pictures
from .verdicts import verdicts


class Target:
    """``name``: what it is here, such as ``unlearned``.  ``pictures``: what the original makes of the prompts.

    ``unrelated``: prompts about other things.  All images are made in batches of one size, so that none depends on its
    company.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        pictures: Pictures | None,
        judge: Judge,
        concept: str,
        costs: Costs,
        unrelated: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        self.name, self.source, self.judge, self.concept = name, source, judge, concept
        self.costs, self.unrelated, self.seed = costs, unrelated, seed
        self._pictures = pictures

    @property
    def batch_size(self) -> int:
        return self.source.batch_size

    @property
    def prompts_at_once(self) -> int:
        """Prompts that share a forward of an optimization."""
        return prompts_at_once(self.batch_size)

    @property
    def pipeline(self) -> PipelineSource:
        assert isinstance(self.source, PipelineSource)  # the plan refuses others
        return self.source

    @property
    def model(self) -> Model:
        return self.pipeline.model

    @property
    def is_original(self) -> bool:
        return self._pictures is not None and self._pictures.model is self.model

    @property
    def pictures(self) -> Pictures:
        assert self._pictures is not None
        return self._pictures

    @functools.cached_property
    def guided_from(self) -> list[Tensors]:
        """A batch of the conditions that guidance leads away from; none where nothing guides."""
        names = self.model.guided_from(self.pipeline.spec.guidance_scale)
        return [self.pipeline.text.of([name] * self.batch_size) for name in names]

    def encode(self, prompts: Sequence[str]) -> Tensors:
        """The denoiser's conditions for prompts, each encoded in a batch of one size; repeats included."""
        return self.model.encode(prompts, self.batch_size).of(prompts)

    def ask(self, keys: Sequence[Key]) -> list[Verdict]:
        """Images of (prompt, seed), as the evaluation makes them."""
        return self.look(self.source.generate(keys))

    def draw(self, keys: Sequence[Key], conditions: Tensors, recorded: torch.Tensor | None = None) -> list[Verdict]:
        """Images from the noise of (prompt, seed), N of them, and other conditions than the prompts', (N, ...) each.

        ``recorded``: (T, K, N, C, H, W), what the sampler takes at its first T points in place of the model's word.
        """
        noise = initial_noise([prompt for prompt, _ in keys], [seed for _, seed in keys], self.source.noise_shape)
        return self.finish(noise, conditions, recorded)

    @torch.no_grad()
    def finish(self, noise: torch.Tensor, conditions: Tensors, recorded: torch.Tensor | None = None) -> list[Verdict]:
        """Images from noise (N, C, H, W); as :meth:`draw`."""
        images, size, spec = [], self.batch_size, self.pipeline.spec
        for rows in chunks(range(len(noise)), size):
            index = torch.tensor(filled(list(rows), size))
            guiding = {name: values[index.to(values.device)] for name, values in conditions.items()}
            given = None if recorded is None else recorded[:, :, index.to(recorded.device)]
            latents = denoise(self.model, [*self.guided_from, guiding], noise[index], spec, given)
            images.append(decode(self.model, latents, spec)[: len(rows)])
        return self.look(torch.cat(images))

    def decoded(self, latents: torch.Tensor) -> list[Verdict]:
        """Images of final latents (N, C, H, W)."""
        size = self.batch_size
        parts = [
            decode(self.model, filled_tensor(part, size), self.pipeline.spec)[: len(part)]
            for part in latents.split(size)
        ]
        return self.look(torch.cat(parts))

    def look(self, images: torch.Tensor) -> list[Verdict]:
        """What the judge says of images (N, 3, H, W) uint8."""
        return verdicts(self.judge, images, self.concept, self.batch_size)


def prompts_at_once(batch_size: int) -> int:
    """How many prompts an attack takes together, with a few rows each in a step."""
    return max(1, batch_size // ROWS)
