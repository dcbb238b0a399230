"""The bytes the kernels touch are those of the formulas: counted, under the interpreter, load by load."""

import contextlib

import pytest
import torch
from fastunlearn_kernels import (
    MaskedAdamW,
    accumulate_saliency_,
    gradient_dots,
    launch,
    lpips_distance,
    noise_pred_loss,
    pack_bits,
    saliency_mask,
    traffic,
)

INTERPRETED = launch.INTERPRETED


@contextlib.contextmanager
def counted_bytes(expected, programs=0):
    """Asserts that ``expected`` bytes are loaded and stored, and at most 1 % and 128 bytes of tables a program more."""
    if not INTERPRETED:
        yield  # the formulas themselves are checked below; test_interpreted.py counts
        return
    from triton.runtime.interpreter import InterpreterBuilder

    total = 0

    def count(method):
        def counting(self, pointer, *args):
            nonlocal total
            mask = next(a for a in args if a is not None and a.data.dtype == bool)
            element = pointer.get_element_ty().primitive_bitwidth // 8
            total += int(mask.data.sum()) * element
            return method(self, pointer, *args)

        return counting

    with pytest.MonkeyPatch.context() as patch:
        for name in ("create_masked_load", "create_masked_store"):
            patch.setattr(InterpreterBuilder, name, count(getattr(InterpreterBuilder, name)))
        yield
    assert expected <= total <= 1.01 * expected + 128 * programs


def test_noise_pred_loss():
    for dtype, num_teachers in ((torch.bfloat16, 2), (torch.float16, 1), (torch.float32, 3)):
        noise_pred = torch.randn(3, 4, 50, 50).to(dtype).requires_grad_(True)
        teacher_preds = torch.randn(num_teachers, 3, 4, 50, 50).to(dtype)
        expected = traffic.noise_pred_loss_bytes(noise_pred, num_teachers, teacher_preds.element_size())
        with counted_bytes(expected):
            loss, _ = noise_pred_loss(noise_pred, teacher_preds, torch.ones(3, num_teachers), torch.ones(3))
            loss.backward()
    assert traffic.noise_pred_loss_bytes(torch.empty(1, 4, 64, 64, dtype=torch.bfloat16), 2, 2) == 8 * 4 * 64 * 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["dense", "select", "compact"])
@pytest.mark.parametrize("density", [0.5, 0.03])
def test_masked_adamw(mode, dtype, density):
    param = torch.nn.Parameter(torch.randn(100, 100).to(dtype))
    mask = torch.rand(100, 100, generator=torch.Generator().manual_seed(0)) < density
    masks = {} if mode == "dense" else {param: pack_bits(mask)}
    optimizer = MaskedAdamW([param], grad_masks=masks, compact=mode == "compact")
    param.grad = torch.randn(100, 100).to(dtype)
    touched = int(mask.view(-1, 8).any(1).sum()) * 8
    size = param.element_size()
    with counted_bytes(traffic.masked_adamw_bytes(10000, touched, int(mask.sum()), mode, size, size), programs=10):
        optimizer.step()


@pytest.mark.parametrize(
    ("mode", "density", "param_itemsize", "expected"),
    [
        ("dense", 1.0, 4, 28),
        ("dense", 1.0, 2, 28),
        ("select", 0.5, 4, 28.125),
        ("select", 0.5, 2, 30.125),
        ("compact", 0.5, 4, 20.125),
        ("compact", 0.5, 2, 18.125),
        ("compact", 0.1, 2, 8.525),
    ],
)
def test_masked_adamw_by_formula(mode, density, param_itemsize, expected):
    n = 10**6
    count = traffic.masked_adamw_bytes(n, n, int(density * n), mode, param_itemsize, param_itemsize)
    assert count / n == pytest.approx(expected)


def test_saliency():
    values, gradient = torch.rand(128, 128), torch.randn(128, 128).bfloat16()
    with counted_bytes(traffic.accumulate_saliency_bytes(128 * 128, 2)):
        accumulate_saliency_([values], [gradient])
    # of a program's histograms torch does the reading, which the interpreter does not see
    with counted_bytes(traffic.saliency_mask_bytes(128 * 128) - 4 * 1024):
        saliency_mask(values, 0.3)
    assert traffic.saliency_mask_bytes(10**6) / 10**6 == pytest.approx(20.625, rel=1e-2)


def test_lpips_distance():
    features = [torch.rand(2, c, 20, 20).bfloat16() for c in (64, 192)]
    with counted_bytes(traffic.lpips_distance_bytes(features) + 4 * 2 * (7 * 64 + 25 * 192)):
        lpips_distance(features, features, [torch.rand(64), torch.rand(192)])
    alex = [(64, 127), (192, 63), (384, 31), (256, 31), (256, 31)]
    maps = [torch.empty(1, c, s, s, dtype=torch.bfloat16, device="meta") for c, s in alex]
    assert traffic.lpips_distance_bytes(maps) / 1e6 == pytest.approx(10.6, rel=1e-2)


def test_gradient_dots():
    gradients = [torch.randn(100, 100).bfloat16()]
    with counted_bytes(traffic.gradient_dots_bytes(10000, 2, 2)):
        gradient_dots(gradients, gradients)
    with counted_bytes(traffic.gradient_dots_bytes(10000, 2)):
        gradient_dots(gradients)
