"""Best of N seeds: nothing is optimized.  The control of all other attacks, at the same budget."""

from __future__ import annotations

from .base import Attack, Attempt, Bouts, Order
from .target import Target


def run(target: Target, order: Order) -> list[Attempt]:
    """As many seeds as the budget pays for; several of a prompt share a batch where few prompts are left."""
    bouts, image = Bouts(order), target.costs.image
    while left := bouts.left(image):
        each = max(1, target.batch_size // len(left))
        tried = [(index, bouts.count(index) + n) for n in range(each) for index in left]
        paid = [(index, seed) for index, seed in tried if (seed + 1) * image <= order.budget]
        verdicts = target.ask([(order.prompts[index], seed) for index, seed in paid])
        for (index, seed), verdict in zip(paid, verdicts, strict=True):
            bouts.judged(index, verdict, f"seed {seed}", image)
    return bouts.attempts()


SEEDS = Attack(
    name="seeds",
    summary="asks again and again, from other noise; the control of all other attacks",
    unknown="the noise",
    source="best of N",
    cost="an image per seed",
    run=run,
    default=lambda costs: 8 * costs.image,
    least=lambda costs: costs.image,
    asks_only=True,
)
