"""How commands speak: one JSON document, nothing, bars or lines, and completion of what the parser knows."""

import io
import json
import os
import shutil
import subprocess
import sys

import pytest
from rich.console import Console as Terminal
from test_report import evaluation

import fastunlearn
from fastunlearn.cli import console as module
from fastunlearn.cli.completion import SHELLS
from fastunlearn.cli.info import EXTRAS
from fastunlearn.errors import did_you_mean

TINY = ["--trajectories", 1, "--trajectory-steps", 2, "--micro-batch-size", 2, "--evaluation-prompts", "none"]
TRAIN = ["train", "--forget", "star", "--device", "cpu", "--steps", 2, "--save", "delta", *TINY]


# ---- machines --------------------------------------------------------------------------------------------------------


@pytest.fixture
def told(cli):
    """``told("methods")``: the one document that a command prints."""

    def run(*arguments):
        answer = cli(*arguments, "--json")
        assert (answer.status, answer.err) == (0, "")
        return json.loads(answer.out)

    return run


def test_what_is_listed_is_one_document(told):
    methods = {one["name"]: one for one in told("methods")}
    assert methods["esd"]["options"]["negative_guidance"]["type"] == "float"
    assert methods["esd"]["defaults"]["stable-diffusion"]["steps"] > 0
    assert told("methods", "esd") == methods["esd"]
    assert {"shapes", "clip"} <= {one["name"] for one in told("judges")}
    assert told("judges", "shapes")["name"] == "shapes"
    assert {"seeds", "embedding"} <= {one["name"] for one in told("attacks")}
    rows = told("prompts", "--concept", "Van Gogh", "--kinds", "name,near", "--per-kind", 2)["prompts"]
    assert rows[0] == {"prompt": "Van Gogh", "group": "forget-name", "kind": "name"}


def test_info_is_one_document_that_says_what_to_install(told, cli, monkeypatch):
    from fastunlearn.cli import info

    monkeypatch.setattr(info, "_version", lambda name: None if name == "peft" else "1.0")
    facts = told("info")
    assert facts["packages"]["torch"] == "1.0"
    assert facts["extras"]["lora"]["missing"] == ["peft"]
    assert facts["extras"]["metrics"]["missing"] == []
    out = cli("info").out
    assert "train --adapter lora`, `export`: pip install 'fastunlearn[lora]'" in out
    assert "clip-score,ssim`: is here" in out


def test_info_knows_every_extra_that_users_install(request):
    import tomllib

    text = (request.config.rootpath / "pyproject.toml").read_text(encoding="utf-8")
    extras = set(tomllib.loads(text)["project"]["optional-dependencies"])
    assert extras - set(EXTRAS) <= {"test", "dev", "bench", "docs"}
    assert set(EXTRAS) <= extras


@pytest.mark.slow
def test_work_is_one_document(told, tmp_path):
    plan = told(*TRAIN, "--dry-run", "--output", tmp_path / "run")
    assert plan["dry_run"]
    assert any(line.startswith("forget ") for line in plan["plan"])
    done = told(*TRAIN, "--output", tmp_path / "run")
    assert done["run"]["method"] == "ovw"
    assert done["model"] == str(tmp_path / "run" / "delta.safetensors")
    assert done["evaluation"] is None
    applied = told("apply", "--model", "shapes", "--delta", done["model"], "--output", tmp_path / "model")
    assert applied == {"model": str(tmp_path / "model")}
    mask = ["mask", "--forget", "star", "--trajectories", 1, "--trajectory-steps", 2]
    found = told(*mask, "--output", tmp_path / "m.safetensors")
    assert found["elements"] > 0


def test_an_error_is_one_line_and_no_document(refused, cli, tmp_path):
    refused(*TRAIN, "--method", "nothing", "--json", "--output", tmp_path / "run")
    assert cli(*TRAIN, "--method", "nothing", "--json", "--output", tmp_path / "run").out == ""


def test_quiet_prints_nothing(cli, tmp_path):
    answer = cli(*TRAIN, "--quiet", "--output", tmp_path / "run")
    assert (answer.status, answer.out, answer.err) == (0, "", "")
    assert (tmp_path / "run" / "run.json").is_file()


# ---- progress --------------------------------------------------------------------------------------------------------


class Spy(fastunlearn.Reporter):
    def __init__(self):
        self.stages, self.parts = [], {}

    def stage(self, name):
        self.stages.append(name)

    def working(self, stage, done, total):
        self.parts.setdefault(stage, []).append((done, total))


@pytest.mark.parametrize("settings", [{"mask_density": 0.5}, {"method": "race"}], ids=["mask", "search"])
def test_every_long_phase_counts_to_its_end(tmp_path, settings):
    common = {"steps": 1, "trajectories": 1, "trajectory_steps": 2, "micro_batch_size": 2}
    spy = Spy()
    known = {"method": "esd", "device": "cpu", "evaluation_prompts": "none", **common, **settings}
    fastunlearn.unlearn("shapes", "star", output=tmp_path / "run", reporter=spy, **known)
    assert spy.stages[0] == "loading"
    assert set(spy.parts) <= set(spy.stages)
    assert "bank" in spy.parts
    for stage, parts in spy.parts.items():
        done = [one for one, _ in parts]
        assert done == sorted(done), stage
        assert len({total for _, total in parts}) == 1, stage
        assert done[-1] <= parts[-1][1], stage
    assert spy.parts["bank"][-1][0] == spy.parts["bank"][-1][1]


def lines_of(terminal, clock, monkeypatch):
    """What a console says of 100 images at one a second."""
    stream = io.StringIO()
    monkeypatch.setattr(module, "terminal", lambda **options: Terminal(file=stream, force_terminal=terminal, width=80))
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    with module.Console() as shown:
        shown.stage("evaluation")
        for second in range(1, 101):
            clock[0] = float(second)
            shown.scoring(second, 100)
    return stream.getvalue()


def test_a_log_gets_a_line_every_few_seconds(monkeypatch):
    lines = lines_of(False, [0.0], monkeypatch).splitlines()
    assert lines[:2] == [
        "evaluate: 10/100 images 1.0/s, 90 s left".replace("90 s", "2 min"),
        "evaluate: 20/100 images 1.0/s, 80 s left",
    ]
    assert len(lines) == 9


def test_a_terminal_gets_a_bar_with_rate_and_time(monkeypatch):
    said = lines_of(True, [0.0], monkeypatch)
    assert "100/100 images 1.0/s" in said
    assert "evaluate: " not in said


def test_quiet_gets_neither(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(module, "terminal", lambda **options: Terminal(file=stream, force_terminal=True))
    with module.Console(quiet=True, plans=False) as shown:
        shown.stage("bank")
        shown.working("bank", 1, 2)
        shown.note("a note")
        shown.plan("esd", ["a line"])
    assert stream.getvalue() == ""


# ---- 80 columns ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["methods", "judges", "attacks"])
def test_a_list_fits_eighty_columns_and_breaks_no_word(cli, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    narrow = cli(command).out
    assert max(map(len, narrow.splitlines())) <= 80
    monkeypatch.setenv("COLUMNS", "400")
    assert narrow.split() == cli(command).out.split()


def test_the_help_fits_the_terminal(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for command in ("train", "evaluate", "attack"):
        options = cli(command, "--help").out.split("examples:")[0]
        assert max(map(len, options.splitlines())) <= 80


def test_results_stand_across_or_down_as_the_terminal_has_room(monkeypatch):
    evaluations = [evaluation("ovw"), evaluation("a-model-with-a-longer-name", "esd")]
    for columns in (80, 160):
        stream = io.StringIO()
        shown = Terminal(file=stream, force_terminal=True, color_system=None, width=columns)
        monkeypatch.setattr(module, "terminal", lambda shown=shown, **options: shown)
        module.table(evaluations)
        lines = [line for line in stream.getvalue().splitlines() if "0.940" in line]
        assert len(lines) == (1 if columns == 80 else 2), stream.getvalue()
        assert max(len(line) for line in stream.getvalue().splitlines() if "judge" not in line) <= columns


def test_an_error_on_a_terminal_is_broken_between_words(tmp_path):
    """On a terminal; everywhere else an error stays one line."""
    import pty

    main_end, end = pty.openpty()
    call = ["train", "--forgte", "star", "--output", "run"]
    script = f"import sys; from fastunlearn.cli.main import main; sys.exit(main({call!r}))"
    done = subprocess.run(
        [sys.executable, "-c", script], stderr=end, env={**os.environ, "COLUMNS": "60"}, cwd=tmp_path, timeout=120
    )
    os.close(end)
    said = os.read(main_end, 10_000).decode().split("\r\n")
    os.close(main_end)
    assert done.returncode == 2
    assert len(said) > 2
    assert max(map(len, said)) <= 60
    assert " ".join(" ".join(said).split()).endswith("Did you mean `--forget`? See `fastunlearn train --help`.")


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("trian", "train"),
        ("--forgte", "--forget"),
        ("--out", "--output"),
        ("sadle", "saddle"),
        ("xyz", None),
        ("", None),
    ],
)
def test_what_was_probably_meant(word, meant):
    said = did_you_mean(word, ["train", "apply", "--forget", "--output", "saddle"])
    assert said == (f" Did you mean `{meant}`?" if meant else "")


# ---- completion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_knows_commands_and_flags(cli, shell):
    answer = cli("completion", shell)
    assert (answer.status, answer.err) == (0, "")
    for word in ("evaluate-images", "weights-dtype", "saddle", "completion"):
        assert word in answer.out


def completed(script, *words):
    """What bash offers for the last of the words."""
    quoted = " ".join(f"'{word}'" for word in words)
    asked = [script, f"COMP_WORDS=({quoted})", f"COMP_CWORD={len(words) - 1}", "_shtab_fastunlearn"]
    asked.append("printf '%s\\n' \"${COMPREPLY[@]}\"")
    done = subprocess.run(["bash", "-c", "\n".join(asked)], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes(cli):
    script = cli("completion", "bash").out
    assert completed(script, "fastunlearn", "eval") == ["evaluate", "evaluate-images"]
    assert completed(script, "fastunlearn", "train", "--forg") == ["--forget", "--forget-prompts"]
    assert completed(script, "fastunlearn", "train", "--method", "sa") == [
        name for name in fastunlearn_methods() if name.startswith("sa")
    ]
    assert completed(script, "fastunlearn", "train", "--device", "c") == ["cpu", "cuda"]


def fastunlearn_methods():
    from fastunlearn.methods import all_methods

    return list(all_methods())


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_read_their_script(cli, tmp_path, shell):
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell}")
    (tmp_path / "script").write_text(cli("completion", shell).out)
    subprocess.run([shell, "-n", str(tmp_path / "script")], check=True, timeout=60)
