"""Fixtures that several files share.  Imports are inside, so that the kernels' tests also run without the engine."""

import dataclasses
import math
import os
import shutil
import warnings
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for the network; subprocesses inherit it


@pytest.fixture(scope="session")
def bundled():
    """The bundled model on the CPU.  Tests only look at it: one that trains loads its own."""
    from fastunlearn.models.loading import load_model

    return load_model("shapes", "cpu")


@pytest.fixture
def pipeline_copy(tmp_path):
    """A copy of the bundled pipeline's folder, to be damaged."""
    from fastunlearn.worlds.shapes import pipeline_folder

    return Path(shutil.copytree(pipeline_folder("shapes"), tmp_path / "pipeline"))


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a command gave back."""

    status: int | str | None
    out: str
    err: str


@pytest.fixture
def cli(capsys, monkeypatch):
    """``cli("train", ...)`` runs a command in this process; stderr is no terminal, and a slow machine logs nothing."""
    from fastunlearn.cli import console
    from fastunlearn.cli.main import main

    monkeypatch.setattr(console, "LOG_EVERY_S", math.inf)

    def run(*arguments):
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code
        captured = capsys.readouterr()
        return Answer(status, captured.out, captured.err)

    return run


@pytest.fixture
def random_trunk(tmp_path):
    """``random_trunk("alex")`` writes random weights under torchvision's names and returns the file."""
    from safetensors.torch import save_file

    def write(net):
        import torch

        from fastunlearn.models.runtime import mend_torchvision

        mend_torchvision()
        lpips = pytest.importorskip("lpips")
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torchvision on the package's way to call it
            torch.manual_seed(0)
            trunk = lpips.LPIPS(net=net, pnet_rand=True, verbose=False).net
        state = {"features." + key.partition(".")[2]: value for key, value in trunk.state_dict().items()}
        save_file(state, tmp_path / "trunk.safetensors")
        return tmp_path / "trunk.safetensors"

    return write


@pytest.fixture
def refused(cli):
    """Runs a command that must refuse: status 2 and one line on stderr, which it returns."""

    def run(*arguments):
        answer = cli(*arguments)
        assert answer.status == 2, answer
        assert answer.err.startswith("fastunlearn: "), answer.err
        assert answer.err.endswith("\n"), answer.err
        assert len(answer.err.splitlines()) == 1, answer.err
        assert "Traceback" not in answer.out + answer.err
        return answer.err

    return run


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Two folders of two pictures of the models' size, by the same names."""
    import itertools

    import numpy as np
    from PIL import Image

    root = tmp_path_factory.mktemp("pictures")
    for seed, (kind, name) in enumerate(itertools.product(("images", "surrogates"), ("a", "b"))):
        (root / kind).mkdir(exist_ok=True)
        noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((64, 64), Image.Resampling.BILINEAR).save(root / kind / f"{name}.png")
    return root


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder of Stable Diffusion with a small UNet of random weights, and DDIM."""
    from tiny_models import build, ddim, sd1

    folder = tmp_path_factory.mktemp("tiny")
    build(lambda: sd1(ddim())).save_pretrained(folder)
    return str(folder)
