"""Several processes over gloo do what one does, and what a mask leaves out keeps its bits in every stage of ZeRO."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fastunlearn_kernels import unpack_bits
from safetensors.torch import load_file

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (pip install 'fastunlearn[deepspeed]')")
pytestmark = pytest.mark.slow  # DeepSpeed takes seconds to import, in every process

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TRAIN = {
    **{"forget": "star", "device": "cpu", "method": "salun", "trainable": "cross-attention-kv", "weight-decay": 0.1},
    **{"trajectories": 1, "trajectory-steps": 4, "steps": 4, "checkpoint-every": 1, "log-every": 1},
    **{"evaluation-prompts": "none"},
}
UNET = "unet/diffusion_pytorch_model.safetensors"


def command(output, *more, **flags):
    said = [f"--{name}={value}" for name, value in {**TRAIN, "output": output, **flags}.items()]
    return [sys.executable, "-m", "fastunlearn", "train", *said, *more]


def run(command, **options):
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=ENVIRONMENT, **options)


# ---- every stage, on a tiny module -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cases")
    script = Path(__file__).with_name("distributed_cases.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run([*launcher, str(script), str(folder)])
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "records.json").read_text())


def test_the_cases_are_the_optimizers_that_they_are_for(records):
    result = {case["optimizer"] for case in records["cases"]}
    assert result == {
        *("_QuietUntilBound", "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"),
        *("FP16_UnfusedOptimizer", "BF16_Optimizer"),
    }
    assert len(records["cases"]) == 35


def test_no_element_outside_the_mask_changes_a_bit(records):
    assert {case["name"]: case["outside_changed"] for case in records["cases"] if case["outside_changed"]} == {}


def test_selected_elements_are_those_of_one_process(records):
    for case in records["cases"]:
        exact = not case["name"].lower().startswith("bf16")
        assert case["selected_moved"] > 0.99, case
        assert case["furthest"] < (1e-6 if exact else 2e-3), case
        assert case["norm_error"] < (1e-5 if exact else 1e-2), case


def test_a_resumed_run_is_bitwise_the_same_in_its_stage_and_the_same_in_others(records):
    for resumed in records["resumed"]:
        assert resumed["bitwise"], resumed
        assert resumed["other_stage"] < 1e-6, resumed
        assert resumed["one_process"] < (2e-3 if "bf16" in resumed["name"] else 1e-6), resumed


def test_an_export_is_the_original_with_the_trained_elements(records):
    assert len(records["exported"]) == 8
    assert all(records["exported"].values())


def test_what_is_sent_for_a_step_is_what_is_counted(records):
    """Up to padding and one number, the norm: what DeepSpeed asks of torch's collectives in every stage."""
    assert [case["name"] for case in records["wire"]] == ["zero 0", "zero 1", "zero 2", "zero 3"]
    for case in records["wire"]:
        assert case["sent"] == pytest.approx(case["counted"], rel=0.05), case


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ds_json(tmp_path_factory):
    path = tmp_path_factory.mktemp("ds") / "ds.json"
    path.write_text(json.dumps({"train_batch_size": 4, "zero_optimization": {"stage": 2}}))
    return path


@pytest.fixture(scope="module")
def two(tmp_path_factory, ds_json):
    """A finished run of two processes."""
    folder = tmp_path_factory.mktemp("two") / "run"
    done = run(command(folder, "--num-processes=2", deepspeed=ds_json))
    assert done.returncode == 0, done.stderr
    # Nothing but how far it is, on a machine that takes longer than a few seconds.
    assert [line for line in done.stderr.splitlines() if not re.match(r"[a-z ]+: [\d,]+/[\d,]+", line)] == []
    return folder


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return load_file(folder / "model" / UNET)


def test_two_processes_train_what_one_does(two, tmp_path, ds_json, bundled):
    from fastunlearn.training.selection import load_mask

    done = run(command(tmp_path / "one", **{"micro-batch-size": 4}))
    assert done.returncode == 0, done.stderr
    for step, (ours, theirs) in enumerate(zip(logged(two), logged(tmp_path / "one"), strict=True)):
        # Only before the first step is there one model: Adam's first steps carry what was rounded otherwise far.
        for key in ("loss", "grad_norm", "forget_loss"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3 if step else 1e-5), (step, key)
        # What is kept is moved by a thousandth.
        assert ours["retain_loss"] == pytest.approx(theirs["retain_loss"], rel=0.05, abs=1e-12), step
    original, selected = load_file(bundled.source / UNET), load_mask(two / "mask.safetensors", bundled)
    for name, trained in weights(two).items():
        inside = unpack_bits(selected.bits[name], trained.shape) if name in selected.bits else False
        assert not ((trained.view(torch.int16) != original[name].view(torch.int16)) & ~torch.as_tensor(inside)).any()


def test_a_process_that_dies_stops_the_others_and_the_run_goes_on_to_the_same_end(two, tmp_path, ds_json):
    folder = tmp_path / "run"
    started = time.monotonic()
    died = run([sys.executable, "-c", MORTAL, *command(folder, "--num-processes=2", deepspeed=ds_json)[3:]])
    told = json.loads((tmp_path / "died.json").read_text())
    assert died.returncode == 2
    assert time.monotonic() - started - told["after_s"] < 60
    assert "process 1 was killed by SIGKILL; the others were stopped. Continue with: fastunlearn train" in died.stderr
    assert "process 0: another process of this run has died" in died.stderr
    assert "Traceback" not in died.stderr
    assert not (folder / "model").exists()
    done = run([sys.executable, "-m", "fastunlearn", "train", "--resume", "--output", str(folder)])
    assert done.returncode == 0, done.stderr
    ours, theirs = weights(folder), weights(two)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# The launcher of a run whose process 1 is killed at its third step.
MORTAL = """
import sys, tempfile, time
from fastunlearn.cli.main import main
body = '''
import json, os, signal, sys, time
from pathlib import Path
from fastunlearn.training import trainer
from fastunlearn.cli.main import main
genuine, count = trainer.Trainer._train_step, [0]
def step(self):
    count[0] += 1
    if count[0] == 3 and os.environ["RANK"] == "1":
        seconds = time.time() - float(os.environ["STARTED"])
        (self.checkpoints.parent.with_name("died.json")).write_text(json.dumps({"after_s": seconds}))
        os.kill(os.getpid(), signal.SIGKILL)
    return genuine(self)
trainer.Trainer._train_step = step
sys.exit(main(sys.argv[1:]))
'''
import os
os.environ["STARTED"] = str(time.time())
with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
    file.write(body)
    file.flush()
    from fastunlearn import distributed
    real = distributed.subprocess.Popen
    distributed.subprocess.Popen = lambda words, **more: real([sys.executable, file.name, *words[4:]], **more)
    sys.exit(main(sys.argv[1:]))
"""


def test_two_nodes_of_one_process_each(two, tmp_path, ds_json):
    """Torchrun's rendezvous over loopback, an agent a node."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    launcher += ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=test", "--local-addr=localhost"]
    arguments = command(tmp_path / "run", deepspeed=ds_json)[1:]
    nodes = [
        subprocess.Popen(
            [*launcher, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
        for _ in range(2)
    ]
    said = [node.communicate(timeout=250)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    ours, theirs = weights(tmp_path / "run"), weights(two)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_mistakes_are_told_once_before_anything_starts(tmp_path, ds_json):
    done = run(command(tmp_path / "run", "--num-processes=2", deepspeed=tmp_path / "none.json"))
    assert done.returncode == 2
    assert done.stderr.count("cannot read the DeepSpeed file") == 1
    assert not (tmp_path / "run").exists()
