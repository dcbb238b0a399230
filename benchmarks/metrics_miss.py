"""What the usual metrics miss: which of them tell an unlearned model from harmless training, by concept and method.

    python benchmarks/metrics_miss.py                   # all of it, about 40 minutes of one core
    python benchmarks/metrics_miss.py --minutes 3       # a part; the same command continues

Every concept of :data:`CONCEPTS` is forgotten by every method of :data:`METHODS` with its defaults.  Beside each model
stand harmless trainings of the same world: ordinary fine-tuning on the model's own images, of several lengths, each on
another half of the training prompts and from another seed.  All are asked for what is not the concept, by prompts that
no training saw, from the same noise.  Then ``metrics_power`` says of every metric whether it tells the unlearned model
from the harmless ones.

A model is a cell: trained, drawn and measured at once, and kept in ``--work`` as one file of numbers, which a change of
the original, of the judge or of a method's defaults makes void.  Writes benchmarks/results/metrics_miss.json and
docs/metrics_miss.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from metrics_miss_figure import draw
from metrics_power import LEVEL, POWER, RESAMPLES, Statistic, limits, power, resampled

from fastunlearn import unlearn
from fastunlearn.evaluation.generators import PipelineSource
from fastunlearn.evaluation.judging import Sides
from fastunlearn.files.atomic import whole_file, write_json
from fastunlearn.files.weights import hash_pipeline
from fastunlearn.judges import judged, load_judge
from fastunlearn.methods import get_method
from fastunlearn.metrics.base import load_metric
from fastunlearn.metrics.distances import load_perceptual
from fastunlearn.metrics.fid import frechet_distance
from fastunlearn.metrics.kid import kernel_distance
from fastunlearn.metrics.statistics import retention
from fastunlearn.models.loading import load_model
from fastunlearn.models.runtime import versions
from fastunlearn.models.sampling import SamplerSpec
from fastunlearn.prompts import is_forget
from fastunlearn.worlds import get_world

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "metrics_miss.json"
FIGURE = ROOT / "docs" / "metrics_miss.png"
CONCEPTS = {"shapes": ("star", "ring", "crescent", "green", "striped"), "gallery": ("twemoji", "cat")}
METHODS = ("uce", "ovw", "saddle", "esd")
HARMLESS = "placebo-noise"
#: Images without guidance, so that they are of the distribution that the model has learned, and many of them.
HARMLESS_SETTINGS = {"trajectories": 64, "trajectory_steps": 20, "trajectory_guidance_scale": 0.0}
HARMLESS_STEPS, HARMLESS_SEEDS = (40, 80, 160), (0, 1)  # a training of every length from every seed
DRAWS = (0, 1)  # seeds of the noise
OTHER = len(DRAWS)  # added to a seed: other noise, of which no model draws
GENERAL = ("open", "empty")  # groups of prompts that name too little to be shown in full
KEPT = 40  # prompts that all models of a world are asked for, less those that name what was forgotten
ASKED = 16  # prompts that ask for the concept, one image each
JUDGED = 32  # images per batch of the judge

Rows = dict[str, npt.NDArray[np.float64]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path(".benchmarks/metrics_miss"))
    parser.add_argument("--worlds", default=",".join(CONCEPTS), help="comma list")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no cell begins after so long")
    args = parser.parse_args()
    until = time.monotonic() + 60 * args.minutes
    worlds = [Cells(name, args.work / name) for name in args.worlds.split(",")]
    for cells in worlds:
        for name, cell in cells.wanted():
            if cells.read(name, cell) is None:
                if time.monotonic() > until:
                    raise SystemExit(f"{cells.name}: {name} is left. Run the command again.")
                cells.make(name, cell)
    content = {
        "command": "python benchmarks/metrics_miss.py",
        "minutes": round(sum(cells.seconds() for cells in worlds) / 60, 1),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "level": LEVEL,
        "power": POWER,
        "resamples": RESAMPLES,
        "draws": len(DRAWS),
        "worlds": {cells.name: cells.found() for cells in worlds},
    }
    write_json(RESULTS, content)
    draw(content, FIGURE)


# ---- a model: trained, drawn, measured ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cell:
    """A model and how it is made.

    ``model``: a bundled one's name; None to train.  ``concept``: what it forgets and is not asked for; None for a
    harmless training.  ``steps``, ``seed``, ``retain``: of the training; None where the method's defaults hold.
    """

    concept: str | None = None
    model: str | None = None
    method: str = ""
    steps: int | None = None
    seed: int = 0
    retain: tuple[str, ...] | None = None


class Cells:
    """The models of a world as files of numbers in ``folder``; what is there is not made again."""

    def __init__(self, name: str, folder: Path) -> None:
        world = get_world(name)
        assert world is not None, f"the world {name} is not installed"
        self.name, self.world, self.folder, self.concepts = name, world, folder, CONCEPTS[name]
        folder.mkdir(parents=True, exist_ok=True)
        self._original = hash_pipeline(load_model(name, "cpu").source)
        asked = {word: world.prompts_to_evaluate(word) for word in self.concepts}
        kept = [p for rows in asked.values() for p, group in rows if not is_forget(group) and group not in GENERAL]
        #: What all models are asked for, less what names the concept.
        self.prompts = _some(list(dict.fromkeys(kept)), KEPT)
        self.forget = {word: _some([p for p, group in rows if is_forget(group)], ASKED) for word, rows in asked.items()}

        #: What the original's images, and what the judge says of them, depend on.
        self._drawn = _hash(self._original, self._judge.name, self.prompts, self.forget)[:12]

    def wanted(self) -> Iterator[tuple[str, Cell]]:
        """Every model by name, harmless trainings first."""
        yield from self.harmless()
        for concept in self.concepts:
            yield from self.of(concept)

    def harmless(self) -> Iterator[tuple[str, Cell]]:
        forget, retain = self.world.prompts_to_train(self.concepts[0])
        for steps, seed in itertools.product(HARMLESS_STEPS, HARMLESS_SEEDS):
            half = random.Random(f"{steps} {seed}").sample(sorted({*forget[2:], *retain}), len(retain) // 2)
            yield f"harmless-{steps}-{seed}", Cell(None, None, HARMLESS, steps, seed, tuple(half))

    def of(self, concept: str) -> Iterator[tuple[str, Cell]]:
        for method in METHODS:
            yield f"{method}-{concept}", Cell(concept, None, method)
        if concept in self.world.golds:
            yield f"gold-{concept}", Cell(concept, self.world.golds[concept])

    def _defaults(self, method: str) -> Any:
        return get_method(method).defaults_for(self.name, *self.world.like)

    def _key(self, cell: Cell) -> str:
        """What a cell's numbers depend on, as a hash."""
        settings = self._defaults(cell.method) if cell.method else None
        trained = HARMLESS_SETTINGS if cell.retain is not None else None
        asked = (self.asked_of(cell), self.forget.get(cell.concept or ""))
        return _hash(self._original, self._judge.name, cell, settings, trained, asked)

    def read(self, name: str, cell: Cell) -> tuple[dict[str, Any], Rows] | None:
        """What is known of a model, and its rows; None where that is yet to be made."""
        path = self.folder / f"{name}.npz"
        if not path.is_file():
            return None
        rows = dict(np.load(path))
        about = json.loads(str(rows.pop("about")))
        return (about, rows) if about["key"] == self._key(cell) else None

    def make(self, name: str, cell: Cell) -> None:
        print(f"{self.name}: {name}", flush=True)
        _ = self.original, self.forgotten_by_the_original  # drawn once; not of this cell
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            source = PipelineSource(load_model(self._model(cell, Path(scratch)), "cpu"), SamplerSpec())
            prompts = self.asked_of(cell)
            rows: Rows = {}
            for seed in DRAWS:
                images = source.generate([(prompt, seed) for prompt in prompts])
                for what, values in self._measured(prompts, seed, images).items():
                    rows[what] = np.concatenate([rows[what], values]) if what in rows else values
            about: dict[str, Any] = {"key": self._key(cell)}
            if cell.concept is not None:
                shown = self._shown(cell.concept, source.generate([(p, 0) for p in self.forget[cell.concept]]))
                about |= {"shown": shown, "shown_original": self.forgotten_by_the_original[cell.concept]}
        about["seconds"] = round(time.monotonic() - begun, 1)
        with whole_file(self.folder / f"{name}.npz") as unfinished, unfinished.open("wb") as stream:
            np.savez(stream, about=np.array(json.dumps(about)), **rows)  # type: ignore[arg-type]

    def _model(self, cell: Cell, scratch: Path) -> str:
        """The name or the folder of a cell's model, which is trained here where it is none of the bundled ones."""
        if cell.model is not None:
            return cell.model
        settings: dict[str, Any] = {"seed": cell.seed, "evaluation_prompts": "none", "device": "cpu"}
        if cell.retain is not None:
            settings |= HARMLESS_SETTINGS | {"steps": cell.steps, "retain_prompts": ";".join(cell.retain)}
            settings["forget_prompts"] = self.concepts[0]  # named, not read: a harmless training has no such rows
        unlearn(self.name, cell.concept or self.concepts[0], cell.method, output=scratch / "run", **settings)
        return str(scratch / "run" / "model")

    # ---- what is measured ----

    def asked_of(self, cell: Cell) -> list[str]:
        words = [] if cell.concept is None else [cell.concept]
        return [prompt for prompt in self.prompts if not {*words} & {*self.world.attributes(prompt).values()}]

    @functools.cached_property
    def original(self) -> dict[int, dict[str, torch.Tensor]]:
        """The original's image of every prompt by the noise's seed, drawn once."""
        path = self.folder / f"original-{self._drawn}.pt"
        if not path.exists():
            print(f"{self.name}: the original's images", flush=True)
            source = PipelineSource(load_model(self.name, "cpu"), SamplerSpec())
            drawn = [source.generate([(prompt, seed) for prompt in self.prompts]) for seed in range(2 * OTHER)]
            with whole_file(path) as unfinished:
                torch.save(torch.stack(drawn), unfinished)
        images = torch.load(path, weights_only=True)
        return {seed: dict(zip(self.prompts, images[seed], strict=True)) for seed in range(2 * OTHER)}

    @functools.cached_property
    def forgotten_by_the_original(self) -> dict[str, float]:
        """In which share of images the original shows each concept when asked to."""
        source = PipelineSource(load_model(self.name, "cpu"), SamplerSpec())
        path = self.folder / f"original-{self._drawn}.json"
        if not path.exists():
            drawn = {word: source.generate([(p, 0) for p in asked]) for word, asked in self.forget.items()}
            write_json(path, {word: self._shown(word, images) for word, images in drawn.items()})
        shown: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
        return shown

    @functools.cached_property
    def _distance(self) -> Any:
        return load_perceptual(self.name)

    @functools.cached_property
    def _judge(self) -> Any:
        return load_judge(self.name)

    @functools.cached_property
    def _metrics(self) -> dict[str, Any]:
        return {name: load_metric(name, world=self.world) for name in ("fid", "dreamsim", "clip-score")}

    def _measured(self, prompts: list[str], seed: int, after: torch.Tensor) -> Rows:
        """Rows (prompts, ...) of every metric for the images from one seed beside the original's."""
        before, other = (torch.stack([self.original[s][p] for p in prompts]) for s in (seed, DRAWS[1 - seed]))
        rows = {name: metric.measure(before, after, prompts).numpy() for name, metric in self._metrics.items()}
        # Of noise that no set holds: the same two draws, exchanged, would be the same set.
        unseen = torch.stack([self.original[seed + OTHER][p] for p in prompts])
        others = self._metrics["fid"].measure(unseen, unseen, prompts).numpy()
        features = others.shape[1] // 2
        rows["fid-other"] = np.concatenate([others[:, :features], rows["fid"][:, features:]], axis=1)
        rows["pairs"] = self._distance.distance(before, after).numpy()
        rows["ceiling"] = self._distance.distance(before, other).numpy()
        rows |= {"right-before": self._right(prompts, before), "right-after": self._right(prompts, after)}
        return {name: values.astype(np.float64) for name, values in rows.items()}

    def _right(self, prompts: list[str], images: torch.Tensor) -> npt.NDArray[np.bool_]:
        """Which images show all that their prompt names."""
        seen = judged(self._judge, images, self.concepts[0], JUDGED).words[0]
        named = [self._judge.asked(prompt) for prompt in prompts]
        vocabulary = self._judge.vocabulary.items()
        return np.all(
            [
                [seen[row, column] == words.index(name[attribute]) for row, name in enumerate(named)]
                for column, (attribute, words) in enumerate(vocabulary)
            ],
            axis=0,
        )

    def _shown(self, concept: str, images: torch.Tensor) -> float:
        """The share of images (N, 3, H, W) that show the concept; one that is not valid shows nothing."""
        return float(Sides(self._judge, judged(self._judge, images, concept, JUDGED), 0).shown(0).mean())

    # ---- what comes of it ----

    def seconds(self) -> float:
        """Spent on all cells, also before a stop."""
        return sum(self._read(name, cell)[0]["seconds"] for name, cell in self.wanted())

    def _read(self, name: str, cell: Cell) -> tuple[dict[str, Any], Rows]:
        found = self.read(name, cell)
        assert found is not None
        return found

    def found(self) -> dict[str, Any]:
        """Every model under every metric, and which of them tell it from the harmless trainings."""
        harmless = [self._read(name, cell)[1] for name, cell in self.harmless()]
        names = [name for name, _ in self.harmless()]
        return {
            "original": self._original,
            "judge": self._judge.name,
            "metric": self._distance.metric,
            "prompts": len(self.prompts),
            "harmless": [
                self._summary(self.prompts, rows) | {"name": n} for n, rows in zip(names, harmless, strict=True)
            ],
            "seeds_exchanged": self._summary(self.prompts, self._exchanged()),
            "concepts": {concept: self._told(concept, harmless) for concept in self.concepts},
        }

    def _told(self, concept: str, harmless: list[Rows]) -> dict[str, Any]:
        """Of one concept: the models' summaries and the power of every metric; how often each errs."""
        print(f"{self.name}: resampling {concept}", flush=True)
        models = {name: self._read(name, cell) for name, cell in self.of(concept)}
        prompts = self.asked_of(Cell(concept))
        places = [self.prompts.index(prompt) for prompt in prompts]
        mine = np.concatenate([np.array(places) + draw * len(self.prompts) for draw in range(len(DRAWS))])
        nulls = [{what: values[mine] for what, values in rows.items()} for rows in harmless]
        draws, chance = resampled(len(prompts), len(DRAWS))
        told: dict[str, Any] = {name: self._summary(prompts, rows) | about for name, (about, rows) in models.items()}
        errs = {}
        for metric, statistic in STATISTICS.items():
            limit, errs[metric] = limits(np.array([[statistic(n, d) for d in draws] for n in nulls]), chance)
            for name, (_, rows) in models.items():
                values = np.array([statistic(rows, index) for index in draws])
                told[name].setdefault("power", {})[metric] = power(values, limit)
        return {"prompts": len(prompts), "asked": len(self.forget[concept]), "false_alarms": errs, "models": told}

    def _exchanged(self) -> Rows:
        """The original itself with the seeds of every prompt exchanged: the same images, no pair alike."""
        parts = [
            self._measured(self.prompts, seed, torch.stack([self.original[DRAWS[1 - seed]][p] for p in self.prompts]))
            for seed in DRAWS
        ]
        return {what: np.concatenate([part[what] for part in parts]) for what in parts[0]}

    def _summary(self, prompts: list[str], rows: Rows) -> dict[str, Any]:
        everything = np.arange(len(rows["pairs"]))
        keys = prompts * len(DRAWS)
        kept = retention(rows["pairs"], keys, rows["ceiling"], keys)
        return {
            "retention": kept.mean,
            "retention_ci95": [kept.low, kept.high],
            "right": float(rows["right-after"].mean()),
            "right_original": float(rows["right-before"].mean()),
            "statistics": {name: statistic(rows, everything) for name, statistic in STATISTICS.items()},
        }


def _hash(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _some(prompts: list[str], count: int) -> list[str]:
    """At most so many of them, from all over the list."""
    return [prompts[index * len(prompts) // count] for index in range(count)] if len(prompts) > count else prompts


# ---- statistics: larger is more damage ------------------------------------------------------------------------------


def _mean(what: str) -> Statistic:
    return lambda rows, index: float(rows[what][index].mean())


def _lost(before: Statistic, after: Statistic) -> Statistic:
    return lambda rows, index: before(rows, index) - after(rows, index)


def _of_sets(compare: Callable[[Any, Any], float], what: str) -> Statistic:
    return lambda rows, index: compare(*np.split(rows[what][index], 2, axis=1))


def _match(side: int) -> Statistic:
    return lambda rows, index: float(rows["clip-score"][index, side].mean())


#: What is compared, by the name that results and figure have for it.
STATISTICS: dict[str, Statistic] = {
    "pairs": _mean("pairs"),
    "dreamsim": _mean("dreamsim"),
    "fid": _of_sets(frechet_distance, "fid"),
    "fid-other": _of_sets(frechet_distance, "fid-other"),
    "kid-other": _of_sets(kernel_distance(), "fid-other"),
    "clip-score": _lost(_match(0), _match(1)),
    "accuracy": _lost(_mean("right-before"), _mean("right-after")),
}


if __name__ == "__main__":
    main()
