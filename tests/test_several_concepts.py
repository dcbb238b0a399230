"""Several concepts: one run, one model; what each becomes; a run on a run; the matrix of what is left of which."""

import csv
import json
import re
import time

import pytest
import torch
from safetensors.torch import load_file
from toys import NOISE, MeanDifference, draw

from fastunlearn import evaluate, unlearn
from fastunlearn.concepts import Finder, Named, read_concepts, title
from fastunlearn.errors import UserError
from fastunlearn.evaluation.inputs import forgotten_by
from fastunlearn.evaluation.plan import world_groups
from fastunlearn.judges import Verdicts
from fastunlearn.methods import get_method
from fastunlearn.methods.recipe import UNCONDITIONAL
from fastunlearn.prompts import PromptGroups, is_forget
from fastunlearn.schema import Ancestor, Evaluation, RunRecord
from fastunlearn.training.concept import make_concept
from fastunlearn.training.config import TrainConfig
from fastunlearn.training.plan import plan_training
from fastunlearn.training.plan_words import plan_lines
from fastunlearn.worlds.shapes import SHAPES_WORLD

UNET = "unet/diffusion_pytorch_model.safetensors"


# ---- what the user says ----------------------------------------------------------------------------------------------

FILES = {
    "a.csv": 'Concept,anchor\nVan Gogh,"a painter, any"\nMonet,\n\n',
    "b.csv": "anchor;concept\na painter, any;Van Gogh\n;Monet\n",
    "c.tsv": "concept\tanchor\tnote\nVan Gogh\ta painter, any\tx\nMonet\n",
    "d.json": '[{"concept": "Van Gogh", "anchor": "a painter, any"}, "Monet"]',
    "e.json": '{"Van Gogh": "a painter, any", "Monet": null}',
    "f.jsonl": '{"concept": "Van Gogh", "anchor": "a painter, any"}\n\n"Monet"\n',
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_names_concepts_and_what_they_become(tmp_path, name):
    (tmp_path / name).write_text(FILES[name], encoding="utf-8-sig")
    assert read_concepts(str(tmp_path / name)) == [Named("Van Gogh", "a painter, any"), Named("Monet")]


def test_names_stand_between_semicolons_and_in_a_text_a_line_each(tmp_path):
    assert read_concepts(" Van Gogh; Monet ;;van gogh") == [Named("Van Gogh"), Named("Monet")]
    assert read_concepts("AC/DC") == [Named("AC/DC")], "no path"
    (tmp_path / "names.txt").write_text("Van Gogh\nSteins;Gate\n")
    assert read_concepts(str(tmp_path / "names.txt")) == [Named("Van Gogh"), Named("Steins;Gate")]
    assert (title(["A"]), title(["A", "B"]), title(list("ABCDE"))) == ("A", "A; B", "A; B; C; 2 more")


def test_the_longest_concept_is_found_whole_and_in_any_case():
    finder = Finder(["star", "red star", "c++"])
    assert finder.named("a Red Star and a STAR, no starfish, C++") == ["red star", "star", "c++"]
    assert finder.replaced("a Red Star and a star in C++", {"red star": "ring", "star": ""}) == "a ring and a in C++"


def concept_of(bundled, method="uce", **settings):
    method = get_method(method)
    return make_concept(TrainConfig(output="x", **settings), method, bundled, method.defaults_for("shapes"))


def test_every_prompt_has_the_anchors_of_the_concepts_that_it_names(bundled):
    made = concept_of(bundled, forget="star;red")
    assert made.concepts == ("star", "red")
    assert {made.anchors[prompt] for prompt in ("a star", "red")} == {"a circle", "orange"}
    both = [prompt for prompt in made.forget_prompts if {"red", "star"} <= set(prompt.split())]
    assert both
    for prompt in both:
        assert made.anchors[prompt] == prompt.replace("red", "orange").replace("star", "circle")
    assert not any(re.search(r"\b(star|red)\b", prompt) for prompt in made.retain_prompts)
    assert set(made.retain_prompts) == set(concept_of(bundled, forget="star").retain_prompts) & set(
        concept_of(bundled, forget="red").retain_prompts
    )


def test_every_prompt_without_the_concepts(bundled):
    prompts = "star;a red star;RED star;two moons"
    assert concept_of(bundled, forget="star", forget_prompts=prompts).without == {
        "star": UNCONDITIONAL,  # nothing is left
        "a red star": "a red",
        "RED star": "RED",
        "two moons": UNCONDITIONAL,  # where the concept is in it is not known
    }
    both = concept_of(bundled, forget="star;red").without["a red star on a plain background"]
    assert both == "a on a plain background"


def test_no_concept_becomes_another_one_by_default_and_anchors_go_in_order(bundled):
    first = concept_of(bundled, forget="circle;square")
    assert (first.anchors["circle"], first.anchors["square"]) == ("triangle", "triangle")
    in_order = concept_of(bundled, forget="star;ring", anchor="a heart;a cross")
    assert (in_order.anchors["star"], in_order.anchors["ring"]) == ("a heart", "a cross")
    one_for_all = concept_of(bundled, forget="star;ring", anchor="heart")
    assert {one_for_all.anchors[word] for word in ("star", "ring")} == {"heart"}
    # Of one concept each prompt draws one, as ever.
    drawn = concept_of(bundled, forget="star", anchor="ring;heart")
    assert drawn.anchor == "ring;heart"
    assert {re.search("ring|heart", text)[0] for text in drawn.anchors.values()} == {"ring", "heart"}


def test_one_run_of_several_concepts_repeats_and_says_which(cli, tmp_path):
    (tmp_path / "concepts.csv").write_text("concept,anchor\nstar,heart\nred,\n")
    words = ["train", "--forget", tmp_path / "concepts.csv", "--method", "uce", "--evaluation-prompts", "none"]
    answer = cli(*words, "--output", tmp_path / "run")
    assert answer.status == 0, answer.err
    assert "concepts    2: star; red" in answer.out
    assert re.search(r"edited      matrices 8, condition [\d.e+]+", answer.out)
    record = RunRecord.read(tmp_path / "run" / "run.json")
    assert (record.concept, record.concepts, record.ancestors) == ("star; red", ("star", "red"), ())
    assert record.edit["matrices"] == 8
    assert record.edit["condition"] > 1
    assert cli("train", "--config", tmp_path / "run" / "config.yaml", "--output", tmp_path / "again").status == 0
    first, again = (load_file(tmp_path / name / "model" / UNET) for name in ("run", "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("method", ["ovw", "esd", "neggrad"])
def test_methods_of_rows_take_several_concepts(bundled, method):
    config = TrainConfig(forget="star;red", output="x", method=method, trajectory_steps=2)
    plan = plan_training(config, get_method(method), bundled)
    asked = {row.condition for row in plan.recipe.rows if row.role == "forget"}
    assert {"star", "red"} <= asked
    assert asked == set(plan.concept.forget_prompts)


def test_the_plan_says_that_a_prompt_to_keep_names_a_concept(bundled):
    config = TrainConfig(forget="star;red", output="x", method="uce", retain_prompts="a red ring;a blue ring")
    lines = plan_lines(plan_training(config, get_method("uce"), bundled))
    assert "torn        1 prompts to keep name what is to be forgotten: 'a red ring'" in lines


def test_a_thousand_concepts_in_a_file_take_seconds(tmp_path):
    from tiny_models import build, sd1

    folder = tmp_path / "sd1"
    build(sd1).save_pretrained(folder)
    with (tmp_path / "concepts.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["concept", "anchor"])
        rows.writerows([f"artist number {n}", "a painter"] for n in range(1000))
    started = time.monotonic()
    run = unlearn(str(folder), str(tmp_path / "concepts.csv"), "uce", output=tmp_path / "run")
    assert time.monotonic() - started < 60
    assert len(run.record.concepts) == 1000
    assert run.record.concept.endswith("997 more")


# ---- a run on a run --------------------------------------------------------------------------------------------------


def test_a_run_on_a_run_remembers_its_ancestors_and_what_each_forgot(cli, refused, tmp_path):
    quick = {"evaluation_prompts": "none"}
    first = unlearn("shapes", "star", "uce", output=tmp_path / "first", **quick)
    second = unlearn(str(tmp_path / "first"), "ring;red", "uce", output=tmp_path / "second", **quick)
    third = unlearn(str(tmp_path / "second" / "model"), "heart", "speed", output=tmp_path / "third", **quick)
    assert first.record.ancestors == ()
    one = Ancestor(method="uce", concepts=("star",), hashes=first.record.hashes)
    two = Ancestor(method="uce", concepts=("ring", "red"), hashes=second.record.hashes)
    assert second.record.ancestors == (one,)
    assert RunRecord.read(tmp_path / "third" / "run.json").ancestors == (one, two)
    assert second.record.hashes["original"] == first.record.hashes["unlearned"]
    assert forgotten_by(third.record, first.record.hashes["original"]) == ("star", "ring", "red", "heart")
    assert forgotten_by(third.record, first.record.hashes["unlearned"]) == ("ring", "red", "heart")
    assert forgotten_by(third.record, second.record.hashes["unlearned"]) == ("heart",)
    weights = first.model / UNET
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    line = refused(*("train", "--model", tmp_path / "first", "--forget", "ring", "--output", tmp_path / "fourth"))
    assert "has changed since its run wrote it" in line


# ---- the matrix ------------------------------------------------------------------------------------------------------

WORDS = ("star", "red")
GROUPED = [(f"{word} {n}", f"forget {word}") for word in WORDS for n in range(6)]
GROUPED += [("red star here", "forget"), ("what is this", "forget")]
GROUPED += [(f"a ring {n}", "retain") for n in range(4)]


def forgets(*words):
    """Draws black where a prompt names one of the words, else what the original draws."""

    def function(prompts, noise):
        named = torch.tensor([any(word in prompt for word in words) for prompt in prompts])
        return torch.where(named[:, None, None, None], torch.zeros((), dtype=torch.uint8), draw(prompts, noise))

    function.__name__ = "without-" + "-".join(words)
    return function


def bright(images, concept):
    """Sees any concept in whatever is not black, and remembers what it was asked."""
    asked.append((concept, len(images)))
    return (images.float().mean(dim=(1, 2, 3)) > 1).float()


asked: list[tuple[str, int]] = []


def evaluated(models, **settings):
    settings = {
        "judge": bright,
        "metric": MeanDifference(),
        "noise_shape": NOISE,
        "forget": "star;red",
        "trust_judge": True,
    } | settings
    return evaluate(draw, models, GROUPED, **settings)


def test_each_concept_is_counted_by_itself_and_the_whole_is_all_of_them(tmp_path):
    asked.clear()
    report = evaluated([forgets("star"), forgets("star", "red")], output=tmp_path / "e")
    assert {concept for concept, _ in asked} == set(WORDS)
    one, both = (result.evaluation for result in report.results)
    assert one.concept == "star; red"
    assert {word: cell.shown for word, cell in one.concepts.items()} == {"star": 0.0, "red": 1.0}
    assert {word: cell.shown for word, cell in both.concepts.items()} == {"star": 0.0, "red": 0.0}
    for cell in one.concepts.values():
        assert (cell.n_images, cell.shown_original, cell.forgotten) == (6, 1.0, True)
        assert cell.shown_ci95[0] <= cell.shown <= cell.shown_ci95[1]
        assert cell.shown_ci95[1] - cell.shown_ci95[0] > 0.2, "six images tell little"
    # 6 + 6 + the prompt of both + the prompt of none, which still shows something.
    assert (both.erasure.n_images, both.erasure.shown) == (14, pytest.approx(1 / 14))
    assert set(both.groups) == {"forget star", "forget red", "forget", "retain"}
    again = Evaluation.read(tmp_path / "e" / report.results[0].name / "evaluation.json")
    assert again.concepts == one.concepts
    page = (tmp_path / "e" / "report.html").read_text()
    assert "Concept by concept" in page
    assert page.count('data-label="red"') == 2


def test_one_concept_has_no_matrix(tmp_path):
    evaluation = evaluated([forgets("star")], forget="star").results[0].evaluation
    assert evaluation.concepts is None
    assert "concepts" not in evaluation.to_dict()
    assert evaluation.erasure.n_images == 14


def test_a_judge_that_sees_each_concept_differently_is_asked_for_the_right_one():
    def judge(images, concept):
        score = torch.full((len(images),), {"star": 0.9, "red": 0.2}[concept])
        return Verdicts(shown=score)

    evaluation = evaluated([draw], judge=judge).results[0].evaluation
    assert {word: cell.shown for word, cell in evaluation.concepts.items()} == {"star": 1.0, "red": 0.0}
    pairs = {pair["prompt"]: pair["score"] for pair in evaluated([draw], judge=judge).pairs}
    assert pairs["red 1"] == pytest.approx(0.2)
    assert pairs["red star here"] == pytest.approx(0.9), "the higher of both"


def test_prompts_ask_for_what_their_group_says_or_for_what_they_name():
    groups = PromptGroups.of([("a vase", "forget Red"), ("a red star", "forget"), ("p", "a"), ("q", "a")], WORDS)
    assert dict(groups.asked) == {"a vase": ("red",), "a red star": ("red", "star")}
    with pytest.raises(UserError, match="at least 2 retain prompts"):
        PromptGroups.of([("a red star", "forget")], WORDS)


def test_the_worlds_prompts_for_several_concepts():
    groups = world_groups(SHAPES_WORLD, WORDS)
    grouped = dict(groups.grouped())
    alone = {word: {p: g for p, g in SHAPES_WORLD.prompts_to_evaluate(word) if is_forget(g)} for word in WORDS}
    assert set(groups.forget) == set(alone["star"]) | set(alone["red"])
    for prompt, group in grouped.items():
        named = [word for word in WORDS if re.search(rf"\b{word}\b", prompt)]
        assert not is_forget(group) if not named else group.endswith(" " + " + ".join(named)), prompt
        assert set(groups.asked.get(prompt, ())) == set(named)
    assert "" in groups.retain


def test_the_matrix_of_runs_that_forgot_different_things(cli, tmp_path):
    """Erase i, look at j: each run answers for its own concepts, and the other's stay."""
    for word in WORDS:
        unlearn("shapes", word, "uce", output=tmp_path / word, evaluation_prompts="none")
    prompts = [("a star on a plain background", "forget"), ("a red shape on a plain background", "forget")]
    prompts += [("a blue ring", "retain"), ("a green heart", "retain")]
    with (tmp_path / "p.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("prompt", "group"), *prompts])
    words = ["evaluate", "--original", "shapes", "--unlearned", tmp_path / "star", "--unlearned", tmp_path / "red"]
    words += ["--prompts", tmp_path / "p.csv", "--num-inference-steps", "4", "--output", tmp_path / "e"]
    answer = cli(*words)
    assert answer.status == 0, answer.err
    matrix = {}
    for word in WORDS:
        content = json.loads((tmp_path / "e" / word / "evaluation.json").read_text())
        matrix[word] = {name: (cell["forgotten"], cell["n_images"]) for name, cell in content["concepts"].items()}
        assert (content["erasure"]["concept"], content["erasure"]["n_images"]) == (word, 1)
    assert matrix == {word: {other: (other == word, 1) for other in WORDS} for word in WORDS}
    assert re.search(r"star +[\d.]+% +[\d.]+%\* ", answer.out)


@pytest.mark.slow
def test_one_edit_forgets_three_concepts_and_keeps_the_rest(tmp_path):
    report = unlearn("shapes", "star;red;striped", "uce", output=tmp_path / "run")
    content = Evaluation.read(report.folder / "evaluation.json")
    assert set(content.concepts) == {"star", "red", "striped"}
    assert all(cell.shown <= 0.1 and cell.shown_original >= 0.8 for cell in content.concepts.values())
    assert content.erasure.shown <= 0.05
    assert content.integrity.retention >= 0.95
