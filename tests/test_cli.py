"""The commands: their names and flags, and that every mistake ends in status 2 and one line that says what to do."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fastunlearn_kernels import launch as kernel_launch
from outputs import files_of
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from toys import names_in

import fastunlearn
from fastunlearn.errors import UserError
from fastunlearn.files.run_folder import prepare_output
from fastunlearn.models.runtime import import_diffusers
from fastunlearn.training import trainer as trainer_module
from fastunlearn.worlds.shapes import pipeline_folder

TINY = ["--trajectories", 1, "--trajectory-steps", 2, "--micro-batch-size", 2, "--evaluation-prompts", "none"]
TRAIN = ["train", "--forget", "star", "--device", "cpu", "--steps", 2, "--trainable", "cross-attention", *TINY]
JUDGE = ["evaluate", "--original", "shapes", "--forget", "star", "--device", "cpu"]
JUDGE += ["--prompts", "a red ring on a plain background;a blue heart on a striped background"]
JUDGE += ["--num-inference-steps", 1, "--batch-size", 2, "--control-pairs", 2]
EVALUATE = [*JUDGE, "--unlearned", "shapes"]
UNET = "unet/diffusion_pytorch_model.safetensors"

FLAGS = {
    "demo": {"config", "output", "model", "forget", "methods", "judge", "seed", "overwrite"},
    "train": {
        *("config", "model", "method", "forget", "anchor", "forget-prompts", "retain-prompts", "output"),
        *("mask", "mask-density", "mask-granularity", "clip-scope", "gradient-accumulation-steps", "save"),
        *("deepspeed", "num-processes", "weights-dtype", "gradient-checkpointing", "offload", "bank-batch-size"),
        *("bank-precision", "evaluation-batch-size", "decode-batch-size", "device-memory-gib"),
        *("steps", "stop-residual", "learning-rate", "lr-scheduler", "micro-batch-size", "trajectories"),
        *("trajectory-steps", "adapter", "rank", "lora-alpha", "lora"),
        *("trajectory-guidance-scale", "trainable", "retain-weight", "set", "weight-decay"),
        *("max-grad-norm", "seed", "mixed-precision", "device", "checkpoint-every", "log-every"),
        *("evaluation-prompts", "judge", "dry-run", "resume", "overwrite"),
    },
    "mask": {
        *("config", "forget", "output", "model", "density", "granularity", "trainable", "forget-prompts"),
        *("trajectories", "trajectory-steps", "trajectory-guidance-scale", "micro-batch-size", "seed"),
        *("mixed-precision", "device", "overwrite", "gradient-checkpointing", "offload", "bank-batch-size"),
    },
    "apply": {"config", "model", "delta", "output", "overwrite"},
    "export": {"config", "run", "format", "output", "lora", "overwrite"},
    "evaluate": {
        *("config", "original", "unlearned", "lora", "prompts", "placebo", "output", "forget", "metric", "metrics"),
        *("trunk-weights", "weights-dtype", "decode-batch-size", "offload"),
        *("seeds-per-prompt", "batch-size", "num-inference-steps", "guidance-scale", "mixed-precision", "device"),
        *("judge", "trust-judge", "control-pairs", "cache", "cache-limit-gib", "num-processes", "resume", "overwrite"),
    },
    "evaluate-images": {
        *("config", "original-images", "unlearned-images", "also", "output", "prompts", "metric", "trunk-weights"),
        *("metrics", "forget", "judge", "trust-judge", "batch-size", "mixed-precision", "num-workers", "device"),
        "overwrite",
    },
    "attack": {
        *("config", "original", "unlearned", "output", "concept", "gold", "placebo", "judge", "attacks", "prompts"),
        *("max-prompts", "unrelated", "budget", "evaluation", "batch-size", "num-inference-steps", "guidance-scale"),
        *("seed", "device", "num-processes", "dry-run", "resume", "overwrite"),
    },
    "attacks": set(),
    "card": {"config", "run", "evaluation", "attack", "base-model", "overwrite"},
    "compare": {"config", "output", "margin", "overwrite"},
    "prompts": {
        *("config", "concept", "output", "kinds", "category", "aliases", "hints", "near", "per-kind", "seed"),
        *("columns", "overwrite"),
    },
    "judges": set(),
    "methods": set(),
    "info": set(),
}
LOADED = {"variant", "parts", "scheduler", "resolution", "negative-prompt", "attention"}
FLAGS |= {name: FLAGS[name] | LOADED for name in ("train", "mask", "evaluate")}
FLAGS["apply"] |= {"variant", "parts"}
FLAGS = {name: flags | {"json", "quiet"} if flags else {"json"} for name, flags in FLAGS.items()}
FLAGS["completion"] = set()


def temporary_files_in(folder):
    return [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run, for tests that copy it or only look."""
    from fastunlearn.cli.main import main

    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main([str(a) for a in (*TRAIN, "--output", folder)]) == 0
    return folder


@pytest.fixture
def run_copy(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


# ---- what there is ---------------------------------------------------------------------------------------------------


def test_the_commands_are_these(cli):
    answer = cli("--help")
    assert (answer.status, answer.err) == (0, "")
    assert re.findall(r"^    ([\w-]+)\s", answer.out, re.MULTILINE) == list(FLAGS)


@pytest.mark.parametrize("command", FLAGS)
def test_a_command_has_these_flags_and_explains_them(cli, command):
    answer = cli(command, "--help")
    assert (answer.status, answer.err) == (0, "")
    options = answer.out.split("options:")[1].split("examples:")[0]
    assert set(re.findall(r"^  (?:-h, )?--([a-z-]+)", options, re.MULTILINE)) == FLAGS[command] | {"help"}
    assert max(map(len, answer.out.splitlines())) <= 120


def test_the_examples_of_the_help_are_accepted(cli, monkeypatch):
    from fastunlearn.cli import main as module

    taken = []
    names = ("train", "mask", "apply", "evaluate", "evaluate_images", "compare", "prompts")
    for name in names:
        monkeypatch.setattr(module, f"_{name}", lambda flags, voice: taken.append(flags) or 0)
    for text in (getattr(module, f"_{name.upper()}_EXAMPLES") for name in names):
        for line in re.sub(r"\\\n\s*", "", text).splitlines()[1:]:
            words = [a or b for a, b in re.findall(r'"([^"]*)"|(\S+)', line)]
            assert words[0] == "fastunlearn"
            assert cli(*words[1:]).status == 0, line
    assert len(taken) == 23


def test_the_version_is_the_packages(cli):
    answer = cli("--version")
    assert (answer.status, answer.out) == (0, f"fastunlearn {fastunlearn.__version__}\n")


def test_a_methods_defaults_are_whole_on_a_narrow_terminal(cli, monkeypatch):
    """Cells are broken, not cut: the longest name of a part is in them piece by piece."""
    monkeypatch.setenv("COLUMNS", "80")
    page = cli("methods", "uce").out
    rows = [line for line in page.splitlines() if line.startswith("│")]
    assert len(rows) > 10
    assert all(len(row) <= 80 for row in rows)
    assert not any("…" in row for row in rows)


def test_methods_lists_each_with_its_paper(cli):
    answer = cli("methods")
    assert (answer.status, answer.err) == (0, "")
    for word in ("esd", "ovw", "saddle", "placebo", "identity", "2303.07345", "2411.02068"):
        assert word in answer.out


def test_judges_lists_each_with_what_it_needs_and_whether_it_can_run_here(cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "nudenet", None)
    answer = cli("judges")
    assert (answer.status, answer.err) == (0, "")
    text = " ".join(answer.out.split())
    for word in ("shapes", "clip", "imagenet", "nsfw", "nudenet", "AGPL-3.0", "BSD-2-Clause", "Imagenette"):
        assert word in text
    assert re.search(r"^nudenet .*?Here: (\w+)", answer.out, re.DOTALL | re.MULTILINE)[1] == "no"
    page = cli("judges", "nudenet").out
    assert "cannot run: it needs the package nudenet, which is not installed: pip install nudenet" in page
    assert "--judge imagenet:OPTION, OPTION being CLASS;CLASS" in cli("judges", "imagenet").out
    assert "unknown judge 'nobody'" in cli("judges", "nobody").err


def test_prompts_writes_a_table_that_the_other_commands_read(cli, tmp_path):
    from fastunlearn.prompts import PromptGroups, parse_prompts, read_prompts

    path = tmp_path / "prompts.csv"
    kinds = "name,prefix,variant,short,long,implicit,misspelt,near,random"
    command = ("prompts", "--concept", "Van Gogh", "--kinds", kinds, "--per-kind", "3")
    answer = cli(*command, "--output", path)
    assert (answer.status, answer.err) == (0, "")
    assert path.read_text().startswith("prompt,group,kind\nVan Gogh,forget-name,name\n")
    read = read_prompts(str(path))
    assert not read.notes, "every column is used"
    groups = PromptGroups.of_list(read, "Van Gogh")
    assert (len(groups.forget), len(groups.retain)) == (1 + 6 * 3, 2 * 3)
    assert parse_prompts(str(path), to_forget=True) == [
        prompt for prompt in dict(read.grouped) if prompt in groups.forget
    ]
    assert set(parse_prompts(str(path))) == set(groups.retain)
    assert {read.kinds[prompt] for prompt in groups.retain} == {"near", "random"}
    before = path.read_bytes()
    assert "exists: use another name, or `--overwrite`" in cli(*command, "--output", path).err
    assert cli(*command, "--output", path, "--overwrite").status == 0
    assert path.read_bytes() == before
    shown = cli(*command).out.splitlines()
    assert len(shown) == len(read.grouped)
    assert shown[0].split() == ["name", "Van", "Gogh"]


def test_a_plan_takes_what_is_to_forget_and_what_to_keep_from_one_file(cli, tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text("prompt,group\na red star,forget-short\na star,forget\na ring,near\na heart,random\n")
    command = (
        "train",
        "--forget",
        "star",
        "--method",
        "ovw",
        "--trajectories",
        1,
        "--trajectory-steps",
        2,
        "--steps",
        1,
    )
    prompts = ("--forget-prompts", path, "--retain-prompts", path, "--evaluation-prompts", "none")
    answer = cli(*command, *prompts, "--dry-run", "--output", tmp_path / "run")
    assert (answer.status, answer.err) == (0, "")
    line = next(line for line in answer.out.splitlines() if line.startswith("forget "))
    assert "a red star" in line
    assert "ring" not in line


def test_info_tells_versions_devices_kernels_and_metrics(cli):
    answer = cli("info")
    assert (answer.status, answer.err) == (0, "")
    assert f"torch         {torch.__version__.split('+')[0]}" in answer.out
    for word in ("device        cpu", "metric        shapes", "lpips-alex", "methods       esd, ovw"):
        assert word in answer.out
    assert f"kernels       CPU: {kernel_launch.describe()['CPU']}\n" in answer.out


@pytest.mark.parametrize(
    ("choice", "reason"), [("cuda", "must be one of reference, native, triton"), ("triton", "cannot")]
)
def test_kernels_that_cannot_run_here_are_one_line(cli, monkeypatch, tmp_path, choice, reason):
    if choice == "triton" and torch.cuda.is_available():
        pytest.skip("here they can")
    monkeypatch.setenv("FASTUNLEARN_KERNELS", choice)
    monkeypatch.setattr(kernel_launch, "CHOICE", choice)
    answer = cli(*TRAIN, "--output", tmp_path / "run")
    assert answer.status == 2
    assert answer.err.count("\n") == 1
    assert f"FASTUNLEARN_KERNELS={choice} " in answer.err or "FASTUNLEARN_KERNELS must" in answer.err
    assert reason in answer.err
    assert not (tmp_path / "run").exists()
    answer = cli("info")  # which is asked why
    assert (answer.status, answer.err) == (0, "")
    assert "kernels       CPU: none: FASTUNLEARN_KERNELS" in answer.out


# ---- what works ------------------------------------------------------------------------------------------------------


def test_train_writes_a_run_and_says_where(cli, tmp_path):
    answer = cli(*TRAIN, "--output", tmp_path / "run")
    assert (answer.status, answer.err) == (0, "")
    assert str(tmp_path / "run" / "model") in answer.out
    names = {"README.md", "checkpoints", "config.yaml", "metrics.jsonl", "model", "run-key.json", "run.json"}
    assert names_in(tmp_path / "run") == names
    assert not temporary_files_in(tmp_path)


def test_the_plan_is_told_before_the_first_step_and_a_dry_run_stops_there(cli, tmp_path, bundled):
    answer = cli(*TRAIN, "--output", tmp_path / "run", "--dry-run")
    assert (answer.status, answer.err) == (0, "")
    assert not (tmp_path / "run").exists()
    selected = sum(p.numel() for name, p in bundled.denoiser.named_parameters() if ".attn2." in name)
    total = sum(p.numel() for p in bundled.denoiser.parameters())
    told = f"{selected:,} parameters, {4 * selected / 1e6:.1f} MB in float32, {selected / total:.1%} of the denoiser"
    assert told in answer.out
    # Two trajectories of two steps: the unconditional, the prompt and the anchor to forget, two branches to keep.
    assert "4 rows from 2 trajectories, 10 UNet evaluations" in answer.out
    # Two steps of two updates with two rows, forward and backward.
    assert "2 steps, 24 UNet evaluations" in answer.out
    assert "estimate    about" in answer.out
    assert "dry run" in answer.out


def test_the_saved_config_makes_the_same_run(cli, finished, tmp_path):
    answer = cli("train", "--config", finished / "config.yaml", "--output", tmp_path / "again")
    assert answer.status == 0
    assert (tmp_path / "again" / "model" / UNET).read_bytes() == (finished / "model" / UNET).read_bytes()


def test_overwrite_leaves_nothing_of_the_earlier_run(cli, run_copy):
    (run_copy / "evaluation.json").write_text("{}")
    assert cli(*TRAIN, "--output", run_copy, "--overwrite").status == 0
    assert not (run_copy / "evaluation.json").exists()
    assert len((run_copy / "metrics.jsonl").read_text().splitlines()) == 1


def test_evaluate_writes_records_summary_grid_and_report(cli, tmp_path):
    folder = tmp_path / "evaluation"
    answer = cli(*EVALUATE, "--output", folder)
    assert (answer.status, answer.err) == (0, "")
    names = {"evaluation.json", "grid.png", "pairs.jsonl", "report.html"}
    assert names_in(folder) == names
    summary = json.loads((folder / "evaluation.json").read_text())
    assert summary["integrity"]["mean"] == 0.0, "a model compared with itself"
    assert summary["controls"]["repeat"] == 0.0
    assert len((folder / "pairs.jsonl").read_text().splitlines()) == summary["integrity"]["n_pairs"] == 2


def test_prompts_that_name_no_attribute_can_be_evaluated_on(cli, tmp_path):
    answer = cli(*EVALUATE, "--prompts", "something;anything", "--output", tmp_path / "evaluation")
    assert (answer.status, answer.err) == (0, "")
    retain = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())["retain"]
    assert list(retain["attributes"]) == ["shape", "color", "background"]
    assert {(one["accuracy"], one["n_asked"]) for one in retain["attributes"].values()} == {(None, 0)}
    assert {one["agreement"] for one in retain["attributes"].values()} == {1.0}


def test_another_programs_config_beside_a_pipeline_is_not_read(cli, pipeline_copy, tmp_path):
    (tmp_path / "config.yaml").write_text("name: something else\n")
    assert cli(*JUDGE, "--unlearned", pipeline_copy, "--output", tmp_path / "evaluation").status == 0


class Canary:
    """A pickle that, when read, makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_beside_safetensors_is_neither_read_nor_copied(cli, pipeline_copy, tmp_path):
    (pipeline_copy / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Canary(tmp_path / "ran")))
    assert cli(*TRAIN, "--model", pipeline_copy, "--output", tmp_path / "run").status == 0
    assert not (tmp_path / "ran").exists()
    assert not list((tmp_path / "run").rglob("*.bin"))


# ---- mistakes in the call --------------------------------------------------------------------------------------------

NUMBERS = [
    *(
        ("train", flag, value)
        for flag in ("--steps",)
        for value in ("-1", "1.5", "nan", "inf", "1e3", "many", "9" * 30)
    ),
    *(("train", "--micro-batch-size", value) for value in ("0", "-4", "nan", "2.0", "", "9" * 30)),
    *(("train", "--learning-rate", value) for value in ("0", "-1e-3", "2", "nan", "inf", "-inf", "1e999", "fast")),
    *(("train", flag, "0") for flag in ("--trajectories", "--trajectory-steps", "--log-every")),
    *(("train", flag, "-1") for flag in ("--checkpoint-every", "--seed", "--retain-weight", "--weight-decay")),
    *(("train", flag, value) for flag in ("--mask-density",) for value in ("0", "1.5", "nan")),
    ("train", "--gradient-accumulation-steps", "0"),
    *(("train", flag, "nan") for flag in ("--weight-decay", "--retain-weight")),
    *(("evaluate", flag, "0") for flag in ("--seeds-per-prompt", "--batch-size", "--num-inference-steps")),
    *(("evaluate", "--guidance-scale", value) for value in ("-1", "nan", "inf")),
    ("demo", "--seed", "-1"),
]
COMPLETE = {"train": TRAIN, "evaluate": EVALUATE, "demo": ["demo"]}


@pytest.mark.parametrize(("command", "flag", "value"), NUMBERS, ids=[" ".join(case)[:48] for case in NUMBERS])
def test_a_number_out_of_range_is_refused_by_its_flag(refused, tmp_path, command, flag, value):
    said = refused(*COMPLETE[command], "--output", tmp_path / "run", f"{flag}={value}")
    assert flag in said
    assert not (tmp_path / "run").exists()


CALLS = {
    "no command": ([], "required: COMMAND"),
    "unknown command": (["trian"], "invalid choice: 'trian'"),
    "unknown command like one": (["trian"], "Did you mean `train`? See `fastunlearn --help`."),
    "unknown choice like one": (["train", "--adapter", "lara"], "Did you mean `lora`? See `fastunlearn train --help`."),
    "unknown flag like one": (
        ["train", "--forgte", "star", "--output", "run"],
        "unrecognized arguments: --forgte star. Did you mean `--forget`? See `fastunlearn train --help`.",
    ),
    "quiet and json": (["methods", "--quiet"], "unrecognized arguments: --quiet."),
    "silent and speaking": (["train", "--quiet", "--json"], "`--quiet` prints nothing, and `--json` a document"),
    "compare without what": (["compare"], "missing: RUN, --output."),
    "compare one run": (["compare", "run", "--output", "out"], "at least 2 runs, got 1"),
    "unknown flag": (["train", "--forget", "star", "--stepz", "3"], "unrecognized arguments: --stepz 3"),
    "flag of two lines": (["train", "--forget", "star", "--a\nb"], "unrecognized arguments: --a b"),
    "flag without its value": (["train", "--forget"], "--forget: expected one argument"),
    "unknown choice": (["train", "--device", "tpu"], "invalid choice: 'tpu'"),
    "train without what": (["train"], "missing: --forget, --output."),
    "evaluate without what": (["evaluate"], "missing: --original, --unlearned, --output."),
    "empty concept": (["train", "--forget", " ", "--output", "run"], "`--forget` is empty"),
    "missing config": (["train", "--config", "nowhere.yaml"], "cannot read the config file nowhere.yaml"),
    "config that is a folder": (["train", "--config", "."], "cannot read the config file"),
    "abbreviated flag": (["train", "--forg", "star", "--output", "run"], "--forg star. Did you mean `--forget`?"),
    "resume nothing": (["train", "--resume", "--output", "nowhere"], "`--resume`: nowhere holds no run"),
    "resume and overwrite": (
        ["train", "--forget", "star", "--output", "run", "--resume", "--overwrite"],
        "`--resume` continues a run and `--overwrite` replaces it",
    ),
}


@pytest.mark.parametrize(("arguments", "said"), CALLS.values(), ids=CALLS)
def test_a_mistaken_call_is_refused(refused, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert said in refused(*arguments)
    assert not list(tmp_path.iterdir())


def test_comparing_what_is_not_there_is_refused(refused, tmp_path):
    assert "nowhere holds no evaluation" in refused("compare", "nowhere", tmp_path, "--output", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_help_and_mistakes_answer_without_loading_torch():
    calls = [["--help"], ["--version"], *([name, "--help"] for name in FLAGS), *(list(c) for c, _ in CALLS.values())]
    calls += [["train", "--forget", "star", "--output", "run", "--steps", "-1"]]
    script = (
        "import sys\n"
        "from fastunlearn.cli.main import main\n"
        f"for call in {calls!r}:\n"
        "    try:\n"
        "        main(call)\n"
        "    except SystemExit:\n"
        "        pass\n"
        "    heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'rich'} & set(sys.modules)\n"
        "    assert not heavy, (call, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# ---- mistakes in what is asked ---------------------------------------------------------------------------------------

ASKED = {
    "unknown method": (["--method", "erase"], r"unknown method 'erase'.*esd, ovw, saddle"),
    "unknown method like one": (["--method", "sadle"], r"unknown method 'sadle'.*Did you mean `saddle`\?"),
    "unknown model": (["--model", "sd99"], r"unknown model 'sd99'.*shapes"),
    "model folder that is not there": (["--model", "./no/such"], r"unknown model './no/such'"),
    "hub model without a network": (["--model", "nobody/nothing"], r"cannot fetch the model 'nobody/nothing'.*folder"),
    "model that is a file": (["--model", "{here}/file"], r"unknown model .*is no folder"),
    "model that is no pipeline": (["--model", "{here}/empty"], r"has no model_index\.json"),
    "missing retain file": (["--retain-prompts", "{here}/gone.txt"], r"gone\.txt' does not exist"),
    "missing forget file": (["--forget-prompts", "{here}/gone.csv"], r"gone\.csv' does not exist"),
    "missing evaluation file": (["--evaluation-prompts", "{here}/gone.txt"], r"gone\.txt' does not exist"),
    "empty retain file": (["--retain-prompts", "{here}/file"], r"holds no prompt"),
    "empty forget file": (["--forget-prompts", "{here}/file"], r"holds no prompt"),
    "empty evaluation file": (["--evaluation-prompts", "{here}/file"], r"holds no prompt"),
    "one evaluation prompt": (["--evaluation-prompts", "a red ring"], r"at least 2 retain prompts"),
    "separators only": (["--retain-prompts", " ; "], r"holds no prompt"),
    "folder for a file": (["--retain-prompts", "{here}/empty"], r"is a folder"),
    "too long": (["--forget-prompts", "star " * 20], r"forget prompt 'star .* has 20 tokens and the model reads 14"),
    "no tokens": (["--forget-prompts", "<|endoftext|>"], r"tokenizer turns .*'<\|endoftext\|>' into nothing"),
    "concept the model lacks": (["--forget", "dog"], r"does not know the concept 'dog'.*circle"),
    "forget prompt to keep": (
        ["--forget-prompts", "a red star;a star", "--retain-prompts", "a ring;A  Red Star"],
        r"forget prompt.* also retain prompts.*'a red star'",
    ),
    "bundled forget prompt to keep": (["--retain-prompts", "a ring;star"], r"also retain prompts.*'star'"),
    "selector of nothing": (["--trainable", "attn9"], r"`--trainable`.*'attn9' selects no parameter.*cross-attention"),
    "selector of half nothing": (["--trainable", "attn2.to_k,attn9"], r"the part 'attn9'"),
    "empty selector": (["--trainable", ","], r"selects no parameter"),
    "anchor that is the concept": (["--anchor", "Star"], r"`--anchor` 'Star' leaves"),
    "anchor of a method without": (["--method", "saddle", "--anchor", "ring"], r"saddle takes no `--anchor`"),
    "another method's option": (["--set", "kappa=2"], r"the method ovw has no option 'kappa'\. It has none\."),
    "unknown option": (
        ["--method", "saddle", "--set", "kapa=2"],
        r"'kapa'\. It has: reference_guidance, kappa, .*, reference\. Did you mean `kappa`\?",
    ),
    "option of another type": (["--method", "esd", "--set", "negative_guidance=far"], r"must be float, got 'far'"),
    "option out of range": (["--method", "saddle", "--set", "kappa=0"], r"`kappa` must be above 0, got 0"),
    "option that is no number": (["--method", "esd", "--set", "negative-guidance=nan"], r"a finite number, got nan"),
    "steps of an edit": (["--method", "uce"], r"uce computes its weights in no steps\. Leave `--steps` out"),
    "more trajectory steps than the sampler has": (["--trajectory-steps", 1001], r"1000"),
}


@pytest.mark.parametrize("overwrite", [False, True], ids=["new folder", "overwrite"])
@pytest.mark.parametrize(("arguments", "said"), ASKED.values(), ids=ASKED)
def test_train_refuses_and_touches_nothing(refused, tmp_path, finished, arguments, said, overwrite):
    here = tmp_path / "here"
    (here / "empty").mkdir(parents=True)
    (here / "file").touch()
    run = tmp_path / "run"
    if overwrite:
        prepare_output(run, "train", overwrite=False)
        shutil.copy(finished / "config.yaml", run)
    before = files_of(tmp_path)
    arguments = [str(argument).replace("{here}", str(here)) for argument in arguments]
    line = refused(*TRAIN, "--output", run, *arguments, *(["--overwrite"] if overwrite else []))
    assert re.search(said, line), line
    assert files_of(tmp_path) == before
    assert run.exists() == overwrite


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the CUDA device that the mistake is to lack")
def test_a_device_that_is_not_there_is_refused(refused, tmp_path):
    assert "needs a CUDA device" in refused(*TRAIN, "--device", "cuda", "--output", tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_model_without_retain_prompts_of_its_own_needs_some(refused, pipeline_copy, tmp_path):
    config = pipeline_copy / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.5}))  # no longer the bundled one
    line = refused(*TRAIN, "--model", pipeline_copy, "--output", tmp_path / "run")
    assert "the method ovw needs retain prompts: give `--retain-prompts`" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_an_output_folder_in_use_is_refused(refused, tmp_path, command):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    before = files_of(tmp_path)
    assert "is not empty. Use another folder, `--overwrite`" in refused(
        *COMPLETE[command], "--output", tmp_path / "run"
    )
    assert "no run of fastunlearn" in refused(*COMPLETE[command], "--output", tmp_path / "run", "--overwrite")
    assert files_of(tmp_path) == before


def test_resuming_as_another_run_is_refused_by_the_setting(refused, run_copy):
    before = files_of(run_copy)
    line = refused("train", "--resume", "--output", run_copy, "--seed", 5)
    assert "has seed = 0, now it is 5" in line
    assert files_of(run_copy) == before


# ---- damaged and mismatched models -----------------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def pickled(folder, canary):
    for path in (folder / "unet").glob("*.safetensors"):
        path.unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Canary(canary)))


def reindex(folder, **changes):
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE = {
    "truncated unet": (lambda f, c: truncate(f / UNET), r"unet/.*is truncated or damaged.*Fetch it again"),
    "empty vae": (lambda f, c: (f / "vae" / Path(UNET).name).write_bytes(b""), r"vae/.*is truncated or damaged"),
    "truncated text encoder": (
        lambda f, c: truncate(f / "text_encoder" / "model.safetensors"),
        r"truncated or damaged",
    ),
    "pickled unet": (pickled, r"is pickled.*safe_serialization=True"),
    "pickle called safetensors": (
        lambda f, c: (f / UNET).write_bytes(pickle.dumps(Canary(c))),
        r"truncated or damaged",
    ),
    "unet that is gone": (lambda f, c: (f / UNET).unlink(), r"cannot load the model"),
    "index that is no json": (lambda f, c: truncate(f / "model_index.json"), r"model_index\.json is damaged"),
    "index of a list": (lambda f, c: (f / "model_index.json").write_text("[]"), r"model_index\.json is damaged"),
    "unknown family": (
        lambda f, c: reindex(f, _class_name="HunyuanDiTPipeline"),
        r"is a HunyuanDiTPipeline, a family not supported",
    ),
    "weights of another shape": (
        lambda f, c: save_file({k: v[:1].clone() for k, v in load_file(f / UNET).items()}, f / UNET),
        r"cannot load the model",
    ),
}


@pytest.mark.parametrize("command", ["train", "evaluate"])
@pytest.mark.parametrize(("damage", "said"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_model_is_refused_and_never_run(refused, pipeline_copy, tmp_path, damage, said, command):
    damage(pipeline_copy, tmp_path / "ran")
    call = [*TRAIN, "--model"] if command == "train" else [*JUDGE, "--unlearned"]
    line = refused(*call, pipeline_copy, "--output", tmp_path / "run")
    assert re.search(said, line), line
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]


def other_sampler(folder, **changes):
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


SAMPLERS = {
    "class": {"_class_name": "PNDMScheduler"},
    "schedule": {"beta_end": 0.02},
    "prediction": {"prediction_type": "v_prediction"},
}


@pytest.mark.parametrize("changes", SAMPLERS.values(), ids=SAMPLERS)
def test_models_of_different_samplers_are_not_compared(refused, pipeline_copy, tmp_path, changes):
    other_sampler(pipeline_copy, **changes)
    if "_class_name" in changes:
        reindex(pipeline_copy, scheduler=["diffusers", changes["_class_name"]])
    line = refused(*JUDGE, "--unlearned", pipeline_copy, "--output", tmp_path / "run")
    assert re.search(rf"has another sampler than the original \({next(iter(changes))}.* differ\)", line), line
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]


def test_a_sampler_that_draws_noise_trains_by_ours(cli, pipeline_copy, tmp_path):
    """Two trainings of one seed give the same bytes, whatever torch's own generator would draw."""
    other_sampler(pipeline_copy, _class_name="EulerAncestralDiscreteScheduler")
    reindex(pipeline_copy, scheduler=["diffusers", "EulerAncestralDiscreteScheduler"])
    made = []
    for name in ("one", "other"):
        torch.rand(1)
        assert cli(*TRAIN, "--model", pipeline_copy, "--output", tmp_path / name).status == 0
        made.append((tmp_path / name / "model" / UNET).read_bytes())
    assert made[0] == made[1]


def test_models_of_different_families_are_not_compared(refused, bundled, tmp_path):
    diffusers = import_diffusers()
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    parts = bundled.pipeline.components
    text = CLIPTextConfig(**{**parts["text_encoder"].config.to_dict(), "projection_dim": 32})
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        block_out_channels=(16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=2 * text.hidden_size,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 32,
    )
    diffusers.StableDiffusionXLPipeline(
        vae=parts["vae"],
        text_encoder=parts["text_encoder"],
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=parts["tokenizer"],
        tokenizer_2=parts["tokenizer"],
        unet=unet,
        scheduler=parts["scheduler"],
    ).save_pretrained(tmp_path / "xl")
    line = refused(*JUDGE, "--unlearned", tmp_path / "xl", "--output", tmp_path / "run")
    assert "is of the family stable-diffusion-xl, the original of stable-diffusion" in line
    assert [path.name for path in tmp_path.iterdir()] == ["xl"]


EVALUATED = {
    "one prompt": (["--prompts", "a red ring"], r"at least 2 retain prompts"),
    "missing prompts": (["--prompts", "gone.csv"], r"'gone\.csv' does not exist"),
    "nothing said about the concept": (["--forget", "", "--prompts", "shapes"], r"names no concept"),
    "concept the judge lacks": (["--forget", "dog"], r"does not know the concept 'dog'"),
    "unknown metric": (["--metric", "psnr"], r"psnr"),
    "more steps than the sampler has": (["--num-inference-steps", 1001], r"1000"),
    "unknown original": (["--original", "sd99"], r"unknown model 'sd99'"),
}


@pytest.mark.parametrize(("arguments", "said"), EVALUATED.values(), ids=EVALUATED)
def test_evaluate_refuses_and_keeps_the_earlier_results(refused, tmp_path, arguments, said):
    prepare_output(tmp_path / "evaluation", "evaluate", overwrite=False)
    (tmp_path / "evaluation" / "evaluation.json").write_text('{"earlier": true}')
    line = refused(*EVALUATE, "--output", tmp_path / "evaluation", "--overwrite", *arguments)
    assert re.search(said, line), line
    assert files_of(tmp_path) == {"evaluation/evaluation.json": b'{"earlier": true}'}
    refused(*EVALUATE, "--output", tmp_path / "new", *arguments)
    assert not (tmp_path / "new").exists()


# ---- losses that are no numbers --------------------------------------------------------------------------------------


def test_a_run_that_diverges_stops_and_says_so(refused, tmp_path):
    """Decay by a factor of -1e9 a step leaves the range of float32 within five."""
    absurd = ["--steps", 12, "--learning-rate", 1, "--weight-decay", 1e9, "--log-every", 1]
    line = refused(*TRAIN, *absurd, "--output", tmp_path / "run")
    assert re.search(r"not a finite number by step \d+; no checkpoint had been saved. Use a smaller", line), line
    assert not (tmp_path / "run" / "model").exists()
    assert not (tmp_path / "run" / "run.json").exists()
    assert not temporary_files_in(tmp_path)


def test_weights_that_the_file_cannot_hold_are_not_exported(refused, tmp_path):
    """Finite in float32, infinite in the original's float16."""
    absurd = ["--method", "esd", "--steps", 1, "--learning-rate", 1, "--weight-decay", 1e9]
    line = refused(*TRAIN, *absurd, "--output", tmp_path / "run")
    assert re.search(r"has grown past what the original's torch.float16 holds. Use a smaller", line), line
    assert not (tmp_path / "run" / "model").exists()
    assert not temporary_files_in(tmp_path)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_the_last_good_checkpoint_is_kept_and_can_be_resumed(cli, refused, tmp_path, monkeypatch, where):
    genuine, calls = trainer_module.noise_pred_loss, []

    def poisoned(noise_pred, *arguments, **keywords):
        calls.append(1)
        if len(calls) > 4 and where == "gradient":
            noise_pred.register_hook(lambda gradient: gradient * float("nan"))
        loss, rows = genuine(noise_pred, *arguments, **keywords)
        return (loss * float("nan") if len(calls) > 4 and where == "loss" else loss), rows

    run = [*TRAIN, "--steps", 4, "--checkpoint-every", 1, "--output", tmp_path / "run"]
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "noise_pred_loss", poisoned)
        line = refused(*run)
    newest = tmp_path / "run" / "checkpoints" / "step-2"
    assert f"not a finite number by step 3; the last good checkpoint is {newest}" in line
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved == ["step-1", "step-2"]
    assert all(tensor.isfinite().all() for tensor in load_file(newest / "rank-0.safetensors").values())
    assert not (tmp_path / "run" / "model").exists()
    assert cli("train", "--resume", "--output", tmp_path / "run").status == 0
    assert cli(*run[:-1], tmp_path / "whole").status == 0
    assert (tmp_path / "run" / "model" / UNET).read_bytes() == (tmp_path / "whole" / "model" / UNET).read_bytes()


# ---- a full disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """``small_disk(size)`` mounts a real file system of so many bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size):
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except OSError as error:
            pytest.skip(f"a small file system cannot be mounted here: {error}")
        if done.returncode != 0:
            pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
        return folder

    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", "-l", str(folder)], check=True, timeout=60)


def assert_whole(folder):
    assert not temporary_files_in(folder)
    for path in folder.rglob("*"):
        if path.suffix in (".json", ".jsonl"):
            for line in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
                json.loads(line)
        if path.suffix == ".safetensors":
            load_file(path)


def test_a_disk_too_small_for_a_checkpoint_holds_no_half_one(refused, small_disk, bundled):
    selected = sum(p.numel() for name, p in bundled.denoiser.named_parameters() if ".attn2." in name)
    disk = small_disk(6 * selected)  # half of the weights and AdamW's two moments in float32
    line = refused(*TRAIN, "--output", disk / "run")
    assert "the disk is full" in line
    assert "Free some space" in line
    assert names_in(disk / "run") == {"checkpoints", "config.yaml", "metrics.jsonl", "run-key.json"}
    assert not list((disk / "run" / "checkpoints").iterdir())
    assert_whole(disk)


def test_a_disk_too_small_for_the_model_holds_no_half_one_and_the_run_goes_on_when_there_is_room(
    cli, refused, small_disk, finished
):
    pipeline = sum(path.stat().st_size for path in pipeline_folder("shapes").rglob("*") if path.is_file())
    disk = small_disk(pipeline)
    assert "the disk is full" in refused(*TRAIN, "--output", disk / "run")
    assert names_in(disk / "run") == {"checkpoints", "config.yaml", "metrics.jsonl", "run-key.json"}
    assert_whole(disk)
    subprocess.run(["mount", "-o", f"remount,size={4 * pipeline}", str(disk)], check=True, timeout=60)
    assert cli("train", "--resume", "--output", disk / "run").status == 0
    assert (disk / "run" / "model" / UNET).read_bytes() == (finished / "model" / UNET).read_bytes()


def test_a_disk_that_is_full_after_an_evaluation_leaves_no_half_file(cli, refused, small_disk):
    disk = small_disk(40_960)
    folder = disk / "evaluation"
    assert "the disk is full" in refused(*EVALUATE, "--output", folder)
    assert not (folder / "report.html").exists()
    assert_whole(disk)
    subprocess.run(["mount", "-o", "remount,size=4194304", str(disk)], check=True, timeout=60)
    assert cli("evaluate", "--resume", "--output", folder).status == 0
    assert names_in(folder) == {"evaluation.json", "grid.png", "pairs.jsonl", "report.html"}


class SomeLibrarysError(Exception):
    """As safetensors' own: neither an OSError nor a RuntimeError."""


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device", "x"),
        OSError(122, "Disk quota exceeded"),
        SomeLibrarysError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail] No space left on device"),
    ],
    ids=["full", "quota", "inside a library", "inside torch"],
)
def test_a_full_disk_is_called_so_however_it_is_told(refused, tmp_path, monkeypatch, error):
    def full(*arguments, **keywords):
        raise error

    monkeypatch.setattr("safetensors.torch.save_file", full)
    line = refused(*TRAIN, "--output", tmp_path / "run")
    assert "the disk is full" in line
    assert not (tmp_path / "run" / "model").exists()
    assert_whole(tmp_path)


BUGS = [ZeroDivisionError(), TypeError("x() missing 1 argument"), ValueError("x"), KeyError("x")]


@pytest.mark.parametrize("error", BUGS)
def test_a_bug_of_ours_shows_its_traceback_and_where_to_report_it(cli, tmp_path, monkeypatch, error):
    def broken(*arguments, **keywords):
        raise error

    monkeypatch.setattr("fastunlearn.training.unlearn.build_bank", broken)
    answer = cli(*TRAIN, "--output", tmp_path / "run")
    assert answer.status == 1
    assert answer.err.startswith("Traceback")
    assert "in broken" in answer.err
    assert "this is a bug of fastunlearn" in answer.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (UserError("the prompt is odd"), "the prompt is odd"),
        (PermissionError(13, "Permission denied", "/x"), "Permission denied: /x"),
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), "out of memory"),
        (SafetensorError("File too large (os error 27)"), "File too large"),
    ],
)
def test_what_the_user_can_mend_is_one_line(refused, tmp_path, monkeypatch, error, words):
    def broken(*arguments, **keywords):
        raise error

    monkeypatch.setattr("fastunlearn.training.unlearn.build_bank", broken)
    assert words in refused(*TRAIN, "--output", tmp_path / "run")


def test_the_switch_for_tracebacks_is_in_the_help_and_works(cli, monkeypatch):
    assert "FASTUNLEARN_TRACEBACK" in cli("--help").out
    monkeypatch.setenv("FASTUNLEARN_TRACEBACK", "1")
    answer = cli("train", "--forget", " ", "--output", "x")
    assert answer.status == 2
    assert answer.err.startswith("Traceback")
    assert "this is a bug" not in answer.err


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------


def test_a_stopped_training_says_how_to_go_on_and_ends_like_one_that_was_not(cli, tmp_path):
    """A real signal to a real process; Saddle has the most state: weights, optimizer and the dual variable."""
    run = ["train", "--method", "saddle", "--forget", "star", *TINY, "--steps", 60, "--log-every", 1, "--device", "cpu"]
    folder = tmp_path / "a run"
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, "-m", "fastunlearn", *map(str, run), "--output", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        deadline = time.monotonic() + 600
        while not (folder / "metrics.jsonl").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "the training never began"
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 2
    told = re.search(r"^fastunlearn: stopped at step (\d+) of 60; the state is saved. Continue with: (.*)\n", err, re.M)
    assert told, err
    assert told[2] == f"fastunlearn train --resume --output '{folder}'"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step-{told[1]}"]
    assert not (folder / "model").exists()
    assert_whole(tmp_path)

    assert cli("train", "--resume", "--output", folder).status == 0
    assert cli(*run, "--output", tmp_path / "whole").status == 0
    assert (folder / "model" / UNET).read_bytes() == (tmp_path / "whole" / "model" / UNET).read_bytes()
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 61))


def test_stopping_before_the_training_leaves_nothing(refused, tmp_path, monkeypatch):
    def stopped(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastunlearn.training.unlearn.build_bank", stopped)
    assert "stopped before anything was written" in refused(*TRAIN, "--output", tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("evaluated", "named"),
    [
        (["a red heart", "a blue cross"], "On 2 prompts that took no part in training it keeps"),
        (["a red heart", "a ring"], "On 2 prompts about other things (1 of which took part in a training) it keeps"),
    ],
)
def test_a_report_says_which_prompts_the_training_had(cli, tmp_path, evaluated, named):
    rows = ["prompt,group", "a star,forget", *(f"{prompt},retain" for prompt in evaluated)]
    (tmp_path / "prompts.csv").write_text("\n".join(rows), encoding="utf-8")
    words = ["--evaluation-prompts", tmp_path / "prompts.csv", "--retain-prompts", "a ring;a circle", "--steps", 1]
    assert cli(*TRAIN, *words, "--output", tmp_path / "run").status == 0
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert named in page.replace("\u00a0", " ")


def test_stopping_an_evaluation_keeps_the_earlier_results(cli, refused, tmp_path, monkeypatch):
    def stopped(*arguments, **keywords):
        raise KeyboardInterrupt

    prepare_output(tmp_path / "evaluation", "evaluate", overwrite=False)
    (tmp_path / "evaluation" / "evaluation.json").write_text('{"earlier": true}')
    folder = tmp_path / "evaluation"
    with monkeypatch.context() as patch:
        patch.setattr("fastunlearn.evaluation.evaluator.Evaluator._score", stopped)
        assert "stopped; nothing was recorded yet" in refused(*EVALUATE, "--output", folder, "--overwrite")
    assert files_of(tmp_path) == {"evaluation/evaluation.json": b'{"earlier": true}'}
    with monkeypatch.context() as patch:
        patch.setattr("fastunlearn.evaluation.evaluator.Evaluator.conclude", stopped)
        line = refused(*EVALUATE, "--output", folder, "--overwrite")
    assert f"stopped. Continue with: fastunlearn evaluate --resume --output {folder}" in line
    assert (folder / "evaluation.json").read_bytes() == b'{"earlier": true}'
    assert cli("evaluate", "--resume", "--output", folder).status == 0
    assert names_in(folder) == {"evaluation.json", "grid.png", "pairs.jsonl", "report.html"}


def test_a_demo_can_be_stopped_and_run_again(refused, tmp_path, monkeypatch, finished):
    def stopped(config, reporter=None):
        shutil.copytree(finished, config.output)
        raise trainer_module.Interrupted("stopped at step 2 of 60")

    monkeypatch.setattr("fastunlearn.training.unlearn.unlearn", stopped)
    for again in range(2):
        line = refused("demo", "--output", tmp_path / "demo", *(["--overwrite"] if again else []))
        assert "stopped" in line
        assert "--overwrite" in line
        assert names_in(tmp_path / "demo") == {"esd"}
