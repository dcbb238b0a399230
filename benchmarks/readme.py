"""Puts the figures of benchmarks/results/ and the tables of what there is into README and docs, between their marks.

python benchmarks/readme.py                      # after `make results`; --check only compares
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from metrics_miss_figure import LABELS, columns

from fastunlearn.methods import Method, all_methods
from fastunlearn.models.families import OURS
from fastunlearn.reports.sentences import gap_sentence, listed
from fastunlearn.schema import Demo

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
#: A section stands between `<!-- begin NAME -->` and `<!-- end NAME -->` in any of these.
PAGES = tuple(
    ROOT / page
    for page in ("README.md", "docs/results.md", "docs/kernels.md", "docs/gallery.md", "packaging/gallery/README.md")
)
#: What the gallery's weights were measured by, when they were made.
QUALITY = ROOT / "packaging" / "gallery" / "fastunlearn_gallery" / "weights" / "quality.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 if a page would change")
    parser.add_argument(
        "--bank-speed", type=Path, help="a pytest-benchmark file to distil into results/bank_speed.json"
    )
    parser.add_argument(
        "--evaluation-speed", type=Path, help="a pytest-benchmark file to distil into results/evaluation_cpu.json"
    )
    parser.add_argument(
        "--second-model", type=Path, help="a pytest-benchmark file to distil into results/second_model_cpu.json"
    )
    args = parser.parse_args()
    if args.bank_speed:
        distil(args.bank_speed)
    if args.evaluation_speed:
        distil_evaluation(args.evaluation_speed)
    if args.second_model:
        (entry,) = json.loads(args.second_model.read_text(encoding="utf-8"))["benchmarks"]
        text = json.dumps(entry["extra_info"], indent=1) + "\n"
        (RESULTS / "second_model_cpu.json").write_text(text, encoding="utf-8")
    before = {path: path.read_text(encoding="utf-8") for path in PAGES}
    after = {path: render(text) for path, text in before.items()}
    if args.check:
        stale = [path.relative_to(ROOT).as_posix() for path in PAGES if before[path] != after[path]]
        sys.exit(f"not what `make readme` writes: {', '.join(stale)}" if stale else 0)
    for path, text in after.items():
        path.write_text(text, encoding="utf-8")


def render(text: str) -> str:
    """A page's text with every marked section made anew from its results file.  KeyError for an unknown mark."""
    sections = {
        "methods": methods_section,
        "families": lambda: families_section(_read("models.json")),
        "demo": lambda: demo_section(RESULTS / "demo.json", "make demo"),
        "gallery_demo": lambda: demo_section(RESULTS / "demo_gallery.json", "fastunlearn demo --model gallery"),
        "edits": lambda: edits_section(_read("edits.json"), _read("gallery.json")),
        "gallery": lambda: gallery_section(json.loads(QUALITY.read_text(encoding="utf-8"))),
        "quality": lambda: quality_section(json.loads(QUALITY.read_text(encoding="utf-8"))),
        "attacked": lambda: attacked_section(_read("attacks.json")["worlds"]["shapes"].values()),
        "leaderboard": lambda: leaderboard_section(RESULTS / "leaderboard.json"),
        "training": lambda: training_section(_read("training_cpu.json")),
        "coverage": lambda: coverage_section(_read("coverage.json")),
        "bank": lambda: bank_section(_read("bank_speed.json"), _read("bank_quality.json")),
        "metrics": lambda: metrics_section(RESULTS / "metrics_miss.json"),
        "evaluation": lambda: evaluation_section(_read("evaluation_cpu.json"), _read("second_model_cpu.json")),
        "native": lambda: native_section(RESULTS / "native_cpu.json"),
        "kernels": lambda: kernels_section([_read(path.name) for path in sorted(RESULTS.glob("kernels-*.json"))]),
    }
    for name in re.findall(r"<!-- begin (\w+) -->", text):
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        head, _, rest = text.partition(begin)
        text = head + begin + sections[name]() + "\n" + end + rest.partition(end)[2]
    return text


def our_methods() -> list[Method]:
    """The methods of this package, without those that installed packages add."""
    return [method for method in all_methods().values() if method.recipe.__module__.startswith("fastunlearn.methods.")]


def methods_section() -> str:
    lines = ["| method | what it does | source |", "|---|---|---|"]
    for method in our_methods():
        if not method.is_control:
            source = method.paper.replace("our reconstruction", "**our reconstruction**")
            lines.append(f"| `{method.name}` | {method.summary} | {source} |")
    controls = ", ".join(f"`{method.name}`" for method in our_methods() if method.is_control)
    return "\n".join([*lines, f"| {controls} | controls: what changes although nothing is to be forgotten | |"])


def families_section(models: dict[str, Any]) -> str:
    """Every family, and how near its images are to plain diffusers' in all cases of models.json."""
    lines = [
        "| family | diffusers pipeline | trained by default | samplers tried | off plain diffusers by at most |",
        "|---|---|---|---|---|",
    ]
    for family in OURS:
        rows = [row for row in models["cases"].values() if row["family"] == family.family]
        worst = max(row["own"] for row in rows)
        samplers = len({row["sampler"] for row in rows})
        pipelines = ", ".join(f"`{name}`" for name in family.pipelines)
        lines.append(
            f"| {family.family} | {pipelines} | {family.default_group} | {samplers} | {worst} of 255, tiny models |"
        )
    return "\n".join(lines)


def edits_section(edits: dict[str, Any], gallery: dict[str, Any]) -> str:
    """The edits in closed form over all concepts, and what the picture shows, in a sentence each."""
    words, pictured = [], []
    for one in (row["evaluation"] for row in gallery["results"]):
        erasure, integrity = one["erasure"], one["integrity"]
        pictured.append(
            f"{one['concept']} is then shown in {erasure['shown']:.1%} of {erasure['n_images']} images asking for it, "
            f"and R is {integrity['retention']:.3f} over {integrity['n_pairs']} others"
        )
    for name, row in edits["summary"].items():
        words.append(f"`{name}` in {row['shown_mean']:.1%} with an R of {row['retention_mean']:.3f}")
    seconds = [one["edit_s"] for concept in edits["concepts"].values() for one in concept["methods"].values()]
    return (
        f"Without training, in closed form, over {len(edits['concepts'])} concepts of the bundled model: the concept "
        f"is shown, on average, by {', by '.join(words)}; an edit takes at most {max(seconds):.1f} s "
        "([table](docs/edits.md)). The picture is of [the gallery](docs/gallery.md) (`fastunlearn demo --model "
        "gallery`), a flow transformer that learned things in six styles from open artwork, after one edit by `uce`: "
        f"{'; '.join(pictured)}."
    )


def quality_section(quality: dict[str, Any]) -> str:
    """How good the gallery's model is, in a sentence."""
    original = quality["original"]
    return (
        f"Of {quality['images']} generated images the judge names the object in {original['object']:.1%}, the style in "
        f"{original['style']:.1%} and the background in {original['background']:.1%} as they were asked for."
    )


def gallery_section(quality: dict[str, Any]) -> str:
    """How good the gallery's models are, attribute by attribute."""
    judge, original, trained = quality["judge"], quality["original"], quality["trained"]
    lines = [
        f"{quality['images']} images of each model, {quality['steps']} steps, guidance {quality['guidance_scale']}, "
        "made by `make gallery-weights`. The judge is a classifier that was trained on drawn images alone, of which it "
        f"names {judge['object']:.1%} of the things, {judge['style']:.1%} of the styles and {judge['background']:.1%} "
        "of the backgrounds rightly.",
        "",
        "| named as it was asked for | original | gold |",
        "|---|---|---|",
    ]
    rows = {"object": "thing", "style": "style", "background": "background", "valid": "a valid image"}
    rows |= {"object_without": "thing, of prompts without twemoji and cat"}
    rows |= {"style_without": "style, of prompts without twemoji and cat"}
    rows |= {"gold_style": "twemoji, where it was asked for", "gold_object": "cat, where it was asked for"}
    for key, words in rows.items():
        lines.append(f"| {words} | {original[key]:.1%} | {quality['gold'][key]:.1%} |")
    shares = " | ".join(f"{original[key]:.1%}" for key in ("held_out", "held_out_object", "held_out_style"))
    lines += ["", "Of pairs of a thing and a style that no training saw:", ""]
    lines += ["| both right | thing right | style right |", "|---|---|---|", f"| {shares} |"]
    if told := quality.get("style_judge"):  # there is none of weights that were made before it
        lines += [
            "",
            "A second judge, which never saw these pairs either, names the style of their drawings in "
            f"{told['held_out_drawn']:.1%} and of what the model generates in {told['held_out_generated']:.1%}.",
        ]
    lines += [
        "",
        f"The autoencoder gives drawn images back with a PSNR of {quality['psnr']} dB. Steps of training: trunk "
        f"{trained['trunk']:,}, then gold {trained['gold']:,} and original {trained['original']:,}.",
    ]
    return "\n".join(lines)


def attacked_section(concepts: Iterable[dict[str, Any]]) -> str:
    """What the attack that learns an embedding brought back, over the concepts that were attacked, in a sentence."""
    counts: dict[str, list[tuple[int, int]]] = {}
    names = []
    for content in concepts:
        names.append(content["concept"])
        for model, found in content["models"].items():
            if (one := found["attacks"].get("embedding")) is not None:
                counts.setdefault(model, []).append((one["broken"], one["n_prompts"]))
    # A model that was not attacked for all of them would not compare.
    totals = {model: map(sum, zip(*one, strict=True)) for model, one in counts.items() if len(one) == len(names)}
    shares = {model: "{} of {}".format(*total) for model, total in totals.items()}
    models = [name for name in shares if name not in ("original", "gold", "placebo")]
    named = ", ".join(f"`{name}` {shares[name]}" for name in models)
    return (
        f"Attacked by an embedding that is learned, which prompts show the concept again ({listed(names)}): {named}; "
        f"the original {shares['original']}, a model that never saw it {shares['gold']} (one training each, "
        "[all attacks](docs/attacks.md))."
    )


def leaderboard_section(path: Path) -> str:
    """Every method on the concepts that nothing was chosen on, world by world."""
    if not path.is_file():
        return "Not measured yet; `python benchmarks/leaderboard.py` measures every method on every concept."
    board = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        "Trainings on concepts that no default was chosen on. Forgotten, of the trainings: shown, in a valid image, in "
        f"at most {board['forgotten_at_most']:.0%}. Medians, with the range. Unprompted: of the images that "
        "show the concept in the original though their prompts leave it open, those that still do; R leaves these out. "
        "Where trainings are more than concepts, some have several seeds. Seconds are of more than one machine."
    ]
    for world, part in board["worlds"].items():
        lines += ["", f"Of `{world}`:", ""]
        lines += ["| method | concepts | forgotten | shown | valid | R | judged the same | unprompted | s |"]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        for name, sums in part["methods"].items():
            if (held := sums["held_out"]) is None:
                continue
            but = f", not {listed(held['still_shown'])}" if held["still_shown"] else ""
            cells = [f"`{name}`", str(len(held["concepts"])), f"{held['forgotten']} of {held['cells']}{but}"]
            cells += [_spread(held[key], ".1%") for key in ("shown", "valid")]
            cells += [_spread(held["retention"], ".3f"), _spread(held["judged_the_same"], ".1%")]
            cells += [
                f"{held['unprompted']['still']} of {held['unprompted']['images']}",
                _spread(held["seconds"], ".0f"),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        if anchors := part["anchors"]:
            told = [f"{word} {one['shown']:.1%} (as {one['anchor']})" for word, one in anchors.items() if one["shown"]]
            lines += [
                "",
                "Asked for its anchor in its place, the original itself shows a concept in some images, and what maps "
                f"it to the anchor can hardly show less: {listed(told or ['none'])}, of {len(anchors)} concepts.",
            ]
        if seen := _also_seen(part):
            lines += ["", f"Not in a method's sums, as its defaults were changed after a look at them: {seen}."]
    return "\n".join(lines)


def _also_seen(part: dict[str, Any]) -> str:
    """By method, the concepts that its own defaults were changed for, and in how many of their images each is shown."""
    found: dict[str, list[str]] = {}
    for cell in part["cells"]:
        chosen = part["methods"][cell["method"]]["chosen_on"]
        if chosen and cell["concept"] in set(chosen["concepts"]).difference(part["chosen_on"]):
            found.setdefault(cell["method"], []).append(f"{cell['concept']} {cell['shown']:.1%}")
    return "; ".join(f"`{method}` {listed(told)}" for method, told in found.items())


def _spread(values: dict[str, float], form: str) -> str:
    return f"{values['median']:{form}} ({values['least']:{form}} to {values['most']:{form}})"


def training_section(result: dict[str, Any]) -> str:
    lines = [
        f"{result['machine']}, torch {result['torch']}: a training step, beside the first row in the same run.",
        "",
        "| | processes | ms per step | times the first | optimizer's states, MB |",
        "|---|---|---|---|---|",
    ]
    for row in result["cases"]:
        lines.append(
            f"| {row['case']} | {row['processes']} | {row['step_ms']:.0f} | {row['times_the_first']:.2f} | "
            f"{row['optimizer_bytes'] / 1e6:.1f} |"
        )
    return "\n".join(lines)


def coverage_section(result: dict[str, Any]) -> str:
    """The worst over shares of prompts that give another image altogether, one row per number of prompts."""
    lines = [
        f"How often a {result['level']:.0%} interval holds the true R, over {result['rounds']} rounds: the least over "
        "all populations and shares of prompts that give another image altogether.",
        "",
        "| prompts | interval of R | populations that it was not chosen on | plain t interval |",
        "|---|---|---|---|",
    ]
    for prompts in sorted({row["prompts"] for row in result["least"]}):
        rows = [row for row in result["least"] if row["prompts"] == prompts]
        cells = (min(row[way] for row in rows) for way in ("retention", "retention_not_chosen_on", "t"))
        lines.append(f"| {prompts} | {' | '.join(f'{share:.1%}' for share in cells)} |")
    beyond = ", ".join(f"{row['retention']['held']:.1%} at {row['prompts']} prompts" for row in result["unbounded"])
    lines += ["", f"Where most of the loss lies in a tail far beyond redrawn images: {beyond}."]
    return "\n".join(lines)


def demo_section(path: Path, command: str) -> str:
    """A demonstration: its methods side by side, and what it cost."""
    if not path.is_file():
        return f"Not measured yet; `{command}` measures it."
    demo = Demo.read(path)
    first = demo.evaluations[0]
    assert first.erasure is not None
    assert first.retain is not None
    assert first.judge is not None
    names = list(first.retain.attributes)
    columns = [f"{first.concept} shown", "valid", *(f"{name} kept" for name in names), "judged the same"]
    lines = [
        f"| | {' | '.join(columns)} | R (95 % interval) | distance |",
        "|---|" + "---|" * (len(columns) + 2),
    ]
    before = [first.erasure.shown_original, first.erasure.valid_original]
    before += [first.retain.attributes[name].original for name in names]
    lines.append(f"| original | {' | '.join(map(_share, before))} |  | 1 | 0 |")
    for evaluation in demo.evaluations:
        integrity, erasure, retain = evaluation.integrity, evaluation.erasure, evaluation.retain
        assert erasure is not None
        assert retain is not None
        low, high = integrity.retention_ci95
        shares = [erasure.shown, erasure.valid]
        shares += [retain.attributes[name].accuracy for name in names] + [retain.agreement]
        lines.append(
            f"| `{evaluation.name}` | {' | '.join(map(_share, shares))} "
            f"| **{integrity.retention:.3f}** ({low:.3f} to {high:.3f}) | {integrity.mean:.4f} |"
        )
    threads = first.spec["threads"]
    lines += [
        "",
        gap_sentence(demo.comparison).replace("\u00a0", " "),
        "",
        f"All from one run of `{command}`, {demo.seconds:.0f} s on a CPU with {threads} "
        f"thread{'s' * (threads != 1)} after installation, without a GPU or a network: {first.erasure.n_images} images "
        f"for prompts with the concept, {first.integrity.n_pairs} without. Judge: `{first.judge.name}`, shown from a "
        f"score of {first.judge.threshold:g} on.",
    ]
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return "not judged" if value is None else f"{value:.1%}"


def bank_section(speed: dict[str, Any], quality: dict[str, Any]) -> str:
    trajectories = sorted({row["trajectories"] for row in speed["bank"]})
    lines = [
        f"200 training rows of ESD on the bundled model, {speed['threads']} CPU threads, one run, each time beside the "
        f"usual loop (median {speed['usual_s']:.0f} s): how many times as fast, in brackets the range over "
        f"{speed['rounds']} rounds. Beside each ratio what it costs: training on 200 rows per role from so many "
        "trajectories against 200 rows from 200 fresh ones, distance to the original on unseen retain prompts "
        f"(training seeds: {len(next(iter(quality['methods'].values()))[0]['retention'])}).",
        "",
        "| trajectories | batch 1 | batch 8 | "
        + " | ".join(f"{m}: star shown, R, distance minus fresh (95 %)" for m in quality["methods"])
        + " |",
        "|---|---|---|" + "---|" * len(quality["methods"]),
    ]
    for count in (*trajectories, "fresh"):
        ratios = []
        for batch_size in (1, 8):
            result = [r for r in speed["bank"] if (r["trajectories"], r["batch_size"]) == (count, batch_size)]
            if result:
                low, high = result[0]["times_faster_range"]
                ratios.append(f"{result[0]['times_faster']:.1f}x ({low:.1f} to {high:.1f})")
            else:
                ratios.append("1x" if batch_size == 1 else "")
        cells = []
        for rows in quality["methods"].values():
            row = next(r for r in rows if r["trajectories"] == count)
            retention = sum(row["retention"]) / len(row["retention"])
            # Results made before judges know no validity, and have another name for the share.
            cell = f"{row['shown'] if 'shown' in row else row['forget_accuracy']:.1%}, {retention:.3f}"
            if gap := row.get("distance_minus_fresh"):
                low, high = gap["ci95"]
                cell += f", {gap['mean']:+.4f} ({low:+.4f} to {high:+.4f})"
            cells.append(cell)
        lines.append(f"| {count} | {' | '.join([*ratios, *cells])} |")
    return "\n".join(lines)


def kernels_section(results: list[dict[str, Any]]) -> str:
    """Our provider of every operation beside the first, which is eager torch, a device after the other."""
    lines = []
    for result in sorted(results, key=lambda result: result["environment"]["kind"], reverse=True):
        environment = result["environment"]
        lines += [
            f"{environment['kind']} ({environment['device']}, torch {environment['torch']}), medians of one run:",
            "",
            "| operation | size | beside | ms | ours, ms | times as fast |",
            "|---|---|---|---|---|---|",
        ]
        first: dict[tuple[str, str], dict[str, Any]] = {}
        for row in result["rows"]:
            beside = first.setdefault((row["operation"], row["size"]), row)
            is_variant = any(word in row["provider"] for word in ("bfloat16", "sectors", "0.01"))
            if row["provider"].startswith("fastunlearn") and not is_variant:
                theirs, ours = _seconds(beside), _seconds(row)
                detail = row["provider"].removeprefix("fastunlearn").lstrip(" ,")
                size = f"{row['size']}{', ' * bool(detail)}{detail}"
                cells = [row["operation"], size, beside["provider"], f"{1e3 * theirs:.3g}", f"{1e3 * ours:.3g}"]
                lines.append(f"| {' | '.join(cells)} | {theirs / ours:.2f}x |")
        lines.append("")
    if not any(result["environment"]["kind"] == "GPU" for result in results):
        lines.append("GPU: not measured yet; `benchmarks/gpu_check.sh` checks and measures on a machine that has one.")
    return "\n".join(lines).rstrip()


def native_section(path: Path) -> str:
    """The library on a CPU beside its peers: a line for each way of each case, a column for each number of threads."""
    if not path.is_file():
        return "CPU, native: not measured yet; `benchmarks/bench_cpu.py` measures on a machine with nothing else to do."
    result = json.loads(path.read_text(encoding="utf-8"))
    floors = ", ".join(f"{rate} GB/s in {n}" for n, rate in result["in_place_gb_per_s"].items())
    cases: dict[tuple[str, str, str, str], dict[int, dict[str, Any]]] = {}
    for row in result["rows"]:
        cases.setdefault((row["operation"], row["size"], row["beside"], row["way"]), {})[row["threads"]] = row
    threads = sorted({row["threads"] for row in result["rows"]})
    counts = "".join(f" {n} thread{'s' * (n > 1)}: ms | times as fast |" for n in threads)
    lines = [
        f"CPU ({result['machine']}, {result['best_level']}, torch {result['torch']}), medians of one interleaved run, "
        f"with the range of the rounds' ratios; an in-place pass moves {floors} threads:",
        "",
        f"| operation | size | way |{counts}",
        "|---|---|---|" + "---|---|" * len(threads),
    ]
    for (operation, size, peer, way), by_threads in cases.items():
        if way.startswith("plain torch"):  # the fallback; it stands in the file
            continue
        cells = [operation, size, f"**{way}**" if "native" in way else way]
        for n in threads:
            row = by_threads[n]
            low, high = row["range"]
            ratio = f"{row['times_as_fast']:.2f}x ({low:.2f} to {high:.2f})" if way != peer else "1x"
            cells += [f"{row['median_ms']:.3g}", ratio]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _seconds(row: dict[str, Any]) -> float:
    return row.get("device_median_s", row["wall_median_s"])


def metrics_section(path: Path) -> str:
    """Which metrics tell unlearned models from harmless trainings, then what they measured."""
    if not path.is_file():
        return "Not measured yet; `python benchmarks/metrics_miss.py` measures it in about 40 minutes of one core."
    result = json.loads(path.read_text(encoding="utf-8"))
    blocks = columns(result)
    alarms = {
        metric: [
            entry["false_alarms"][metric] for world in result["worlds"].values() for entry in world["concepts"].values()
        ]
        for metric in LABELS
    }
    names = [name if name == "gold" else f"`{name}`" for name in blocks]
    lines = [
        f"| sees it for so many concepts | {' | '.join(names)} | harmless trainings taken for damage |",
        "|---|" + "---|" * (len(blocks) + 1),
    ]
    for metric, label in LABELS.items():
        seen = [
            f"{sum(model['power'][metric] >= result['power'] for _, model in block)} of {len(block)}"
            for block in blocks.values()
        ]
        lines.append(f"| {label} | {' | '.join(seen)} | {statistics.mean(alarms[metric]):.1%} |")
    lines += [
        "",
        f"Sees it: above what one more harmless training stays below with a chance of {result['level']:.0%}, in "
        f"at least {result['power']:.0%} of {result['resamples']} resamples of prompts and harmless trainings. "
        f"{_metrics_sizes(result)} Made by `{result['command']}`, {result['minutes']:.0f} minutes with "
        f"{result['threads']} CPU thread{'s' * (result['threads'] != 1)}. What was measured, medians with the range "
        "over concepts or trainings:",
        "",
        "| | concept shown | prompt shown in full | CLIPScore-like, change | FID, same noise | FID, other noise | R |",
        "|---|---|---|---|---|---|---|",
    ]
    for world, found in result["worlds"].items():
        rows = {
            "the original, seeds exchanged": [found["seeds_exchanged"]],
            "harmless trainings": found["harmless"],
        }
        for concept, entry in found["concepts"].items():
            for name, model in entry["models"].items():
                method = name.removesuffix(f"-{concept}")
                rows.setdefault(method if method == "gold" else f"`{method}`", []).append(model)
        lines += [_measured_row(f"{world}: {name}", models) for name, models in rows.items()]
    lines += ["", "![By metric, method and concept: told from harmless training or not](metrics_miss.png)"]
    return "\n".join(lines)


def _metrics_sizes(result: dict[str, Any]) -> str:
    parts = []
    for world, found in result["worlds"].items():
        counts = [entry["prompts"] * result["draws"] for entry in found["concepts"].values()]
        parts.append(
            f"{world}: {', '.join(found['concepts'])}; {min(counts)} to {max(counts)} pairs of images a model, "
            f"{len(found['harmless'])} harmless trainings."
        )
    return " ".join(parts)


def _measured_row(name: str, models: list[dict[str, Any]]) -> str:
    def cell(values: list[float], form: str) -> str:
        low, middle, high = (f"{value:{form}}" for value in (min(values), statistics.median(values), max(values)))
        return middle if low == high else f"{middle} ({low} to {high})"

    found = [model["statistics"] for model in models]
    cells = [
        cell([model["shown"] for model in models], ".0%") if "shown" in models[0] else "",
        cell([model["right"] for model in models], ".1%"),
        cell([0.0 - one["clip-score"] for one in found], "+.2f"),
        cell([one["fid"] for one in found], ".3f"),
        cell([one["fid-other"] for one in found], ".3f"),
        f"**{cell([model['retention'] for model in models], '.3f')}**",
    ]
    return f"| {name} | {' | '.join(cells)} |"


def evaluation_section(speed: dict[str, Any], second: dict[str, Any]) -> str:
    lines = [
        "| pairs/s on a CPU | the `lpips` package's script | `lpips` in batches | `evaluate-images` |",
        "|---|---|---|---|",
    ]
    for net in speed["nets"]:
        rates, times, ranges = net["pairs_per_second"], net["times_as_fast_as"], net["range"]
        ratios = [f"{times[way]:.2f}x ({ranges[way][0]:.2f} to {ranges[way][1]:.2f})" for way in ("script", "batched")]
        lines.append(
            f"| {net['net']}, {net['side']} x {net['side']} PNG, {net['pairs']} pairs | {rates['script']:.1f} | "
            f"{rates['batched']:.1f} | **{rates['evaluate-images']:.1f}**: {ratios[0]}, {ratios[1]} |"
        )
    drawn = second["share_of_the_second"]["draw"]
    lines += [
        "",
        f"From prompts to distances on the bundled model, {second['pairs']} pairs: {second['first_s']:.0f} s for the "
        f"first unlearned model, {second['second_s']:.0f} s for a second one, whose originals come from the cache "
        f"({second['second_over_first']:.0%}; drawing its images is {drawn:.0%} of that).",
    ]
    return "\n".join(lines)


def distil_evaluation(path: Path) -> None:
    """Keep of a pytest-benchmark file the pairs a second and the ratios."""
    report = json.loads(path.read_text(encoding="utf-8"))
    content = {
        "machine": {key: report["machine_info"][key] for key in ("processor", "python_version", "machine")},
        "nets": [entry["extra_info"] for entry in report["benchmarks"]],
    }
    (RESULTS / "evaluation_cpu.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def distil(path: Path) -> None:
    """Keep of a pytest-benchmark file what the README quotes and what it was measured on."""
    report = json.loads(path.read_text(encoding="utf-8"))
    bank = []
    for entry in report["benchmarks"]:
        info = dict(entry["extra_info"])
        threads, usual = info.pop("threads"), info.pop("usual_seconds")
        bank.append({"median_s": round(entry["stats"]["median"], 3), "usual_s": round(usual, 1), **info})
    content = {
        "machine": {key: report["machine_info"][key] for key in ("processor", "python_version", "machine")},
        "threads": threads,
        "rounds": entry["stats"]["rounds"],
        "usual_s": statistics.median(row["usual_s"] for row in bank),
        "bank": bank,
    }
    (RESULTS / "bank_speed.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
