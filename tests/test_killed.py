"""Killed at 23 random moments, what is continued ends byte for byte as if it had not been; of two at once one refuses.

A command is killed, continued, killed again, and at last left to end.  The moments are drawn from a seed, as a share
of the time that the uninterrupted command took, so they fall anywhere: in the imports, a step, a file, the export.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from outputs import files_of
from PIL import Image

from fastunlearn.files.run_folder import RECORD

pytestmark = pytest.mark.slow

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TRAIN = ["train", "--forget=star", "--device=cpu", "--trajectories=1", "--trajectory-steps=4", "--steps=12"]
TRAIN += ["--micro-batch-size=2", "--checkpoint-every=1", "--evaluation-prompts=none", "--trainable=cross-attention-kv"]
MASKED = ["--method=salun", "--mask-density=0.25", "--save=delta"]
ADAPTED = ["--method=esd", "--adapter=lora", "--rank=2"]
SHAPES = ";".join(f"a {color} {shape}" for color in ("red", "blue", "pink") for shape in ("ring", "star", "heart"))
EVALUATE = [
    "evaluate",
    "--original=shapes",
    "--unlearned=shapes",
    "--forget=star",
    "--device=cpu",
    f"--prompts={SHAPES}",
]
EVALUATE += ["--num-inference-steps=2", "--batch-size=1", "--control-pairs=2"]

ATTACK = ["attack", "--original=shapes", "--unlearned=shapes-gold-star", "--concept=star", "--device=cpu"]
ATTACK += [
    "--prompts=a star;a red star;a blue star;a pink star",
    "--attacks=seeds,embedding,relearn:unrelated,completion",
]
ATTACK += ["--num-inference-steps=2", "--batch-size=4", "--budget=40"]

#: Case -> (command, how often it is killed).
CASES = {
    "train": (TRAIN, 4),
    "train with a mask to a delta": ([*TRAIN, *MASKED], 3),
    "train an adapter": ([*TRAIN, *ADAPTED], 2),
    "an adapter by ZeRO-3": ([*TRAIN, *ADAPTED, "--deepspeed=zero3.json", "--num-processes=2"], 1),
    "ZeRO-2 on two processes": ([*TRAIN, *MASKED, "--deepspeed=zero2.json", "--num-processes=2"], 2),
    "ZeRO-3 on two processes": ([*TRAIN, *MASKED, "--deepspeed=zero3.json", "--num-processes=2"], 2),
    "evaluate": (EVALUATE, 4),
    "attack": (ATTACK, 3),
    "evaluate-images": (["evaluate-images", "--original-images=a", "--unlearned-images=b", "--metric=shapes"], 2),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with what the commands read."""
    here = tmp_path_factory.mktemp("here")
    for stage in (2, 3):
        (here / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    draw = random.Random(0)
    for side in ("a", "b"):
        (here / side).mkdir()
        for number in range(40):
            noise = bytes(draw.randrange(256) for _ in range(3 * 64 * 64))
            Image.frombytes("RGB", (64, 64), noise).save(here / side / f"{number}.png")
    return here


def start(place, command, output, *more):
    words = [sys.executable, "-m", "fastunlearn", *command, f"--output={output}", *more]
    return subprocess.Popen(
        words, cwd=place, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def end(process):
    _, said = process.communicate(timeout=280)
    return process.returncode, said


#: Files that say where, when or how fast a run went.
TIMES = {RECORD, "run.json", "metrics.jsonl", "state.json", "config.yaml"}


def results_of(folder):
    """What a run is for: its bytes by name."""
    return files_of(folder, without=TIMES)


def kill_after(process, seconds):
    """Whether it had to be killed; the processes that it started end by themselves."""
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    status, said = end(process)
    assert status in (0, -signal.SIGKILL), said
    return status != 0


def continuing(place, output):
    """The flag with which a user goes on from what is there."""
    if not (place / output).exists():
        return []
    begun = any((place / output / name).exists() for name in ("run-key.json", "journal"))
    return ["--resume"] if begun else ["--overwrite"]


def again(place, command, output):
    """Start once more; the workers of the killed one have a moment to end."""
    flags = continuing(place, output)
    if command[0] == "evaluate-images":  # reads again from the start
        flags = ["--overwrite"] if flags else []
    return start(place, command, output, *flags)


@pytest.mark.parametrize("case", CASES)
def test_killed_at_random_moments_it_ends_as_if_it_had_not_been(case, place):
    command, kills = CASES[case]
    if "--num-processes=2" in command:
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    name = case.replace(" ", "-")
    began = time.monotonic()
    status, said = end(start(place, command, f"{name}-whole"))
    took = time.monotonic() - began
    assert status == 0, said
    draw, killed, output = random.Random(case), 0, f"{name}-0"
    for attempt in range(3 * kills):
        if killed == kills:
            break
        if kill_after(again(place, command, output), took * draw.uniform(0.25, 1.0)):
            killed += 1
            time.sleep(0.5)
        else:  # it came to its end first
            assert results_of(place / output) == results_of(place / f"{name}-whole")
            output = f"{name}-{attempt + 1}"
    assert killed == kills
    status, said = end(again(place, command, output))
    assert status == 0, said
    assert results_of(place / output) == results_of(place / f"{name}-whole")
    assert not [path for path in place.rglob("*") if path.name.endswith((".tmp", ".lock"))], (
        "nothing half-written stays"
    )


#: The commands that write.
WRITERS = {
    "train": TRAIN,
    "mask": ["mask", "--forget=star", "--device=cpu", "--trajectories=1", "--density=0.5"],
    "evaluate": EVALUATE,
    "attack": ATTACK,
    "evaluate-images": CASES["evaluate-images"][0],
    "compare": ["compare", "first", "second"],
    "apply": ["apply", "--model=shapes", "--delta=made/delta.safetensors"],
    "demo": ["demo"],
}


@pytest.fixture(scope="module")
def prepared(place):
    """What compare and apply read."""
    for command, output in ((EVALUATE, "first"), (EVALUATE, "second"), ([*TRAIN, *MASKED, "--steps=1"], "made")):
        status, said = end(start(place, command, output))
        assert status == 0, said
    return place


@pytest.mark.parametrize("name", WRITERS)
def test_of_two_commands_at_once_on_one_folder_one_refuses(name, prepared):
    output = f"both-{name}" + (".safetensors" if name == "mask" else "")
    both = [start(prepared, WRITERS[name], output) for _ in range(2)]
    if name == "demo":  # long: the one that goes on is known to go on
        while all(process.poll() is None for process in both):
            time.sleep(0.05)
        for process in both:
            if process.poll() is None:
                process.kill()
    ended = [end(process) for process in both]
    refused = [said for status, said in ended if status == 2]
    assert len(refused) == 1, ended
    assert len(refused[0].strip().splitlines()) == 1
    assert "Traceback" not in "".join(said for _, said in ended)
