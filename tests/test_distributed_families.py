"""ZeRO-3 over two processes on tiny models with the classes of FLUX and SDXL: what one process trains, two train."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import build, flux, sdxl

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (pip install 'fastunlearn[deepspeed]')")
pytestmark = pytest.mark.slow  # DeepSpeed takes seconds to import, in every process

TRAIN = {
    **{"method": "ovw", "forget": "Van Gogh", "anchor": "a painter", "retain-prompts": "a dog;a cat", "device": "cpu"},
    **{"trajectories": 1, "trajectory-steps": 4, "steps": 2, "learning-rate": 1e-3, "evaluation-prompts": "none"},
}
CASES = {"flux": (flux, "transformer", ("add_",)), "sdxl": (sdxl, "unet", (".attn2.",))}


def run(output, *more, **flags):
    said = [f"--{name}={value}" for name, value in {**TRAIN, "output": output, **flags}.items()]
    command = [sys.executable, "-m", "fastunlearn", "train", *said, *more]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()][-1]


@pytest.mark.parametrize("family", CASES)
def test_zero_3_over_two_processes_trains_a_family_as_one_process_does(family, tmp_path):
    make, part, parts_of_names = CASES[family]
    model = tmp_path / family
    build(make).save_pretrained(model)
    (tmp_path / "ds.json").write_text(json.dumps({"train_batch_size": 2, "zero_optimization": {"stage": 3}}))
    logs = [
        run(tmp_path / "two", "--num-processes=2", model=model, deepspeed=tmp_path / "ds.json"),
        run(tmp_path / "one", model=model, **{"micro-batch-size": 2}),
    ]
    for key in ("loss", "grad_norm", "forget_loss", "retain_loss"):
        assert logs[0][key] == pytest.approx(logs[1][key], rel=1e-4), key
    file = f"{part}/diffusion_pytorch_model.safetensors"
    original, two, one = (load_file(f / file) for f in (model, tmp_path / "two" / "model", tmp_path / "one" / "model"))
    changed = {name for name in original if not torch.equal(original[name], two[name])}
    assert changed
    assert all(any(word in name for word in parts_of_names) for name in changed)
    moved = torch.cat([(one[name] - original[name]).flatten() for name in sorted(changed)])
    apart = torch.cat([(one[name] - two[name]).flatten() for name in sorted(changed)])
    assert apart.norm() < 0.01 * moved.norm()
    assert float(moved.abs().max()) > 1e-3


def test_bfloat16_weights_under_zero_3_keep_float32_masters_of_the_files_own_values(tmp_path):
    """With no step the export is the original's bytes; with two, what is not selected keeps them."""
    model, file = tmp_path / "model", "unet/diffusion_pytorch_model.safetensors"
    build(sdxl).save_pretrained(model)
    settings = {"train_batch_size": 2, "zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    frugal = ("--num-processes=2", "--mixed-precision=bf16", "--weights-dtype=bf16", "--gradient-checkpointing")
    run(tmp_path / "two", *frugal, model=model, deepspeed=tmp_path / "ds.json")
    original, two = load_file(model / file), load_file(tmp_path / "two" / "model" / file)
    changed = {name for name in original if not torch.equal(original[name], two[name])}
    assert changed
    assert all(".attn2." in name for name in changed)
    assert max(float((original[name] - two[name]).abs().max()) for name in changed) < 1e-2
