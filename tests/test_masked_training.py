"""Runs with a mask: what it leaves out keeps its bytes, whatever else is asked; deltas rebuild the same files."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch
from fastunlearn_kernels import pack_bits, unpack_bits
from outputs import files_of
from safetensors import safe_open
from safetensors.torch import load_file

from fastunlearn.distributed import World
from fastunlearn.errors import UserError
from fastunlearn.training.checkpoint import Piece, load_checkpoint, save_checkpoint
from fastunlearn.training.config import ApplyConfig, MaskConfig, TrainConfig
from fastunlearn.training.engine import TorchEngine
from fastunlearn.training.export import apply
from fastunlearn.training.saliency import mask
from fastunlearn.training.selection import Selection, load_mask
from fastunlearn.training.unlearn import unlearn

TINY = {"forget": "star", "trajectories": 1, "trajectory_steps": 4, "micro_batch_size": 4, "evaluation_prompts": "none"}
KV = {"trainable": "cross-attention-kv"}
UNET = "unet/diffusion_pytorch_model.safetensors"


def config(tmp_path, name="run", **changes):
    return TrainConfig(output=str(tmp_path / name), **{**TINY, "steps": 3, "method": "salun", **KV, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    unlearn(config(folder, mask_density=0.25, weight_decay=0.1, checkpoint_every=1))
    return folder / "run"


def changes(bundled, model):
    """name -> bool mask of the elements whose bits differ from the original's file."""
    original, trained = load_file(bundled.source / UNET), load_file(model / UNET)
    return {name: original[name].view(torch.int16) != trained[name].view(torch.int16) for name in original}


def test_only_selected_elements_change_and_nearly_all_do(finished, bundled):
    selected = load_mask(finished / "mask.safetensors", bundled)
    moved = outside = 0
    for name, changed in changes(bundled, finished / "model").items():
        bits = selected.bits.get(name)
        inside = torch.zeros_like(changed) if bits is None else unpack_bits(bits, changed.shape)
        moved += int((changed & inside).sum())
        outside += int((changed & ~inside).sum())
    assert outside == 0
    assert moved > 0.95 * selected.total


def test_a_run_makes_the_mask_that_the_command_makes(finished, bundled, tmp_path):
    made = MaskConfig(
        forget="star",
        output=str(tmp_path / "mask"),
        density=0.25,
        trajectories=1,
        trajectory_steps=4,
        micro_batch_size=4,
        **KV,
    )
    mask(made)
    ours, theirs = load_mask(tmp_path / "mask", bundled), load_mask(finished / "mask.safetensors", bundled)
    assert (ours.made, ours.shapes) == (theirs.made, theirs.shapes)
    assert all(torch.equal(ours.bits[name], bits) for name, bits in theirs.bits.items())
    with pytest.raises(ValueError, match="exists"):
        mask(made)


def test_both_make_it_on_the_same_images_by_default(tmp_path, monkeypatch):
    asked = []

    def told(model, prompts, names, budget, *, on_progress, **settings):
        asked.append((tuple(prompts), tuple(names), budget, settings))
        raise UserError("enough")

    for module in ("saliency", "unlearn"):
        monkeypatch.setattr(f"fastunlearn.training.{module}.make_mask", told)
    where = {"forget": "star", "trainable": "cross-attention-kv", "device": "cpu"}
    with pytest.raises(UserError, match="enough"):
        mask(MaskConfig(output=str(tmp_path / "mask"), density=0.5, **where))
    with pytest.raises(UserError, match="enough"):
        unlearn(TrainConfig(output=str(tmp_path / "run"), method="salun", evaluation_prompts="none", **where))
    assert asked[0] == asked[1]
    assert asked[0][2].num_inference_steps == 15


@pytest.mark.parametrize("method", ["neggrad", "ovw"])
def test_any_method_takes_a_mask(finished, bundled, tmp_path, method):
    given = str(finished / "mask.safetensors")
    unlearn(config(tmp_path, method=method, mask=given, trainable=None, clip_scope="all", steps=1))
    selected = load_mask(finished / "mask.safetensors", bundled)
    for name, changed in changes(bundled, tmp_path / "run" / "model").items():
        inside = unpack_bits(selected.bits[name], changed.shape) if name in selected.bits else torch.zeros_like(changed)
        assert not (changed & ~inside).any(), name


def test_the_states_hold_only_selected_elements(bundled):
    """At density 0.1, below 20 % of the dense optimizer's bytes, its masks included."""

    def bytes_of(optimizer):
        states = [v for state in optimizer.state.values() for v in state.values()]
        masks = [t for s in optimizer._selections.values() for t in (s.bits, s.flat_bits, s.ranks)]
        return sum(tensor.nbytes for tensor in states + masks)

    def stepped(bits):
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(512, 513), torch.nn.Linear(513, 64))
        names = [name for name, _ in module.named_parameters()]
        packed = {n: bits(p) for n, p in module.named_parameters()} if bits else None
        engine = TorchEngine(module, Selection.of(module, names, packed), learning_rate=1e-3)
        engine.backward(module(torch.ones(1, 512)).sum())
        engine.step()
        return bytes_of(engine.optimizer)

    assert stepped(lambda p: pack_bits(torch.rand(p.shape) < 0.1)) < 0.2 * stepped(None)


def test_two_half_batches_are_one_batch(tmp_path):
    unlearn(config(tmp_path, "whole", micro_batch_size=4, mask_density=0.5))
    mask_file = str(tmp_path / "whole" / "mask.safetensors")
    unlearn(config(tmp_path, "halves", micro_batch_size=2, gradient_accumulation_steps=2, mask=mask_file))
    logged = [json.loads((tmp_path / name / "metrics.jsonl").read_text()) for name in ("whole", "halves")]
    for key in ("loss", "grad_norm", "forget_loss", "retain_loss"):
        assert logged[0][key] == pytest.approx(logged[1][key], rel=1e-3), key
    ends = [load_file(tmp_path / name / "checkpoints/step-3/rank-0.safetensors") for name in ("whole", "halves")]
    for key in ends[0]:
        if key.startswith("weight/"):  # Adam turns the rounding of a gradient near 0 into a step of any size up to lr
            assert (ends[0][key] - ends[1][key]).abs().mean() < 1e-6


# ---- delta -----------------------------------------------------------------------------------------------------------


def test_a_delta_rebuilds_the_model_bit_for_bit(finished, bundled, tmp_path):
    unlearn(config(tmp_path, mask_density=0.25, weight_decay=0.1, save="delta"))
    delta = tmp_path / "run" / "delta.safetensors"
    assert not (tmp_path / "run" / "model").exists()
    assert delta.stat().st_size < 0.2 * (bundled.source / UNET).stat().st_size
    apply(ApplyConfig(model="shapes", delta=str(delta), output=str(tmp_path / "model")))
    assert files_of(tmp_path / "model") == files_of(finished / "model")
    with pytest.raises(ValueError, match="not empty"):
        apply(ApplyConfig(model="shapes", delta=str(delta), output=str(tmp_path / "model")))


def test_a_delta_is_read_by_safetensors_alone(finished, bundled, tmp_path):
    unlearn(config(tmp_path, mask_density=0.25, weight_decay=0.1, save="delta"))
    original, wanted = load_file(bundled.source / UNET), load_file(finished / "model" / UNET)
    with safe_open(tmp_path / "run" / "delta.safetensors", "pt") as file:
        shapes = json.loads(file.metadata()["fastunlearn"])["shapes"]
        for name, shape in shapes.items():
            flat = original[name].flatten().clone()
            if f"{name}.indices" in file.keys():  # noqa: SIM118 - no mapping
                where = file.get_tensor(f"{name}.indices").long()
            else:
                bits = file.get_tensor(f"{name}.bits").tolist()
                where = torch.tensor([i for i in range(flat.numel()) if bits[i // 8] >> (i % 8) & 1])
            flat[where] = file.get_tensor(f"{name}.values")
            assert torch.equal(flat.view(shape), wanted[name])
    assert {name for name in wanted if not torch.equal(wanted[name], original[name])} == set(shapes)


def test_a_delta_of_another_original_is_refused(pipeline_copy, tmp_path):
    unlearn(config(tmp_path, steps=1, method="ovw", save="delta"))
    config_file = pipeline_copy / "unet" / "config.json"
    config_file.write_text(config_file.read_text() + " ")
    delta = str(tmp_path / "run" / "delta.safetensors")
    with pytest.raises(ValueError, match="belongs to another original"):
        apply(ApplyConfig(model=str(pipeline_copy), delta=delta, output=str(tmp_path / "model")))
    weights = str(pipeline_copy / UNET)
    with pytest.raises(ValueError, match="is no delta"):
        apply(ApplyConfig(model="shapes", delta=weights, output=str(tmp_path / "model")))
    assert not (tmp_path / "model").exists()


def test_a_run_saved_as_a_delta_says_what_to_do(tmp_path):
    from fastunlearn.models.loading import load_model

    unlearn(config(tmp_path, steps=1, method="ovw", save="delta"))
    with pytest.raises(ValueError, match="fastunlearn apply"):
        load_model(str(tmp_path / "run"), "cpu")


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def piece(name, start, stop):
    values = {kind: torch.arange(start, stop) + offset for kind, offset in (("weight", 0.5), ("exp_avg", 100.0))}
    return Piece(name, start, values, step=7.0)


class Rank(World):
    """One of two processes that save a checkpoint at once, in threads."""

    meeting = threading.Barrier(2)

    def barrier(self):
        self.meeting.wait(60)


def saved_by_two(folder, lengths, parts, state):
    threads = [
        threading.Thread(target=save_checkpoint, args=(folder, Rank(rank, 2), pieces, lengths, state))
        for rank, pieces in enumerate(parts)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_any_division_of_a_checkpoint_is_read_back_as_any_other(tmp_path):
    lengths = {"a": 10, "b": 3}
    both = tmp_path / "both"
    saved_by_two(both, lengths, [[piece("a", 0, 4)], [piece("a", 4, 10), piece("b", 0, 3)]], {"step": 7})
    assert {path.name for path in both.iterdir()} == {"state.json", "rank-0.safetensors", "rank-1.safetensors"}
    result, trainer = load_checkpoint(both, lengths, {"a": (2, 7), "b": (3, 3)})
    assert trainer == {"step": 7}
    assert result["a"].values["weight"].tolist() == [2.5, 3.5, 4.5, 5.5, 6.5]
    assert result["a"].values["exp_avg"].tolist() == [102.0, 103.0, 104.0, 105.0, 106.0]
    assert result["a"].step == 7.0
    with pytest.raises(ValueError, match="another run"):
        load_checkpoint(both, {"a": 11, "b": 3}, {"a": (0, 10)})
    (both / "rank-0.safetensors").unlink()
    with pytest.raises(ValueError, match="is damaged"):
        load_checkpoint(both, lengths, {"a": (0, 10)})


@pytest.mark.parametrize("name", ["state.json", "rank-0.safetensors"])
def test_any_changed_bit_of_a_checkpoint_is_found(name, tmp_path):
    lengths = {"a": 10}
    save_checkpoint(tmp_path / "c", World(), [piece("a", 0, 10)], lengths, {"step": 7})
    path = tmp_path / "c" / name
    whole = path.read_bytes()
    for bit in random.Random(0).sample(range(8 * len(whole)), 60):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"is damaged .*Delete it to resume from an older one"):
            load_checkpoint(tmp_path / "c", lengths, {"a": (0, 10)})
    path.write_bytes(whole)
    load_checkpoint(tmp_path / "c", lengths, {"a": (0, 10)})


def test_a_checkpoint_of_other_elements_is_refused(tmp_path):
    def engine(seed, density=0.5):
        module = torch.nn.Linear(9, 7)
        torch.manual_seed(seed)
        order = torch.rand(63).argsort().argsort() < 63 * density
        bits = {"weight": pack_bits(order.view(7, 9))}
        return TorchEngine(module, Selection.of(module, ["weight"], bits), learning_rate=1e-3)

    engine(0).save(tmp_path / "step-1", {"step": 1})
    assert engine(0).load(tmp_path / "step-1") == {"step": 1}
    for other in (engine(1), engine(0, density=0.3)):  # as many elements, but others; fewer
        with pytest.raises(ValueError, match="is of another run"):
            other.load(tmp_path / "step-1")


def test_a_resumed_run_divides_its_rows_as_it_likes_but_takes_as_many(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    same = {"mask_density": 0.25, "weight_decay": 0.1, "checkpoint_every": 1, "resume": True}
    with pytest.raises(ValueError, match="took 4 rows per step, now it is 2"):
        unlearn(config(tmp_path, micro_batch_size=2, **same))
    unlearn(config(tmp_path, micro_batch_size=2, gradient_accumulation_steps=2, **same))


KILLED = """
import os, signal, sys
from fastunlearn.training import checkpoint, export, trainer
from fastunlearn.__main__ import main
where, count = sys.argv[1], [0]

def die_at(module, name, when):
    genuine = getattr(module, name)
    def mortal(*args, **kwargs):
        count[0] += 1
        if count[0] == when:
            os.kill(os.getpid(), signal.SIGKILL)
        return genuine(*args, **kwargs)
    setattr(module, name, mortal)

if where == "in a checkpoint":  # the second: its tensors are written, its state is not
    die_at(checkpoint, "write_json", 2)
elif where == "between steps":
    die_at(trainer.Trainer, "_train_step", 3)
elif where == "removing a checkpoint":
    die_at(checkpoint.shutil, "rmtree", 5)
else:  # the pipeline is copied, its weights are not laid over yet
    die_at(export, "overlay", 1)
main(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["in a checkpoint", "between steps", "removing a checkpoint", "in the export"])
def test_a_killed_run_ends_like_one_that_was_not(finished, tmp_path, where):
    folder = tmp_path / "run"
    flags = {
        **TINY,
        **KV,
        "steps": 3,
        "method": "salun",
        "mask_density": 0.25,
        "weight_decay": 0.1,
        "checkpoint_every": 1,
    }
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in {**flags, "output": folder}.items()]
    command = [sys.executable, "-c", KILLED, where, "train", *arguments]
    threads = str(torch.get_num_threads())  # the bits are those of one number of threads
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": threads}
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    saved = sorted((folder / "checkpoints").glob("step-*"))
    assert saved, "a checkpoint is there"
    assert not (folder / "model").exists()
    unlearn(config(tmp_path, mask_density=0.25, weight_decay=0.1, checkpoint_every=1, resume=True))
    assert files_of(folder / "model") == files_of(finished / "model")
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-2", "step-3"]
    assert not list(folder.rglob("*.tmp"))
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [3]


@pytest.mark.slow
def test_stage_3_trains_in_one_process_without_a_launcher(tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    arguments = [f"--{n.replace('_', '-')}={v}" for n, v in {**TINY, **KV, "method": "salun", "steps": 2}.items()]
    arguments += ["--mask-density=0.25", f"--deepspeed={tmp_path / 'ds.json'}", f"--output={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "fastunlearn", "train", *arguments]
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=alone)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "model" / "model_index.json").is_file()
