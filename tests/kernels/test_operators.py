"""The operations under compilers, fake tensors, ``torch.func`` and dispatch modes, which see operators only.

On whatever serves CPU tensors here: an operator calls what the other tests try on each backend.
"""

import inspect
import subprocess
import sys
from pathlib import Path

import fastunlearn_kernels as fk
import pytest
import torch
from fastunlearn_kernels import launch, operators
from torch._subclasses.fake_tensor import FakeTensorMode

ROOT = Path(__file__).parents[2]
SHAPE = (3, 4, 6, 5)


@pytest.fixture(autouse=True)
def _poisoned_buffers():
    """Plain buffers, unlike in the other files: what is traced allocates them."""


def loss_inputs(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)

    def randn(*size):
        return torch.randn(size, generator=g)

    inputs = [randn(*SHAPE).to(dtype), randn(2, *SHAPE).to(dtype), randn(3, 2), randn(3)]
    return inputs, {"spatial_mask": randn(3, 1, 6, 5) > 0, "snr": randn(3).abs() + 0.1, "snr_gamma": 5.0}


def head_inputs():
    g = torch.Generator().manual_seed(0)
    features = [[torch.randn(2, c, 5, 5, generator=g).relu() for c in (8, 3)] for _ in "01"]
    return *features, [torch.rand(c, generator=g) for c in (8, 3)]


def dots_inputs():
    g = torch.Generator().manual_seed(0)
    sides = [[torch.randn(s, generator=g) for s in ((7, 9), (1000,))] for _ in "01"]
    return *sides, [fk.pack_bits(torch.rand(t.shape, generator=g) > 0.5) for t in sides[0]]


def masked_dots(gradients0, gradients1, masks):
    return fk.gradient_dots(gradients0, gradients1, grad_masks=masks)


def mask(values, other):
    return fk.saliency_mask([values, other], 0.3)


def accumulated(values, gradient):
    total = values.clone()
    fk.accumulate_saliency_([total], [gradient])
    return total


def scores():
    g = torch.Generator().manual_seed(0)
    return torch.randn(70, 3, generator=g), torch.randn(33, generator=g)


CALLS = {
    "LPIPS": (fk.lpips_distance, head_inputs),
    "dots": (masked_dots, dots_inputs),
    "mask": (mask, scores),
    "accumulate": (accumulated, lambda: (scores()[0], scores()[0].bfloat16())),
    "pack": (fk.pack_bits, lambda: (scores()[0] > 0,)),
}


@pytest.mark.parametrize("compiler", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CALLS)
def test_it_compiles_into_one_graph(name, compiler):
    function, make = CALLS[name]
    torch._dynamo.reset()
    expected = function(*make())
    compiled = torch.compile(function, backend=compiler, fullgraph=True)
    torch.testing.assert_close(compiled(*make()), expected, rtol=0, atol=0)


@pytest.mark.parametrize("compiler", [pytest.param("eager", marks=pytest.mark.slow), "aot_eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_loss_compiles_into_one_graph(dtype, compiler):
    torch._dynamo.reset()
    results = []
    for function in (fk.noise_pred_loss, torch.compile(fk.noise_pred_loss, backend=compiler, fullgraph=True)):
        inputs, options = loss_inputs(dtype)
        inputs[0].requires_grad_(True)
        loss, per_row = function(*inputs, **options)
        (gradient,) = torch.autograd.grad(loss * 3, inputs[0])
        assert gradient.dtype == dtype
        assert not per_row.requires_grad
        results.append((loss.detach(), per_row, gradient))
    torch.testing.assert_close(*results)


def as_fakes(mode, values):
    return torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, values)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_fake_tensors_get_the_shapes_and_dtypes(name, inside):
    function, make = CALLS[name]
    expected = function(*make())
    mode = FakeTensorMode()
    fakes = as_fakes(mode, make())
    if inside:
        with mode:
            result = function(*fakes)
    else:
        result = function(*fakes)
    real, fake = (torch.utils._pytree.tree_leaves(value) for value in (expected, result))
    assert [(r.shape, r.dtype, r.device) for r in real] == [(f.shape, f.dtype, f.device) for f in fake]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_fake_tensors_go_through_the_loss_and_back(dtype):
    mode = FakeTensorMode()
    inputs, options = loss_inputs(dtype)
    with mode:
        fakes, options = as_fakes(mode, inputs), as_fakes(mode, options)
        fakes[0].requires_grad_(True)
        loss, per_row = fk.noise_pred_loss(*fakes, **options)
        loss.backward()
    assert (loss.shape, per_row.shape, fakes[0].grad.shape) == ((), (3,), SHAPE)
    assert (loss.dtype, per_row.dtype, fakes[0].grad.dtype) == (torch.float32, torch.float32, dtype)


def test_torch_func_differentiates_the_loss():
    inputs, options = loss_inputs()
    gradient = torch.func.grad(lambda x: fk.noise_pred_loss(x, *inputs[1:], **options)[0])(inputs[0])
    inputs[0].requires_grad_(True)
    loss, _ = fk.noise_pred_loss(*inputs, **options)
    loss.backward()
    torch.testing.assert_close(gradient, inputs[0].grad)
    value = torch.func.functional_call(_Loss(inputs[1:], options), {"scale": torch.tensor(2.0)}, (inputs[0].detach(),))
    torch.testing.assert_close(value, fk.noise_pred_loss(2 * inputs[0].detach(), *inputs[1:], **options)[0])


class _Loss(torch.nn.Module):
    def __init__(self, rest, options):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.rest, self.options = rest, options

    def forward(self, x):
        return fk.noise_pred_loss(self.scale * x, *self.rest, **self.options)[0]


def test_the_operators_are_what_they_say():
    """torch's own checks of schema, autograd, fakes and compilation."""
    inputs, options = loss_inputs()
    from fastunlearn_kernels.noise_loss import _operator

    rows = [*inputs[1:], None, None, None, options["snr"], options["spatial_mask"].float(), None, 5.0, None, "epsilon"]
    torch.library.opcheck(_operator, (inputs[0].requires_grad_(True), True, *rows))


def test_a_second_backward_is_refused_and_a_second_derivative_too():
    inputs, options = loss_inputs()
    inputs[0].requires_grad_(True)
    loss, _ = fk.noise_pred_loss(*inputs, **options)
    (gradient,) = torch.autograd.grad(loss, inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        torch.autograd.grad(gradient.sum(), inputs[0])
    loss, _ = fk.noise_pred_loss(*inputs, **options)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already handed out"):
        loss.backward()


def test_plain_tensors_take_no_operator(monkeypatch):
    """A dispatch costs more than a small loss: it is for those who look."""
    assert not operators.is_watched(torch.ones(1))
    assert not operators.is_watched(torch.nn.Parameter(torch.ones(1)))
    with FakeTensorMode():
        assert operators.is_watched(torch.ones(1))
    assert "torch.library" in inspect.getsource(operators)
    assert launch.backend_of(torch.ones(1)) in ("native", "reference", "triton")


@pytest.mark.slow
def test_two_copies_of_the_package_have_operators_of_their_own(tmp_path):
    """As the Hub loads one beside an installed one."""
    import shutil

    package = ROOT / "kernels/torch-ext/fastunlearn_kernels"
    shutil.copytree(package, tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__"))
    code = f"""
import importlib.util, sys, torch, fastunlearn_kernels
spec = importlib.util.spec_from_file_location("_other", {str(tmp_path / "copy/__init__.py")!r})
module = sys.modules["_other"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert torch.ops._other.gradient_dots is not None and torch.ops.fastunlearn_kernels.gradient_dots is not None
assert torch.compile(module.gradient_dots, backend="eager", fullgraph=True)([torch.ones(3)])[0] == 3
"""
    environment = {"PYTHONPATH": str(package.parent)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
