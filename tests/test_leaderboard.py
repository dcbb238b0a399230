"""benchmarks/leaderboard.py: what it puts into its results file, without a training."""

import dataclasses
import json
import sys
import types
from pathlib import Path

import pytest

from fastunlearn.worlds import get_world

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import leaderboard
import readme

GALLERY = get_world("gallery")
NOW = {"original": "now", "judge": "one"}


def finished(method, concept, *, shown=0.0, made_of=NOW, defaults=None, unprompted=None):
    """A cell as the work folder holds it."""
    stamp = {**made_of, "defaults": defaults or leaderboard.defaults_of(GALLERY, method, concept)}
    figures = {"shown": shown, "valid": 1.0, "retention": 0.9, "judged_the_same": 0.95, "seconds": 3.0}
    figures["unprompted"] = unprompted
    return {**stamp, "method": method, "concept": concept, "seed": 0, **figures}


def put(work, *cells):
    work.mkdir(exist_ok=True)
    for cell in cells:
        (work / f"gallery-{cell['method']}-{cell['concept']}-0.json").write_text(json.dumps(cell))


def test_sums_are_over_concepts_that_no_default_was_chosen_on(tmp_path):
    chosen = leaderboard.CHOSEN_ON["gallery"]
    put(tmp_path, *(finished("uce", word, shown=1.0) for word in chosen), finished("uce", "cat"))
    sums = leaderboard.collected(tmp_path, GALLERY, NOW, None)["methods"]["uce"]
    assert (sums["held_out"]["concepts"], sums["held_out"]["forgotten"]) == (["cat"], 1)
    assert (sums["chosen_on"]["cells"], sums["chosen_on"]["forgotten"]) == (len(chosen), 0)


def test_unprompted_images_are_counted_over_all_trainings(tmp_path):
    three, five = ({"n_images": n, "shown": shown} for n, shown in ((3, 1 / 3), (5, 0.8)))
    put(
        tmp_path,
        finished("uce", "cat", unprompted=three),
        finished("uce", "fox", unprompted=five),
        finished("uce", "bear"),
    )
    held = leaderboard.collected(tmp_path, GALLERY, NOW, None)["methods"]["uce"]["held_out"]
    assert held["unprompted"] == {"images": 8, "still": 5}


def test_what_one_method_was_changed_for_is_not_in_its_sums(tmp_path, monkeypatch):
    monkeypatch.setattr(leaderboard, "ALSO_SEEN", {("gallery", "speed"): ("cat",)})
    put(tmp_path, *(finished(method, word) for method in ("speed", "uce") for word in ("cat", "fox")))
    methods = leaderboard.collected(tmp_path, GALLERY, NOW, None)["methods"]
    assert methods["speed"]["held_out"]["concepts"] == ["fox"]
    assert methods["speed"]["chosen_on"]["concepts"] == ["cat"]
    assert methods["uce"]["held_out"]["concepts"] == ["cat", "fox"]


@pytest.mark.parametrize("what", NOW)
def test_cells_of_the_same_original_and_judge_stay_until_they_are_made_anew(tmp_path, what):
    earlier = NOW | {what: "earlier"}
    put(tmp_path / "first", finished("uce", "cat", shown=0.5), finished("uce", "fox"))
    before = leaderboard.collected(tmp_path / "first", GALLERY, NOW, None)
    put(tmp_path / "second", finished("uce", "cat", shown=0.25), finished("esd", "fox", made_of=earlier))

    def shown(made_of):
        cells = leaderboard.collected(tmp_path / "second", GALLERY, made_of, before)["cells"]
        return {(cell["method"], cell["concept"]): cell["shown"] for cell in cells}

    assert shown(NOW) == {("uce", "cat"): 0.25, ("uce", "fox"): 0.0}
    assert shown(earlier) == {("esd", "fox"): 0.0}


def test_what_anchors_show_stays_with_the_same_original_and_the_same_words(tmp_path):
    put(tmp_path, finished("uce", "emojione", shown=0.1))
    before = leaderboard.collected(tmp_path, GALLERY, NOW, None)
    assert before["anchors"] == {}
    one = {"anchor": "twemoji", "asked": leaderboard.asked_of(GALLERY, "emojione"), "n_images": 29, "shown": 0.07}
    before["anchors"] = {"emojione": one}
    assert leaderboard.collected(tmp_path, GALLERY, NOW, before)["anchors"] == before["anchors"]
    assert leaderboard.collected(tmp_path, GALLERY, NOW | {"original": "other"}, before)["anchors"] == {}
    elsewhere = dataclasses.replace(GALLERY, anchors={})
    assert leaderboard.collected(tmp_path, elsewhere, NOW, before)["anchors"] == {}, "it becomes another word there"


@pytest.mark.slow  # sixty images
def test_an_anchor_that_the_model_lacks_shows_the_concept_itself():
    """No training saw noto's apple: what the original makes of it looks like emojione's, which becomes twemoji so."""
    word = "emojione"
    chosen = leaderboard.anchors_shown(GALLERY, [word])[word]
    first = leaderboard.anchors_shown(dataclasses.replace(GALLERY, anchors={}), [word])[word]
    assert (chosen["anchor"], first["anchor"]) == ("twemoji", "noto")
    assert chosen["shown"] <= 0.05 < first["shown"] < 0.15


def test_cells_of_other_defaults_go(tmp_path):
    put(tmp_path / "first", finished("uce", "cat"), finished("uce", "fox", defaults="earlier"))
    before = leaderboard.collected(tmp_path / "first", GALLERY, NOW, None)
    assert [cell["concept"] for cell in before["cells"]] == ["cat"]
    before["cells"][0]["defaults"] = "earlier"
    (tmp_path / "none").mkdir()
    assert not leaderboard.collected(tmp_path / "none", GALLERY, NOW, before)["cells"]


@pytest.mark.parametrize("name", leaderboard.CHOSEN_ON)
def test_defaults_were_chosen_on_words_of_the_world_and_leave_others_of_every_kind(name):
    world = get_world(name)
    chosen = set(leaderboard.CHOSEN_ON[name])
    assert chosen <= {word for words in world.vocabulary.values() for word in words}
    assert all(set(words) - chosen for words in world.vocabulary.values())


def test_one_worlds_run_leaves_the_others_cells(tmp_path, monkeypatch):
    put(tmp_path, finished("uce", "cat"))
    monkeypatch.setattr(leaderboard, "hash_pipeline", lambda folder: NOW["original"])
    monkeypatch.setattr(leaderboard, "load_judge", lambda world: types.SimpleNamespace(name=NOW["judge"]))
    board = json.loads(leaderboard.RESULTS.read_text())
    output = tmp_path / "board.json"
    output.write_text(json.dumps(board))
    flags = ["--world", "gallery", "--methods", "uce", "--concepts", "Cat", "--minutes", "0"]
    monkeypatch.setattr(sys, "argv", ["leaderboard", *flags, "--work", str(tmp_path), "--output", str(output)])
    leaderboard.main()
    after = json.loads(output.read_text())
    assert after["worlds"]["shapes"] == board["worlds"]["shapes"]
    assert [cell["concept"] for cell in after["worlds"]["gallery"]["cells"]] == ["cat"]


def test_cells_of_other_prompts_go(tmp_path):
    put(tmp_path, finished("uce", "cat"))
    more = dataclasses.replace(GALLERY, train_prompts=lambda word: ([word], ["a hat"]))
    other = dataclasses.replace(GALLERY, evaluation_prompts=lambda word: [(word, "forget")])
    assert leaderboard.collected(tmp_path, GALLERY, NOW, None)["cells"]
    assert not leaderboard.collected(tmp_path, more, NOW, None)["cells"]
    assert not leaderboard.collected(tmp_path, other, NOW, None)["cells"]


def test_the_page_names_what_is_still_shown_and_what_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(leaderboard, "ALSO_SEEN", {("gallery", "speed"): ("cat",)})
    put(tmp_path, finished("speed", "cat", shown=0.25), finished("speed", "fox", shown=0.5), finished("speed", "bear"))
    part = leaderboard.collected(tmp_path, GALLERY, NOW, None)
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"worlds": {"gallery": part}, "forgotten_at_most": 0.05}))
    page = readme.leaderboard_section(results)
    assert "1 of 2, not fox" in page
    assert page.endswith("`speed` cat 25.0%.")


@pytest.mark.parametrize(("shown", "told"), [(0.07, "emojione 7.0% (as noto)"), (0.0, "none")])
def test_the_page_says_what_an_anchor_shows_of_a_concept(tmp_path, shown, told):
    put(tmp_path, finished("uce", "emojione", shown=0.1))
    part = leaderboard.collected(tmp_path, GALLERY, NOW, None)
    part["anchors"] = {"emojione": {"anchor": "noto", "n_images": 29, "shown": shown}}
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"worlds": {"gallery": part}, "forgotten_at_most": 0.05}))
    assert readme.leaderboard_section(results).endswith(f"show less: {told}, of 1 concepts.")
