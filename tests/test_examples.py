"""The examples run as they stand, in an empty folder and without a network, and say what they are to say."""

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = pytest.mark.slow


@pytest.fixture
def said(tmp_path, monkeypatch, capfd):
    """``said("unlearn_style")``: what an example prints."""
    monkeypatch.chdir(tmp_path)

    def run(name):
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capfd.readouterr().out

    return run


def test_a_style_is_forgotten_and_the_rest_kept(said, tmp_path):
    out = said("unlearn_style")
    before, after = map(int, re.search(r"show the style: (\d+)% before, (\d+)% after", out).groups())
    assert before > after
    assert 0.5 < float(re.search(r"R = ([\d.]+)", out)[1]) <= 1
    assert (tmp_path / "style-evaluation" / "report.html").is_file()


def test_a_model_of_any_kind_is_judged(said, tmp_path):
    out = said("evaluate_my_model")
    values = [float(value) for value in re.findall(r"(?:R =|distance) (-?[\d.]+\d)", out)]
    assert len(values) == 3
    assert values[0] < 1
    assert all(value > 0 for value in values[1:])
    assert (tmp_path / "function-report.html").is_file()
    assert (tmp_path / "folders" / "report.html").is_file()


def test_the_kernels_train_in_a_loop_of_plain_diffusers(said):
    out = said("embed_kernels")
    losses = [float(value) for value in re.findall(r"loss ([\d.]+)", out)]
    assert len(losses) == 4
    changed, total = (
        int(number.replace(",", "")) for number in re.search(r"([\d,]+) of ([\d,]+) elements", out).groups()
    )
    assert 0 < changed <= 0.1 * total + 1


def test_the_attacks_say_what_they_broke(said, tmp_path):
    out = said("attack_my_model")
    for name in ("seeds", "completion"):
        assert re.search(
            rf"{name}: prompts broken: .*'original': '\d of 4', 'unlearned': '\d of 4', 'gold': '\d of 4'", out
        )
    assert (tmp_path / "attack" / "report.html").is_file()


def test_the_notebook_holds_what_a_run_shows(monkeypatch):
    pytest.importorskip("nbclient", reason="nbclient is of the extra `test`")
    import notebook

    path = EXAMPLES / "first_look.ipynb"
    held = notebook.said(notebook.nbformat.read(path, as_version=4))
    assert [shown[-1] for shown in held][-1] == "an image"
    assert sys.prefix not in path.read_text(encoding="utf-8"), "it names no folder of the machine that ran it"
    # The kernel is a process of its own, and finds the packages where this one does.
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    assert notebook.said(notebook.executed(path)) == held
