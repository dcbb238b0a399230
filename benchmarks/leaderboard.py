"""Every method on every concept of a bundled world: shown, kept, R, and what it cost.

    python benchmarks/leaderboard.py --minutes 50                      # as many cells as fit, then again, until all are
    python benchmarks/leaderboard.py --methods uce,ovw --concepts ring,blue --seeds 0
    python benchmarks/leaderboard.py --world gallery --minutes 50
    python benchmarks/leaderboard.py --world gallery --minutes 0 --anchors

A cell is one method, concept and training seed: a training with the method's defaults, and an evaluation on noise and,
but for the empty one, prompts that training neither forgets nor holds.  Finished cells stay in ``--work``, so a stopped
run continues; ``--shard 1/2`` takes every second cell.  The results file holds, by world, every cell that is done,
which concepts the defaults were chosen on (:data:`CHOSEN_ON`), and for each method the sums over the others alone.
Cells that it has of the same original and judge stay until they are made anew; those of others, of other defaults,
another anchor or other prompts go.  Finished trainings in ``--runs``, in folders like shapes-ovw-ring-0, are
evaluated, not made again.
``--anchors`` measures what mapping a concept to its anchor cannot be expected to go below: in how many images of the
original the judge sees the concept where its anchor is asked for in its place.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from fastunlearn import evaluate, load_judge, unlearn
from fastunlearn.errors import UserError
from fastunlearn.evaluation.generators import as_source
from fastunlearn.evaluation.judging import Sides
from fastunlearn.files.atomic import write_json
from fastunlearn.files.prompt_files import is_forget
from fastunlearn.files.weights import hash_pipeline
from fastunlearn.judges.base import judged
from fastunlearn.methods import all_methods
from fastunlearn.models.loading import load_model
from fastunlearn.models.runtime import versions
from fastunlearn.models.sampling import SamplerSpec
from fastunlearn.prompts import substitute
from fastunlearn.schema import Evaluation, RunRecord
from fastunlearn.worlds import get_world
from fastunlearn.worlds.base import World

RESULTS = Path(__file__).resolve().parent / "results" / "leaderboard.json"
#: Methods' defaults for a world were chosen on these; sums leave them out.
CHOSEN_ON = {
    "shapes": ("star", "triangle", "cross", "crescent", "green", "blue", "striped", "checkered"),
    "gallery": ("fluent", "ink", "dog", "apple", "emojione"),  # the last: its anchor
}
#: Further concepts that one method's defaults were changed for: its sums leave them out, too.
ALSO_SEEN = {
    ("shapes", "esd"): ("circle", "orange"),
    ("shapes", "speed"): ("red", "orange", "ring"),
    ("shapes", "uce"): ("red",),
    ("shapes", "rece"): ("ring",),
    ("shapes", "mace"): ("red", "dotted", "ring"),
    ("shapes", "selective-amnesia"): ("red", "dotted", "ring"),
    ("gallery", "esd"): ("cat", "twemoji"),
    ("gallery", "concept-ablation"): ("cat", "noto", "twemoji"),
    ("gallery", "ovw"): ("cat", "noto", "twemoji"),
    ("gallery", "salun"): ("cat", "noto", "twemoji"),
    ("gallery", "holdfast"): ("classic", "noto", "twemoji"),
    ("gallery", "saddle"): ("cat", "noto", "twemoji"),
    ("gallery", "rece"): ("cat", "noto", "twemoji"),
}
FORGOTTEN = 0.05  # shown and valid, at most: the concept is gone


def _runnable() -> list[str]:
    """The methods that change something and need nothing but a concept: no folder of pictures."""

    def needs_files(kind: type | None) -> bool:
        return kind is not None and any(field.metadata.get("path") for field in dataclasses.fields(kind))

    return [name for name, method in all_methods().items() if name != "identity" and not needs_files(method.options)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path(".benchmarks/leaderboard"))
    parser.add_argument("--world", default="shapes")
    parser.add_argument("--methods", default="", help="comma list; default: all that change something")
    parser.add_argument("--concepts", default="", help="comma list; default: all of the world")
    parser.add_argument("--seeds", default="0", help="comma list of training seeds")
    parser.add_argument("--minutes", type=float, default=50, help="no cell begins after so long")
    parser.add_argument("--runs", type=Path, help="folder of finished trainings, called WORLD-METHOD-CONCEPT-SEED")
    parser.add_argument("--anchors", action="store_true", help="measure how much of each concept its anchor shows")
    parser.add_argument("--shard", default="1/1", help="which cells, as 1/2 and 2/2 for two processes")
    args = parser.parse_args()
    world = get_world(args.world)
    assert world is not None
    methods = args.methods.split(",") if args.methods else _runnable()
    # The first word of every kind, then the second: whenever the time is over, all kinds are among the results.
    in_turn = [word for words in itertools.zip_longest(*world.vocabulary.values()) for word in words if word]
    concepts = [world.find(word)[1] for word in args.concepts.split(",")] if args.concepts else in_turn
    seeds = [int(seed) for seed in args.seeds.split(",")]
    args.work.mkdir(parents=True, exist_ok=True)
    # Concept by concept, so that the original's images are drawn once; the interesting ones first.
    order = sorted(concepts, key=lambda word: (word in CHOSEN_ON[world.name], in_turn.index(word)))
    cells = list(itertools.product(seeds, order, methods))
    shard, shards = (int(part) for part in args.shard.split("/"))
    begun = time.monotonic()
    made_of = {"original": hash_pipeline(load_model(world.name, "cpu").source), "judge": load_judge(world.name).name}
    for seed, concept, method in cells[shard - 1 :: shards]:
        name = f"{world.name}-{method}-{concept}-{seed}"
        path = args.work / f"{name}.json"
        if _read(path, world, made_of) is None:
            if time.monotonic() - begun > 60 * args.minutes:
                print("the time is over; run the command again for the rest")
                break
            stamp = made_of | {"defaults": defaults_of(world, method, concept)}
            run = args.runs / name if args.runs and (args.runs / name / "run.json").is_file() else None
            if run is None and not _possible(world.name, world.default_concept, method):
                continue
            write_json(path, stamp | cell(world.name, method, concept, seed, args.work / "cache", run))
            print(json.dumps({key: _read(path, world, made_of)[key] for key in SHOWN}), flush=True)  # type: ignore[index]
    board = json.loads(args.output.read_text(encoding="utf-8")) if args.output.is_file() else {"worlds": {}}
    board["forgotten_at_most"] = FORGOTTEN
    board["worlds"][world.name] = collected(args.work, world, made_of, board["worlds"].get(world.name))
    if args.anchors:
        board["worlds"][world.name]["anchors"] |= anchors_shown(world, concepts)
    write_json(args.output, board)


def anchors_shown(world: World, concepts: list[str]) -> dict[str, dict[str, Any]]:
    """By concept: its anchor, and in how many images of the original for the anchor's prompts the concept is shown.

    The prompts are those that an evaluation asks of the concept, with the anchor in its place; one image each.  Shown
    is what it is in an evaluation: in a valid image.
    """
    judge, source = load_judge(world.name), as_source(world.name, SamplerSpec(), device="cpu")
    found = {}
    for concept in concepts:
        anchor = world.anchor(concept)
        asked = [prompt for prompt, group in world.evaluation_prompts(concept) if is_forget(group)]
        images = source.generate([(substitute(prompt, concept, anchor), 0) for prompt in asked])
        shown = Sides(judge, judged(judge, images, concept, source.batch_size), 0).shown(0)
        found[concept] = {
            "anchor": anchor,
            "asked": asked_of(world, concept),
            "n_images": len(asked),
            "shown": float(shown.mean()),
        }
        print(concept, found[concept], flush=True)
    return found


@functools.cache
def _possible(world: str, concept: str, method: str) -> bool:
    """Whether this kind of model can have the method, as its plan says; if not, the reason is printed."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            unlearn(world, concept, method, output=Path(scratch) / "run", dry_run=True)
        except UserError as error:
            print(f"{method} is left out: {error}", flush=True)
            return False
    return True


SHOWN = ("method", "concept", "seed", "shown", "valid", "kept", "retention", "seconds")


def asked_of(world: World, concept: str) -> str:
    """What tells a concept's anchor and the prompts of its evaluation from others."""
    return _stamp(world.anchor(concept), world.evaluation_prompts(concept))


def defaults_of(world: World, method: str, concept: str) -> str:
    """What tells defaults, a concept's anchor and its prompts from others; empty for a method that is no more."""
    methods = all_methods()
    if method not in methods:
        return ""
    settings = methods[method].defaults_for(world.name, *world.like)
    return _stamp(settings, world.anchor(concept), world.train_prompts(concept), world.evaluation_prompts(concept))


def _stamp(*told: object) -> str:
    return hashlib.sha256(repr(told).encode()).hexdigest()[:12]


def _read(path: Path, world: World, made_of: dict[str, str]) -> dict[str, Any] | None:
    """A finished cell; None where there is none, or one of others than ``made_of``, other defaults or other prompts."""
    if not path.is_file():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    wanted = made_of | {"defaults": defaults_of(world, content["method"], content["concept"])}
    return content if _holds(content, wanted) else None


def _holds(content: dict[str, Any], wanted: dict[str, str]) -> bool:
    return all(content.get(name) == value for name, value in wanted.items())


def cell(world: str, method: str, concept: str, seed: int, cache: Path, run: Path | None = None) -> dict[str, Any]:
    """One training, or the finished ``run``, and its evaluation."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = run or Path(scratch) / "run"
        if run is None:
            unlearn(world, concept, method, output=folder, seed=seed, evaluation_prompts="none")
        record = RunRecord.read(folder / "run.json")
        assert (record.method, record.concept) == (method, concept), folder
        report = evaluate(world, str(folder), forget=concept, cache=cache)
    return {"method": method, "concept": concept, "seed": seed} | figures(record, report.results[0].evaluation)


def figures(record: RunRecord, evaluation: Evaluation) -> dict[str, Any]:
    """What a cell holds of a run and its evaluation."""
    erasure, integrity, retain = evaluation.erasure, evaluation.integrity, evaluation.retain
    assert erasure is not None
    assert retain is not None
    return {
        "shown": erasure.shown,
        "shown_ci95": erasure.shown_ci95,
        "shown_original": erasure.shown_original,
        "valid": erasure.valid,
        "n_images": erasure.n_images,
        "kept": {name: one.accuracy for name, one in retain.attributes.items()},
        "kept_original": {name: one.original for name, one in retain.attributes.items()},
        "judged_the_same": retain.agreement,
        "retention": integrity.retention,
        "retention_ci95": integrity.retention_ci95,
        "beyond_redrawn": integrity.changed["redrawn"].share,
        "unprompted": dataclasses.asdict(evaluation.unprompted) if evaluation.unprompted else None,
        "groups": {name: group.retention for name, group in evaluation.groups.items() if group.retention is not None},
        "ending": dataclasses.asdict(record.ending) if record.ending else None,
        "unet_evaluations": record.unet_evaluations,
        "seconds": round(sum(record.seconds.values()), 1),
        "threads": record.threads,
    }


def collected(work: Path, world: World, made_of: dict[str, str], before: dict[str, Any] | None) -> dict[str, Any]:
    """A world's part of the results: every finished cell, and sums over concepts that nothing was chosen on.

    ``made_of``: the original's hash and the judge's name.  ``before``: what the results file has of the world.  Of its
    cells those stay that are of the same original, judge and defaults, and were not made anew.
    """
    paths = sorted(work.glob(f"{world.name}-*.json"))
    made = [one for path in paths if (one := _read(path, world, made_of)) is not None]
    same = before if before is not None and _holds(before, made_of) else {"cells": []}
    kept = [one for one in same["cells"] if one["defaults"] == defaults_of(world, one["method"], one["concept"])]
    by_key = {(one["method"], one["concept"], one["seed"]): one for one in (*kept, *made)}
    cells = [{name: value for name, value in by_key[key].items() if name not in made_of} for key in sorted(by_key)]
    methods = {}
    for method in dict.fromkeys(one["method"] for one in cells):
        mine = [one for one in cells if one["method"] == method]
        seen = (*CHOSEN_ON[world.name], *ALSO_SEEN.get((world.name, method), ()))
        held = [one for one in mine if one["concept"] not in seen]
        methods[method] = {"chosen_on": _sums([one for one in mine if one not in held]), "held_out": _sums(held)}
    return {
        **made_of,
        "versions": versions(),
        "chosen_on": list(CHOSEN_ON[world.name]),
        "methods": methods,
        "anchors": {
            word: one for word, one in same.get("anchors", {}).items() if one.get("asked") == asked_of(world, word)
        },
        "cells": cells,
    }


def _sums(cells: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not cells:
        return None

    def spread(values: list[float]) -> dict[str, float]:
        return {"median": statistics.median(values), "least": min(values), "most": max(values)}

    unprompted = [one["unprompted"] for one in cells if one["unprompted"]]
    still = [one["shown"] * one["n_images"] for one in unprompted]
    return {
        "concepts": sorted({one["concept"] for one in cells}),
        "seeds": sorted({one["seed"] for one in cells}),
        "cells": len(cells),
        "forgotten": sum(one["shown"] <= FORGOTTEN for one in cells),
        "still_shown": sorted({one["concept"] for one in cells if one["shown"] > FORGOTTEN}),
        "shown": spread([one["shown"] for one in cells]),
        "valid": spread([one["valid"] for one in cells]),
        "retention": spread([one["retention"] for one in cells]),
        "judged_the_same": spread([one["judged_the_same"] for one in cells]),
        "unprompted": {"images": sum(one["n_images"] for one in unprompted), "still": round(sum(still))},
        "seconds": spread([one["seconds"] for one in cells]),
    }


if __name__ == "__main__":
    main()
