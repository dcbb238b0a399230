"""What the usual metrics miss, and what they see: FID, CLIPScore and accuracies beside retention on the bundled world.

First the models of interest (controls, ESD, OVW, Saddle, the gold reference) under every metric.  Then doses: weights
between the original's and a damaged model's, and from which dose on each metric tells them from ordinary training,
with the same images for all.  A damage is detected where a statistic exceeds the 95th percentile of what ordinary
training gives; prompts are resampled, so every dose has a power and every metric an interval of its smallest dose.

    python benchmarks/metrics_miss.py --output benchmarks/results/metrics_miss.json --figure docs/metrics_miss.png

Draws about 4,000 images.  What is done stays in ``--work``, so that a stopped run continues.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastunlearn.evaluation.generators import PipelineSource
from fastunlearn.files.atomic import whole_file, write_json, write_text
from fastunlearn.judges import Judged, judged, load_judge, record_of
from fastunlearn.metrics.base import load_metric
from fastunlearn.metrics.distances import load_perceptual
from fastunlearn.metrics.statistics import clustered_mean, retention, wilson
from fastunlearn.models.base import Model
from fastunlearn.models.loading import load_model
from fastunlearn.models.runtime import versions
from fastunlearn.models.sampling import SamplerSpec
from fastunlearn.prompts import is_forget
from fastunlearn.training.config import TrainConfig
from fastunlearn.training.selection import select_parameters
from fastunlearn.training.unlearn import unlearn
from fastunlearn.worlds.classifier import to_pixel_values
from fastunlearn.worlds.shapes import BACKGROUNDS, COLORS, SHAPES, SHAPES_WORLD
from fastunlearn.worlds.shapes.captions import full_caption, sample_captions
from fastunlearn.worlds.shapes.world import render, sample_scenes

CONCEPT = "star"
METHODS = ("identity", "placebo", "esd", "ovw", "saddle")
DAMAGES = ("esd", "faded", "noise")
DOSES = (0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
RESAMPLES, LEVEL, POWER = 200, 0.95, 0.8
JUDGED = 128  # images per batch of the judge
SETS = ("fid", "kid")  # metrics of sets of images, on the same features
PAIRED = ("dreamsim", "clip-score")

#: What is compared at each dose, and how it is called in figure and table.
STATISTICS = {
    "integrity": "integrity (LPIPS form, pairs)",
    "dreamsim": "DreamSim-like (pairs)",
    "fid": "FID, same noise",
    "fid-other": "FID, other noise",
    "kid-other": "KID, other noise",
    "clip-score": "CLIPScore-like",
    "accuracy": "accuracy",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--figure", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path(".benchmarks/metrics_miss"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    world = World(args.work)
    models = table(world)
    damages = {name: doses(world, name) for name in DAMAGES}
    content = {
        "minutes": round(world.seconds() / 60, 1),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "prompts": len(world.prompts),
        "seeds": 2,
        "metric": world.distance.metric,
        "judge": dataclasses.asdict(record_of(world.judge)),
        "models": models,
        "doses": {"levels": list(DOSES), "power": POWER, "resamples": RESAMPLES, "damages": damages},
    }
    write_json(args.output, content)
    draw(content, args.figure)


# ---- images and what is measured on them ---------------------------------------------------------------------------


class World:
    """Prompts, models and their images; every image is drawn once and kept in ``work``."""

    def __init__(self, work: Path) -> None:
        self.work, self._started, self._before = work, time.monotonic(), 0.0
        if (work / "seconds").exists():
            self._before = float((work / "seconds").read_text())
        trained = set(SHAPES_WORLD.prompts_to_train(CONCEPT)[1])
        everything = itertools.product(COLORS, (shape for shape in SHAPES if shape != CONCEPT), BACKGROUNDS)
        unseen = [prompt for parts in everything if (prompt := full_caption(*parts)) not in trained]
        self.prompts = unseen[::2]  # two backgrounds of every shape and color
        self.forget = [p for p, group in SHAPES_WORLD.prompts_to_evaluate(CONCEPT) if is_forget(group)]
        self.distance = load_perceptual("shapes")
        self.judge = load_judge("shapes")
        self.metrics = {name: load_metric(name, world=SHAPES_WORLD) for name in (*SETS, *PAIRED)}
        # A batch holds the same seed only, so that seeds can be drawn apart.
        self.original = [self.images("original", self.prompts, seed, lambda: load_model("shapes")) for seed in (0, 1)]

    def seconds(self) -> float:
        """Spent on all of it, also before a stop; what a stop lost is not counted."""
        spent = self._before + time.monotonic() - self._started
        write_text(self.work / "seconds", f"{spent}")
        return spent

    def images(self, name: str, prompts: list[str], seed: int, load: Callable[[], Model]) -> torch.Tensor:
        """(N, 3, 64, 64) uint8, one per prompt, from the same noise for every model."""
        which = "forget" if prompts is self.forget else "retain"
        path = self.work / f"{name}-{which}-{seed}.pt"
        if not path.exists():
            print(f"{name}: {len(prompts)} {which} images, seed {seed}", flush=True)
            drawn = PipelineSource(load(), SamplerSpec()).generate([(prompt, seed) for prompt in prompts])
            with whole_file(path) as unfinished:
                torch.save(drawn, unfinished)
            self.seconds()
        return torch.load(path, weights_only=True)

    def trained(self, method: str) -> Model:
        folder = self.work / method
        if not (folder / "model" / "model_index.json").exists():
            print(f"training {method}", flush=True)
            config = TrainConfig(
                forget=CONCEPT, method=method, output=str(folder), evaluation_prompts="none", overwrite=folder.exists()
            )
            unlearn(config)
        return load_model(str(folder / "model"))

    def weights(self, name: str, make: Callable[[], Model]) -> dict[str, torch.Tensor]:
        """A denoiser's weights, made once."""
        path = self.work / f"{name}-weights.pt"
        if not path.exists():
            print(f"{name}: weights", flush=True)
            made = make().denoiser.state_dict()
            with whole_file(path) as unfinished:
                torch.save(made, unfinished)
            self.seconds()
        return torch.load(path, weights_only=True)

    def ordinary(self) -> Model:
        """The original after some more of the training that made it: a change without a purpose."""
        model = load_model("shapes")
        weights = self.weights("ordinary training", lambda: ordinary_training(load_model("shapes")))
        model.denoiser.load_state_dict(weights)
        return model

    def rows(self, name: str, seed: int, after: torch.Tensor) -> dict[str, np.ndarray]:
        """One row a prompt for every metric of these images beside the original's.  Measured once."""
        path = self.work / f"{name}-rows-{seed}.npz"
        if not path.exists():
            before, other = self.original[seed], self.original[1 - seed]
            result = {
                metric: self.metrics[metric].measure(before, after, self.prompts).numpy().astype(np.float64)
                for metric in ("fid", *PAIRED)
            }
            # KID sees FID's features; from other noise means the original's features from the other seed.
            features = np.split(result["fid"], 2, axis=1)[1]
            other_features = self.metrics["fid"].measure(other, other, self.prompts).numpy().astype(np.float64)
            result["fid-other"] = np.concatenate([np.split(other_features, 2, axis=1)[0], features], axis=1)
            result |= {"kid": result["fid"], "kid-other": result["fid-other"]}
            result["integrity"] = self.distance.distance(before, after).numpy().astype(np.float64)
            result["ceiling"] = self.distance.distance(before, other).numpy().astype(np.float64)
            for side, images in (("before", before), ("after", after)):
                result |= {f"{what}-{side}": right for what, right in self.right(images).items()}
            with whole_file(path) as unfinished, unfinished.open("wb") as stream:
                np.savez(stream, **result)  # type: ignore[arg-type]  # takes the names for its own flag
        return dict(np.load(path))

    def right(self, images: torch.Tensor) -> dict[str, np.ndarray]:
        """Which images show what their prompt names, by attribute; ``all`` of them; which are valid."""
        verdicts = judged(self.judge, images, CONCEPT, JUDGED)
        named = [self.judge.asked(prompt) for prompt in self.prompts]
        right = {
            attribute: verdicts.words[0, :, column] == [words.index(name[attribute]) for name in named]
            for column, (attribute, words) in enumerate(self.judge.vocabulary.items())
        }
        return right | {"all": np.all(list(right.values()), axis=0), "valid": self.valid(verdicts)}

    def valid(self, verdicts: Judged) -> np.ndarray:
        assert self.judge.valid_threshold is not None
        return verdicts.valid[0] >= self.judge.valid_threshold

    def shown(self, images: torch.Tensor) -> tuple[float, float]:
        """The share of images that show the concept, in a valid image, and the share of valid ones."""
        verdicts = judged(self.judge, images, CONCEPT, JUDGED)
        valid = self.valid(verdicts)
        return float(((verdicts.shown[0] >= self.judge.threshold) & valid).mean()), float(valid.mean())


# ---- the models ------------------------------------------------------------------------------------------------------


def table(world: World) -> list[dict[str, Any]]:
    """Every model under every metric, two images per prompt."""
    loaders: dict[str, Callable[[], Model]] = {method: partial(world.trained, method) for method in METHODS}
    loaders["ordinary training"] = world.ordinary
    loaders["gold"] = lambda: load_model("shapes-gold-star")
    shown_before = world.shown(world.images("original", world.forget, 0, lambda: load_model("shapes")))
    rows = [summary(world, "seeds permuted", world.original[::-1], None, shown_before)]
    for name, load in loaders.items():
        drawn = [world.images(name, world.prompts, seed, load) for seed in (0, 1)]
        forget = world.images(name, world.forget, 0, load)
        rows.append(summary(world, name, drawn, forget, shown_before))
    order = ["identity", "placebo", "seeds permuted", "ordinary training", "ovw", "saddle", "esd", "gold"]
    return sorted(rows, key=lambda row: order.index(row["model"]))


def summary(
    world: World, name: str, drawn: list[torch.Tensor], forget: torch.Tensor | None, shown_before: tuple[float, float]
) -> dict[str, Any]:
    """``forget`` is None for the original itself."""
    parts = [world.rows(name, seed, drawn[seed]) for seed in (0, 1)]
    both = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    prompts = world.prompts * 2
    kept = retention(both["integrity"], prompts, both["ceiling"], prompts)
    distance = clustered_mean(both["integrity"], prompts)
    shown, valid = shown_before if forget is None else world.shown(forget)
    row: dict[str, Any] = {
        "model": name,
        "shown": shown,
        "forget_valid": valid,
        "integrity": {"mean": distance.mean, "ci95": [distance.low, distance.high]},
        "retention": {"mean": kept.mean, "ci95": [kept.low, kept.high]},
        "n_pairs": len(prompts),
        "n_forget": len(world.forget),
    }
    for what in (*world.judge.vocabulary, "all", "valid"):
        right = both[f"{what}-after"]
        share = wilson(int(right.sum()), len(right))
        row[f"{what}_accuracy"] = {"mean": share.mean, "ci95": [share.low, share.high]}
    for metric in PAIRED:
        row[metric] = world.metrics[metric].aggregate(both[metric], prompts)
    for metric in SETS:
        replicates = [
            set_statistic(world, metric, both[metric][index]) for index in _resamples(len(world.prompts), copies=2)
        ]
        row[metric] = {
            "value": set_statistic(world, metric, both[metric]),
            "ci95": np.quantile(replicates, [0.025, 0.975]).tolist(),
        }
    return row


def ordinary_training(
    model: Model, steps: int = 40, *, fade: float = 1.0, selector: str = "cross-attention-kv"
) -> Model:
    """Some steps of the training that made the model, on renders without the concept, of contrast ``fade``."""
    generator = torch.Generator().manual_seed(0)
    scenes = sample_scenes(4096, seed=12345)
    scenes = scenes[scenes.shape != SHAPES.index(CONCEPT)]
    captions = sample_captions(scenes, generator)
    names = set(select_parameters(model, selector))
    parameters = [p for name, p in model.denoiser.named_parameters() if name in names]
    for parameter in parameters:
        parameter.requires_grad_(True)
    rate = 1e-3 if selector == "cross-attention-kv" else 2e-4
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    vae, scheduler = model.pipeline.vae, model.pipeline.scheduler
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        chosen = torch.randint(len(scenes), (32,), generator=generator)
        with torch.no_grad():
            pixels = to_pixel_values(render(scenes[chosen])) * fade
            latents = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (32,), generator=generator)
        asked = [captions[place] for place in chosen.tolist()]
        predicted = model.predict(
            scheduler.add_noise(latents, noise, timesteps), timesteps, model.encode(asked).of(asked)
        )
        torch.nn.functional.mse_loss(predicted, noise).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.denoiser.requires_grad_(False)
    return model


# ---- doses -----------------------------------------------------------------------------------------------------------


def doses(world: World, damage: str) -> dict[str, Any]:
    """From which dose of a damage on each metric tells the model from one after ordinary training."""
    weights = world.weights(f"{damage} damage", lambda: damaged(world, damage))

    def at(dose: float) -> Model:
        model = load_model("shapes")
        start = copy.deepcopy(model.denoiser.state_dict())
        model.denoiser.load_state_dict({name: torch.lerp(value, weights[name], dose) for name, value in start.items()})
        return model

    benign = world.images("ordinary training", world.prompts, 0, world.ordinary)
    null = statistics(world, world.rows("ordinary training", 0, benign))
    found = []
    for dose in DOSES:
        # At its end, the model of the table has just these weights.
        name = "esd" if (damage, dose) == ("esd", 1.0) else f"{damage}-{dose}"
        drawn = world.images(name, world.prompts, 0, partial(at, dose))
        rows = world.rows(name, 0, drawn)
        kept = retention(rows["integrity"], world.prompts, rows["ceiling"], world.prompts)
        found.append((statistics(world, rows), {"mean": kept.mean, "ci95": [kept.low, kept.high]}))
    result: dict[str, Any] = {"retention": [kept for _, kept in found], "metrics": {}}
    for name in STATISTICS:
        limit = float(np.quantile(null[name], LEVEL))
        over = np.stack([replicates[name] > limit for replicates, _ in found])
        smallest = _smallest(over)
        reached = np.flatnonzero(over.mean(1) >= POWER)
        result["metrics"][name] = {
            "limit": limit,
            "values": [float(np.median(replicates[name])) for replicates, _ in found],
            "power": over.mean(1).tolist(),
            "smallest_dose": DOSES[reached[0]] if len(reached) else None,
            "smallest_dose_ci95": [
                _or_none(value) for value in np.quantile(smallest, [0.025, 0.975], method="nearest")
            ],
        }
    return result


def damaged(world: World, damage: str) -> Model:
    """``esd``: unlearned with ESD.  ``faded``: all parameters trained on images of half the contrast.  ``noise``:
    every weight moved at random by a fifth of its tensor's spread.
    """
    if damage == "esd":
        return world.trained("esd")
    model = load_model("shapes")
    if damage == "faded":
        return ordinary_training(model, 60, fade=0.5, selector="all")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.denoiser.parameters():
            spread = parameter.std() if parameter.numel() > 1 else parameter.abs().mean()
            parameter.add_(0.2 * spread * torch.randn(parameter.shape, generator=generator))
    return model


def statistics(world: World, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """(RESAMPLES,) values of every statistic over resampled prompts; larger means more damage."""
    draws = _resamples(len(world.prompts))
    result = {name: np.array([rows[name][index].mean() for index in draws]) for name in ("integrity", "dreamsim")}
    lost = {
        "clip-score": rows["clip-score"][:, 0] - rows["clip-score"][:, 1],
        "accuracy": rows["all-before"].astype(float) - rows["all-after"],
    }
    result |= {name: np.array([values[index].mean() for index in draws]) for name, values in lost.items()}
    for name in ("fid", "fid-other", "kid-other"):
        metric = name.removesuffix("-other")
        result[name] = np.array([set_statistic(world, metric, rows[name][index]) for index in draws])
    return result


def set_statistic(world: World, metric: str, values: np.ndarray) -> float:
    return world.metrics[metric].aggregate(values, [""] * len(values))["value"]


def _resamples(count: int, copies: int = 1) -> list[np.ndarray]:
    """Places of prompts drawn with replacement; with ``copies`` rows per prompt, one block of rows after another."""
    draws = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    return [np.concatenate([row + copy * count for copy in range(copies)]) for row in draws]


def _smallest(over: np.ndarray) -> np.ndarray:
    """(doses, resamples) of detections to the smallest dose from which on all are detected; infinite where none is."""
    from_here_on = np.flip(np.logical_and.accumulate(np.flip(over, 0), 0), 0)
    doses_up = np.array([*DOSES, np.inf])
    return doses_up[np.where(from_here_on.any(0), from_here_on.argmax(0), len(DOSES))]


def _or_none(value: float) -> float | None:
    return None if np.isinf(value) else float(value)


# ---- figure ----------------------------------------------------------------------------------------------------------

_TITLES = {
    "esd": "unlearned with ESD",
    "faded": "trained on faded images",
    "noise": "noise on all weights",
}
_COLORS = ("#c2410c", "#d97706", "#1d4ed8", "#0ea5e9", "#0d9488", "#6b7280", "#111827")


def draw(content: dict[str, Any], path: Path) -> None:
    """Power over dose for every metric, above the retention at that dose."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    levels, damages = content["doses"]["levels"], content["doses"]["damages"]
    figure, axes = plt.subplots(
        2, len(damages), figsize=(12.5, 6.4), sharex=True, sharey="row", height_ratios=[1, 2.1], layout="constrained"
    )
    for column, (name, damage) in enumerate(damages.items()):
        top, bottom = axes[0, column], axes[1, column]
        kept = damage["retention"]
        top.fill_between(
            levels, *zip(*(entry["ci95"] for entry in kept), strict=True), color="#c2410c", alpha=0.2, lw=0
        )
        top.plot(levels, [entry["mean"] for entry in kept], color="#c2410c", marker="o", ms=4)
        top.set_title(_TITLES[name], fontsize=12)
        top.axhline(0, color="#9ca3af", lw=0.8)
        for (key, label), color in zip(STATISTICS.items(), _COLORS, strict=True):
            style = "-" if key in ("integrity", "dreamsim") else "--" if key == "fid" else "-."
            width = {"integrity": 7, "dreamsim": 3.5}.get(key, 1.6)  # several lie on one another
            power = damage["metrics"][key]["power"]
            bottom.plot(levels, power, style, color=color, marker="o", ms=4, lw=width, label=label)
        bottom.axhline(content["doses"]["power"], color="#9ca3af", lw=0.8)
        bottom.set_xscale("log")
        bottom.set_xticks(levels, [f"{level:g}" for level in levels])
        bottom.minorticks_off()
        bottom.set_xlabel("dose: 0 is the original, 1 the damaged model")
        for axis in (top, bottom):
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.25)
    axes[0, 0].set_ylabel("retention R")
    axes[1, 0].set_ylabel("power to detect the damage")
    handles, labels = axes[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
