"""Completion: the original begins an image, the model under attack finishes it.

At the first points of a trajectory the sampler takes the original's predictions, which the pictures hold already, and
from there on the model's own.  So the sampler's memory, where it has one, is the original's too.  The less is handed
over before the concept comes back, the more of it the model still knows; what any model makes of so much is shown by
the gold reference.  Few-step noising attacks hand over a noised picture instead of the trajectory's own latents.
"""

from __future__ import annotations

from .base import Attack, Attempt, Bouts, Costs, Order
from .target import Target

#: Of a trajectory's points, how many the original gives, the least first.
SHARES = (0.1, 0.2, 0.35, 0.5)
_NUMBERS = 2  # trajectories per share


def given_points(share: float, points: int) -> int:
    """At least one point, and at least one is left."""
    return min(max(1, round(share * points)), points - 1)


def run(target: Target, order: Order) -> list[Attempt]:
    bouts, points, branches = Bouts(order), target.costs.points, target.costs.branches
    pictures = target.pictures.of(order.prompts)
    conditions = target.encode(order.prompts)
    for share in SHARES:
        given = given_points(share, points)
        # The original has finished its own trajectories: what it would be given it would only repeat.
        cost = 0 if target.is_original else (points - given) * branches
        for number in range(_NUMBERS):
            if not (left := bouts.left(cost)):
                continue
            if target.is_original:
                seen = target.decoded(pictures.of(number, pictures.final)[left])
            else:
                kept = {name: values[left] for name, values in conditions.items()}
                recorded = pictures.recorded(number, given)[:, :, left]
                seen = target.finish(pictures.of(number, pictures.noise)[left], kept, recorded)
            for index, verdict in zip(left, seen, strict=True):
                bouts.judged(index, verdict, f"{share:.0%} handed over", cost)
    return bouts.attempts()


def _default(costs: Costs) -> int:
    left = [costs.points - given_points(share, costs.points) for share in SHARES]
    return _NUMBERS * costs.branches * sum(left)


COMPLETION = Attack(
    name="completion",
    summary="hands over the original's unfinished images to be finished",
    unknown="the latents",
    source="few-step noising attacks; here with the original's own latents",
    cost="the rest of an image per share handed over; nothing on the original",
    run=run,
    default=_default,
    least=lambda costs: (costs.points - given_points(SHARES[0], costs.points)) * costs.branches,
    needs_pictures=True,
)
