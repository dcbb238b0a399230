"""What an evaluation must not believe, and what it must say: damaged journals and models, prompts, seeds, caches."""

import errno
import json
import random
import shutil

import pytest
from toys import NOISE, PROMPTS, SETTINGS, draw, run_record, shifted

from fastunlearn import Reporter, evaluate
from fastunlearn.errors import UserError
from fastunlearn.evaluation.image_cache import ImageCache
from fastunlearn.files.weights import hash_pipeline


class Notes(Reporter):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def stopping(after):
    """A model that fails after so many batches."""
    count = [0]

    def function(prompts, noise):
        count[0] += 1
        if count[0] > after:
            raise KeyboardInterrupt
        return draw(prompts, noise)

    function.__name__ = "draw"
    return function


@pytest.fixture
def stopped(tmp_path):
    """The folder of an evaluation that was stopped with some pairs recorded."""
    with pytest.raises(KeyboardInterrupt):
        evaluate(draw, stopping(3), PROMPTS, output=tmp_path / "run", **SETTINGS)
    return tmp_path / "run"


def test_any_changed_bit_of_a_journal_is_found(stopped):
    path = stopped / "journal" / "0.jsonl"
    whole, changes = path.read_bytes(), random.Random(0)
    assert whole.count(b"\n") >= 4
    for _ in range(60):
        damaged = bytearray(whole)
        at = changes.randrange(whole.rindex(b"\n"))
        damaged[at] ^= 1 << changes.randrange(8)
        if damaged[at] == 10 or whole[at] == 10:
            continue  # a line more or less is a line that is not whole
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"has changed in line \d+ since it was written.*--overwrite"):
            evaluate(draw, draw, PROMPTS, output=stopped, resume=True, **SETTINGS)
    path.write_bytes(whole)
    assert evaluate(draw, draw, PROMPTS, output=stopped, resume=True, **SETTINGS).pairs


@pytest.mark.parametrize("line", ["[]", "{}", "null", "5", '["x"]', '["0123456789abcdef", ["a", 0]]', "[[], []]"])
def test_a_line_that_is_no_record_is_told(line, stopped):
    path = stopped / "journal" / "0.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match="has changed in line"):
        evaluate(draw, draw, PROMPTS, output=stopped, resume=True, **SETTINGS)


def test_a_journal_that_is_a_link_is_not_followed(stopped, tmp_path):
    (tmp_path / "precious").write_text("years of work")
    (stopped / "journal" / "0.jsonl").unlink()
    (stopped / "journal" / "0.jsonl").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=r"journal/0\.jsonl"):
        evaluate(draw, draw, PROMPTS, output=stopped, resume=True, **SETTINGS)
    assert (tmp_path / "precious").read_text() == "years of work"


@pytest.mark.parametrize("left", [(), ("prompts.csv",), ("prompts.csv", "evaluate.yaml")])
def test_one_that_was_stopped_before_it_had_begun_can_be_resumed(left, stopped):
    for path in (stopped / "journal").iterdir():
        if path.name not in left:
            path.unlink()
    report = evaluate(draw, draw, PROMPTS, output=stopped, resume=True, **SETTINGS)
    assert len(report.pairs) == len(PROMPTS)
    assert not (stopped / "journal").exists()


# ---- models of runs --------------------------------------------------------------------------------------------------


def test_a_run_whose_model_has_changed_is_not_evaluated(tmp_path, bundled):
    model = tmp_path / "run" / "model"
    shutil.copytree(bundled.source, model)
    hashes = {"original": "a", "unlearned": hash_pipeline(bundled.source)}
    run_record(hashes=hashes).write(tmp_path / "run" / "run.json")
    settings = {"prompts": "a ring;a cross", "num_inference_steps": 1, "batch_size": 2, "control_pairs": 1}
    evaluate("shapes", tmp_path / "run", **settings)
    config = model / "text_encoder" / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(UserError, match=r"the model in .*run/model has changed since its run wrote it"):
        evaluate("shapes", tmp_path / "run", **settings)


# ---- prompts ---------------------------------------------------------------------------------------------------------


def test_the_seeds_of_a_file_are_the_keys_and_every_number_of_ranks_sees_them(tmp_path):
    (tmp_path / "p.csv").write_text("prompt,group,seed\na,x,5\na,x,2\nb,x,9\nc,forget,7\n")
    settings = {**SETTINGS, "output": tmp_path / "run"}
    with pytest.raises(KeyboardInterrupt):
        evaluate(draw, stopping(1), str(tmp_path / "p.csv"), **settings | {"batch_size": 2})
    (tmp_path / "p.csv").rename(tmp_path / "moved.csv")
    report = evaluate(
        draw, shifted(5), str(tmp_path / "moved.csv"), **settings | {"batch_size": 2, "output": tmp_path / "other"}
    )
    assert [(pair["prompt"], pair["seed"]) for pair in report.pairs] == [("a", 2), ("a", 5), ("b", 9), ("c", 7)]
    assert report.pairs[0]["redrawn"] == report.pairs[1]["redrawn"], "each is the other's other seed"
    rows = (tmp_path / "run" / "journal" / "prompts.csv").read_text().splitlines()
    assert rows == ["prompt,group,seed", "a,x,5", "a,x,2", "b,x,9", "c,forget,7"]
    with pytest.raises(UserError, match="the prompt file gives the seeds"):
        evaluate(draw, draw, str(tmp_path / "moved.csv"), **SETTINGS, seeds_per_prompt=2)


def test_what_a_reader_must_know_of_the_prompts_is_said(tmp_path, bundled):
    (tmp_path / "p.csv").write_text(
        "prompt,type,artist\na red star,others,x\na ring,others,y\na starfish,others,z\nred "
        + "red " * 30
        + ",others,w\n"
    )
    notes = Notes()
    evaluate(
        *("shapes", "shapes", str(tmp_path / "p.csv")),
        **{"forget": "star", "num_inference_steps": 1, "batch_size": 2, "control_pairs": 1, "reporter": notes},
    )
    said = "\n".join(notes.notes)
    assert "not used: artist" in said
    assert "1 of 4 prompts to keep name “star”, for example 'a red star'" in said
    assert "1 of 4 prompts are longer than the 14 tokens that the model reads" in said
    assert len(notes.notes) == 3


def test_nothing_is_said_of_plain_prompts():
    notes = Notes()
    evaluate(draw, draw, PROMPTS, **SETTINGS, reporter=notes)
    assert notes.notes == []


# ---- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_cache_that_cannot_be_written_or_touched_is_used_all_the_same(number, tmp_path, monkeypatch):
    settings = {"prompts": "a ring;a cross", "num_inference_steps": 1, "batch_size": 2, "control_pairs": 1}
    first = evaluate("shapes", "shapes", cache=tmp_path / "cache", forget="star", **settings)

    def refuse(*arguments, **keywords):
        raise OSError(number, "no")

    monkeypatch.setattr("fastunlearn.evaluation.image_cache.os.utime", refuse)
    notes = Notes()
    again = evaluate("shapes", "shapes", cache=tmp_path / "cache", forget="star", reporter=notes, **settings)
    assert json.dumps(again.summary) == json.dumps(first.summary)
    assert notes.notes == []
    monkeypatch.setattr("fastunlearn.evaluation.image_cache.tempfile.mkstemp", refuse)
    fresh = evaluate("shapes", "shapes", cache=tmp_path / "new", forget="star", reporter=notes, **settings)
    assert json.dumps(fresh.summary) == json.dumps(first.summary)
    assert "images could not be added to the cache (no)" in notes.notes[0]
    assert ImageCache(tmp_path / "new", 10**9).load("0" * 64) is None
    assert NOISE
