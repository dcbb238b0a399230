"""The loss of an attack: our row loss, whose gradient goes to the condition of the model under attack.

Each prompt has unknowns of its own, and all prompts share a forward.  A step's rows are points of the original's
trajectories for the prompt, and what the model should predict there is what the original predicts.
"""

from __future__ import annotations

import torch
from fastunlearn_kernels import noise_pred_loss

from ..models.base import Tensors
from .base import BACKWARD, ROWS
from .pictures import Trajectories, repeated
from .target import Target

#: What a step costs a prompt, in U.
STEP = ROWS * (1 + BACKWARD)


class RowLoss:
    """Rows of some prompts' pictures, drawn step by step from generators of their own.

    ``per_step``: rows of a prompt.  ``fixed``: the same rows in every step, spread over the trajectory.
    """

    def __init__(self, target: Target, pictures: Trajectories, *, per_step: int = ROWS, fixed: bool = False) -> None:
        self._target, self._bank, self._fixed, self.per_step = target, pictures.bank, fixed, per_step
        self._points = pictures.points
        self._rows = [pictures.rows(index) for index in range(len(pictures.prompts))]
        self._draws = [torch.Generator().manual_seed(target.seed * 1_000_003 + 17) for _ in self._rows]

    def __call__(self, conditions: Tensors, prompts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, () with its gradient, and each prompt's own (P,), detached.

        ``conditions``: (P, ...) each, of these ``prompts``.
        """
        model, bank = self._target.model, self._bank
        index = torch.cat([self._drawn(prompt) for prompt in prompts]).to(bank.latents.device)
        rows = torch.arange(len(prompts)).repeat_interleave(self.per_step)
        guided = model.with_guidance(repeated(conditions, rows), self._target.pipeline.spec.guidance_scale)
        prediction = model.predict(bank.latents[index], bank.timesteps[index], guided)
        # A mean over the rows of each prompt, summed over prompts: no prompt's gradient depends on another.
        weights = torch.full((len(index),), float(len(prompts)), device=index.device)
        loss, per_row = noise_pred_loss(
            prediction, bank.teacher_preds, bank.coefficients[index], weights, row_index=index
        )
        return loss, per_row.view(len(prompts), self.per_step).mean(1)

    def _drawn(self, prompt: int) -> torch.Tensor:
        rows, count = self._rows[prompt], self.per_step
        if self._fixed:  # of one picture after the other, at points all over the trajectory
            number = torch.arange(count)
            points = (2 * number + 1) * self._points // (2 * count)
            return rows[number % (len(rows) // self._points) * self._points + points]
        return rows[torch.randint(len(rows), (count,), generator=self._draws[prompt])]
