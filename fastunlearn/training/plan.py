"""What a training will do, known and said before its first step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ..distributed import World
from ..methods import Method
from ..methods.recipe import Concept, Defaults, Recipe
from .bank import BankPlan
from .memory import MemoryEstimate
from .selection import GradMask


@dataclasses.dataclass(frozen=True)
class TrainPlan:
    """What a training will do, known before its first step.  Sizes in bytes, work in UNet evaluations of one sample."""

    method: Method
    settings: Defaults
    untried_on: str  # the family that the method has no defaults of its own for; empty where it has
    concept: Concept
    recipe: Recipe
    names: tuple[str, ...]
    mask: GradMask | None
    world: World
    deepspeed: Mapping[str, Any] | None  # the checked configuration
    accumulation: int
    memory: MemoryEstimate | None  # only for a dry run, which it is for
    trainable_parameters: int
    total_parameters: int
    trainable_bytes: int
    bank: BankPlan
    loop_forwards: int
    seconds_per_evaluation: float

    @property
    def loop_evaluations(self) -> int:
        """Forward and backward of the student, a backward counted as two forwards."""
        return 3 * self.loop_forwards


def plan_lines(plan: TrainPlan) -> list[str]:
    """What a training will do, in words, before its first step."""
    settings, concept = plan.settings, plan.concept
    share = plan.trainable_parameters / plan.total_parameters
    total = plan.bank.unet_evaluations + plan.loop_evaluations
    lines = [
        f"method      {plan.method.name}: {plan.method.summary}",
        f"forget      {_some(concept.forget_prompts)}",
    ]
    used = {row.role for row in plan.recipe.rows}
    if concept.anchors:
        lines.append(f"becomes     {_some(list(concept.anchors.values()))}")
    if "retain" in used:
        lines.append(f"keep        {_some(concept.retain_prompts)}")
    if plan.untried_on:
        lines.append(f"settings    where you chose none, those for stable-diffusion: untried on {plan.untried_on}")
    lines += [
        f"may change  {settings.trainable}: {plan.trainable_parameters:,} parameters, "
        f"{plan.trainable_bytes / 1e6:.1f} MB in float32, {share:.1%} of the denoiser",
        *([f"mask        {mask}"] if (mask := _mask_line(plan)) else []),
        f"bank        {plan.bank.rows:,} rows from {len(plan.bank.assignments)} trajectories, "
        f"{plan.bank.unet_evaluations:,} UNet evaluations",
        f"loop        {settings.steps} steps, {plan.loop_evaluations:,} UNet evaluations (a backward counts as two)",
    ]
    if plan.memory is not None:
        lines.append(f"memory      {_memory(plan.memory.device, 'a process')}")
        if plan.memory.host:
            lines.append(f"            {_memory(plan.memory.host, 'on the host')}")
    return [*lines, f"estimate    {_duration(total * plan.seconds_per_evaluation)} (from one timed forward)"]


def _memory(parts: Mapping[str, int], index: str) -> str:
    """The sum of bytes, and what it is made of, the largest first."""
    named = ", ".join(f"{name} {_bytes(size)}" for name, size in sorted(parts.items(), key=lambda item: -item[1]))
    return f"about {_bytes(sum(parts.values()))} {index}: {named}"


def _bytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _mask_line(plan: TrainPlan) -> str:
    if plan.mask is not None:
        return f"from a file, made for {_some([plan.mask.made.get('prompts', '?')])}"
    density = plan.settings.mask_density
    return f"the {density:.0%} of the elements that are most salient for the concept" if density is not None else ""


def _some(prompts: Sequence[str], limit: int = 3) -> str:
    distinct = list(dict.fromkeys(prompts))
    more = f" and {len(distinct) - limit} more" if len(distinct) > limit else ""
    return ", ".join(repr(prompt) for prompt in distinct[:limit]) + more


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"about {seconds:.0f} s"
    if seconds < 5400:
        return f"about {seconds / 60:.0f} min"
    return f"about {seconds / 3600:.1f} h"
