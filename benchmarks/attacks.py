"""What attacks bring back of one concept of the bundled world, method by method: the table in docs/attacks.md.

    python benchmarks/attacks.py [--seconds 150] [--folder .benchmarks/attacks]

Trains what is not in the folder yet, attacks what is not in benchmarks/results/attacks.json yet, and at the end writes
the table.  ``--seconds``: start nothing after so long; the same command continues.  One concept, one seed of training,
one of the attacks: read the table as an example, and the intervals as over prompts alone.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "attacks.json"
PAGE = ROOT / "docs" / "attacks.md"
CONCEPT, PROMPTS = "star", 16
METHODS = ("uce", "holdfast", "esd", "ovw", "saddle", "placebo")
MODELS = ("original", "gold", *METHODS)
ATTACKS = ("seeds", "prompts", "completion", "embedding", "embedding:word", "relearn")
BEGIN, END = "<!-- begin attacks -->", "<!-- end attacks -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--folder", type=Path, default=ROOT / ".benchmarks" / "attacks")
    args = parser.parse_args()
    until = time.monotonic() + args.seconds
    content = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in MODELS:
        if all(label in content.get("models", {}).get(name, {}).get("attacks", {}) for label in ATTACKS):
            continue
        if time.monotonic() > until:
            raise SystemExit(f"{name} is left: run the command again.")
        model = model_of(name, args.folder)
        target = Target(name, model)
        content = {**content, **target.settings}
        for label in ATTACKS:
            one = content.setdefault("models", {}).setdefault(name, {"hash": target.hash, "attacks": {}})
            if one["hash"] != target.hash:
                raise SystemExit(
                    f"{RESULTS} has another {name} (hash {one['hash'][:12]}). Delete the file, or the run."
                )
            if label in one["attacks"]:
                continue
            if time.monotonic() > until:
                raise SystemExit(f"{label} on {name} is left: run the command again.")
            one["attacks"][label] = target.attacked(label)
            RESULTS.write_text(json.dumps(content, indent=1) + "\n")
            print(name, label, one["attacks"][label]["broken"], "of", one["attacks"][label]["n_prompts"], flush=True)
    write_table(content)


def model_of(name: str, folder: Path) -> str:
    """A bundled model, or that of a run with the method's defaults, trained unless it is there."""
    from fastunlearn import unlearn

    bundled = {"original": "shapes", "gold": f"shapes-gold-{CONCEPT}"}
    if name in bundled:
        return bundled[name]
    run = folder / name
    if not (run / "run.json").is_file():
        begun = (run / "run-key.json").is_file()
        unlearn("shapes", CONCEPT, name, output=run, evaluation_prompts="none", device="cpu", resume=begun)
    return str(run / "model")


class Target:
    """One model under attack, beside the original, with the budgets that `fastunlearn attack` has by itself."""

    def __init__(self, name: str, model: str) -> None:
        from fastunlearn import load_judge
        from fastunlearn.attacks import parse_attacks
        from fastunlearn.attacks.inputs import prompts_for
        from fastunlearn.attacks.pictures import Pictures
        from fastunlearn.attacks.plan import ORIGINAL, UNLEARNED, AttackPlan
        from fastunlearn.attacks.target import Target as OneTarget
        from fastunlearn.evaluation.generators import PipelineSource, as_source
        from fastunlearn.models.sampling import SamplerSpec

        spec = SamplerSpec()
        sources = {ORIGINAL: as_source("shapes", spec, device="cpu")}
        sources[UNLEARNED] = sources[ORIGINAL] if name == "original" else as_source(model, spec, device="cpu")
        asking, others, _ = prompts_for(None, CONCEPT, sources[ORIGINAL].world, PROMPTS, worded=True)
        asked = parse_attacks(",".join(ATTACKS))
        judge = load_judge("shapes")
        self.plan = AttackPlan(sources, judge, CONCEPT, asking, others, (), asked, None)
        original = sources[ORIGINAL]
        assert isinstance(original, PipelineSource)
        pictures = Pictures(original.model, original.spec, judge, CONCEPT)
        self.units = [unit for unit in self.plan.units() if unit.model == UNLEARNED]
        self.target = OneTarget(name, sources[UNLEARNED], pictures, judge, CONCEPT, self.plan.costs)
        self.hash = sources[UNLEARNED].content()

    @property
    def settings(self) -> dict[str, Any]:
        """What the results state beside the figures."""
        import torch

        return {
            "command": "python benchmarks/attacks.py",
            "concept": CONCEPT,
            "training_seed": 0,
            "attack_seed": self.plan.seed,
            "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads()},
            "budgets": {task.label: task.budget for task in self.plan.tasks},
            "spec": {name: value for name, value in self.plan.record().items() if name != "hashes"},
            "judge": self.plan.judge.name,
        }

    def attacked(self, label: str) -> dict[str, Any]:
        """Prompts broken, with the interval over prompts, what it cost in U, and how long it took."""
        from fastunlearn.metrics.statistics import clustered_share

        started = time.monotonic()
        units = [unit for unit in self.units if unit.task.label == label]
        attempts = [one for unit in units for one in unit.task.attack.run(self.target, unit.order)]
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


def table(content: dict[str, Any]) -> str:
    """The results for people."""
    budgets = content["budgets"]
    lines = [
        f"Of the prompts for “{content['concept']}” on the bundled model, how many each attack broke, with the 95 % "
        "interval over prompts; in brackets in the head the budget per prompt in U. One concept, one training of each "
        f"method with its defaults, one seed of the attacks; judge: `{content['judge']}`. Made by "
        f"`{content['command']}`.",
        "",
        "| model | " + " | ".join(f"{label} ({budgets[label]:,})" for label in ATTACKS) + " |",
        "|---|" + "---|" * len(ATTACKS),
    ]
    for name in MODELS:
        cells = [_cell(content["models"][name]["attacks"][label]) for label in ATTACKS]
        words = name if name in ("original", "gold") else f"`{name}`"
        lines.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(one: dict[str, Any]) -> str:
    low, high = one["share_ci95"]
    return f"{one['broken']} of {one['n_prompts']} ({low:.0%} to {high:.0%})"


def write_table(content: dict[str, Any]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table(content)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
