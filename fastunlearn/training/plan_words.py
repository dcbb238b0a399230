"""A training's plan in words, line by line, as it is shown before the first step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .. import concepts
from ..methods.recipe import UNCONDITIONAL, Edit, Role, Row
from .budget import memory_lines
from .plan import TrainPlan


def plan_lines(plan: TrainPlan) -> list[str]:
    """What a training will do, in words, before its first step."""
    settings, concept = plan.settings, plan.concept
    share = plan.trainable_parameters / plan.total_parameters
    total = plan.search_evaluations + plan.bank.unet_evaluations + plan.loop_evaluations
    total += plan.evidence.unet_evaluations if plan.evidence else 0
    lines = [f"method      {plan.method.name}: {plan.method.summary}"]
    if len(concept.concepts) > 1:
        lines.append(f"concepts    {len(concept.concepts)}: {concepts.title(concept.concepts)}")
    lines.append(f"forget      {_some(concept.forget_prompts)}{_left_out(plan, 'forget')}")
    if concept.anchors:
        lines.append(f"becomes     {_some(list(concept.anchors.values()))}")
    if concept.retain_prompts and (
        isinstance(plan.recipe, Edit) or any(row.role == "retain" for row, _ in plan.bank.assignments)
    ):
        lines.append(f"keep        {_some(concept.retain_prompts)}{_left_out(plan, 'retain')}")
    finder = concepts.Finder(concept.concepts)
    if torn := [prompt for prompt in concept.retain_prompts if finder.named(prompt)]:
        lines.append(f"torn        {len(torn)} prompts to keep name what is to be forgotten: {_some(torn, 2)}")
    if plan.cut:
        more = f"{len(plan.cut)} prompts are" if len(plan.cut) > 1 else "one prompt is"
        lines.append(f"cut         {more} longer than the model reads, and read in part: {_some(plan.cut, 2)}")
    if plan.left_out:
        lines.append(f"left out    what still holds all that the original knows: {', '.join(plan.left_out)}")
    if plan.untried_on:
        chosen, untried = plan.settings_of, plan.untried_on
        lines.append(f"settings    where you chose none, those for {chosen}: untried on {untried}")
    lines += [
        f"may change  {settings.trainable}: {plan.trainable_parameters:,} parameters, "
        f"{plan.trainable_bytes / 1e6:.1f} MB in float32, {share:.1%} of the denoiser",
        *([f"mask        {mask}"] if (mask := _mask_line(plan)) else []),
        *(plan.adapter.lines(plan.method.name) if plan.adapter else []),
    ]
    memory = memory_lines(plan.memory) if plan.memory is not None else []
    if plan.is_uncounted:
        memory = ["memory      not counted: this denoiser asks for values of its inputs, unknown in advance"]
    if isinstance(plan.recipe, Edit):
        if plan.loop_forwards:
            count = len(plan.recipe.suppressions)
            lines.append(
                f"edit        in closed form, between which attention to {count} "
                f"concept{'s' if count > 1 else ''} is trained away: {total:,} UNet evaluations"
            )
        else:
            lines.append("edit        in closed form: no rows, no steps")
        if plan.pooled:
            lines.append(
                f"untouched   what reads the pooled text ({', '.join(plan.pooled)}): edits change what reads states"
            )
        return [*lines, *memory]
    if plan.recipe.start is not None:
        lines.append("start       weights edited in closed form, then trained")
    if plan.recipe.searches:
        lines.append(
            f"search      {len(plan.recipe.searches)} embeddings, at most {plan.search_evaluations:,} UNet evaluations"
        )
    windows = f" ({plan.bank.trained_rows:,} in their windows)" if plan.bank.trained_rows < plan.bank.rows else ""
    at_most = "at most " if plan.evidence is not None else ""
    lines += [
        f"bank        {plan.bank.rows:,} rows{windows} from {len(plan.bank.assignments)} trajectories, "
        f"{plan.bank.unet_evaluations:,} UNet evaluations",
        f"loop        {at_most}{settings.steps} steps, {plan.loop_evaluations:,} UNet evaluations, a backward as two",
    ]
    if plan.is_priced:
        lines.append(
            f"price       found while training: as little deviation as possible with {plan.settings.stop_residual:.0%} "
            "of the concept left"
        )
        if plan.evidence is not None:
            lines.append(f"measured    on {plan.evidence.rows} held-out rows, every {plan.evidence.every} steps")
    elif plan.evidence is not None:
        landing = ", and the rate has then got to 0" if plan.lands else ""
        lines.append(
            f"ends        once {plan.evidence.until:.0%} of the concept is left on {plan.evidence.rows} held-out rows, "
            f"looked at every {plan.evidence.every} steps{landing}"
        )
    if plan.seconds_per_evaluation is None:
        timed = "none: the weights do not fit the memory that this machine has left, so no forward was timed"
    else:
        timed = f"{_duration(total * plan.seconds_per_evaluation)} (from one timed forward)"
    return [*lines, *memory, f"estimate    {timed}"]


def _mask_line(plan: TrainPlan) -> str:
    if plan.has_mask_file:
        return f"from a file, made for {_some([plan.selection.made.get('prompts', '?')])}"
    density = plan.settings.mask_density
    return f"the {density:.0%} of the elements that are most salient for the concept" if density is not None else ""


def _left_out(plan: TrainPlan, role: Role) -> str:
    """How many prompts of a role have a trajectory, where it is not all of them."""
    if isinstance(plan.recipe, Edit):
        return ""

    def asked_for(rows: Iterable[Row]) -> set[str]:
        return {row.trajectory for row in rows if row.role == role and row.condition != UNCONDITIONAL}

    asked, used = asked_for(plan.recipe.rows), asked_for(row for row, _ in plan.bank.assignments)
    rows = sum(row.role == role for row in plan.recipe.rows)
    return (
        f" ({len(used)} of {len(asked)} take part; `--trajectories {rows}` for all)" if len(used) < len(asked) else ""
    )


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
