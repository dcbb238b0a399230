"""The package stands alone: torch only, a valid Hugging Face Hub kernel, no shadow over PyPI's ``kernels``."""

import ast
import importlib.metadata
import inspect
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import fastunlearn_kernels
import pytest
import torch

ROOT = Path(__file__).parents[2]
PROJECT = ROOT / "kernels"
PACKAGE = PROJECT / "torch-ext" / "fastunlearn_kernels"
FILES = sorted(PACKAGE.glob("*.py"))


def run_python(code, *arguments, cwd, path):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(command, cwd=cwd, env={"PYTHONPATH": str(path)}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_public_names():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    names = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
    )
    assert names == [
        "MaskedAdamW",
        "accumulate_saliency_",
        "gradient_dots",
        "lpips_distance",
        "noise_pred_loss",
        "pack_bits",
        "projection_coefficient",
        "saliency_mask",
        "unpack_bits",
    ]
    for name in names:
        documented = inspect.getdoc(getattr(fastunlearn_kernels, name))
        assert documented
        assert "Raises:" in documented or name == "projection_coefficient"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_imports_are_relative_or_torch_or_triton(file):
    source = file.read_text()
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    for node in ast.walk(ast.parse(source, feature_version=(3, 9))):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1 or (node.level == 0 and node.module.split(".")[0] in allowed)
    # the Hub allows operators in a generated namespace only
    assert ("torch.library" in source) == (file.name == "operators.py")


def test_hub_project():
    build = tomllib.loads((PROJECT / "build.toml").read_text())
    assert build["general"]["name"].replace("-", "_") == PACKAGE.name
    assert (
        build["general"]["license"].lower()
        == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"].lower()
    )
    assert set(build["general"]["backends"]) == {"cpu", "cuda", "rocm"}
    assert "torch-noarch" in build
    for name in ("flake.nix", "CARD.md"):
        assert (PROJECT / name).is_file()
    assert not (PACKAGE / PACKAGE.name).exists()
    assert not (PACKAGE / "_ops.py").exists()


def test_operators_take_the_prefix_that_the_hubs_builder_makes(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "made_up", ignore=shutil.ignore_patterns("__pycache__"))
    prefix = "def add_op_namespace_prefix(name): return '_made_up_0123abc::' + name\n"
    (tmp_path / "made_up" / "_ops.py").write_text(prefix)
    code = "import torch, made_up; print(torch.ops._made_up_0123abc.lpips_distance)"
    assert run_python(code, cwd=tmp_path, path=tmp_path).strip() == "_made_up_0123abc.lpips_distance"


def test_without_the_native_source_and_library_the_reference_serves(tmp_path):
    """What the Hub's builder makes of a `torch-noarch` kernel: the Python files alone."""
    shutil.copytree(
        PACKAGE, tmp_path / "bare", ignore=shutil.ignore_patterns("__pycache__", "native.cpp", "_native.so")
    )
    code = """
import torch, bare
print(bare.launch.backend_of(torch.ones(1)), float(bare.gradient_dots([torch.ones(3)])[0]))
"""
    assert run_python(code, cwd=tmp_path, path=tmp_path).strip() == "reference 3.0"


def test_loads_under_another_name(tmp_path):
    """As the Hub loads it: a folder with a name made up for the build, registered under an identifier."""
    shutil.copytree(PACKAGE, tmp_path / "torch-cpu", ignore=shutil.ignore_patterns("__pycache__"))
    code = """
import importlib.util, sys, torch
name = "_made_up_0123abc"
spec = importlib.util.spec_from_file_location(name, sys.argv[1] + "/torch-cpu/__init__.py")
module = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
loss, _ = module.noise_pred_loss(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 1, 2, 2), torch.ones(1, 1), torch.ones(1))
assert loss == 1 and "fastunlearn_kernels" not in sys.modules
"""
    run_python(code, tmp_path, cwd=tmp_path, path="")


def test_loads_with_the_hub_client(tmp_path):
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the PyPI package `kernels` is not installed")
    from kernels import get_local_kernel

    build = tmp_path / "build" / "torch-cpu"
    shutil.copytree(PACKAGE, build, ignore=shutil.ignore_patterns("__pycache__"))
    general = tomllib.loads((PROJECT / "build.toml").read_text())["general"]
    metadata = {
        "name": general["name"],
        "id": "_fastunlearn_kernels_cpu_0000000",
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    (build / "metadata.json").write_text(json.dumps(metadata))
    kernel = get_local_kernel(tmp_path)
    assert kernel.gradient_dots([torch.ones(3)])[0] == 3


def test_importing_needs_neither_triton_nor_torchvision():
    code = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch, fastunlearn_kernels as fk
assert not any(name.split(".")[0] in ("torchvision", "diffusers", "fastunlearn", "deepspeed") for name in sys.modules)
param = torch.nn.Parameter(torch.ones(4))
optimizer = fk.MaskedAdamW([param], grad_masks={param: fk.saliency_mask(torch.arange(4.0), 0.5)})
param.grad = torch.ones(4)
optimizer.step()
assert (param != 1).tolist() == [False, False, True, True]
"""
    run_python(code, cwd=ROOT, path=PACKAGE.parent)


def test_gpu_tensors_without_triton_are_an_error_not_a_fallback(monkeypatch):
    class Gpu:
        is_cuda = True

    assert fastunlearn_kernels.launch.runs_triton(Gpu())
    monkeypatch.setattr(fastunlearn_kernels.launch, "triton", None)
    with pytest.raises(RuntimeError, match="need Triton"):
        fastunlearn_kernels.launch.runs_triton(Gpu())


@pytest.mark.parametrize("folder", ["kernels", "kernels/torch-ext", "packaging", "benchmarks", "tests/kernels"])
def test_no_folder_becomes_a_package(folder):
    assert not (ROOT / folder / "__init__.py").exists()
    if folder.startswith("kernels"):
        assert not list((ROOT / folder).glob("*.py"))


def test_the_pypi_package_kernels_is_not_shadowed(tmp_path):
    """diffusers and transformers import ``kernels`` where it is installed; from our root they must get theirs."""
    installed = tmp_path / "site"
    (installed / "kernels").mkdir(parents=True)
    (installed / "kernels" / "__init__.py").write_text("MINE = False\n")
    assert run_python("import kernels; print(kernels.MINE)", cwd=ROOT, path=installed).strip() == "False"
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s is None or s.origin is None)"
    assert run_python(code, cwd=ROOT, path="").strip() == "True"


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_noise_pred_loss_compiles_into_one_graph(backend):
    noise_pred, teacher = torch.randn(2, 4, 5, 5, requires_grad=True), torch.randn(2, 2, 4, 5, 5)
    rest = (teacher, torch.randn(2, 2), torch.randn(2))
    mask = torch.rand(2, 1, 5, 5) > 0.5
    expected, expected_per_row = fastunlearn_kernels.noise_pred_loss(noise_pred, *rest, spatial_mask=mask)
    (expected_gradient,) = torch.autograd.grad(expected * 3, noise_pred)
    compiled = torch.compile(fastunlearn_kernels.noise_pred_loss, backend=backend, fullgraph=True)
    loss, per_row = compiled(noise_pred, *rest, spatial_mask=mask)
    (gradient,) = torch.autograd.grad(loss * 3, noise_pred)
    torch.testing.assert_close((loss, per_row, gradient), (expected, expected_per_row, expected_gradient))
