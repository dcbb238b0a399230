"""What will be attacked, with what, and what it costs: known and checked before anything is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..errors import UserError
from ..evaluation.generators import PipelineSource, Source, check_comparable, environment
from ..judges.base import Judge, check_concept, record_of
from . import CONTROL
from .base import Attack, Costs, Order
from .pictures import COUNT
from .relearn import UNRELATED
from .target import prompts_at_once

#: The names of the models in an attack, in order.
ORIGINAL, UNLEARNED, GOLD, PLACEBO = "original", "unlearned", "gold", "placebo"


@dataclasses.dataclass(frozen=True)
class Task:
    """An attack as it was asked for: ``label`` is NAME[:OPTION].  ``models``: on which.  ``prompts``: with kinds."""

    label: str
    attack: Attack
    option: str
    budget: int
    prompts: tuple[tuple[str, str], ...]
    models: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Unit:
    """What is done and recorded at once: a task's attempts on one model for some of its prompts."""

    task: Task
    model: str
    first: int
    order: Order

    @property
    def key(self) -> str:
        return f"{self.task.label}|{self.model}|{self.first}"

    @property
    def cost(self) -> int:
        """In U, at most."""
        return self.order.budget * len(self.order.prompts)


@dataclasses.dataclass(frozen=True)
class AttackPlan:
    """Everything that decides the result.

    ``models``: by their name here, the original first.  ``prompts``: (prompt, kind) that ask for the concept;
    ``worded``: the prompts of the attack `prompts`.  ``unrelated``: prompts about other things.
    """

    models: Mapping[str, Source]
    judge: Judge
    concept: str
    prompts: tuple[tuple[str, str], ...]
    worded: tuple[tuple[str, str], ...]
    unrelated: tuple[str, ...]
    asked: Mapping[str, tuple[Attack, str]]
    budget: int | None
    seed: int = 0
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.prompts) < 2:
            raise UserError(
                f"an attack needs at least 2 prompts that ask for {self.concept!r}, got {len(self.prompts)}: an "
                "interval is over prompts. Give more with `--prompts`."
            )
        original = self.models[ORIGINAL]
        for name, source in self.models.items():
            check_comparable(original, source, name)
        if isinstance(original, PipelineSource):
            original.check_sampler()
        check_concept(self.judge, self.concept)
        for label, (attack, option) in self.asked.items():
            for name, source in self.models.items():
                if not attack.asks_only and not isinstance(source, PipelineSource):
                    raise UserError(
                        f"the attack {label} needs more than answers to prompts, and {name} is a function. Pass a "
                        "pipeline, or leave the attack out."
                    )
                if isinstance(source, PipelineSource):
                    attack.check(source.model, self.concept, option)
            if attack.name == "prompts" and not self.worded:
                raise UserError("the attack prompts has no other words for the concept: give them with `--prompts`.")
            if (attack.name, option) == ("relearn", "unrelated") and not self.unrelated:
                raise UserError("the attack relearn:unrelated needs prompts about other things: give `--unrelated`.")
        for task in self.tasks:
            if task.budget < (least := task.attack.least(self.costs)):
                raise UserError(
                    f"`--budget` {task.budget} is less than the attack {task.label} needs for its first image, {least} "
                    "denoiser forwards per prompt. Give more."
                )

    @property
    def costs(self) -> Costs:
        """A function's image counts as one forward."""
        source = self.models[ORIGINAL]
        if not isinstance(source, PipelineSource):
            return Costs(1, 1, len(self.prompts))
        points = len(source.model.new_scheduler(source.spec.num_inference_steps).timesteps)
        branches = len(source.model.guided_from(source.spec.guidance_scale)) + 1
        return Costs(branches * points, points, len(self.prompts))

    @property
    def tasks(self) -> list[Task]:
        """The attacks in the order in which they were asked for, and the control, on the unlearned model at least.

        The control may spend as much as the dearest of the others.
        """
        from .seeds import SEEDS

        costs, result = self.costs, []
        budgets = {
            label: self.budget or attack.default(costs) for label, (attack, _) in self.asked.items() if label != CONTROL
        }
        most = max(budgets.values(), default=self.budget or SEEDS.default(costs))
        asked = self.asked if CONTROL in self.asked else {**self.asked, CONTROL: (SEEDS, "")}
        for label, (attack, option) in asked.items():
            models = tuple(self.models) if label in self.asked else (UNLEARNED,)
            prompts = self.worded if attack.name == "prompts" else self.prompts
            result.append(Task(label, attack, option, budgets.get(label, most), prompts, models))
        return result

    def units(self) -> list[Unit]:
        """The same whoever does them: prompts in runs of one size, all together where they share one attempt."""
        result = []
        size = prompts_at_once(self.models[ORIGINAL].batch_size)
        for task in self.tasks:
            step = len(task.prompts) if task.attack.takes_all else size
            for first in range(0, len(task.prompts), step):
                part = task.prompts[first : first + step]
                prompts, kinds = tuple(prompt for prompt, _ in part), tuple(kind for _, kind in part)
                order = Order(prompts, kinds, task.budget, task.option)
                result += [Unit(task, model, first, order) for model in task.models]
        return sorted(result, key=lambda unit: unit.first)  # so that pictures are used while they are there

    @property
    def prepared(self) -> int:
        """U that the original spends on pictures, once for all attacks."""
        pictured = [(attack.name, option) for attack, option in self.asked.values() if attack.needs_pictures]
        cost = 0
        if any(one != ("relearn", "unrelated") for one in pictured):
            cost += COUNT * len(self.prompts) * self.costs.image
        if ("relearn", "unrelated") in pictured:
            cost += len(self.unrelated[:UNRELATED]) * self.costs.image
        return cost

    @property
    def most(self) -> int:
        """U in all, if nothing came back before its budget was spent."""
        return self.prepared + sum(unit.cost for unit in self.units())

    def lines(self, seconds_per_forward: float | None = None) -> list[str]:
        """The plan for people."""
        names = ", ".join(self.models)
        lines = [f"looks for {self.concept!r} in {names}, with {len(self.prompts)} prompts; judge: {self.judge.name}"]
        lines.append(f"U is a denoiser forward of one sample, an image costs {self.costs.image} U")
        for task in self.tasks:
            on = f"{len(task.models)} models" if len(task.models) > 1 else f"the {task.models[0]} model, as the control"
            total = task.budget * len(task.prompts) * len(task.models)
            each = f"{task.budget:>9,} U per prompt, {len(task.prompts)} prompts"
            lines.append(f"  {task.label:18} {each}, {on}: at most {total:,} U")
        if self.prepared:
            lines.append(f"  {'pictures':18} of the original, made once: {self.prepared:,} U")
        whole = f"at most {self.most:,} U in all"
        if seconds_per_forward is not None:
            whole += (
                f", about {self.most * seconds_per_forward:,.0f} s here ({1000 * seconds_per_forward:.3g} ms a forward)"
            )
        lines.append(f"{whole}; a prompt whose concept came back costs no more")
        return lines

    def spec(self) -> dict[str, Any]:
        """What must be the same for two parts of one attack."""
        original = self.models[ORIGINAL]
        return {
            "models": {name: source.content() for name, source in self.models.items()},
            "concept": self.concept,
            "attacks": {task.label: task.budget for task in self.tasks},
            "prompts": self.prompts,
            "worded": self.worded,
            "unrelated": self.unrelated,
            "judge": dataclasses.asdict(record_of(self.judge)),
            "seed": self.seed,
            **original.settings(),
            **environment(original.device),
        }

    def record(self) -> dict[str, Any]:
        """The settings that the result states."""
        original = self.models[ORIGINAL]
        return {
            **original.settings(),
            "seed": self.seed,
            "hashes": {name: source.content() for name, source in self.models.items()},
            **environment(original.device),
        }
