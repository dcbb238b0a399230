"""The example of a package that adds a method, a rule, a metric, a distance, a judge and a family: pip installs it,
and the command line uses all of them."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tiny_models
from safetensors.torch import load_file

PLUGIN = Path(__file__).parents[1] / "examples" / "plugin"
TINY = ("--trajectories", 1, "--trajectory-steps", 3, "--micro-batch-size", 2, "--evaluation-prompts", "none")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Where pip has installed the package, from a copy: building leaves files beside what it builds."""
    import shutil

    source = shutil.copytree(PLUGIN, tmp_path_factory.mktemp("source") / "plugin")
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--target", str(site), str(source)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return site


@pytest.fixture
def installed(site, monkeypatch):
    monkeypatch.syspath_prepend(site)
    yield
    for path in PLUGIN.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.mark.parametrize("path", sorted(PLUGIN.glob("*.py")), ids=lambda path: path.name)
def test_each_takes_at_most_forty_lines(path):
    assert len(path.read_text().splitlines()) <= 40


def test_the_method_its_option_and_its_rule(installed, cli, refused, tmp_path):
    page = cli("methods", "until").out
    assert "share" in page
    assert "stop forgetting below this share" in page
    run = ("train", "--forget", "star", "--method", "until", "--output", tmp_path / "run", *TINY, "--steps", 3)
    assert "share" in refused(*run, "--set", "shrae=0.3")
    assert cli(*run, "--set", "share=1").status == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["forgetting"] in (0.0, 1.0)
    assert "share: 1" in (tmp_path / "run" / "config.yaml").read_text()


def test_the_method_that_the_docs_begin_with_trains(cli, tmp_path, monkeypatch):
    """Its two files as the page has them; what pip would write of the second is written here."""
    page = (PLUGIN.parents[1] / "docs" / "extend.md").read_text(encoding="utf-8")
    module, project = (re.search(rf"```{kind}\n(.*?)```", page, re.DOTALL)[1] for kind in ("python", "toml"))
    group = tomllib.loads(project)["project"]["entry-points"]["fastunlearn.methods"]
    (tmp_path / "halfway.py").write_text(module)
    record = tmp_path / "mine-1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (record / "entry_points.txt").write_text(
        "[fastunlearn.methods]\n" + "".join(f"{name} = {value}\n" for name, value in group.items())
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert "halfway" in cli("methods").out
    assert cli("train", "--forget", "star", "--method", "halfway", "--output", tmp_path / "run", *TINY, "--steps", 2)
    assert (tmp_path / "run" / "model" / "model_index.json").is_file()
    sys.modules.pop("halfway")


def test_the_metric_the_distance_and_the_judge(installed, cli, tmp_path):
    words = [
        "evaluate",
        "--original",
        "shapes",
        "--unlearned",
        "shapes-gold-star",
        "--forget",
        "red",
        "--device",
        "cpu",
    ]
    (tmp_path / "p.csv").write_text("prompt,group\na red ring,forget\na blue ring,near\na gray ring,near\n")
    words += ["--prompts", tmp_path / "p.csv", "--num-inference-steps", 2, "--batch-size", 4, "--control-pairs", 1]
    answer = cli(
        *words, "--judge", "main-color", "--metrics", "brightness", "--metric", "pixels", "--output", tmp_path / "e"
    )
    assert (answer.status, answer.err) == (0, "")
    result = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert result["judge"]["name"].startswith("main-color@")
    assert result["metrics"]["brightness"]["of"] == "pixels"
    assert result["integrity"]["metric"] == "pixels@1"
    assert result["erasure"]["n_images"] == 1


def test_the_family(installed, cli, refused, tmp_path):
    model = tiny_models.pixart(alpha=True)
    model.save_pretrained(tmp_path / "model")
    run = ("train", "--model", tmp_path / "model", "--forget", "Van Gogh", "--output", tmp_path / "run", *TINY)
    prompts = ("--retain-prompts", "a dog;a cat")
    assert cli(*run, *prompts, "--method", "esd", "--steps", 2, "--learning-rate", 0.01).status == 0
    name = "transformer/diffusion_pytorch_model.safetensors"
    before, after = (load_file(folder / name) for folder in (tmp_path / "model", tmp_path / "run" / "model"))
    changed = {key for key in before if not before[key].equal(after[key])}
    assert changed
    assert all(".attn2." in key for key in changed)


def test_without_the_package_nothing_of_it_is_known(refused, tmp_path):
    assert "unknown method 'until'" in refused(
        "train", "--forget", "star", "--method", "until", "--output", tmp_path / "r"
    )
    tiny_models.pixart(alpha=True).save_pretrained(tmp_path / "model")
    said = refused(
        "train", "--model", tmp_path / "model", "--forget", "x", "--method", "esd", "--output", tmp_path / "r"
    )
    assert "PixArtAlphaPipeline, a family not supported" in said
