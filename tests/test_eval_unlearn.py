"""The technique for eval-unlearn's runner: it draws what plain diffusers draws, and the real runner takes it."""

import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import torch

from fastunlearn.errors import UserError
from fastunlearn.evaluation.eval_unlearn import Technique
from fastunlearn.models.runtime import import_diffusers
from fastunlearn.worlds.shapes import pipeline_folder

ROOT = Path(__file__).parents[1]
GROUP = "eval_unlearn.techniques"
PACKAGE = "eval-unlearn==1.1.2"
GIVEN = "FASTUNLEARN_EVAL_UNLEARN"  # a folder that holds the package
SMALL = {"device": "cpu", "num_inference_steps": 2, "guidance_scale": 3.0}
PROMPTS = ["a red star", "a blue ring on a plain background", "a star"]


def declared():
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return content["project"]["entry-points"][GROUP]


def test_the_declared_entry_point_is_the_technique():
    ((name, value),) = declared().items()
    assert EntryPoint(name, value, GROUP).load() is Technique


def test_it_draws_what_plain_diffusers_draws():
    folder = pipeline_folder("shapes")
    ours = Technique(model="shapes", batch_size=2, **SMALL).generate(prompts=PROMPTS, seed=5)
    pipeline = import_diffusers().StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    for index, (prompt, image) in enumerate(zip(PROMPTS, ours, strict=True)):
        generator = torch.Generator().manual_seed(5 + index)
        theirs = pipeline(prompt, generator=generator, num_inference_steps=2, guidance_scale=3.0).images[0]
        gap = np.abs(np.asarray(image, dtype=int) - np.asarray(theirs, dtype=int))
        assert gap.max() <= 1


def test_without_a_seed_no_noise_is_drawn_twice_and_the_next_technique_draws_the_same():
    def drawn():
        technique = Technique(model="shapes", seed=3, **SMALL)
        return [image.tobytes() for _ in range(2) for image in technique.generate(prompts=["a star", "a star"])]

    first = drawn()
    assert len(set(first)) == 4
    assert drawn() == first


def test_what_is_wrong_is_one_line(cli, tmp_path):
    made = ("--method", "identity", "--evaluation-prompts", "none", "--output", tmp_path / "run")
    assert cli("train", "--forget", "star", *made).status == 0
    for settings, said in (
        ({}, "`model` is missing"),
        ({"model": "shapes", "steps": 3}, "unknown: steps. It has: model, "),
        ({"model": "shapes", "num_inference_steps": 0}, "num.inference.steps"),
        ({"model": "nowhere"}, "nowhere"),
        ({"model": str(tmp_path / "run"), "erase_concept": "ring"}, "forgot star"),
    ):
        with pytest.raises(UserError, match=said) as error:
            Technique(**settings)
        assert "\n" not in str(error.value)
    unet = tmp_path / "run" / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    Technique(model=str(tmp_path / "run"), erase_concept="Star", device="cpu")
    content = bytearray(unet.read_bytes())
    content[-1] ^= 1
    unet.write_bytes(content)
    with pytest.raises(UserError, match="has changed since its run wrote it"):
        Technique(model=str(tmp_path / "run"), device="cpu")


# ---- the real package ------------------------------------------------------------------------------------------------

RUN = """
import json, sys
from torch.utils.data import DataLoader
from eval_unlearn.registry import register_metric
from eval_unlearn.runners import SingleBenchmarkRunner
from eval_unlearn.types import Dataset, MetricResult
import numpy, torch
from fastunlearn import load_judge

class Shown:
    def __init__(self, prompts):
        self.prompts, self.seen = prompts, []
    def load_dataset(self):
        def collate(batch):
            return Dataset(prompts=batch, metadata={"source": "the test's own"})
        return DataLoader(self.prompts, batch_size=2, collate_fn=collate)
    def update(self, images, prompts, metadata):
        batch = torch.stack([torch.from_numpy(numpy.array(image)).permute(2, 0, 1) for image in images])
        self.seen += [float(score) for score in load_judge("shapes").judge(batch, "star").shown]
    def compute(self):
        return MetricResult("shown", sum(score >= 0.5 for score in self.seen) / len(self.seen), {"scores": self.seen})

register_metric("shown")(Shown)
prompts = [f"a {color} star on a plain background" for color in ("red", "blue", "green")]
settings = {"erase_concept": "star", "device": "cpu", "num_inference_steps": 12, "guidance_scale": 3.0}
shown = {}
for model in sys.argv[2:]:
    settings["model"] = model
    runner = SingleBenchmarkRunner(
        "fastunlearn", "shown", dict(settings), {"prompts": prompts}, output_dir=sys.argv[1], seed=0
    )
    shown[model] = runner.run()
print("REPORTS " + json.dumps(shown))
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A folder with the real package and with our entry point, as an installation of both would leave them."""
    site = tmp_path_factory.mktemp("site")
    given = os.environ.get(GIVEN)
    if given is None:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode:
            pytest.skip(f"pip cannot install {PACKAGE}, and {GIVEN} names no folder that holds it")
    about = site / "fastunlearn_technique-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: fastunlearn-technique\nVersion: 1\n")
    lines = [f"{name} = {value}" for name, value in declared().items()]
    (about / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines, ""]))
    return [str(site), *([given] if given else [])]


@pytest.mark.slow
def test_the_real_runner_scores_our_runs(package, tmp_path):
    from fastunlearn import unlearn

    run = unlearn("shapes", "star", "uce", output=tmp_path / "run", device="cpu", evaluation_prompts="none")
    path = os.pathsep.join([*package, *sys.path])
    command = [sys.executable, "-c", RUN, str(tmp_path / "results"), "shapes", str(run.folder)]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("REPORTS ")]
    reports = json.loads(line.removeprefix("REPORTS "))
    before, after = reports["shapes"], reports[str(run.folder)]
    assert before["technique_name"] == after["technique_name"] == "fastunlearn"
    assert after["erase_concept"] == "star"
    assert before["metric_result"]["value"] == 1
    assert after["metric_result"]["value"] == 0
    assert len(list((tmp_path / "results").rglob("*.png"))) == 6
