"""What attacks bring back of a concept of a bundled world, model by model: the tables in docs/attacks.md.

    python benchmarks/attacks.py [--seconds 150] [--folder .benchmarks/attacks]
    python benchmarks/attacks.py --world gallery --models original,gold,uce
    python benchmarks/attacks.py --concept ring --gold .benchmarks/shapes/gold-ring

Trains what is not in the folder yet, in WORLD/CONCEPT/MODEL, attacks what is not in benchmarks/results/attacks.json
yet, and at the end writes the tables.  ``--seconds``: start nothing after so long; the same command continues.
``--gold``: of a concept that the world has no gold of, what tools/train_shapes.py made, beside its pipeline.  One seed
of training, one of the attacks: read the tables as examples, and the intervals as over prompts alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

from fastunlearn.worlds import get_world
from fastunlearn.worlds.base import World
from fastunlearn.worlds.bundle import assembled

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "attacks.json"
PAGE = ROOT / "docs" / "attacks.md"
PROMPTS = 16
MODELS = "original,gold,uce,holdfast,esd,ovw,saddle,placebo"
ATTACKS = ("seeds", "prompts", "completion", "embedding", "embedding:word", "relearn")
LONGER = "embedding, 200 steps"  # beside those of the default budget
LABELS = (*ATTACKS, LONGER)
BEGIN, END = "<!-- begin attacks -->", "<!-- end attacks -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", default="shapes")
    parser.add_argument("--concept", default="", help="default: what the world's demonstration forgets")
    parser.add_argument("--models", default=MODELS, help="comma list of original, gold and methods")
    parser.add_argument("--gold", type=Path, help="folder with the parts of a gold reference for the concept")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="how many are attacked")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--folder", type=Path, default=ROOT / ".benchmarks" / "attacks")
    parser.add_argument("--output", type=Path, default=RESULTS, help="another file than this leaves docs alone")
    args = parser.parse_args()
    until = time.monotonic() + args.seconds
    world = get_world(args.world)
    if world is None:
        raise SystemExit(f"{args.world} is no bundled world.")
    concept = world.find(args.concept or world.default_concept)[1]
    names = args.models.split(",")
    board = json.loads(args.output.read_text(encoding="utf-8")) if args.output.is_file() else {"worlds": {}}
    content = board["worlds"].setdefault(world.name, {}).setdefault(concept, {"models": {}})
    folder = args.folder / world.name / concept
    for name in names:
        if all(label in content["models"].get(name, {}).get("attacks", {}) for label in LABELS):
            continue
        if time.monotonic() > until:
            raise SystemExit(f"{name} is left: run the command again.")
        target = Target(name, model_of(name, world, concept, folder, args.gold), world, concept, args.prompts)
        content |= target.settings
        one = content["models"].setdefault(name, {"hash": target.hash, "attacks": {}})
        if one["hash"] != target.hash:
            known = one["hash"][:12]
            raise SystemExit(f"{args.output} has another {name} (hash {known}). Delete that entry, or the run.")
        for label in LABELS:
            if label in one["attacks"]:
                continue
            if time.monotonic() > until:
                raise SystemExit(f"{label} on {name} is left: run the command again.")
            one["attacks"][label] = target.attacked(label)
            args.output.write_text(json.dumps(board, indent=1) + "\n", encoding="utf-8")
            print(name, label, one["attacks"][label], flush=True)
    if args.output == RESULTS:
        write_tables(board)


def model_of(name: str, world: World, concept: str, folder: Path, gold: Path | None) -> str:
    """A bundled model, or that of a run with the method's defaults, trained unless it is there.

    ``gold``: parts that stand in place of those in ``pipeline`` beside it, where the world has no gold of the concept.
    """
    from fastunlearn import unlearn

    if name == "original":
        return world.name
    if name == "gold":
        if concept in world.golds:
            return world.golds[concept]
        if gold is None:
            raise SystemExit(f"{world.name} has no gold of {concept}: make one (tools/train_shapes.py), give `--gold`.")
        return str(assembled(gold.parent, "pipeline", gold.name, f"{world.name}-{gold.name}"))
    run = folder / name
    if not (run / "run.json").is_file():
        begun = (run / "run-key.json").is_file()
        unlearn(world.name, concept, name, output=run, evaluation_prompts="none", device="cpu", resume=begun)
    return str(run / "model")


class Target:
    """One model under attack, beside the original, with the budgets that `fastunlearn attack` has by itself."""

    def __init__(self, name: str, model: str, world: World, concept: str, prompts: int) -> None:
        from fastunlearn import load_judge
        from fastunlearn.attacks import parse_attacks
        from fastunlearn.attacks.embedding import budget_of
        from fastunlearn.attacks.inputs import prompts_for
        from fastunlearn.attacks.pictures import Pictures
        from fastunlearn.attacks.plan import ORIGINAL, UNLEARNED, AttackPlan
        from fastunlearn.attacks.target import Target as OneTarget
        from fastunlearn.evaluation.generators import PipelineSource, as_source
        from fastunlearn.models.sampling import SamplerSpec

        spec = SamplerSpec()
        sources = {ORIGINAL: as_source(world.name, spec, device="cpu")}
        sources[UNLEARNED] = sources[ORIGINAL] if name == "original" else as_source(model, spec, device="cpu")
        asking, others, _ = prompts_for(None, concept, world, prompts, worded=True)
        asked = parse_attacks(",".join(ATTACKS))
        judge = load_judge(world.name)
        self.plan = AttackPlan(sources, judge, concept, asking, others, (), asked, None)
        longer = dataclasses.replace(
            self.plan, asked=parse_attacks("embedding"), budget=budget_of(self.plan.costs, steps=200)
        )
        original = sources[ORIGINAL]
        assert isinstance(original, PipelineSource)
        pictures = Pictures(original.model, original.spec, judge, concept)
        mine = [unit for unit in self.plan.units() if unit.model == UNLEARNED]
        self.units = {label: [unit for unit in mine if unit.task.label == label] for label in ATTACKS}
        self.units[LONGER] = [
            unit for unit in longer.units() if (unit.model, unit.task.label) == (UNLEARNED, "embedding")
        ]
        self.target = OneTarget(name, sources[UNLEARNED], pictures, judge, concept, self.plan.costs)
        self.hash = sources[UNLEARNED].content()

    @property
    def settings(self) -> dict[str, Any]:
        """What the results state beside the figures."""
        import torch

        return {
            "concept": self.plan.concept,
            "training_seed": 0,
            "attack_seed": self.plan.seed,
            "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads()},
            "budgets": {label: units[0].task.budget for label, units in self.units.items()},
            "spec": {name: value for name, value in self.plan.record().items() if name != "hashes"},
            "judge": self.plan.judge.name,
        }

    def attacked(self, label: str) -> dict[str, Any]:
        """Prompts broken, with the interval over prompts, what it cost in U, and how long it took."""
        from fastunlearn.metrics.statistics import clustered_share

        started = time.monotonic()
        attempts = [one for unit in self.units[label] for one in unit.task.attack.run(self.target, unit.order)]
        flags = [one.broken_at is not None for one in attempts]
        share = clustered_share(flags, [one.prompt for one in attempts])
        return {
            "broken": sum(flags),
            "n_prompts": len(flags),
            "share": share.mean,
            "share_ci95": [share.low, share.high],
            "images": sum(len(one.tries) for one in attempts),
            "cost": sum(one.tries[-1].cost for one in attempts),
            "seconds": round(time.monotonic() - started, 1),
        }


def table(world: str, content: dict[str, Any]) -> str:
    """A concept's results for people."""
    budgets, bundled = content["budgets"], get_world(world)
    assert bundled is not None
    given = " --gold FOLDER" if "gold" in content["models"] and content["concept"] not in bundled.golds else ""
    lines = [
        f"Of the prompts for “{content['concept']}” on `{world}`, how many each attack broke, with the 95 % "
        "interval over prompts; in brackets in the head the budget per prompt in U. One training of each method with "
        f"its defaults, one seed of the attacks; judge: `{content['judge']}`. Made by `python benchmarks/attacks.py "
        f"--world {world} --concept {content['concept']} --models {','.join(content['models'])}{given}`.",
        "",
        "| model | " + " | ".join(f"{label} ({budgets[label]:,})" for label in LABELS) + " |",
        "|---|" + "---|" * len(LABELS),
    ]
    for name, one in content["models"].items():
        words = name if name in ("original", "gold") else f"`{name}`"
        lines.append(f"| {words} | {' | '.join(_cell(one['attacks'][label]) for label in LABELS)} |")
    return "\n".join(lines)


def _cell(one: dict[str, Any]) -> str:
    low, high = one["share_ci95"]
    return f"{one['broken']} of {one['n_prompts']} ({low:.0%} to {high:.0%})"


def write_tables(board: dict[str, Any]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    found = [(world, content) for world, concepts in board["worlds"].items() for content in concepts.values()]
    tables = "\n\n".join(table(world, content) for world, content in found)
    PAGE.write_text(f"{before}{BEGIN}\n{tables}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
