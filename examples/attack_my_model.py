"""Is the concept gone, also for somebody who looks for it?

Each attack has the same budget on the original, on the unlearned model, and on a model that never saw the concept,
which tells what the attack itself makes.  Here that is `shapes-gold-star`; leave `gold` out where you have none.
Takes a minute on a CPU.
"""

from fastunlearn import attack, unlearn

PROMPTS = ["a red star on a plain background", "a blue star on a striped background", "a star", "a green star"]

run = unlearn("shapes", "star", method="uce", output="attacked-run", evaluation_prompts="none")
report = attack(
    *("shapes", run.folder),
    attacks="seeds,completion",  # other noise; images of the original, half finished
    prompts=PROMPTS,
    gold="shapes-gold-star",
    output="attack",
    budget=200,  # denoiser forwards per prompt; without it each attack has its own
)
for result in report.record.attacks:
    broken = {name: f"{side.broken} of {side.n_prompts}" for name, side in result.models.items()}
    print(f"{result.name}: prompts broken: {broken}, by other noise alone: {result.control.broken}")
print("curves, images and what to make of them: attack/report.html")
