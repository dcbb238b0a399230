"""Comparing evaluated models: pair by pair, with intervals, and only what was measured alike."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from toys import PROMPTS, SETTINGS, MeanDifference, draw, names_in, shifted

from fastunlearn import evaluate
from fastunlearn.evaluation.compare import compare_runs
from fastunlearn.evaluation.config import CompareConfig

GROUPED = [(prompt, "near" if index < 6 else "far") for index, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of models evaluated together, and of one evaluated alone."""
    folder = tmp_path_factory.mktemp("runs")
    models = [shifted(4, "mild"), shifted(4, "twin"), shifted(12, "harsh")]
    evaluate(draw, models, GROUPED, output=folder / "together", seeds_per_prompt=2, **SETTINGS)
    evaluate(draw, shifted(5, "alone"), GROUPED[::-1], output=folder / "alone", seeds_per_prompt=2, **SETTINGS)
    return folder


def compared(tmp_path, *folders, **settings):
    config = CompareConfig(runs=tuple(map(str, folders)), output=str(tmp_path / "out"), **settings)
    return compare_runs(config)


def test_every_two_are_compared_and_told_apart(runs, tmp_path):
    together = runs / "together"
    result = compared(tmp_path, together / "mild", together / "twin", together / "harsh", runs / "alone")
    rows = {(row["a"], row["b"]): row for row in result["comparisons"]}
    assert len(rows) == 6
    same = rows["mild", "twin"]
    assert (same["difference"], same["ci95"], same["p_value"]) == (0.0, [0.0, 0.0], 1.0)
    assert same["equivalent"]
    assert same["verdict"] == "mild and twin are equivalent within the margin"
    apart = rows["mild", "harsh"]
    assert apart["difference"] > apart["ci95"][0] > 0
    assert not apart["equivalent"]
    assert apart["verdict"] == "mild keeps more than harsh"
    assert rows["harsh", "alone"]["difference"] < 0
    assert set(apart["groups"]) == {"near", "far"}
    # The difference is that of the retentions that the evaluations state.
    stated = {run["name"]: run["retention"] for run in result["runs"]}
    assert apart["difference"] == pytest.approx(stated["mild"] - stated["harsh"])
    assert all(row["p_value_holm"] >= row["p_value"] for row in rows.values())


def test_the_margin_decides_equivalence(runs, tmp_path):
    pair = runs / "together" / "mild", runs / "alone"
    narrow = compared(tmp_path, *pair, margin=1e-4)["comparisons"][0]
    wide = compared(tmp_path, *pair, margin=1e4, overwrite=True)["comparisons"][0]
    assert not narrow["equivalent"]
    assert narrow["equivalence_p_value"] > 0.05 > wide["equivalence_p_value"]
    assert wide["equivalent"]
    assert wide["verdict"] == "mild keeps more, but by less than the margin: equivalent"


def test_it_leaves_a_table_a_plot_and_a_page(runs, tmp_path):
    result = compared(tmp_path, runs / "together" / "mild", runs / "alone", overwrite=True)
    assert names_in(tmp_path / "out") == {"compare.json", "compare.png", "compare.html"}
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == result
    pixels = np.asarray(Image.open(tmp_path / "out" / "compare.png").convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10
    markup = (tmp_path / "out" / "compare.html").read_text()
    for word in ("mild − alone", "mild keeps more", "mean-difference@0"):
        assert word in markup
    assert not re.search(r"https?:|url\(|<script", markup)
    with pytest.raises(ValueError, match="is not empty"):
        compared(tmp_path, runs / "together" / "mild", runs / "alone")
    compared(tmp_path, runs / "together" / "mild", runs / "alone", overwrite=True)


def test_the_command_prints_the_verdict(runs, tmp_path, cli):
    answer = cli("compare", runs / "together" / "mild", runs / "together" / "harsh", "--output", tmp_path / "out")
    assert (answer.status, answer.err) == (0, "")
    assert "mild - harsh" in answer.out
    assert "compare.html" in answer.out


def edited(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_what_was_not_measured_alike_is_refused(runs, tmp_path):
    one = runs / "alone"

    def against(name, said, **settings):
        models = settings.pop("original", draw), shifted(3), settings.pop("prompts", GROUPED)
        evaluate(*models, output=tmp_path / name, **{"seeds_per_prompt": 2} | SETTINGS | settings)
        with pytest.raises(ValueError, match=said):
            compared(tmp_path, one, tmp_path / name)

    def other(prompts, noise):
        return draw(prompts, 2 * noise)

    class Other(MeanDifference):
        metric = "other@1"

    against("original", "they are of different originals", original=other)
    against("seeds", "seeds_per_prompt is '2' and '1'", seeds_per_prompt=1)
    against("batches", "micro_batch_size is '4' and '5'", batch_size=5)
    against("metric", "metric is 'mean-difference@0' and 'other@1'", metric=Other())
    against("prompts", r"2 pairs are in one of them only, such as \('thing", prompts=GROUPED[:-1])
    other.__name__ = "draw"
    against("images", "their originals drew different images", original=other)
    with pytest.raises(ValueError, match="is given twice"):
        compared(tmp_path, one, one)
    assert not (tmp_path / "out").exists()


def test_damaged_evaluations_are_refused(runs, tmp_path):
    whole = runs / "alone"

    def damaged(name, damage, said):
        shutil.copytree(whole, tmp_path / name)
        damage(tmp_path / name)
        with pytest.raises(ValueError, match=said):
            compared(tmp_path, whole, tmp_path / name)

    damaged("no pairs", lambda f: (f / "pairs.jsonl").unlink(), r"pairs\.jsonl is missing")
    damaged("no summary", lambda f: (f / "evaluation.json").unlink(), r"evaluation\.json is missing")
    damaged("half", lambda f: (f / "pairs.jsonl").write_bytes((f / "pairs.jsonl").read_bytes()[:-9]), "is damaged")
    damaged("empty", lambda f: (f / "pairs.jsonl").write_text(""), "has no pairs")
    damaged(
        "twice",
        lambda f: (f / "pairs.jsonl").write_bytes(2 * (f / "pairs.jsonl").read_bytes()),
        "or a pair twice",
    )
    damaged("other", lambda f: edited(f / "evaluation.json", lambda c: c.pop("integrity")), "of another version")
    with pytest.raises(ValueError, match=r"holds no evaluation: evaluation\.json is missing"):
        compared(tmp_path, whole, runs)
    assert not (tmp_path / "out").exists()
