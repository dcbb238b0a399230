"""What the original makes of the prompts: trajectories with all its predictions, made once for all attacks.

They are a bank's, so nothing that an attack needs of the original is computed twice.  Their noise is neither a
training's nor that of the images that the judge is shown, but where an attack hands it over.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch

from ..judges.base import Judge
from ..methods.recipe import Recipe, Row
from ..methods.rules import Sum
from ..models.base import Model, Tensors
from ..models.sampling import SamplerSpec, decode, denoise, initial_noise
from ..training.bank import Bank, BankPlan, build_bank
from .verdicts import verdicts

#: Pictures per prompt.
COUNT = 4
PURPOSE = "attack"  # of their noise


@dataclasses.dataclass(frozen=True)
class Trajectories:
    """P prompts with K trajectories each, of T points.

    ``bank``: rows of prompt p, number k, point t are at (p K + k) T + t.  ``noise``, ``final``: (P K, C, H, W), where
    each began and ended.  ``shown``: (P, K) bool, the judge sees the concept in its picture.
    """

    bank: Bank
    prompts: tuple[str, ...]
    points: int
    noise: torch.Tensor
    final: torch.Tensor
    shown: torch.Tensor

    def rows(self, prompt: int) -> torch.Tensor:
        """The bank's rows of one prompt's pictures that show the concept; of all of them where none does."""
        kept = self.shown[prompt] if self.shown[prompt].any() else torch.ones_like(self.shown[prompt])
        first = (prompt * len(kept) + kept.nonzero()[:, 0]) * self.points
        return (first[:, None] + torch.arange(self.points)).flatten()

    def recorded(self, number: int, points: int) -> torch.Tensor:
        """The original's predictions at the first ``points`` of each prompt's trajectory ``number``:
        (points, K, P, C, H, W)."""
        per_prompt = self.shown.shape[1]
        first = (torch.arange(len(self.prompts)) * per_prompt + number) * self.points
        index = first[None, :] + torch.arange(points)[:, None]
        return self.bank.teacher_preds[:, index.to(self.bank.latents.device)].transpose(0, 1)

    def of(self, number: int, values: torch.Tensor) -> torch.Tensor:
        """The rows of each prompt's trajectory ``number`` of ``noise`` or ``final``."""
        return values[number :: self.shown.shape[1]]


class Pictures:
    """The original's trajectories by prompts, the last ones kept."""

    def __init__(self, model: Model, spec: SamplerSpec, judge: Judge, concept: str, seed: int = 0) -> None:
        self.model, self.spec, self.judge, self.concept, self.seed = model, spec, judge, concept, seed
        self._made = functools.lru_cache(maxsize=2)(self._make)

    def of(self, prompts: Sequence[str], count: int = COUNT) -> Trajectories:
        return self._made(tuple(prompts), count)

    def _make(self, prompts: tuple[str, ...], count: int) -> Trajectories:
        model, spec, size = self.model, self.spec, self.spec.micro_batch_size
        rows = [Row("forget", prompt, prompt, {prompt: 1.0}) for prompt in prompts]
        points = len(model.new_scheduler(spec.num_inference_steps).timesteps)
        assignments = tuple((row, number) for row in rows for number in range(count))
        guided_from = model.guided_from(spec.guidance_scale)
        branches, steps = len(guided_from) + 1, spec.num_inference_steps
        plan = BankPlan(assignments, branches, steps, points, spec.guidance_scale, guided_from, self.seed)
        bank = build_bank(model, Recipe(rows, Sum()), plan, micro_batch_size=size, purpose=PURPOSE)
        seeds = [self.seed * 1_000_003 + number for _, number in assignments]
        names = [row.trajectory for row, _ in assignments]
        noise = initial_noise(names, seeds, model.latent_shape, PURPOSE)
        # Where they ended: the sampler once more, which has all predictions already.
        guiding = [model.encode([name], size).of([name] * len(names)) for name in guided_from]
        guiding.append(model.encode(prompts, size).of(names))
        recorded = bank.teacher_preds.view(branches, len(names), points, *model.latent_shape).permute(2, 0, 1, 3, 4, 5)
        final = denoise(model, guiding, noise, spec, recorded)
        images = torch.cat([decode(model, part, spec) for part in final.split(size)])
        shown = torch.tensor([one.shown for one in verdicts(self.judge, images, self.concept, size)])
        return Trajectories(bank, prompts, points, noise, final, shown.view(len(prompts), count))


def noised_rows(
    model: Model, final: torch.Tensor, timesteps: torch.Tensor, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ordinary training on pictures: final latents (N, C, H, W) at timesteps (N,) -> (latents, truth)."""
    seeds = list(range(len(final)))
    noise = initial_noise([name] * len(final), seeds, model.latent_shape, PURPOSE).to(final.device)
    return model.noised(final, noise, timesteps)


def repeated(tensors: Tensors, index: torch.Tensor) -> Tensors:
    """Rows of conditions, as often as ``index`` (B,) names them."""
    return {name: values[index.to(values.device)] for name, values in tensors.items()}
