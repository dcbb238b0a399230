"""What is printed: texts of users as they wrote them, and the share of valid images beside what was forgotten."""

import dataclasses
import os
import subprocess
import sys

import pytest
from test_report import content, evaluation

from fastunlearn.cli import console
from fastunlearn.schema import Demo, Evaluation

EVIL = ["a star [/b]", "[red]x[/red]", "[/]", ":star: y", "[link=z]w"]


def said(capsys):
    """What was printed, in one line and without lines of tables."""
    out = capsys.readouterr().out
    return " ".join("".join(" " if "\u2500" <= sign <= "\u257f" else sign for sign in out).split())


@pytest.mark.parametrize("text", EVIL)
def test_texts_of_users_are_shown_as_they_are(capsys, tmp_path, text):
    one = evaluation(text, concept=text, erasure__concept=text)
    console.table([one])
    with console.Console() as shown:
        shown.plan("esd", [f"forget  {text}"])
        shown.note(text)
        shown.training(1, 2, {"loss": 1.0, "steps_per_second": 1.0})
        one.write(tmp_path / "evaluation.json")
        shown.result(tmp_path, tmp_path / f"model{text.replace('/', '|')}")
    captured = capsys.readouterr()
    assert f"forget  {text}" in captured.out
    assert f"“{text}”" in captured.out
    assert f"model{text.replace('/', '|')}  (loads" in captured.out
    assert f"note: {text}" in captured.err
    assert captured.out.count(text.split()[0]) >= 2


@pytest.mark.parametrize("text", EVIL)
def test_a_plan_shows_prompts_as_they_are(cli, tmp_path, text):
    answer = cli(
        *("train", "--forget", "star", "--method", "esd", "--steps", 2, "--trajectories", 1, "--trajectory-steps", 4),
        *("--micro-batch-size", 2, "--evaluation-prompts", "none", "--forget-prompts", f"{text};", "--dry-run"),
        *("--output", tmp_path / "run"),
    )
    assert answer.status == 0, answer
    assert text in answer.out


def test_the_table_shows_validity_and_agreement_beside_what_is_claimed(capsys):
    console.table([evaluation("a"), evaluation("b", retain=None, erasure=None)])
    words = said(capsys)
    for expected in ("star shown", "valid", "species kept", "mood kept", "judged the same", "97.5%", "94.0%"):
        assert expected in words or all(word in words for word in expected.split())
    assert "a 0.0% 97.5% 99.6% 97.0% 94.0% 0.940 0.924 to 0.952 - 0.0247" in words
    assert "b - - - - - 0.940" in words
    assert "judge: zoo@0123456789ab, shown from a score of 0.7 on" in words


def test_a_judge_that_cannot_tell_validity_says_so(capsys):
    bare = content(judge__valid_threshold=None, erasure__valid=None, erasure__valid_original=None)
    console.table([Evaluation.from_dict(bare)])
    assert "ovw 0.0% - " in said(capsys)


def test_without_a_judge_the_table_says_nothing_of_it(capsys):
    console.table([dataclasses.replace(evaluation(), erasure=None, retain=None, judge=None)])
    words = said(capsys)
    assert "valid" not in words
    assert "judge" not in words
    assert "ovw 0.940 0.924 to 0.952 - 0.0247" in words


def test_a_terminal_without_the_sign_shows_its_code():
    words = ["train", "--dry-run", "--forget", "star", "--method", "esd", "--forget-prompts", "a star ★"]
    words += ["--output", "run", "--trajectories", "1", "--trajectory-steps", "2"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    answer = subprocess.run(
        [sys.executable, "-m", "fastunlearn", *words], env=environment, capture_output=True, text=True, check=False
    )
    assert (answer.returncode, answer.stderr) == (0, "")
    assert r"a star \u2605" in answer.stdout


def test_clipping_at_0_is_none(cli, tmp_path):
    """The same weights as under a bound that no gradient reaches; under a small one they are others."""
    weights = {}
    for bound in ("0", "1e9", "1e-4"):
        words = ["--method", "esd", "--steps", "2", "--trajectories", "1", "--trajectory-steps", "2"]
        words += ["--save", "delta", "--evaluation-prompts", "none", "--max-grad-norm", bound]
        words += ["--weight-decay", "0.5"]
        assert cli("train", "--forget", "star", *words, "--output", tmp_path / bound).status == 0
        weights[bound] = (tmp_path / bound / "delta.safetensors").read_bytes()
    assert weights["0"] == weights["1e9"] != weights["1e-4"]


def test_no_column_of_the_demos_table_is_cut(capsys, request):
    evaluations = Demo.read(request.config.rootpath / "benchmarks" / "results" / "demo.json").evaluations
    console.table(evaluations)
    lines = capsys.readouterr().out
    assert " distance" in lines
    for one in evaluations:
        assert f" {one.integrity.mean:.4f}" in lines
