"""gradient_dots against float64, and the projection that it serves."""

import pytest
import torch
from fastunlearn_kernels import MaskedAdamW, gradient_dots, pack_bits, projection_coefficient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("took")  # on each backend

SHAPES = [(1,), (7, 9), (0,), (90, 100), (10, 10, 10)]


def make(shapes=SHAPES, dtype0=torch.float32, dtype1=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    gradients0 = [torch.randn(shape, generator=g).to(dtype0) for shape in shapes]
    gradients1 = [(torch.randn(shape, generator=g) + 0.5).to(dtype1) for shape in shapes]
    masks = [torch.rand(shape, generator=g) > 0.5 for shape in shapes]
    return gradients0, gradients1, masks


def check(gradients0, gradients1, masks=None):
    packed = None if masks is None else [None if m is None else pack_bits(m) for m in masks]
    dots = gradient_dots(gradients0, gradients1, grad_masks=packed)
    masks = masks or [None] * len(gradients0)
    flat0, flat1 = (
        torch.cat([(g if m is None else g[m]).double().reshape(-1) for g, m in zip(gradients, masks, strict=True)])
        for gradients in (gradients0, gradients0 if gradients1 is None else gradients1)
    )
    if gradients1 is None:
        flat1 = torch.zeros_like(flat1)
    expected = torch.stack([flat0 @ flat0, flat0 @ flat1, flat1 @ flat1])
    scale = float((flat0 @ flat0 * (flat1 @ flat1)).sqrt())
    assert dots.dtype == torch.float32
    torch.testing.assert_close(dots.double(), expected, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("dtype1", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype0", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dots(dtype0, dtype1, took):
    gradients0, gradients1, masks = make(dtype0=dtype0, dtype1=dtype1)
    check(gradients0, gradients1)
    check(gradients0, gradients1, masks)
    check(gradients0, gradients1, [masks[0], None, None, masks[3], None])
    check(gradients0, None, masks)
    took("_gradient_dots_kernel", "gradient_dots")


def test_mixed_dtypes_strides_and_unaligned():
    gradients0, gradients1, _ = make()
    gradients0[1] = gradients0[1].bfloat16()
    gradients1[3] = gradients1[3].t().contiguous().t()
    gradients0[4] = torch.cat([torch.zeros(1), gradients0[4].reshape(-1)])[1:].view(10, 10, 10)
    check(gradients0, gradients1)


def test_nan_outside_the_mask_reaches_nothing():
    gradients0, gradients1, masks = make()
    poisoned0, poisoned1 = (
        [torch.where(m, g, float("nan")) for g, m in zip(gradients, masks, strict=True)]
        for gradients in (gradients0, gradients1)
    )
    packed = [pack_bits(m) for m in masks]
    clean = gradient_dots(gradients0, gradients1, grad_masks=packed)
    assert torch.equal(gradient_dots(poisoned0, poisoned1, grad_masks=packed), clean)


def test_inputs_stay_and_runs_repeat():
    gradients0, gradients1, _ = make()
    before = [g.clone() for g in gradients0 + gradients1]
    assert torch.equal(gradient_dots(gradients0, gradients1), gradient_dots(gradients0, gradients1))
    assert all(torch.equal(g, start) for g, start in zip(gradients0 + gradients1, before, strict=True))


def test_nothing_is_zero():
    assert torch.equal(gradient_dots([torch.zeros(0)], [torch.zeros(0)]), torch.zeros(3))


def test_projection_takes_the_conflict_and_only_that():
    g0, g1 = torch.tensor([1.0, 2.0]), torch.tensor([0.0, -3.0])
    coefficient = projection_coefficient(gradient_dots([g0], [g1]))
    assert torch.equal(g0 + coefficient * g1, torch.tensor([1.0, 0.0]))
    assert projection_coefficient(gradient_dots([g0], [-g1])) == 0
    assert projection_coefficient(gradient_dots([g0], [torch.zeros(2)])) == 0


def test_the_optimizer_steps_along_the_projection():
    results = []
    for folded in (True, False):
        gradients0, gradients1, _ = make([(7, 9), (40, 30)])
        params = [torch.nn.Parameter(torch.ones(g.shape)) for g in gradients0]
        gradients1 = [-0.5 * g0 + 0.1 * g1 for g0, g1 in zip(gradients0, gradients1, strict=True)]
        coefficient = projection_coefficient(gradient_dots(gradients0, gradients1))
        assert coefficient > 0
        optimizer = MaskedAdamW(params, lr=0.1, eps=1.0)
        for param, g0, g1 in zip(params, gradients0, gradients1, strict=True):
            param.grad = g0 if folded else g0 + coefficient * g1
        if folded:
            optimizer.step(other_grads=dict(zip(params, gradients1, strict=True)), other_coefficient=coefficient)
        else:
            optimizer.step()
        results.append(torch.cat([param.detach().reshape(-1) for param in params]))
    torch.testing.assert_close(*results)


@settings(
    deadline=None,
    database=None,
    derandomize=True,
    max_examples=15,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=4), seed=st.integers(0, 99)
)
def test_any_shapes(shapes, seed):
    gradients0, gradients1, masks = make(shapes, seed=seed)
    check(gradients0, gradients1, masks)


def test_a_vector_that_is_every_other_element_of_another():
    """``reshape(-1)`` leaves it as it is, and memory is what a kernel reads."""
    pairs = torch.randn(9, 2, generator=torch.Generator().manual_seed(0))
    check([pairs[:, 0]], [pairs[:, 1]], [torch.arange(9) % 2 == 0])
    param = torch.nn.Parameter(torch.ones(9))
    param.grad = pairs[:, 0]
    expected = pairs[:, 0].double().norm()
    torch.testing.assert_close(MaskedAdamW([param]).clip_factor(1.0)[1].double(), expected, rtol=1e-6, atol=0)
