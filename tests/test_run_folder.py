"""A run's folder: never overwritten by accident, and every file in it whole or absent."""

import json
import os
import stat

import pytest

from fastunlearn.errors import UserError
from fastunlearn.files.atomic import (
    remove_temporaries,
    whole_file,
    whole_folder,
    write_json,
    write_lines,
    write_text,
)
from fastunlearn.files.run_folder import (
    RECORD,
    check_output,
    claimed,
    claimed_file,
    clear_output,
    files_below,
    own,
    prepare_output,
)

RUN = {"config.yaml": "forget: star", "run.json": "{}", "metrics.jsonl": "", "model/model_index.json": "{}"}
RESULTS = {"pairs.jsonl": "", "evaluation.json": "{}", "grid.png": "", "report.html": ""}

# name -> (command, files, names that the run chose)
OURS = {
    "finished run": ("train", RUN, ["model/model_index.json"]),
    "stopped run": ("train", {"config.yaml": "", "checkpoints/step-3/state.json": "{}"}, []),
    "run that was killed while writing": ("train", {".fastunlearn-model.x1.tmp/unet/config.json": "{}"}, []),
    "evaluated run": ("train", {**RUN, **RESULTS}, ["model/model_index.json"]),
    "evaluation": ("evaluate", RESULTS, []),
    "evaluation that was stopped": ("evaluate", {"journal/spec.json": "{}", "journal/0.jsonl": ""}, []),
    "models evaluated together": (
        "evaluate",
        {f"{name}/{file}": "{}" for name in ("a", "b") for file in ("evaluation.json", "pairs.jsonl")},
        ["a/evaluation.json", "a/pairs.jsonl", "b/evaluation.json", "b/pairs.jsonl"],
    ),
    "comparison": ("compare", {"compare.json": "{}", "compare.png": "", "compare.html": ""}, []),
    "model with odd names": ("apply", {"unet/a[1]*.json": "", "model_index.json": "{}"}, None),
}
# Files that a user could have beside, and even under, our names.
FOREIGN = {
    "a document": "thesis.txt",
    "notes in the model": "model/notes.txt",
    "a file in a folder of our name": "journal/diary/today.txt",
    "a checkpoint of another tool": "checkpoints/last.ckpt",
    "an evaluation of another tool": "other/evaluation.json",
    "a hidden file": ".git/HEAD",
    "a hidden temporary file": ".work.tmp/thesis.txt",
    "a name that a pattern of ours nearly matches": "checkpoints/step-3/deep/state.json",
}
UNRECORDED = {
    "a document": {"thesis.txt": "years of work"},
    "another project": {"config.yaml": "name: mine\nversion: 2\n", "src/main.py": ""},
    "all our names": {**RUN, **RESULTS, "checkpoints/step-1/state.json": "{}"},
    "only a journal": {"journal/diary.txt": "mine"},
    "a damaged record": {"config.yaml": "", RECORD: "{"},
    "a record of another format": {"config.yaml": "", RECORD: '{"format": "x", "command": "train", "owned": ["*"]}'},
    "a record of an unknown command": {
        "config.yaml": "",
        RECORD: '{"format": "fastunlearn-folder-1", "command": "rm", "owned": ["*"]}',
    },
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


def run_of(name, folder):
    """The folder of a finished or stopped command."""
    command, files, chosen = OURS[name]
    prepare_output(folder, command, overwrite=False)
    own(folder, command, chosen or [])
    plant(folder, files)
    if chosen is None:
        own(folder, command, files_below(folder))
    return folder


def entries(folder):
    return {name for name in snapshot(folder) if name != RECORD}


@pytest.mark.parametrize("name", OURS)
def test_overwrite_replaces_what_a_run_left(name, tmp_path):
    folder = run_of(name, tmp_path / "run")
    prepare_output(folder, OURS[name][0], overwrite=True)
    assert [entry.name for entry in folder.iterdir()] == [RECORD]


@pytest.mark.parametrize("foreign", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("name", OURS)
def test_one_file_of_the_users_and_nothing_is_deleted(name, foreign, tmp_path):
    folder = plant(run_of(name, tmp_path / "run"), {foreign: "mine"})
    before = snapshot(folder)
    with pytest.raises(UserError, match=r"`--overwrite`: .*run holds files that are no run of fastunlearn \("):
        prepare_output(folder, OURS[name][0], overwrite=True)
    with pytest.raises(UserError, match="no run of fastunlearn"):
        clear_output(folder)
    assert snapshot(folder) == before


@pytest.mark.parametrize("flag", ["overwrite", "resume"])
@pytest.mark.parametrize("files", UNRECORDED.values(), ids=UNRECORDED)
def test_a_folder_without_our_record_is_nobodys_to_replace(files, flag, tmp_path):
    folder = plant(tmp_path / "home", files)
    before = snapshot(folder)
    with pytest.raises(UserError, match=rf"`--{flag}`: .*home holds files that are no run of fastunlearn"):
        prepare_output(folder, "train", **{"overwrite": False, flag: True})
    assert snapshot(folder) == before


@pytest.mark.parametrize("kind", ["file", "folder", "nothing"])
@pytest.mark.parametrize("flag", ["overwrite", "resume"])
def test_a_link_in_a_run_is_neither_followed_nor_removed(kind, flag, tmp_path):
    folder = run_of("stopped run", tmp_path / "run")
    target = tmp_path / "precious"
    if kind == "folder":
        plant(target, {"a": "years of work"})
    elif kind == "file":
        target.write_text("years of work")
    (folder / "metrics.jsonl").symlink_to(target)
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        prepare_output(folder, "train", **{"overwrite": False, flag: True})
    assert (folder / "metrics.jsonl").is_symlink()
    assert kind != "file" or target.read_text() == "years of work"


def test_a_run_within_a_run_is_judged_by_its_own_record(tmp_path):
    folder = tmp_path / "demo"
    prepare_output(folder, "demo", overwrite=False)
    run_of("finished run", folder / "esd")
    plant(folder, RESULTS)
    plant(folder / "esd", {"notes.txt": "mine"})
    with pytest.raises(UserError, match=r"\(esd/notes\.txt\)"):
        prepare_output(folder, "demo", overwrite=True)
    (folder / "esd" / "notes.txt").unlink()
    prepare_output(folder, "demo", overwrite=True)
    assert not entries(folder)


def test_another_commands_folder_is_not_continued(tmp_path):
    folder = run_of("evaluation", tmp_path / "run")
    with pytest.raises(UserError, match=r"`--resume`: .*holds the output of `fastunlearn evaluate`"):
        check_output(folder, "train", overwrite=False, resume=True)
    prepare_output(folder, "train", overwrite=True)
    plant(folder, {"report.html": "", "config.yaml": ""})
    check_output(folder, "train", overwrite=False, resume=True)


def test_clearing_leaves_the_folder_and_what_is_to_stay(tmp_path):
    clear_output(tmp_path)
    folder = plant(run_of("models evaluated together", tmp_path / "run"), {"journal/spec.json": "{}"})
    clear_output(folder, but=["journal"])
    assert entries(folder) == {"journal/spec.json"}


@pytest.mark.parametrize(
    "name", sorted(set(OURS) - {"run that was killed while writing"})
)  # that one holds nothing yet
def test_a_used_folder_is_refused_without_a_flag(name, tmp_path):
    folder = run_of(name, tmp_path / "run")
    before = snapshot(folder)
    command = OURS[name][0]
    with pytest.raises(UserError, match=r"is not empty.*--overwrite") as error:
        prepare_output(folder, command, overwrite=False)
    assert ("--resume" in str(error.value)) == (command in ("train", "evaluate")), "only these have the flag"
    assert snapshot(folder) == before


def test_only_temporary_names_of_ours_are_removed(tmp_path):
    plant(tmp_path, {".fastunlearn-a.1.tmp": "", ".mine.tmp": "", ".fastunlearn-notes": "", "a.tmp": ""})
    remove_temporaries(tmp_path)
    assert set(snapshot(tmp_path)) == {".mine.tmp", ".fastunlearn-notes", "a.tmp"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("exists", [False, True])
def test_a_new_or_empty_folder_is_taken(exists, overwrite, tmp_path):
    folder = tmp_path / "deep" / "run"
    if exists:
        folder.mkdir(parents=True)
    check_output(folder, "train", overwrite=overwrite)
    assert folder.exists() == exists, "a check must change nothing"
    prepare_output(folder, "train", overwrite=overwrite)
    assert folder.is_dir()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "run").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="is a file"):
            check_output(tmp_path / "run", "train", overwrite=overwrite)
    assert (tmp_path / "run").read_text() == "x"


@pytest.mark.parametrize("exists", [False, True])
def test_there_is_nothing_to_resume_in_an_empty_folder(exists, tmp_path):
    folder = tmp_path / "run"
    if exists:
        folder.mkdir()
    with pytest.raises(ValueError, match=r"`--resume`.*holds no run"):
        check_output(folder, "train", overwrite=False, resume=True)


def test_resume_keeps_what_is_there(tmp_path):
    folder = run_of("finished run", tmp_path / "run")
    before = snapshot(folder)
    prepare_output(folder, "train", overwrite=False, resume=True)
    assert snapshot(folder) == before


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
    folder = run_of("models evaluated together", tmp_path / "run")
    (folder / ".fastunlearn-report.html.x.tmp").touch()
    with claimed(folder):
        prepare_output(folder, "evaluate", overwrite=True)
        assert not entries(folder)
        with pytest.raises(UserError, match="another command is writing"), claimed(folder):
            pass


def test_a_file_that_is_being_written_is_claimed(tmp_path):
    path = tmp_path / "a.mask.safetensors"
    with claimed_file(path):
        with pytest.raises(UserError, match="another command is writing"), claimed_file(path):
            pass
        with claimed_file(tmp_path / "b.mask.safetensors"):
            pass
    assert not list(tmp_path.iterdir())


def test_a_folder_is_exchanged_where_the_system_can_and_else_steps_aside(tmp_path, monkeypatch):
    for libc in (None, object()):
        if libc is not None:
            monkeypatch.setattr("ctypes.CDLL", lambda *a, libc=libc, **k: libc)
        plant(tmp_path / "model", {"old.json": "old"})
        with whole_folder(tmp_path / "model") as unfinished:
            plant(unfinished, {"new.json": "new"})
        assert snapshot(tmp_path) == {"model/new.json": b"new"}
        (tmp_path / "model" / "new.json").unlink()


def test_files_and_the_names_of_folders_are_flushed(tmp_path, monkeypatch):
    flushed, real = [], os.fsync

    def fsync(handle):
        flushed.append(os.readlink(f"/proc/self/fd/{handle}"))
        real(handle)

    monkeypatch.setattr("os.fsync", fsync)
    write_text(tmp_path / "a", "x")
    with whole_folder(tmp_path / "model") as unfinished:
        plant(unfinished, {"unet/weights": "x"})
    names = [name.removeprefix(str(unfinished)) for name in flushed]
    assert {"/unet/weights", "/unet", "", str(tmp_path)} <= set(names)
