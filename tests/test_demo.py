"""The main job, end to end, with the real weights and settings: what the README's first screen promises."""

import json

import pytest
from toys import names_in

from fastunlearn.cli.main import main as cli
from fastunlearn.training.config import TrainConfig


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "demo"
    assert cli(["demo", "--output", str(folder)]) == 0
    return folder


def summaries(folder):
    result = json.loads((folder / "demo.json").read_text())["evaluations"]
    return {summary["name"]: summary for summary in result}


@pytest.mark.slow
def test_ovw_forgets_the_star_and_keeps_the_rest(demo):
    ovw = summaries(demo)["ovw"]
    assert ovw["erasure"]["shown_original"] >= 0.95
    assert ovw["erasure"]["shown"] <= 0.05
    assert ovw["erasure"]["valid"] >= 0.9
    assert ovw["retain"]["agreement"] >= 0.9  # open and empty prompts are among these
    assert ovw["retain"]["attributes"]["shape"]["accuracy"] >= 0.98
    assert ovw["groups"]["retain"]["retention"] >= 0.93
    assert ovw["integrity"]["retention"] >= 0.9
    assert ovw["controls"]["repeat"] == 0.0


@pytest.mark.slow
def test_integrity_sees_what_accuracy_does_not(demo):
    """ESD's accuracies look like UCE's; its images are further from the original's, compared pair by pair."""
    result = summaries(demo)
    compared = json.loads((demo / "demo.json").read_text())["comparison"]
    esd, uce, placebo = (result[name] for name in ("esd", "uce", "placebo"))
    assert esd["retain"]["attributes"]["shape"]["accuracy"] >= 0.95
    assert (compared["a"], compared["b"]) == ("esd", "uce")
    assert compared["ci95"][1] < 0
    assert compared["p_value_holm"] < 0.001
    assert uce["integrity"]["retention"] > esd["integrity"]["retention"] + 0.05
    assert esd["erasure"]["shown"] <= 0.05
    assert uce["erasure"]["shown"] <= 0.05
    assert uce["integrity"]["retention"] >= 0.98, "an edit in closed form is the one to beat"
    assert placebo["integrity"]["retention"] >= 0.99
    assert placebo["erasure"]["shown"] >= 0.95


@pytest.mark.slow
def test_the_demo_leaves_its_files(demo):
    assert names_in(demo) == {"demo.json", "esd", "grid.png", "ovw", "placebo", "report.html", "uce"}
    for method in ("esd", "ovw", "placebo"):
        names = names_in(demo / method)
        assert {"config.yaml", "run.json", "metrics.jsonl", "model", "pairs.jsonl", "evaluation.json"} <= names
        card = (demo / method / "README.md").read_text()
        assert f"| {summaries(demo)[method]['integrity']['retention']:.3f} |" in card
        lines = (demo / method / "pairs.jsonl").read_text().splitlines()
        assert len(lines) == 105
    assert not list(demo.rglob("*.tmp"))


@pytest.mark.slow
def test_a_run_evaluates_as_the_demo_did(demo, tmp_path):
    """`evaluate` on the demo's model gives the demo's numbers, to the last bit."""
    from fastunlearn import evaluate

    result = evaluate("shapes", demo / "ovw", output=tmp_path / "again", placebo=demo / "placebo")
    ours, theirs = result.summary, summaries(demo)["ovw"]
    assert ours["integrity"] == theirs["integrity"]
    assert ours["erasure"] == theirs["erasure"]
    assert ours["spec"]["hashes"] == theirs["spec"]["hashes"]


@pytest.mark.slow
def test_gold_never_draws_the_star():
    from fastunlearn import evaluate

    summary = evaluate("shapes", "shapes-gold-star", forget="star").summary
    assert summary["erasure"]["shown"] <= 0.05
    assert summary["retain"]["attributes"]["shape"]["accuracy"] >= 0.98


@pytest.mark.slow
@pytest.mark.parametrize("method", ["saddle"])
def test_other_methods_forget_with_their_defaults(tmp_path, method):
    from fastunlearn import unlearn

    unlearn(TrainConfig(forget="star", method=method, output=str(tmp_path / "run")))
    summary = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert summary["erasure"]["shown"] <= 0.10
    assert summary["retain"]["attributes"]["shape"]["accuracy"] >= 0.95


def test_the_readme_quotes_its_results_files(request):
    """Every figure between the README's marks comes from a file in benchmarks/results/."""
    import subprocess
    import sys

    script = request.config.rootpath / "benchmarks" / "readme.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
