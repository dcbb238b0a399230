"""A run's model card: what a hub reads of it, what people read of it, and that it is never somebody else's file."""

import json

import pytest
from huggingface_hub import ModelCard
from outputs import files_of
from test_report import evaluation
from test_schema import attack_record
from toys import run_record

from fastunlearn.files.run_folder import RECORD
from fastunlearn.reports.card import FORMS, Card, is_untouched
from fastunlearn.schema import AdapterRecord, Ancestor, AttackRecord, RunRecord

TRAIN = ("train", "--forget", "star", "--method", "uce", "--device", "cpu", "--evaluation-prompts", "none")
SMALL = ("--device", "cpu", "--num-inference-steps", 1, "--batch-size", 2)
ASKING = "a red star on a plain background;a blue star on a dotted background"


def a_card(**changes):
    settings = {"method": "esd", "seed": 0, "mask_density": None, "options": {}}
    return Card(**{"run": run_record(), "form": "model", "settings": settings} | changes)


def whole():
    attack = AttackRecord.from_dict(attack_record())
    return a_card(base_model="owner/name", evaluation=evaluation(), attack=attack)


# ---- what it says ----------------------------------------------------------------------------------------------------


def test_a_hub_reads_base_tags_and_figures():
    data = ModelCard(whole().text("1.2")).data
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("owner/name", "diffusers", "text-to-image")
    assert data.to_dict()["base_model_relation"] == "finetune"
    assert "unlearning" in data.tags
    figures = {one.metric_type: (one.metric_value, one.dataset_name) for one in data.eval_results}
    assert figures["retention"] == (0.94, "56 prompts about other things")
    assert figures["shown"][0] == round(evaluation().erasure.shown, 4)
    assert figures["attack"] == (0.5, "2 prompts that ask for it")


def test_without_a_base_of_the_hub_and_without_results_none_is_claimed():
    data = ModelCard(a_card(run=run_record(model="/data/of/mine/sd15")).text("1.2")).data
    assert data.base_model is None
    assert data.eval_results is None
    text = a_card(run=run_record(model="/data/of/mine/sd15")).text("1.2")
    assert "# sd15 without “star”" in text
    assert "/data/of/mine" not in text
    assert "Not measured yet." in text
    assert "Not tried yet." in text


def test_people_read_what_was_done_and_found():
    earlier = Ancestor(method="uce", concepts=("ring",), hashes={"original": "x", "unlearned": "a"})
    text = whole().text("1.2")
    assert "| hash of the base's files | `a` |" in text
    assert "| hash of this model's files | `b` |" in text
    assert "| made with | fastunlearn 1.2 |" in text
    assert "| R, retention (lpips-form/shapes-classifier@0123456789ab) | 0.940 | 0.924 to 0.952 |" in text
    assert "| attack | denoiser forwards per prompt | original | unlearned | control |" in text
    assert "| `seeds` | 20 | 1 of 2 (0 to 100\u00a0%) | 1 of 2 (0 to 100\u00a0%) | 1 of 2 (0 to 100\u00a0%) |" in text
    assert "method: esd\nseed: 0\n```" in text
    assert "| before, `uce` forgot | ring |" in a_card(run=run_record(ancestors=(earlier,))).text("1.2")


@pytest.mark.parametrize("form", FORMS)
def test_each_form_says_how_it_is_read(form):
    adapter = AdapterRecord(base="x", rank=4, alpha=4.0, layers=2)
    text = a_card(form=form, run=run_record(adapter=adapter), base_model="a/b").text("1")
    assert FORMS[form] in text
    assert ModelCard(text).data.to_dict()["base_model_relation"] == ("adapter" if form == "adapter" else "finetune")


def test_what_users_wrote_is_shown_as_it_is():
    concept = "<b>a|b</b>\n# [x](y) `z` *w* \"q\": - 'p' é"
    text = a_card(run=run_record(concept=concept), evaluation=evaluation(concept=concept)).text("1")
    body = text.partition("\n---\n")[2]
    assert "\\<b\\>a\\|b\\</b\\> \\# \\[x\\](y) \\`z\\` \\*w\\*" in body
    assert "<b>" not in body
    assert "\n# [x]" not in text
    (index,) = ModelCard(text).data.to_dict()["model-index"]
    assert index["name"] == f"shapes without {' '.join(concept.split())}"


def test_any_change_of_a_card_is_seen():
    text = whole().text("1")
    assert is_untouched(text)
    assert not is_untouched(text.replace("star", "starfish", 1))
    assert not is_untouched(text + "more\n")
    assert not is_untouched("")


# ---- where it stands -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    from fastunlearn.cli.main import main

    folder = tmp_path_factory.mktemp("trained") / "run"
    assert main([*map(str, TRAIN), "--output", str(folder)]) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path):
    import shutil

    return shutil.copytree(trained, tmp_path / "run")


def test_train_writes_it_and_says_no_time_and_no_place(trained, cli, tmp_path):
    text = (trained / "README.md").read_text()
    record = RunRecord.read(trained / "run.json")
    assert is_untouched(text)
    assert record.hashes["unlearned"] in text
    assert cli(*TRAIN, "--output", tmp_path / "again").status == 0
    assert (tmp_path / "again" / "README.md").read_bytes() == text.encode()


def test_the_run_is_continued_and_replaced_as_before(run, cli):
    before = files_of(run, without={RECORD, "run.json", "config.yaml"})
    assert cli("train", "--resume", "--output", run).status == 0
    assert files_of(run, without={RECORD, "run.json", "config.yaml"}) == before
    assert cli(*TRAIN, "--output", run, "--overwrite").status == 0
    assert files_of(run, without={RECORD, "run.json", "config.yaml"}) == before


def test_a_card_that_was_changed_by_hand_stays_until_it_is_to_be_replaced(run, cli, refused):
    path = run / "README.md"
    path.write_text(path.read_text() + "\nMine.\n")
    mine = path.read_bytes()
    assert cli("train", "--resume", "--output", run).status == 0
    assert path.read_bytes() == mine
    assert "changed by hand" in refused("card", "--run", run)
    assert path.read_bytes() == mine
    assert cli("card", "--run", run, "--overwrite").status == 0
    assert is_untouched(path.read_text())
    path.write_text("# My own notes\n")
    assert "is no card of fastunlearn" in refused("card", "--run", run, "--overwrite")


def test_what_is_no_run_of_ours_or_of_another_model_is_one_line(run, refused, tmp_path):
    assert "no folder of a finished" in refused("card", "--run", tmp_path)
    assert "holds no attack.json" in refused("card", "--run", run, "--attack", run)
    assert "is no name of the hub" in refused("card", "--run", run, "--base-model", "./sd15")
    (tmp_path / "of-another").mkdir()
    AttackRecord.from_dict(attack_record()).write(tmp_path / "of-another" / "attack.json")
    assert "is of another model" in refused("card", "--run", run, "--attack", tmp_path / "of-another")
    evaluation().write(run / "evaluation.json")
    assert "is of another model" in refused("card", "--run", run)


def test_results_of_the_run_are_found_also_among_those_of_others(run, cli, tmp_path):
    hashes = json.loads((run / "run.json").read_text())["hashes"]
    (tmp_path / "both" / "uce").mkdir(parents=True)
    (tmp_path / "both" / "esd").mkdir()
    evaluation(name="esd").write(tmp_path / "both" / "esd" / "evaluation.json")
    own = evaluation(name="uce", spec__hashes=hashes, integrity__retention=0.87)
    own.write(tmp_path / "both" / "uce" / "evaluation.json")
    attack = AttackRecord.from_dict(attack_record() | {"spec": {"hashes": hashes}})
    (tmp_path / "attack").mkdir()
    attack.write(tmp_path / "attack" / "attack.json")
    words = ("--evaluation", tmp_path / "both", "--attack", tmp_path / "attack", "--base-model", "owner/name")
    answer = cli("card", "--run", run, *words)
    assert answer.out == f"card: {run / 'README.md'}\n"
    data = ModelCard.load(run / "README.md").data
    assert data.base_model == "owner/name"
    assert {one.metric_value for one in data.eval_results} >= {0.87, 0.5}


@pytest.mark.slow
def test_from_training_to_a_card_with_everything(cli, tmp_path):
    """The real commands, one after the other; the run is still the one that they know."""
    run, out = tmp_path / "run", tmp_path / "out"
    assert cli(*TRAIN, "--output", run).status == 0
    both = ("--original", "shapes", "--unlearned", run, *SMALL)
    measured = ("--control-pairs", 2, "--trust-judge", "--output", out / "evaluation")
    assert cli("evaluate", *both, *measured).status == 0
    answer = cli("attack", *both, "--attacks", "seeds", "--prompts", ASKING, "--budget", 4, "--output", out / "attack")
    assert answer.status == 0, answer.err
    words = ("--evaluation", out / "evaluation", "--attack", out / "attack")
    assert cli("card", "--run", run, *words).status == 0
    text = (run / "README.md").read_text()
    assert "Not measured yet" not in text
    assert "Not tried yet" not in text
    assert len(ModelCard(text).data.eval_results) == 3
    assert (
        cli("attack", *both, "--attacks", "seeds", "--prompts", ASKING, "--dry-run", "--output", out / "x").status == 0
    )
    assert cli("train", "--resume", "--output", run).status == 0
