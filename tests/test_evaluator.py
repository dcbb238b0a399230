"""The evaluator: exact where it must be, calibrated at both ends, and refusing what cannot be compared."""

import collections
import json
import re
import shutil

import pytest
import torch
from toys import run_record

from fastunlearn import evaluate
from fastunlearn.evaluation.evaluator import evaluate_models
from fastunlearn.evaluation.generators import PipelineSource, as_source, check_comparable
from fastunlearn.evaluation.plan import PromptGroups, file_groups, world_groups
from fastunlearn.evaluation.results import EvaluationReport, write_results
from fastunlearn.files.weights import hash_pipeline
from fastunlearn.metrics.distances import load_perceptual
from fastunlearn.models.loading import load_model
from fastunlearn.models.sampling import SamplerSpec
from fastunlearn.training.config import TrainConfig
from fastunlearn.training.unlearn import unlearn
from fastunlearn.worlds.shapes import SHAPES, SHAPES_WORLD

SPEC = SamplerSpec(num_inference_steps=3, micro_batch_size=4)
GROUPS = PromptGroups(
    ("a red star on a plain background", "a blue star on a dotted background"),
    (
        "a red ring on a plain background",
        "a blue circle on a dotted background",
        "a pink heart on a striped background",
        "a green cross",
    ),
    "star",
)


@pytest.fixture(scope="module")
def metric():
    return load_perceptual("shapes", "cpu")


@pytest.fixture(scope="module")
def damaged(bundled, tmp_path_factory):
    """The bundled model with noise on its cross-attention: a stand-in for an unlearned one."""
    folder = tmp_path_factory.mktemp("damaged") / "model"
    shutil.copytree(bundled.source, folder)
    model = load_model(str(folder), "cpu")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.denoiser.named_parameters():
        if "attn2" in name and parameter.dim() == 2:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def result(bundled, damaged, metric):
    return evaluate_models(bundled, {"damaged": damaged}, GROUPS, metric, SPEC)


def test_a_model_against_itself_changes_nothing(bundled, metric):
    result = evaluate_models(bundled, {"same": bundled}, GROUPS, metric, SPEC).results[0]
    assert {record["distance"] for record in result.pairs} == {0.0}
    assert result.summary["integrity"]["mean"] == 0.0
    assert result.summary["integrity"]["retention"] == 1.0
    low, high = result.summary["integrity"]["retention_ci95"]
    assert low < high == 1.0  # what so few prompts cannot exclude of others


def test_a_model_that_ignores_prompts_and_noise_keeps_nothing(bundled, metric, monkeypatch):
    """Its images are those of other prompts: R is near 0 or below."""
    genuine = PipelineSource.start
    other = load_model("shapes", "cpu")

    def shuffled(source, keys):
        if source.model is other:
            keys = [(keys[-1][0], seed + 900) for _, seed in keys]
        return genuine(source, keys)

    monkeypatch.setattr(PipelineSource, "start", shuffled)
    result = evaluate_models(bundled, {"other": other}, GROUPS, metric, SPEC).results[0]
    assert result.summary["integrity"]["retention"] < 0.25


def test_summary_has_the_promised_fields(result):
    summary = result.results[0].summary
    for section, names in {
        "integrity": "mean ci95 ceiling retention n_pairs n_prompts metric",
        "judge": "name threshold valid_threshold attributes",
        "erasure": "shown shown_ci95 shown_original valid valid_original unlearning_accuracy",
        "retain": "attributes agreement valid valid_original",
        "controls": "repeat",
        "spec": "sampler steps guidance_scale dtype hashes",
    }.items():
        assert set(names.split()) <= summary[section].keys()
    assert list(summary["retain"]["attributes"]) == summary["judge"]["attributes"] == ["shape", "color", "background"]
    for attribute in summary["retain"]["attributes"].values():
        assert attribute.keys() == {"accuracy", "original", "agreement", "n_asked"}
    assert re.fullmatch(r"shapes@[0-9a-f]{12}", summary["judge"]["name"])
    assert summary["controls"]["repeat"] == 0.0
    assert summary["integrity"]["n_pairs"] == summary["integrity"]["n_prompts"] == 4
    assert summary["integrity"]["mean"] > 0
    json.dumps(summary, allow_nan=False)


def test_summary_is_the_mean_of_the_records(result):
    evaluation = result.results[0]
    distances = [record["distance"] for record in evaluation.pairs if record["group"] == "retain"]
    assert evaluation.summary["integrity"]["mean"] == pytest.approx(sum(distances) / len(distances))
    assert len(evaluation.pairs) == 6
    forget = [record for record in evaluation.pairs if record["group"] == "forget"]
    erasure = evaluation.summary["erasure"]
    assert erasure["shown"] == sum(record["shown"] and record["valid"] for record in forget) / 2
    assert erasure["valid"] == sum(record["valid"] for record in forget) / 2
    before = [record["original"]["shown"] and record["original"]["valid"] for record in forget]
    assert erasure["shown_original"] == sum(before) / 2
    for record in evaluation.pairs:
        # The word that the classifier names is the concept just where the score says so.
        assert record["shown"] == (record["attributes"]["shape"] == "star") == (record["score"] >= 0.5)


def test_the_order_of_prompts_changes_no_bit(bundled, damaged, metric, result):
    reordered = PromptGroups(GROUPS.forget[::-1], GROUPS.retain[::-1], "star")
    again = evaluate_models(bundled, {"damaged": damaged}, reordered, metric, SPEC).results[0]

    def by_key(records):
        return sorted(records, key=lambda record: (record["prompt"], record["seed"]))

    assert again.pairs == by_key(again.pairs) == result.results[0].pairs
    assert again.summary["integrity"] == result.results[0].summary["integrity"]


def test_a_second_model_changes_nothing_for_the_first(bundled, damaged, metric, result):
    both = evaluate_models(bundled, {"same": bundled, "damaged": damaged}, GROUPS, metric, SPEC)
    assert both.results[1].pairs == result.results[0].pairs
    assert both.results[1].summary == result.results[0].summary


def test_several_seeds_a_prompt_are_clustered(bundled, damaged, metric):
    result = evaluate_models(bundled, {"damaged": damaged}, GROUPS, metric, SPEC, seeds_per_prompt=2).results[0]
    assert result.summary["integrity"]["n_pairs"] == 8
    assert result.summary["integrity"]["n_prompts"] == 4
    assert {record["seed"] for record in result.pairs} == {0, 1}


def test_an_original_that_does_not_repeat_is_not_scored(bundled, damaged, metric, monkeypatch):
    genuine, calls = PipelineSource.finish, []

    def unsteady(*args):
        calls.append(1)
        images = genuine(*args)
        return images.flip(3) if len(calls) == 2 else images

    monkeypatch.setattr(PipelineSource, "finish", unsteady)
    with pytest.raises(ValueError, match="does not repeat itself"):
        evaluate_models(bundled, {"damaged": damaged}, GROUPS, metric, SPEC)


def test_progress_reaches_its_total(bundled, damaged, metric):
    seen = []
    evaluate_models(
        bundled, {"d": damaged}, GROUPS, metric, SPEC, on_progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_another_sampler_is_refused(bundled, tmp_path):
    shutil.copytree(bundled.source, tmp_path / "model")
    path = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    content = json.loads(path.read_text()) | {"beta_end": 0.02}
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="beta_end"):
        check_comparable(as_source(bundled, SPEC), as_source(tmp_path / "model", SPEC, device="cpu"), "other")


def test_prompts_without_a_retain_group_are_refused():
    with pytest.raises(ValueError, match="at least 2 retain prompts"):
        PromptGroups(("a star",), (), "star")
    with pytest.raises(ValueError, match="also retain prompts"):
        PromptGroups(("A  star",), ("a star", "a ring"), "star")


def test_groups_come_from_a_column(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text("prompt,group\na star,forget\na ring,near\na red ring,\n", encoding="utf-8")
    groups = file_groups(str(path), "star")
    assert groups.forget == ("a star",)
    assert groups.retain == ("a ring", "a red ring")


def test_bundled_groups_are_the_evaluation_split():
    groups = world_groups(SHAPES_WORLD, "star")
    names = collections.Counter(groups.names[prompt] for prompt in groups.retain)
    assert names == {"retain": 56, "open": 8, "empty": 1}
    assert not any(shape in prompt for shape in SHAPES for prompt in groups.retain if groups.names[prompt] == "open")
    assert all("star" in prompt for prompt in groups.forget)


def test_results_are_written_whole(tmp_path, result):
    write_results(tmp_path, EvaluationReport(result, GROUPS))
    assert {path.name for path in tmp_path.iterdir()} == {
        "evaluation.json",
        "grid.png",
        "pairs.jsonl",
        "report.html",
    }
    lines = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert lines == result.results[0].pairs
    html = (tmp_path / "report.html").read_text()
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert "data:image/png;base64," in html


@pytest.mark.parametrize(
    ("seen", "named"),
    [
        (None, "prompts about other things it keeps"),
        (set(), "prompts that took no part in training it keeps"),
        ({""}, "prompts that took no part in training (but for the empty one) it keeps"),
        ({"", "a green cross"}, "prompts about other things (2 of which took part in a training) it keeps"),
    ],
)
def test_the_report_says_what_training_had_seen(tmp_path, result, seen, named):
    write_results(tmp_path, EvaluationReport(result, GROUPS, seen=seen))
    assert named in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("method", "concept", "count"),
    [
        ("uce", "ring", 1),
        ("esd", "star", 1),
        ("ovw", "star", 9),
        ("uce", "star", 9),
        ("ovw", "green", 9),
        ("esd", "green", 3),
    ],
)
def test_of_a_worlds_prompts_few_took_part_in_training(tmp_path, method, concept, count):
    """The empty one, which guidance leads away from and edits hold, and what is to be drawn instead of the concept."""
    config = TrainConfig(forget=concept, method=method, output=str(tmp_path / "run"), dry_run=True)
    both = unlearn(config).prompts & set(world_groups(SHAPES_WORLD, concept).retain)
    assert "" in both
    assert len(both) == count


def test_evaluate_reads_the_concept_from_the_run(tmp_path, bundled):
    shutil.copytree(bundled.source, tmp_path / "run" / "model")
    hashes = {"original": "a", "unlearned": hash_pipeline(bundled.source)}
    run_record(method="identity", concept="star", hashes=hashes).write(tmp_path / "run" / "run.json")
    result = evaluate(
        "shapes",
        tmp_path / "run",
        "a red ring;a blue circle;a star",
        output=tmp_path / "out",
        num_inference_steps=2,
        batch_size=4,
    )
    assert result.summary["concept"] == "star"
    assert result.summary["method"] == "identity"
    assert result.summary["integrity"]["retention"] == 1.0
