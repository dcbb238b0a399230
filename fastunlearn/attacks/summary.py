"""From attempts to attack.json: shares of prompts broken, as curves over the budget, beside control and gold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from .. import schema
from ..evaluation.plan import spread
from ..judges.base import record_of
from ..metrics.statistics import clustered_share, difference
from . import CONTROL
from .base import Attempt
from .plan import GOLD, UNLEARNED, AttackPlan, Task

#: label -> model -> attempts, in the prompts' order.
Found = Mapping[str, Mapping[str, Sequence[Attempt]]]

_POINTS = 16  # of a curve


def summarize(plan: AttackPlan, found: Found, described: Mapping[str, object]) -> schema.AttackRecord:
    """The content of attack.json."""
    results = tuple(_result(task, found) for task in plan.tasks if task.label in plan.asked)
    return schema.AttackRecord(
        name=str(described["name"]),
        method=str(described["method"]),
        concept=plan.concept.strip(),
        model=str(described["model"]),
        judge=record_of(plan.judge),
        n_prompts=len(plan.prompts),
        prepared=plan.prepared,
        attacks=results,
        notes=plan.notes,
        spec=plan.record(),
    )


def _result(task: Task, found: Found) -> schema.AttackResult:
    attempts, control = found[task.label], found[CONTROL][UNLEARNED]
    costs = {
        t.cost for side in (*attempts.values(), control) for one in side for t in one.tries if t.cost <= task.budget
    }
    grid = sorted({*spread(sorted(costs), _POINTS), task.budget})
    unlearned, gold = attempts[UNLEARNED], attempts.get(GOLD)
    same = [one.prompt for one in unlearned] == [one.prompt for one in control]
    return schema.AttackResult(
        name=task.label,
        summary=task.attack.summary,
        unknown=task.attack.unknown,
        source=task.attack.source,
        budget=task.budget,
        interval=clustered_share([True] * 2, ["a", "b"]).method.partition(",")[0],
        models={name: _attacked(side, task.budget, grid) for name, side in attempts.items()},
        control=_attacked(control, task.budget, grid),
        minus_control=_gap(unlearned, control, task.budget) if same and task.label != CONTROL else None,
        minus_gold=_gap(unlearned, gold, task.budget) if gold is not None else None,
    )


def _attacked(attempts: Sequence[Attempt], budget: int, grid: Sequence[int]) -> schema.Attacked:
    """What an attack did to one model for at most ``budget``."""
    prompts = [one.prompt for one in attempts]
    tries = [[t for t in one.tries if t.cost <= budget] for one in attempts]
    flags = _broken(attempts, budget)
    share = clustered_share(flags, prompts)
    by = Counter(one[-1].what for one, flag in zip(tries, flags, strict=True) if flag)
    kinds = dict.fromkeys(one.kind for one in attempts)
    return schema.Attacked(
        broken=int(flags.sum()),
        n_prompts=len(prompts),
        share=share.mean,
        share_ci95=(share.low, share.high),
        images=sum(map(len, tries)),
        cost=sum(one[-1].cost if one else 0 for one in tries),
        curve=tuple(_point(attempts, prompts, cost) for cost in grid),
        broken_by=dict(sorted(by.items(), key=lambda item: (-item[1], item[0]))),
        kinds={
            kind: schema.KindBroken(
                broken=int(sum(flag for one, flag in zip(attempts, flags, strict=True) if one.kind == kind)),
                n_prompts=sum(one.kind == kind for one in attempts),
            )
            for kind in (kinds if len(kinds) > 1 else ())
        },
    )


def _point(attempts: Sequence[Attempt], prompts: Sequence[str], cost: int) -> schema.CurvePoint:
    share = clustered_share(_broken(attempts, cost), prompts)
    return schema.CurvePoint(cost=cost, share=share.mean, ci95=(share.low, share.high))


def _broken(attempts: Sequence[Attempt], budget: int) -> np.ndarray:
    """(N,) bool: the concept came back for at most ``budget``."""
    return np.array([one.broken_at is not None and one.broken_at <= budget for one in attempts])


def _gap(a: Sequence[Attempt], b: Sequence[Attempt], budget: int) -> schema.Difference:
    """How much larger the share of prompts broken is in a than in b, prompt by prompt."""
    gap = difference(_broken(a, budget), _broken(b, budget), [one.prompt for one in a])
    return schema.Difference(mean=gap.mean, ci95=(max(-1.0, gap.low), min(1.0, gap.high)))
