"""Judges: the bundled one, a user's own, and one that another package brings, all used alike."""

import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from toys import PROMPTS, SETTINGS, Reader, draw, names_in, shifted

from fastunlearn import evaluate, plugins
from fastunlearn.errors import UserError
from fastunlearn.evaluation.evaluator import Evaluator
from fastunlearn.judges import Judge, Verdicts, all_judges, as_judge, broken_judges, judged, load_judge
from fastunlearn.schema import Evaluation
from fastunlearn.worlds.shapes import load_classifier
from fastunlearn.worlds.shapes.world import SHAPES, render, sample_scenes

GROUPED = [(prompt, "forget" if index < 4 else "near" if index < 9 else "far") for index, prompt in enumerate(PROMPTS)]


def noise(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, 64, 64), generator=generator).to(torch.uint8)


# ---- the bundled judge -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes():
    return load_judge("shapes")


def test_the_bundled_judge_says_what_its_classifier_names(shapes):
    scenes = sample_scenes(200, seed=3)
    images = render(scenes)
    images = images if images.dtype == torch.uint8 else ((images + 1) * 127.5).round().to(torch.uint8)
    labels = load_classifier().predict(images)
    for word in ("star", "red", "striped"):
        attribute, _ = next((name, word) for name, words in shapes.vocabulary.items() if word in words)
        verdicts = shapes.judge(images, word)
        named = [shapes.vocabulary[attribute][index] == word for index in labels[attribute].tolist()]
        assert ((verdicts.shown >= shapes.threshold) == torch.tensor(named)).all()
        assert ((verdicts.valid >= shapes.valid_threshold) == (labels["valid"] == 1)).all()
        assert verdicts.attributes["shape"] == [SHAPES[index] for index in labels["shape"].tolist()]
    truth = [shape == SHAPES.index("star") for shape in scenes.shape.tolist()]
    agreement = ((shapes.judge(images, "star").shown >= 0.5) == torch.tensor(truth)).float().mean()
    assert agreement > 0.98


def test_the_bundled_judge_finds_noise_not_valid_and_knows_its_words(shapes):
    assert (shapes.judge(noise(20), "star").valid < shapes.valid_threshold).all()
    assert shapes.asked("a red star on a plain background") == {"shape": "star", "color": "red", "background": "plain"}
    shapes.check(" Star ")
    with pytest.raises(UserError, match="does not know the concept 'van Gogh'"):
        shapes.check("van Gogh")
    with pytest.raises(UserError, match="takes no option"):
        load_judge("shapes:large")


def test_how_images_lie_in_memory_changes_no_bit(shapes):
    """A full batch comes as the decoder left it, one that was filled up does not; ranks fill up at other places."""
    images = noise(9)
    whole = judged(shapes, images, "star", 9)
    other = judged(shapes, images.contiguous(memory_format=torch.channels_last), "star", 9)
    parts = [judged(shapes, part.contiguous(memory_format=torch.channels_last), "star", 9) for part in images.split(5)]
    for again in (other, type(whole).joined(parts, axis=1)):
        assert (again.shown == whole.shown).all()
        assert (again.valid == whole.valid).all()


def test_noise_is_not_forgetting(bundled):
    """A model that makes noise of every prompt: nothing is shown, nothing is valid, and every page says both."""

    def broken(prompts, noise_):
        return noise(len(prompts), seed=1)

    prompts = [
        ("a red star", "forget"),
        ("a blue star", "forget"),
        ("a red ring", "retain"),
        ("a green cross", "retain"),
    ]
    settings = {"num_inference_steps": 2, "batch_size": 4, "control_pairs": 2, "forget": "star"}
    result = evaluate(bundled, {"broken": broken}, prompts, **settings).results[0].evaluation
    assert (result.erasure.shown, result.erasure.valid) == (0.0, 0.0)
    assert result.erasure.unlearning_accuracy_valid == 0.0
    assert (result.groups["forget"].shown, result.groups["forget"].valid) == (0.0, 0.0)
    assert result.retain.valid == 0.0


def test_garbage_that_the_judge_takes_for_the_concept_shows_nothing():
    class Deluded(Judge):
        name, valid_threshold = "deluded@1", 0.5

        def judge(self, images, concept):
            return Verdicts(torch.ones(len(images)), torch.zeros(len(images)))

    erasure = evaluate(draw, shifted(3), GROUPED, judge=Deluded(), forget="x", **SETTINGS).summary["erasure"]
    assert (erasure["shown"], erasure["shown_original"], erasure["valid"]) == (0.0, 0.0, 0.0)
    assert erasure["unlearning_accuracy"] == 0.0, "UA of the field asks the classifier alone"


# ---- a user's judge --------------------------------------------------------------------------------------------------


def test_every_number_of_a_judge_is_that_of_its_verdicts():
    """Counted once more from the lines of pairs.jsonl."""
    settings = {"judge": Reader(), "forget": "anything at all", "seeds_per_prompt": 3, **SETTINGS}
    result = evaluate(draw, shifted(30), GROUPED, **settings)
    evaluation, lines = result.results[0].evaluation, result.pairs
    forget = [line for line in lines if line["group"] == "forget"]
    kept = [line for line in lines if line["group"] != "forget"]
    assert evaluation.erasure.n_images == len(forget) == 12
    shown = [line["shown"] and line["valid"] for line in forget]
    assert evaluation.erasure.shown == sum(shown) / 12
    assert 0 < sum(shown) < 12, "else the test sees nothing"
    assert evaluation.erasure.valid == sum(line["valid"] for line in forget) / 12
    before = [line["original"]["shown"] and line["original"]["valid"] for line in forget]
    assert evaluation.erasure.shown_original == sum(before) / 12
    assert evaluation.erasure.shown_ci95[0] <= evaluation.erasure.shown <= evaluation.erasure.shown_ci95[1]
    tint = evaluation.retain.attributes["tint"]
    asked = [line for line in kept if "xx" in line["prompt"]]
    assert tint.n_asked == len(asked) > 0
    assert tint.accuracy == sum(line["attributes"]["tint"] == "red" for line in asked) / len(asked)
    assert tint.original == sum(line["original"]["attributes"]["tint"] == "red" for line in asked) / len(asked)
    assert tint.agreement == sum(line["attributes"] == line["original"]["attributes"] for line in kept) / len(kept)
    same = [(line["attributes"], line["valid"]) for line in kept]
    assert evaluation.retain.agreement == sum(
        one == (line["original"]["attributes"], line["original"]["valid"]) for one, line in zip(same, kept, strict=True)
    ) / len(kept)
    assert evaluation.judge.name == "reader@0"
    assert (evaluation.judge.threshold, evaluation.judge.valid_threshold) == (0.6, 0.5)
    for line in lines:
        assert line["shown"] == (line["score"] >= 0.6)


@pytest.mark.parametrize(
    "answer",
    [
        lambda scores: scores,
        lambda scores: scores.numpy(),
        lambda scores: scores.tolist(),
        lambda scores: scores > 0.6,
        lambda scores: scores.double(),
        lambda scores: Verdicts(scores),
    ],
    ids=["tensor", "array", "list", "truth", "double", "verdicts"],
)
def test_a_function_is_a_judge(answer):
    asked = []

    def bright(images, concept):
        asked.append((tuple(images.shape), images.dtype, concept))
        return answer(images.float().mean(dim=(1, 2, 3)) / 255)

    settings = {"forget": "light", "trust_judge": True, **SETTINGS}
    result = evaluate(draw, shifted(60), GROUPED, judge=bright, **settings).results[0].evaluation
    assert set(asked) == {((4, 3, 8, 8), torch.uint8, "light")}, "batches of one size"
    assert result.judge.name == "function bright"
    assert result.judge.valid_threshold is result.erasure.valid is result.retain.valid is None
    assert result.retain.agreement is None
    assert result.retain.attributes == {}
    assert result.erasure.shown > result.erasure.shown_original


def test_an_object_with_some_of_the_protocol_is_a_judge():
    given = types.SimpleNamespace(name="mine@9", threshold=0.25, judge=lambda images, concept: [0.3] * len(images))
    judge = as_judge(given)
    assert (judge.name, judge.threshold, judge.asked("x")) == ("mine@9", 0.25, {})
    assert evaluate(draw, draw, GROUPED, judge=given, forget="x", **SETTINGS).summary["erasure"]["shown"] == 1.0


def test_a_judge_refuses_what_it_does_not_know_before_anything_is_generated(tmp_path):
    def never(prompts, noise):
        raise AssertionError("something was generated")

    with pytest.raises(UserError, match="does not know 'unknown'"):
        evaluate(never, draw, GROUPED, judge=Reader(), forget="unknown", output=tmp_path / "out", **SETTINGS)
    with pytest.raises(UserError, match="looks for a concept: name it with `--forget`"):
        evaluate(never, draw, GROUPED, judge=Reader(), output=tmp_path / "out", **SETTINGS)
    assert not list(tmp_path.iterdir())


def raises(count):
    raise ZeroDivisionError("division by zero")


BAD = {
    "above one": (lambda n: [1.5] * n, "must give 4 scores from 0 to 1 .* got 1.5"),
    "nan": (lambda n: [float("nan")] * n, "got nan"),
    "negative": (lambda n: np.full(n, -0.1), "got -0.1"),
    "too few": (lambda n: [0.5] * (n - 1), r"got the shape \(3,\)"),
    "too deep": (lambda n: torch.zeros(n, 1), r"got the shape \(4, 1\)"),
    "texts": (lambda n: ["yes"] * n, r"got the shape \(0,\)"),
    "an error": (raises, "the judge function judge failed: ZeroDivisionError: division by zero. Mend it"),
    "verdicts of nothing": (lambda n: Verdicts(None), r"got the shape \(\)"),
    "validity that is none": (lambda n: Verdicts([0.5] * n, ["?"] * n), "valid_threshold = None: both or neither"),
    "infinite": (lambda n: torch.full((n,), torch.inf), "got inf"),
    "complex": (lambda n: [1j] * n, r"got the shape \(0,\)"),
    "nothing": (lambda n: None, r"got the shape \(\)"),
    "validity unasked": (lambda n: Verdicts([0.5] * n, [0.5] * n), "valid_threshold = None: both or neither"),
}


@pytest.mark.parametrize(("answer", "said"), BAD.values(), ids=BAD)
def test_answers_that_are_none_are_refused(answer, said):
    def judge(images, concept):
        return answer(len(images))

    with pytest.raises(UserError, match=said) as error:
        evaluate(draw, draw, GROUPED, judge=judge, forget="x", **SETTINGS)
    assert "the judge function judge" in str(error.value)


def test_what_a_judge_of_somebody_else_raises_is_one_line_and_a_fault_of_ours_is_not(monkeypatch):
    class Fails(Judge):
        name = "fails@1"

        def check(self, concept):
            raise KeyError(concept)

        def judge(self, images, concept):
            raise AttributeError("no attribute 'x'")

    with pytest.raises(UserError, match=r"the judge fails@1 failed: AttributeError: no attribute 'x'"):
        judged(Fails(), noise(2), "x", 2)
    given = types.SimpleNamespace(name="odd@1", judge=lambda images, concept: [0.5] * len(images), check=Fails().check)
    with pytest.raises(UserError, match="the judge odd@1 failed: KeyError: 'x'"):
        evaluate(draw, draw, GROUPED, judge=given, forget="x", **SETTINGS)

    def broken(device, option):
        raise RuntimeError("no such network")

    entry = types.SimpleNamespace(name="broken", value="theirs:broken", load=lambda: broken)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [entry] if group == "fastunlearn.judges" else [])
    with pytest.raises(UserError, match="the judge broken failed: RuntimeError: no such network"):
        load_judge("broken")
    ours = load_judge("shapes")
    monkeypatch.setattr(ours, "classifier", None)
    with pytest.raises(AttributeError):
        judged(ours, noise(2), "star", 2)


def test_words_and_thresholds_that_are_none_are_refused():
    class Odd(Reader):
        def judge(self, images, concept):
            verdicts = super().judge(images, concept)
            return Verdicts(verdicts.shown, verdicts.valid, {"tint": self.words(verdicts.attributes["tint"])})

    odd = Odd()
    odd.words = lambda words: ["mauve", *words[1:]]
    with pytest.raises(UserError, match="must name a word of its 'tint' per image, got the word 'mauve'"):
        judged(as_judge(odd), noise(3), "x", 2)
    odd.words = lambda words: words[1:]
    with pytest.raises(UserError, match="got 1 for 2 images"):
        judged(as_judge(odd), noise(3), "x", 2)
    odd.words = lambda words: [None, *words[1:]]
    assert judged(as_judge(odd), noise(3), "x", 2).words[0, :, 0].tolist().count(-1) == 2
    for given, said in (
        (3, "a judge is a name"),
        (Reader, "a judge is a name"),
        (types.SimpleNamespace(judge=draw, threshold=7), "must be from 0 to 1"),
        (types.SimpleNamespace(judge=draw, vocabulary={"a": ["x", "x"]}), "list of different words for 'a'"),
        (types.SimpleNamespace(judge=draw, name=3), "has no name"),
    ):
        with pytest.raises(UserError, match=said):
            as_judge(given)


def test_an_unknown_judge_and_none_at_all(bundled, tmp_path, refused):
    with pytest.raises(UserError, match=r"unknown judge 'nobody'. There are: shapes, .*clip, imagenet"):
        load_judge("nobody")
    settings = {"num_inference_steps": 1, "batch_size": 2, "control_pairs": 2, "forget": "star"}
    prompts = "a red ring;a blue heart"
    summary = evaluate(bundled, {"a": bundled}, prompts, judge="none", **settings).summary
    assert summary["judge"] is summary["erasure"] is summary["retain"] is None
    line = refused(
        *("evaluate", "--original", "shapes", "--unlearned", "shapes", "--prompts", prompts, "--forget", "star"),
        *("--judge", "nobody", "--output", tmp_path / "out"),
    )
    assert "unknown judge 'nobody'" in line
    assert not (tmp_path / "out").exists()


# ---- journal and files -----------------------------------------------------------------------------------------------


def results_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_verdicts_survive_a_stop_to_the_last_bit(tmp_path):
    settings = {"judge": Reader(), "forget": "x", "seeds_per_prompt": 2, "trust_judge": True, **SETTINGS}
    evaluate(draw, shifted(7), GROUPED, output=tmp_path / "whole", **settings)
    calls = []

    def stopping(prompts, noise):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("stopped")
        return shifted(7)(prompts, noise)

    stopping.__name__ = "shifted"
    with pytest.raises(RuntimeError, match="stopped"):
        evaluate(draw, stopping, GROUPED, output=tmp_path / "run", **settings)
    journal = tmp_path / "run" / "journal"
    assert json.loads((journal / "spec.json").read_text())["format"] == 4
    other = Reader()
    other.threshold = 0.9
    with pytest.raises(UserError, match="has judge = "):
        evaluate(draw, stopping, GROUPED, output=tmp_path / "run", resume=True, **settings | {"judge": other})
    evaluate(draw, stopping, GROUPED, output=tmp_path / "run", resume=True, **settings)
    assert results_of(tmp_path / "run") == results_of(tmp_path / "whole")
    assert names_in(tmp_path / "run") == {"evaluation.json", "pairs.jsonl", "grid.png", "report.html"}
    page = (tmp_path / "run" / "report.html").read_text()
    assert "reader@0 (shown from a score of 0.6 on, valid from 0.5 on)" in page
    assert "Right<br>tint" in page


def test_a_journal_of_another_format_is_not_continued(tmp_path, monkeypatch):
    def stopped(*arguments):
        raise RuntimeError("stopped")

    settings = {"judge": Reader(), "forget": "x", **SETTINGS}
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "conclude", stopped)
        with pytest.raises(RuntimeError, match="stopped"):
            evaluate(draw, draw, GROUPED, output=tmp_path / "run", **settings)
    spec = tmp_path / "run" / "journal" / "spec.json"
    content = json.loads(spec.read_text())
    for older in ({**content, "format": 2}, {key: value for key, value in content.items() if key != "format"}):
        spec.write_text(json.dumps(older))
        with pytest.raises(UserError, match=r"format [12], this version continues format 4. .*`--overwrite`"):
            evaluate(draw, draw, GROUPED, output=tmp_path / "run", resume=True, **settings)


def test_the_same_with_any_number_of_models_and_in_any_company():
    settings = {"judge": Reader(), "forget": "x", **SETTINGS}
    both = evaluate(draw, {"a": shifted(30), "b": shifted(3)}, GROUPED, **settings)
    for name, amount in (("a", 30), ("b", 3)):
        alone = evaluate(draw, {name: shifted(amount)}, GROUPED[::-1], **settings)
        ours = next(result for result in both.results if result.name == name)
        assert ours.pairs == alone.pairs
        assert ours.evaluation == alone.results[0].evaluation


# ---- a judge of another package --------------------------------------------------------------------------------------

EXAMPLE = Path(__file__).parents[1] / "examples" / "plugin" / "main_color_judge.py"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The example, installed as a package of its own: a module and its metadata."""
    site = tmp_path / "site"
    info = site / "main_color-1.0.dist-info"
    info.mkdir(parents=True)
    shutil.copy(EXAMPLE, site / "main_color.py")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: main-color\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[fastunlearn.judges]\nmain-color = main_color:MainColor\n")
    monkeypatch.syspath_prepend(site)
    yield site
    sys.modules.pop("main_color", None)


def test_a_judge_of_another_package_takes_at_most_forty_lines():
    assert len([line for line in EXAMPLE.read_text().splitlines() if line.strip()]) <= 40


def test_a_judge_of_another_package_judges_from_the_command_line(installed, cli, tmp_path):
    assert "main-color" in all_judges()
    command = ["evaluate", "--original", "shapes", "--unlearned", "shapes-gold-star", "--forget", "red"]
    command += ["--prompts", prompt_file(tmp_path), "--num-inference-steps", 2, "--batch-size", 4, "--control-pairs", 2]
    answer = cli(*command, "--judge", "main-color:70", "--output", tmp_path / "out")
    assert (answer.status, answer.err) == (0, "")
    result = Evaluation.read(tmp_path / "out" / "evaluation.json")
    assert result.judge == evaluation_judge(70)
    assert "red shown" in " ".join(answer.out.split()).replace("red model", "red")
    assert result.erasure.valid is None
    assert result.retain.attributes["main"].n_asked == 2
    assert "main-color@" in answer.out
    refusal = cli(*command, "--forget", "mauve", "--judge", "main-color", "--output", tmp_path / "other")
    assert refusal.status == 2
    assert "not 'mauve'" in refusal.err
    assert cli("info").out.count("main-color") == 1


def prompt_file(folder):
    (folder / "prompts.csv").write_text("prompt,group\na red ring,forget\na blue ring,near\na green cross,near\n")
    return folder / "prompts.csv"


def evaluation_judge(reach):
    from fastunlearn.judges import record_of

    return record_of(load_judge(f"main-color:{reach}"))


def test_a_broken_judge_of_another_package_harms_nobody_else(monkeypatch, cli):
    def fails():
        raise ImportError("no module named torchvision")

    entries = [
        types.SimpleNamespace(name="broken", value="broken:Judge", load=fails),
        types.SimpleNamespace(name="shapes", value="theirs:Judge", load=lambda: Reader),
        types.SimpleNamespace(name="text", value="theirs:TEXT", load=lambda: "text"),
    ]
    monkeypatch.setattr(plugins, "entry_points", lambda group: entries if group == "fastunlearn.judges" else [])
    assert all_judges() == ["shapes", "clip", "imagenet", "nsfw", "nudenet"]
    assert load_judge("shapes").name.startswith("shapes@")
    with pytest.raises(UserError, match="the judge 'broken' of another package cannot be loaded: ImportError"):
        load_judge("broken")
    assert broken_judges().keys() == {"broken", "shapes of theirs:Judge", "text"}
    assert "broken: cannot be loaded" in cli("info").out


def test_asking_for_a_judge_loads_no_training():
    script = "import fastunlearn.judges, sys; print([n for n in sys.modules if n.startswith('fastunlearn.training')])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
