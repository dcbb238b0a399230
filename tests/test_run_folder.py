"""A run's folder: never overwritten by accident, and every file in it whole or absent."""

import json
import os
import stat

import pytest

from fastunlearn.cli import demo
from fastunlearn.config import DEMO_METHODS, TrainConfig, to_yaml
from fastunlearn.files.run_folder import (
    check_output,
    claimed,
    clear_output,
    prepare_output,
    whole_file,
    whole_folder,
    write_json,
    write_lines,
    write_text,
)

CONFIG = to_yaml(TrainConfig(forget="star", output="run"))
RUN = {"config.yaml": CONFIG, "run.json": "{}", "metrics.jsonl": "", "model/model_index.json": "{}"}

OURS = {
    "finished run": RUN,
    "stopped run": {"config.yaml": CONFIG, "checkpoints/step-3/state.json": "{}"},
    "run that was killed while writing": {"config.yaml": CONFIG, ".model.x1.tmp/unet/config.json": "{}"},
    "evaluated run": {**RUN, "pairs.jsonl": "", "evaluation.json": "{}", "grid.png": "", "report.html": ""},
    "evaluation": {"pairs.jsonl": "", "evaluation.json": "{}", "grid.png": "", "report.html": ""},
    "evaluation cut short": {"pairs.jsonl": ""},
    "evaluation that was stopped": {"journal/spec.json": "{}", "journal/0.jsonl": ""},
    "models evaluated together": {
        **{f"{name}/{file}": "{}" for name in ("a", "b") for file in ("evaluation.json", "pairs.jsonl")},
        **{"grid.png": "", "report.html": ""},
    },
    "comparison": {"compare.json": "{}", "compare.png": "", "compare.html": ""},
    "demo": {
        **{f"{method}/{name}": content for method in DEMO_METHODS for name, content in RUN.items()},
        **{"demo.json": "{}", "grid.png": "", "report.html": ""},
    },
    "demo that was stopped": {f"esd/{name}": content for name, content in RUN.items()},
}
FOREIGN = {
    "a document": {"thesis.txt": "years of work"},
    "another project": {"config.yaml": "name: mine\nversion: 2\n", "src/main.py": ""},
    "another project with our names": {"config.yaml": "name: mine\n", "model/weights.bin": "", "checkpoints/a": ""},
    "broken config": {"config.yaml": "a: [", "model/model_index.json": "{}"},
    "pipeline": {"model_index.json": "{}", "unet/config.json": "{}"},
    "checkpoints alone": {"checkpoints/last.ckpt": ""},
    "model alone": {"model/model_index.json": "{}"},
    "report alone": {"report.html": ""},
    "run with notes beside": {**RUN, "notes.txt": "mine"},
    "run with another folder beside": {**RUN, "photos/cat.png": ""},
    "evaluation with notes in it": {"a/evaluation.json": "{}", "a/notes.txt": "mine"},
    "evaluations beside a folder": {"a/evaluation.json": "{}", "photos/cat.png": ""},
    "folder of runs": {f"{name}/config.yaml": CONFIG for name in ("first", "second")},
    "demo with notes in a run": {f"esd/{name}": content for name, content in RUN.items()} | {"esd/notes.txt": ""},
    "run with a temporary file beside": {**RUN, "mine.tmp": ""},
    "hidden file": {".git/HEAD": "ref"},
}


def plant(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def snapshot(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fail_after(context, write, error):
    with context as unfinished:
        write(unfinished)
        raise error


@pytest.mark.parametrize("files", OURS.values(), ids=OURS)
def test_overwrite_replaces_what_a_run_left(files, tmp_path):
    folder = plant(tmp_path / "run", files)
    prepare_output(folder, overwrite=True)
    assert folder.is_dir()
    assert not list(folder.iterdir())


def test_clearing_leaves_the_folder_and_what_is_to_stay(tmp_path):
    clear_output(tmp_path)
    folder = plant(tmp_path / "run", {"journal/spec.json": "{}", **OURS["models evaluated together"]})
    clear_output(folder, but=["journal"])
    assert snapshot(folder) == {"journal/spec.json": b"{}"}
    plant(folder, {"notes.txt": "mine"})
    with pytest.raises(ValueError, match="holds files that are no run"):
        clear_output(folder)
    assert len(snapshot(folder)) == 2


@pytest.mark.parametrize("files", FOREIGN.values(), ids=FOREIGN)
def test_overwrite_refuses_what_is_not_all_ours(files, tmp_path):
    folder = plant(tmp_path / "home", files)
    before = snapshot(folder)
    with pytest.raises(ValueError, match=r"`--overwrite`: .*home holds files that are no run"):
        prepare_output(folder, overwrite=True)
    assert snapshot(folder) == before


@pytest.mark.parametrize("files", [*OURS.values(), *FOREIGN.values()], ids=[*OURS, *FOREIGN])
def test_a_used_folder_is_refused_without_a_flag(files, tmp_path):
    folder = plant(tmp_path / "run", files)
    before = snapshot(folder)
    with pytest.raises(ValueError, match=r"is not empty.*--overwrite.*--resume"):
        prepare_output(folder, overwrite=False)
    assert snapshot(folder) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("exists", [False, True])
def test_a_new_or_empty_folder_is_taken(exists, overwrite, tmp_path):
    folder = tmp_path / "deep" / "run"
    if exists:
        folder.mkdir(parents=True)
    check_output(folder, overwrite=overwrite)
    assert folder.exists() == exists, "a check must change nothing"
    prepare_output(folder, overwrite=overwrite)
    assert folder.is_dir()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "run").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="is a file"):
            check_output(tmp_path / "run", overwrite=overwrite)
    assert (tmp_path / "run").read_text() == "x"


@pytest.mark.parametrize("exists", [False, True])
def test_there_is_nothing_to_resume_in_an_empty_folder(exists, tmp_path):
    folder = tmp_path / "run"
    if exists:
        folder.mkdir()
    with pytest.raises(ValueError, match=r"`--resume`.*holds no run"):
        check_output(folder, overwrite=False, resume=True)


def test_resume_keeps_what_is_there(tmp_path):
    folder = plant(tmp_path / "run", RUN)
    before = snapshot(folder)
    prepare_output(folder, overwrite=False, resume=True)
    assert snapshot(folder) == before


def test_the_demos_folders_are_known():
    assert demo.METHODS == DEMO_METHODS


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError, SystemExit])
@pytest.mark.parametrize("existed", [False, True])
def test_a_file_that_fails_leaves_the_old_one_and_no_scraps(existed, error, tmp_path):
    path = tmp_path / "result.json"
    if existed:
        path.write_text("old")
    with pytest.raises(error):
        fail_after(whole_file(path), lambda unfinished: unfinished.write_text("half"), error)
    assert [entry.name for entry in tmp_path.iterdir()] == (["result.json"] if existed else [])
    assert not existed or path.read_text() == "old"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("existed", [False, True])
def test_a_folder_that_fails_leaves_the_old_one_and_no_scraps(existed, error, tmp_path):
    path = tmp_path / "model"
    if existed:
        plant(path, {"old.json": "old"})
    with pytest.raises(error):
        fail_after(whole_folder(path), lambda unfinished: plant(unfinished, {"unet/config.json": "half"}), error)
    assert [entry.name for entry in tmp_path.iterdir()] == (["model"] if existed else [])
    assert not existed or snapshot(path) == {"old.json": b"old"}


def test_nothing_is_under_the_final_name_before_it_is_whole(tmp_path):
    with whole_file(tmp_path / "a") as unfinished:
        unfinished.write_text("text")
        assert not (tmp_path / "a").exists()
    with whole_folder(tmp_path / "b") as unfinished:
        plant(unfinished, {"part": "x"})
        assert not (tmp_path / "b").exists()
    assert snapshot(tmp_path) == {"a": b"text", "b/part": b"x"}


def test_a_folder_replaces_the_older_one_entirely(tmp_path):
    plant(tmp_path / "model", {"old.json": "old"})
    with whole_folder(tmp_path / "model") as unfinished:
        plant(unfinished, {"new.json": "new"})
    assert snapshot(tmp_path) == {"model/new.json": b"new"}


@pytest.mark.parametrize(("umask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_files_can_be_read_by_whom_the_umask_allows(umask, file_mode, folder_mode, tmp_path):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "a", "x")
        with whole_folder(tmp_path / "b") as unfinished:
            plant(unfinished, {"weights": "x"})
            (unfinished / "weights").chmod(0o600)
        assert os.umask(umask) == umask, "the process' umask was changed"
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == file_mode
    assert stat.S_IMODE((tmp_path / "b" / "weights").stat().st_mode) == file_mode
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == folder_mode


def test_json_is_read_back_and_ends_with_a_line(tmp_path):
    content = {"ä": [1, 2.5, None], "n": {"x": True}}
    write_json(tmp_path / "a.json", content)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == content
    assert text.endswith("}\n")
    assert "ä" in text


def test_records_are_one_a_line(tmp_path):
    records = [{"prompt": "a\nb"}, {"prompt": "ü"}]
    write_lines(tmp_path / "a.jsonl", records)
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == records


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_never_written(number, tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"mean": number})
    with pytest.raises(ValueError, match="JSON"):
        write_lines(tmp_path / "a.jsonl", [{"mean": number}])
    assert not list(tmp_path.iterdir())


def test_a_folder_to_be_replaced_stays_the_one_that_is_claimed(tmp_path):
    folder = plant(tmp_path / "run", OURS["models evaluated together"])
    (folder / ".report.html.x.tmp").touch()
    with claimed(folder):
        prepare_output(folder, overwrite=True)
        assert not list(folder.iterdir())
        with pytest.raises(ValueError, match="another evaluation is writing"), claimed(folder):
            pass
    (folder / ".report.html.x.tmp").touch()
    clear_output(folder)
    assert not list(folder.iterdir())
