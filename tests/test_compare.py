"""Comparing evaluated models: pair by pair, with intervals, and only what was measured alike."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from toys import PROMPTS, SETTINGS, MeanDifference, draw, names_in, shifted

from fastunlearn import EvaluateImagesConfig, evaluate, evaluate_images
from fastunlearn.evaluation.compare import compare_runs
from fastunlearn.evaluation.config import CompareConfig
from fastunlearn.schema import Comparison, FoldersEvaluation

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
    rows = {(row.a, row.b): row for row in result.comparisons}
    assert len(rows) == 6
    same = rows["mild", "twin"]
    assert (same.difference, same.ci95, same.p_value) == (0.0, (0.0, 0.0), 1.0)
    # Equal on 13 prompts: that is not enough to exclude that 5 % of all prompts differ.
    assert not same.equivalent
    assert same.verdict.startswith("undecided")
    wide = compared(tmp_path, together / "mild", together / "twin", margin=0.5, overwrite=True).comparisons[0]
    assert wide.verdict == "mild and twin are equivalent within the margin"
    apart = rows["mild", "harsh"]
    assert apart.difference > apart.ci95[0] > 0
    assert not apart.equivalent
    assert apart.verdict == "mild keeps more than harsh"
    assert rows["harsh", "alone"].difference < 0
    assert set(apart.groups) == {"near", "far"}
    # The difference is that of the retentions that the evaluations state.
    stated = {run.name: run.retention for run in result.runs}
    assert apart.difference == pytest.approx(stated["mild"] - stated["harsh"])
    assert all(row.p_value_holm >= row.p_value for row in rows.values())


def test_the_margin_decides_equivalence(runs, tmp_path):
    pair = runs / "together" / "mild", runs / "alone"
    narrow = compared(tmp_path, *pair, margin=1e-4).comparisons[0]
    wide = compared(tmp_path, *pair, margin=1e4, overwrite=True).comparisons[0]
    assert not narrow.equivalent
    assert narrow.equivalence_p_value > 0.05 > wide.equivalence_p_value
    assert wide.equivalent
    assert wide.verdict == "mild keeps more, but by less than the margin: equivalent"


def test_it_leaves_a_table_a_plot_and_a_page(runs, tmp_path):
    result = compared(tmp_path, runs / "together" / "mild", runs / "alone", overwrite=True)
    assert names_in(tmp_path / "out") == {"compare.json", "compare.png", "compare.html"}
    assert Comparison.read(tmp_path / "out" / "compare.json") == result
    assert result.margin == 0.05
    pixels = np.asarray(Image.open(tmp_path / "out" / "compare.png").convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10
    markup = (tmp_path / "out" / "compare.html").read_text()
    for word in ("mild − alone", "mild keeps more", "mean-difference@0"):
        assert word in markup
    assert not re.search(r"https?:|url\(|<script .*src", markup)
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


def without_last(folder):
    return b"".join((folder / "pairs.jsonl").read_bytes().splitlines(keepends=True)[:-1])


def test_damaged_evaluations_are_refused(runs, tmp_path):
    whole = runs / "alone"

    def damaged(name, damage, said):
        shutil.copytree(whole, tmp_path / name)
        edited(tmp_path / name / "evaluation.json", lambda c: [c.pop("sha256"), c.pop("pairs_sha256")])
        damage(tmp_path / name)
        with pytest.raises(ValueError, match=said):
            compared(tmp_path, whole, tmp_path / name)

    shutil.copytree(whole, tmp_path / "edited")
    (tmp_path / "edited" / "pairs.jsonl").write_bytes(without_last(whole))
    with pytest.raises(ValueError, match=r"is damaged: pairs\.jsonl has changed since it was written\. Evaluate again"):
        compared(tmp_path, whole, tmp_path / "edited")
    damaged("no pairs", lambda f: (f / "pairs.jsonl").unlink(), r"pairs\.jsonl is missing")
    damaged("no summary", lambda f: (f / "evaluation.json").unlink(), r"evaluation\.json is missing")
    damaged("half", lambda f: (f / "pairs.jsonl").write_bytes((f / "pairs.jsonl").read_bytes()[:-9]), "is damaged")
    damaged("empty", lambda f: (f / "pairs.jsonl").write_text(""), "has no pairs")
    damaged("fewer", lambda f: (f / "pairs.jsonl").write_bytes(without_last(f)), "too few of them")
    damaged("a list", lambda f: (f / "pairs.jsonl").write_text("[]\n"), "has no proper")
    damaged(
        "twice",
        lambda f: (f / "pairs.jsonl").write_bytes(2 * (f / "pairs.jsonl").read_bytes()),
        "or a pair twice",
    )
    damaged("other", lambda f: edited(f / "evaluation.json", lambda c: c.pop("integrity")), "integrity is missing")
    damaged("older", lambda f: edited(f / "evaluation.json", lambda c: c.pop("schema")), "of version 0.1 or older")
    damaged("newer", lambda f: edited(f / "evaluation.json", lambda c: c.update(schema=2)), "Update fastunlearn")
    damaged("a run", lambda f: edited(f / "evaluation.json", lambda c: c.update(kind="run")), "of `fastunlearn train`")
    with pytest.raises(ValueError, match=r"holds no evaluation: evaluation\.json is missing"):
        compared(tmp_path, whole, runs)
    assert not (tmp_path / "out").exists()


# ---- folders of images -----------------------------------------------------------------------------------------------


def folder_of(path, strength):
    """Ten images; ``strength`` says how far they are from those of strength 0."""
    path.mkdir(parents=True)
    for index in range(10):
        pixels = np.random.default_rng(index).integers(256, size=(64, 64, 3), dtype=np.uint8)
        pixels[: strength * (1 + index % 3)] = 0
        Image.fromarray(pixels).save(path / f"{index}.png")
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Evaluations of folders of images: two models beside one original, and one beside another."""
    folder = tmp_path_factory.mktemp("folders")
    originals = [folder_of(folder / "original", 0), folder_of(folder / "other", 1)]
    (folder / "prompts.csv").write_text(
        "file,prompt,group\n"
        + "".join(f"{index}.png,p{index // 2},{'far' if index > 5 else 'near'}\n" for index in range(10))
    )
    for name, original, strength, prompts in (
        ("mild", 0, 2, None),
        ("harsh", 0, 12, None),
        ("of another", 1, 2, None),
        ("with prompts", 0, 2, str(folder / "prompts.csv")),
    ):
        evaluate_images(
            EvaluateImagesConfig(
                original_images=str(originals[original]),
                unlearned_images=str(folder_of(folder / f"images {name}", strength)),
                output=str(folder / name),
                metric="shapes",
                prompts=prompts,
            )
        )
    return folder


def test_folders_of_images_are_compared_by_their_distances(folders, tmp_path, cli):
    result = compared(tmp_path, folders / "mild", folders / "harsh")
    (row,) = result.comparisons
    mild, harsh = (FoldersEvaluation.read(folders / name / "evaluation.json").integrity for name in ("mild", "harsh"))
    assert row.difference == pytest.approx(harsh.mean - mild.mean)
    assert row.verdict == "mild keeps more than harsh"
    assert (row.equivalent, row.equivalence_p_value, result.margin) == (None, None, None)
    assert result.unit.startswith("difference in distance")
    assert [run.retention for run in result.runs] == [None, None]
    markup = (tmp_path / "out" / "compare.html").read_text()
    assert "to count as equal" not in markup
    assert Comparison.read(tmp_path / "out" / "compare.json") == result
    answer = cli("compare", folders / "mild", folders / "harsh", "--margin", 10, "--output", tmp_path / "wide")
    assert answer.status == 0
    (wide,) = Comparison.read(tmp_path / "wide" / "compare.json").comparisons
    assert wide.verdict == "mild keeps more, but by less than the margin: equivalent"
    assert "difference in distance" in " ".join(answer.out.replace("┃", " ").split())


def test_folders_that_were_not_measured_alike_are_refused(folders, runs, tmp_path):
    for other, said in (
        (folders / "of another", "they are of different originals"),
        (folders / "with prompts", "clusters is 'pairs' and 'prompts'"),
        (runs / "alone", "one is a result of `fastunlearn evaluate-images`, the other of `fastunlearn evaluate`"),
    ):
        with pytest.raises(ValueError, match=said):
            compared(tmp_path, folders / "mild", other)
    assert not (tmp_path / "out").exists()
