"""A DeepSpeed file is held against our flags, and what is wrong with it is said in one line."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

from fastunlearn.cli.main import _without_local_rank
from fastunlearn.training.deepspeed_config import read_deepspeed
from fastunlearn.training.shares import estimate_memory

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

DEFAULTS = {
    "world_size": 2,
    "micro_batch_size": None,
    "gradient_accumulation_steps": None,
    "max_grad_norm": 1.0,
    "default_micro_batch_size": 3,
}


@pytest.fixture
def read(tmp_path):
    def run(content, **changes):
        path = tmp_path / "ds.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return read_deepspeed(path, **{**DEFAULTS, **changes})

    return run


@pytest.mark.parametrize(
    ("content", "flags", "sizes"),
    [
        ({}, {}, (3, 1, 6)),
        ({}, {"micro_batch_size": 5, "gradient_accumulation_steps": 2}, (5, 2, 20)),
        ({"train_batch_size": 8}, {}, (4, 1, 8)),
        ({"train_batch_size": 8}, {"world_size": 1}, (8, 1, 8)),
        ({"train_batch_size": 8}, {"micro_batch_size": 2}, (2, 2, 8)),
        ({"train_batch_size": 8, "gradient_accumulation_steps": 4}, {}, (1, 4, 8)),
        ({"train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto"}, {}, (3, 1, 6)),
        (
            {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3, "train_batch_size": 12},
            {},
            (2, 3, 12),
        ),
    ],
)
def test_batch_sizes_follow_from_what_is_given(read, content, flags, sizes):
    settings = read(content, **flags)
    names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    assert tuple(settings[name] for name in names) == sizes


@pytest.mark.parametrize(
    ("content", "flags", "said"),
    [
        ("{", {}, "is not JSON"),
        ("[1]", {}, "one JSON object"),
        ({"zero_optimisation": {}}, {}, "unknown key 'zero_optimisation'"),
        ({"optimizer": {"type": "Adam"}}, {}, "take `optimizer` out: .*--learning-rate"),
        ({"scheduler": {}}, {}, "--lr-scheduler"),
        (
            {"train_batch_size": 10},
            {"micro_batch_size": 3},
            "10 is not micro batch 3 x accumulation 1 x 2 processes = 6",
        ),
        ({"train_batch_size": 7}, {}, "train_batch_size 7 is not micro batch 3 x accumulation 1 x 2 processes = 6"),
        ({"train_micro_batch_size_per_gpu": 4}, {"micro_batch_size": 3}, "= 4, `--micro-batch-size` says 3"),
        ({"gradient_accumulation_steps": 4}, {"gradient_accumulation_steps": 3}, "= 4, `--gradient-acc.* says 3"),
        ({"train_batch_size": 0}, {}, "whole number from 1 on"),
        ({"gradient_clipping": 0.5}, {}, "clips gradients at 0.5, `--max-grad-norm` says 1"),
        ({"fp16": {"enabled": True}}, {}, "Use `bf16`"),
        ({"bf16": True}, {}, "`bf16` must be an object"),
        ({"zero_optimization": {"stage": 4}}, {}, "stage must be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, {}, "nvme is not supported"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, {}, "needs ZeRO stage 3"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, {}, "must keep their bits"),
    ],
)
def test_what_is_wrong_is_named(read, content, flags, said):
    with pytest.raises(ValueError, match=said):
        read(content, **flags)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*nowhere\.json"):
        read_deepspeed(tmp_path / "nowhere.json", **DEFAULTS)


def test_comments_and_auto_say_nothing(read):
    settings = read({"_when": "always", "bf16": {"enabled": "auto"}, "zero_optimization": {"_": 1, "stage": 2}})
    assert "_when" not in settings
    assert "enabled" not in settings["bf16"]
    assert settings["zero_optimization"]["stage"] == 2
    assert settings["zero_optimization"]["reduce_bucket_size"] <= 10**8


def test_the_launchers_local_rank_is_taken_from_wherever_it_puts_it(monkeypatch):
    for arguments in (["--local_rank=1", "train", "--forget", "x"], ["train", "--local-rank", "1", "--forget", "x"]):
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        assert _without_local_rank(arguments) == ["train", "--forget", "x"]
        assert os.environ["LOCAL_RANK"] == "1"


def test_processes_need_a_deepspeed_file(refused, tmp_path, monkeypatch):
    said = refused("train", "--forget", "star", "--output", tmp_path / "run", "--num-processes", 2)
    assert "`--num-processes` needs `--deepspeed FILE`" in said
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "2 processes need `--deepspeed FILE`" in refused("train", "--forget", "star", "--output", tmp_path / "run")
    monkeypatch.setenv("WORLD_SIZE", "many")
    assert "whole numbers" in refused("train", "--forget", "star", "--output", tmp_path / "run")


# ---- memory ----------------------------------------------------------------------------------------------------------

SD15, SDXL = 859_520_964, 2_567_463_684


def estimate(total=SD15, density=1.0, world_size=1, **zero):
    deepspeed = {"bf16": {"enabled": True}, "zero_optimization": zero} if zero else None
    result = estimate_memory(
        total=total,
        trainable=total,
        selected=int(density * total),
        is_masked=density < 1,
        world_size=world_size,
        deepspeed=deepspeed,
        other_parts=0,
        activations=0,
        bank=0,
    )
    return {key: size / 1e9 for key, size in result.device.items()}, {k: v / 1e9 for k, v in result.host.items()}


@pytest.mark.parametrize("total", [SD15, SDXL])
def test_bytes_a_parameter_are_those_of_adamw(total):
    """Float32: weights, gradients, two moments; bf16: 2 + 2, and 12 of master and moments, divided by ZeRO."""
    device, _ = estimate(total)
    assert sum(device.values()) == pytest.approx(16 * total / 1e9)
    device, _ = estimate(total, stage=1, world_size=8)
    assert sum(device.values()) == pytest.approx((2 + 2 + 12 / 8) * total / 1e9, rel=1e-6)
    device, _ = estimate(total, stage=3, world_size=8)
    assert sum(device.values()) == pytest.approx(16 / 8 * total / 1e9, rel=1e-6)


def test_a_mask_makes_the_states_smaller():
    device, _ = estimate(density=0.1)
    assert device["optimizer"] == pytest.approx(0.8 * SD15 / 1e9, rel=1e-6)
    assert device["optimizer"] + device["masks"] < 0.2 * 8 * SD15 / 1e9


def test_what_is_offloaded_is_on_the_host():
    device, host = estimate(stage=3, offload_optimizer={"device": "cpu"})
    assert "optimizer" not in device
    assert host["optimizer"] == pytest.approx(12 * SD15 / 1e9, rel=1e-6)


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.json")), ids=lambda path: path.name)
def test_the_examples_are_read_and_their_figures_are_the_counts(example):
    settings = read_deepspeed(example, **DEFAULTS)
    zero = settings["zero_optimization"]
    for what, said in json.loads(example.read_text())["_memory_each_process"].items():
        total = SD15 if what.startswith("SD1.5") else SDXL
        processes = int(re.search(r"(\d+) process", what)[1])
        device, host = estimate(total, density=0.5, world_size=processes, **zero)
        assert f"= {sum(device.values()):.1f} GB on the device" in said
        assert f"masters and states {host.get('optimizer', device.get('optimizer')):.1f}" in said


def test_a_dry_run_counts_the_models_own_memory(cli, tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    flags = ["--method", "salun", "--mask-density", "0.1", "--trainable", "all"]
    flags += ["--deepspeed", tmp_path / "ds.json", "--num-processes", 2]
    answer = cli("train", "--forget", "star", "--output", tmp_path / "run", "--dry-run", "--device", "cpu", *flags)
    assert (answer.status, answer.err) == (0, "")
    weights = 3_988_680 * 4 / 1e6
    (told,) = re.findall(r"^ {12}training    \d+\.\d MB: (.*)", answer.out, re.MULTILINE)
    assert f"weights {weights:.1f} MB" in told
    assert f"gradients {weights / 2:.1f} MB" in told
    assert "activations" in told


def test_without_deepspeed_it_says_how_to_get_it(refused, tmp_path, monkeypatch):
    (tmp_path / "ds.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    said = refused("train", "--forget", "star", "--deepspeed", tmp_path / "ds.json", "--output", tmp_path / "run")
    assert "pip install 'fastunlearn[deepspeed]'" in said
    assert not (tmp_path / "run").exists()


REFUSED = {
    '{"zero_optimization": {"stage": 2, "overlap_com": true}}': "DeepSpeed refuses `zero_optimization`: overlap_com",
    '{"zero_optimization": {"stage": 3, "offload_param": {"device": "tpu"}}}': "offload_param.device",
    '{"bf16": {"enabled": "maybe"}}': "DeepSpeed refuses `bf16`: enabled",
    '{"bf16": true}': "`bf16` must be an object",
    '{"comms_logger": {"enabled": "x"}}': "DeepSpeed refuses `comms_logger`: enabled",
    '{"comms_logger": 4}': "`comms_logger` must be an object, got 4",
    '{"tensorboard": 1}': "`tensorboard` must be an object, got 1",
    '{"wandb": {"x": 1}}': "DeepSpeed refuses a section: wandb.x",
    '{"csv_monitor": {"enabled": 7}}': "csv_monitor.enabled",
    '{"data_types": 4}': "`data_types` must be an object, got 4",
    '{"data_types": {"grad_accum_dtype": 7}}': "`data_types.grad_accum_dtype` must be one of fp32, fp16, bf16",
    '{"communication_data_type": {}}': "`communication_data_type` must be one of",
    '{"communication_data_type": "int8"}': "`communication_data_type` must be one of",
    '{"gradient_predivide_factor": []}': "`gradient_predivide_factor` must be a number above 0",
    '{"gradient_predivide_factor": 0}': "`gradient_predivide_factor` must be a number above 0",
    '{"steps_per_print": "x"}': "`steps_per_print` must be a number above 0",
    '{"prescale_gradients": "x"}': "`prescale_gradients` must be true or false",
    '{"gradient_clipping": "1.0"}': "`gradient_clipping` must be a number, 0 for none, got '1.0'",
    '{"gradient_clipping": 0}': "clips gradients at 0, `--max-grad-norm` says 1",
    '{"dump_state": 1}': "`dump_state` must be true or false",
    '{"flops_profiler": 3}': "`flops_profiler` must be an object",
    '{"flops_profiler": {"profile_step": "x"}}': "`flops_profiler.profile_step` must be a whole number",
}


@pytest.mark.parametrize(("content", "words"), REFUSED.items(), ids=REFUSED)
def test_what_deepspeed_would_refuse_is_refused_before_anything_is_computed(content, words, refused, tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    (tmp_path / "ds.json").write_text(content)
    flags = ["--method", "esd", "--trajectories", 1, "--trajectory-steps", 2, "--deepspeed", tmp_path / "ds.json"]
    assert words in refused("train", "--forget", "star", *flags, "--output", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ['{"gradient_clipping": 0}', '{"gradient_clipping": null}', "{}"])
def test_no_clipping_is_said_alike_in_file_and_flag(content, tmp_path):
    (tmp_path / "ds.json").write_text("\ufeff" + content)  # and as some editors write it
    assert read_deepspeed(tmp_path / "ds.json", **DEFAULTS | {"max_grad_norm": 0.0})["gradient_clipping"] == 0.0


def test_what_deepspeed_reads_is_not_refused(cli, tmp_path):
    content = {
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "gradient_predivide_factor": 2.0,
        "flops_profiler": {"enabled": False, "profile_step": 3},
        "csv_monitor": {"enabled": False, "output_path": "x"},
        "comms_logger": {"enabled": False},
    }
    (tmp_path / "ds.json").write_text(json.dumps(content))
    flags = ["--method", "esd", "--trajectories", 1, "--trajectory-steps", 2, "--deepspeed", tmp_path / "ds.json"]
    answer = cli("train", "--forget", "star", *flags, "--output", tmp_path / "run", "--dry-run", "--num-processes", 2)
    assert (answer.status, answer.err) == (0, "")


def test_more_processes_than_rows_are_refused(refused, tmp_path):
    (tmp_path / "ds.json").write_text("{}")
    flags = ["--deepspeed", tmp_path / "ds.json", "--num-processes", 9, "--trajectories", 1, "--trajectory-steps", 4]
    said = refused("train", "--forget", "star", "--method", "ovw", *flags, "--dry-run", "--output", tmp_path / "run")
    assert "more processes, 9, than rows, 8" in said
