"""What the real compiler makes of the kernels on sm_80, sm_90, sm_100, gfx942: no spills, wide accesses."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
# the bfloat16 path of each kernel; the rest is the long tail
SCENARIOS = ("loss", "adamw select", "adamw compact", "lpips alex", "saliency", "dots masked")
TAIL = (
    "loss fp16",
    "loss all options",
    "adamw dense",
    "adamw fp32 dense",
    "adamw fp32 select",
    "adamw fp32 compact",
    "lpips vgg",
    "lpips squeeze fp32",
    "dots",
)
TARGETS = ("sm_90", "sm_80", "gfx942")
MAX_REGISTERS = 128

# at least so many loads and stores of 128 bits: one for 8 elements of 16 bits, two for 8 of 32
WIDE = {
    "loss": {"_noise_pred_loss_kernel": (3, 1), "_scale_kernel": (4, 4)},
    "loss fp16": {"_noise_pred_loss_kernel": (3, 2)},
    "loss all options": {"_noise_pred_loss_kernel": (5, 1)},
    "adamw dense": {"_masked_adamw_kernel": (7, 7)},
    "adamw select": {"_masked_adamw_kernel": (8, 7)},
    "adamw fp32 dense": {"_masked_adamw_kernel": (8, 6)},
    "adamw fp32 select": {"_masked_adamw_kernel": (8, 6)},
    "lpips alex": {"_lpips_head_kernel": (8 * 5, 0)},
    "lpips vgg": {"_lpips_head_kernel": (8 * 5, 0)},
    "lpips squeeze fp32": {"_lpips_head_kernel": (16 * 7, 0)},
    "saliency": {"_accumulate_kernel": (3, 2), "_histogram_kernel": (2, 0), "_pack_kernel": (2, 0)},
    "dots": {"_gradient_dots_kernel": (2, 0)},
    "dots masked": {"_gradient_dots_kernel": (2, 0)},
}


@functools.cache
def compiled(target, scenarios):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(FOLDER.parents[1] / "kernels/torch-ext")
    command = [sys.executable, str(FOLDER / "offline_compile.py"), target, *scenarios]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def check(target, scenarios):
    reports = compiled(target, scenarios)
    assert set(reports) == set(scenarios)
    for scenario, kernels in reports.items():
        assert kernels
        for kernel, report in kernels.items():
            where = f"{scenario}, {kernel} on {target}: {report}"
            assert report["spills"] == 0, where
            assert 0 < report["registers"] <= MAX_REGISTERS, where
            assert report["float_atomics"] == 0, where
        for kernel, (loads, stores) in WIDE.get(scenario, {}).items():
            report = kernels[kernel]
            for kind, wanted in (("loads", loads), ("stores", stores)):
                count = report[kind].get("128", 0)
                assert count >= wanted, f"{scenario}, {kernel} on {target}: {report}"


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_well(target):
    check(target, SCENARIOS)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_variant_compiles_well(target):
    check(target, TAIL)


@pytest.mark.slow
def test_kernels_compile_well_for_blackwell():
    check("sm_100", SCENARIOS)


def test_loss_accesses_are_all_wide():
    """One 128-bit access a tensor and thread; what else is loaded are the row's scalars, 32 bits each."""
    report = compiled("sm_90", SCENARIOS)["loss"]["_noise_pred_loss_kernel"]
    assert report["loads"] == {"128": 3, "32": 3}
    assert report["stores"] == {"128": 1, "32": 1}


def test_compact_states_are_read_element_by_element_and_nothing_else_is():
    report = compiled("sm_90", SCENARIOS)["adamw compact"]["_masked_adamw_kernel"]
    # twice, for whole and for last blocks: m, v and master of 4 elements; gradient and weight 64 bits wide, or alone
    assert report["loads"]["32"] <= 2 * 3 * 4 + 8
    assert report["stores"]["32"] == 2 * 3 * 4
    assert report["stores"]["64"] == 1


@pytest.mark.parametrize("target", ["sm_90", "sm_80"])
def test_lpips_does_not_fuse_what_would_break_symmetry(target):
    assert compiled(target, SCENARIOS)["lpips alex"]["_lpips_head_kernel"]["fused_multiply_adds"] == 0
