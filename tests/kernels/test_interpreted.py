"""Runs the tests of the public functions again, on the real kernels, under the interpreter; see ``conftest.py``."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
WITH_A_LONG_TAIL = ("test_noise_loss.py", "test_masked_adamw.py", "test_saliency.py", "test_lpips_head.py")
FILES = (*WITH_A_LONG_TAIL, "test_gradient_dots.py", "test_traffic.py")


def run(file, marker):
    command = [sys.executable, "-m", "pytest", str(FOLDER / file), "-q", "-m", marker, "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=FOLDER.parents[1])
    report = result.stdout + result.stderr
    assert result.returncode == 0, report
    summary = result.stdout.strip().splitlines()[-1]
    assert re.search(r"\b[1-9]\d* passed", summary), report
    assert "skipped" not in summary, report


@pytest.mark.parametrize("file", FILES)
def test_kernels(file):
    run(file, "not slow and not gpu")


@pytest.mark.slow
def test_plans_of_kernels():
    run("test_plans.py", "not slow and not gpu")


@pytest.mark.slow
@pytest.mark.parametrize("file", WITH_A_LONG_TAIL)
def test_kernels_at_length(file):
    run(file, "slow")


def test_every_kernel_is_named_by_a_test():
    package = FOLDER.parents[1] / "kernels/torch-ext/fastunlearn_kernels"
    launched = set(re.findall(r"\b(_\w+_kernel)\[", "".join(path.read_text() for path in package.glob("*.py"))))
    named = set(re.findall(r"took\(\"(_\w+_kernel)\"", "".join((FOLDER / file).read_text() for file in FILES)))
    assert launched
    assert launched == named
