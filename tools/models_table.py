"""Tries every family, sampler, layout and option on tiny models, and writes what came out: the table of docs/models.md.

    python tools/models_table.py

measures, writes ``benchmarks/results/models.json`` and from it ``docs/models.md``.  The models have the real classes
and random weights: what is measured is whether we draw what plain diffusers draws, not whether anything is forgotten.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples" / "plugin")]

RESULTS = ROOT / "benchmarks" / "results" / "models.json"
PAGE = ROOT / "docs" / "models.md"
NEGATIVE = "blurry, ugly"
BACKENDS = ("xformers", "flash")
# Of these two a model gets the one that it does not have.
OTHERS = ("DPMSolverMultistep", "Euler")

HEAD = """# Models that work

Made by `python tools/models_table.py` on tiny models with the real classes, random weights and diffusers {diffusers}.
**None of it has been tried with real weights.** A number is the largest difference, in 8-bit steps, between an image of
ours and that of plain diffusers from the same noise, with the same settings: 0 and 1 are the same image.

## Families and samplers

`own`: as the model comes. `--resolution`, `--negative-prompt`, `--scheduler`: with the option, against plain diffusers
told the same. `--attention`: what beside torch's own can compute the model's layers, through diffusers; it needs a CUDA
device and has not run here; flash is for `evaluate --mixed-precision bf16` alone. A sampler that draws noise at every
step (LCM, ancestral, SDE) gets noise of ours, a function of prompt and seed alone, so it repeats itself. `ours alone`:
plain diffusers fails with that sampler.

"""
LAYOUTS = """
## Layouts

Stable Diffusion 1 in each layout: images of the model as it is read, and, after a step of training, of the folder that
the run leaves, both against plain diffusers. What was given stays byte for byte what it was. Of the denoiser's folder a
run hands on only the weights that it read: a second copy beside them, in another precision or without the moving
average, would still hold what was unlearned. Pickles are never read and never handed on.

"""
FILES = """
## Single files

A `.safetensors` file in the key names of its makers, read by diffusers' own converters. Settings, tokenizers and parts
that the file lacks come from a diffusers folder of the same base, `--parts FOLDER`; without it those of Stable
Diffusion 1 and XL are known, with CLIP's vocabulary from `open_clip_torch`, and for others the hub's cache is looked
through. Nothing is fetched. A run leaves a diffusers folder. FLUX's converter knows the width of the real model alone,
so that here it was told the tiny one.

"""
END = """
## What is not served

FLUX.2, HunyuanDiT, Kandinsky, Stable Cascade, refiners, inpainting and image-to-image models are
refused in one line; [extend.md](extend.md) shows how another package adds a family. Prompts have no weights in brackets
and no clip-skip. FLUX's `true_cfg_scale` is not offered. Not every sampler of diffusers can take the place of every
other: `--scheduler` says in one line what is lost.
"""


def measure() -> dict[str, Any]:
    """Everything that the page shows."""
    import types

    from against_diffusers import CASES
    from pixart_alpha_family import PixArtAlpha
    from test_layouts import LAYOUTS as FOLDERS
    from test_single_files import KINDS
    from tiny_models import diffusers

    from fastunlearn import plugins

    entry = types.SimpleNamespace(name="pixart-alpha", value="pixart_alpha_family", load=lambda: PixArtAlpha)
    plugins.entry_points = lambda group: [entry] if group == "fastunlearn.families" else []  # type: ignore
    result: dict[str, Any] = {"diffusers": diffusers.__version__, "cases": {}, "layouts": {}, "files": {}}
    for case, make in CASES.items():
        result["cases"][case] = case_row(make)
        print(case, result["cases"][case], flush=True)
    for name, (make, asked, options) in FOLDERS.items():
        with tempfile.TemporaryDirectory() as folder:
            result["layouts"][name] = layout_row(Path(folder), make, asked, options)
        print(name, result["layouts"][name], flush=True)
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            result["files"][kind] = file_row(Path(folder), kind)
        print(kind, result["files"][kind], flush=True)
    return result


def case_row(make: Any) -> dict[str, Any]:
    """One model: how far each image is from plain diffusers', or why there is none."""
    from against_diffusers import PROMPTS, drawn_by, images_of
    from tiny_models import build

    from fastunlearn.models.attention import can_compute
    from fastunlearn.models.loading import wrap_pipeline
    from fastunlearn.models.options import ModelOptions

    def difference(options: dict[str, Any], **call: Any) -> int | str | None:
        pipeline = build(make)
        try:
            model = wrap_pipeline(pipeline, "mine", ModelOptions(**options))
        except ValueError as error:
            return f"refused: {error}"
        pipeline.scheduler = model.pipeline.scheduler
        ours = images_of(model)
        try:
            theirs = drawn_by(pipeline, **call)
        except (AssertionError, ValueError):  # not every pipeline can pass its steps to every sampler
            return None
        return int((ours - theirs).abs().max())

    model = wrap_pipeline(build(make), "mine")
    width, height = model.image_size
    fits = model.largest_size is None or 2 * width <= model.largest_size * model.pixels_per_latent
    size = (2 * width, height) if fits else (width, height // 2)
    other = {}
    for name in OTHERS:
        if name.lower() not in type(model.pipeline.scheduler).__name__.lower():
            other[name] = difference({"scheduler": name})
            break
    return {
        "family": model.family,
        "sampler": type(model.pipeline.scheduler).__name__.removesuffix("Scheduler"),
        "own": difference({}),
        "resolution": difference({"resolution": "{}x{}".format(*size)}, size=size),
        "negative": difference({"negative_prompt": NEGATIVE}, negative_prompt=[NEGATIVE] * len(PROMPTS)),
        "scheduler": other,
        "attention": [
            backend for backend in BACKENDS if can_compute(model.denoiser, backend, is_masked=model.masks_attention)
        ],
    }


def layout_row(root: Path, make: Any, asked: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """One layout: read, trained on, exported."""
    import torch
    from against_diffusers import drawn_by, images_of
    from test_layouts import files_in
    from tiny_models import diffusers

    from fastunlearn import unlearn
    from fastunlearn.files.weights import snapshot_of
    from fastunlearn.models.loading import load_model

    def difference(model: Any, folder: Path) -> int:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, **options)
        return int((images_of(model) - drawn_by(pipeline)).abs().max())

    given = make(root)
    before = files_in(given)
    settings = {"trajectories": 1, "trajectory_steps": 2, "steps": 1, "evaluation_prompts": "none", "device": "cpu"}
    unlearn(str(given), "Van Gogh", "esd", output=root / "run", **settings, **asked)
    made = root / "run" / "model"
    return {
        "flags": " ".join(f"--{name} {value}" for name, value in asked.items()),
        "read": difference(load_model(str(given), "cpu", **asked), snapshot_of(given)),
        "left": difference(load_model(str(made), "cpu"), made),
        "untouched": files_in(given) == before,
    }


def file_row(root: Path, kind: str) -> dict[str, Any]:
    """One single file against the folder that it was made of."""
    import pytest
    from against_diffusers import images_of, images_of_diffusers
    from test_single_files import narrow_converter, written

    from fastunlearn.models.loading import load_model

    with pytest.MonkeyPatch.context() as patch:
        narrow_converter(patch)
        file, base, whole = written(root, kind)
        model = load_model(str(file), "cpu", parts=str(base))
        return {
            "pipeline": type(model.pipeline).__name__,
            "read": int((images_of(model) - images_of_diffusers(whole)).abs().max()),
        }


def page(result: dict[str, Any]) -> str:
    """docs/models.md."""

    def cell(value: Any) -> str:
        return "refused" if isinstance(value, str) else "ours alone" if value is None else str(value)

    lines = [HEAD.format(**result)]
    lines += [
        "| model | family | sampler | own | `--resolution` | `--negative-prompt` | `--scheduler` | `--attention` |\n"
    ]
    lines += ["|---|---|---|---|---|---|---|---|\n"]
    for case, row in result["cases"].items():
        other = ", ".join(f"{name}: {cell(value)}" for name, value in row["scheduler"].items())
        cells = [
            case,
            f"`{row['family']}`",
            row["sampler"],
            *map(cell, (row["own"], row["resolution"], row["negative"])),
        ]
        lines += [f"| {' | '.join([*cells, other, ', '.join(row['attention']) or '-'])} |\n"]
    reasons = {
        value.removeprefix("refused: ")
        for row in result["cases"].values()
        for value in (row["resolution"], row["negative"], *row["scheduler"].values())
        if isinstance(value, str)
    }
    lines += [
        "\nWhy something is refused, in the words of the command:\n\n",
        *(f"- {reason}\n" for reason in sorted(reasons)),
    ]
    lines += [LAYOUTS, "| layout | flags | as read | after training |\n|---|---|---|---|\n"]
    for name, row in result["layouts"].items():
        flags = f"`{row['flags']}`" if row["flags"] else "-"
        lines += [f"| {name} | {flags} | {row['read']} | {row['left']} |\n"]
    lines += [FILES, "| file | pipeline | as read |\n|---|---|---|\n"]
    lines += [f"| {name} | {row['pipeline']} | {row['read']} |\n" for name, row in result["files"].items()]
    return "".join([*lines, END])


def main() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = measure()
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(result), encoding="utf-8")


if __name__ == "__main__":
    main()
