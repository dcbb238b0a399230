"""Saliency masks against a stable sort in numpy, and bit masks against numpy's packing."""

import numpy as np
import pytest
import torch
from fastunlearn_kernels import accumulate_saliency_, pack_bits, saliency_mask, unpack_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

HYPOTHESIS = settings(
    deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

pytestmark = pytest.mark.usefixtures("took")  # on each backend


def oracle(tensors, density):
    """The masks of the largest magnitudes: of equal ones the first, NaN last."""
    flat = np.concatenate([np.abs(t.numpy().reshape(-1)).astype(np.float64) for t in tensors])
    flat = np.where(np.isnan(flat), 0, flat)
    count = int(np.floor(density * flat.size + 0.5))
    mask = np.zeros(flat.size, dtype=bool)
    mask[np.argsort(-flat, kind="stable")[:count]] = True
    pieces = np.split(mask, np.cumsum([t.numel() for t in tensors])[:-1])
    return [torch.from_numpy(piece).view(t.shape) for piece, t in zip(pieces, tensors, strict=True)]


def check(tensors, density):
    before = [t.clone() for t in tensors]
    packed = saliency_mask(tensors, density)
    for bits, expected, t, start in zip(packed, oracle(tensors, density), tensors, before, strict=True):
        assert torch.equal(unpack_bits(bits, t.shape), expected)
        assert torch.equal(bits, pack_bits(expected))  # padding bits included
        assert torch.equal(t.isnan(), start.isnan())
        assert torch.equal(t.nan_to_num(), start.nan_to_num())


@pytest.mark.parametrize("density", [0.0, 0.001, 0.3, 0.5, 0.97, 1.0])
def test_largest_of_all_tensors(density, took):
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=g) * scale for shape, scale in (((1,), 3), ((7, 9), 1), ((30, 700), 0.01))]
    check(tensors, density)
    if density > 0:
        took("_histogram_kernel", "select_largest")
        took("_pack_kernel", "select_largest")


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_ties_are_taken_in_order(density):
    g = torch.Generator().manual_seed(0)
    check([torch.randint(-2, 3, (20001,), generator=g).float(), torch.ones(37)], density)
    check([torch.zeros(1000)], density)


def test_every_kind_of_number():
    special = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-45, -1e-38, 3e38, 1.0, 1.0000001, -1.0]
    values = torch.tensor(special * 3)
    for count in range(len(values) + 1):
        check([values], count / len(values))


def test_one_tensor_gives_one_mask():
    values = torch.tensor([[3.0, -5.0], [1.0, 4.0]])
    bits = saliency_mask(values, 0.5)
    assert unpack_bits(bits, (2, 2)).tolist() == [[False, True], [False, True]]


def test_layouts():
    values = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        saliency_mask(values.transpose(0, 2), 0.3), saliency_mask(values.transpose(0, 2).contiguous(), 0.3)
    )


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_sectors_of_8(density):
    values = torch.randn(3, 41, generator=torch.Generator().manual_seed(0))
    mask = unpack_bits(saliency_mask(values, density, granularity="sector"), values.shape).reshape(-1)
    sectors = list(values.abs().reshape(-1).split(8))
    means = torch.stack([sector.double().mean() for sector in sectors])
    chosen = torch.zeros(len(sectors), dtype=torch.bool)
    chosen[means.argsort(descending=True)[: int(density * len(sectors) + 0.5)]] = True
    assert torch.equal(mask, chosen.repeat_interleave(8)[: values.numel()])


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_rows(density):
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(9, 4, 3, generator=g), torch.randn(11, generator=g), torch.randn(5, 17, generator=g)]
    packed = saliency_mask(tensors, density, granularity="row")
    means = torch.cat([t.double().abs().reshape(t.shape[0], -1).mean(1) for t in tensors])
    chosen = torch.zeros(25, dtype=torch.bool)
    chosen[means.argsort(descending=True)[: int(density * 25 + 0.5)]] = True
    for bits, t, rows in zip(packed, tensors, chosen.split([9, 11, 5]), strict=True):
        assert torch.equal(unpack_bits(bits, t.shape), rows.view([-1] + [1] * (t.dim() - 1)).expand(t.shape))


def test_tensors_without_elements():
    assert saliency_mask([torch.zeros(0), torch.ones(3)], 1.0)[0].shape == (0,)
    assert saliency_mask([torch.zeros(0)], 0.5)[0].shape == (0,)
    for granularity in ("sector", "row"):
        masks = saliency_mask([torch.zeros(0), torch.ones(3)], 1.0, granularity=granularity)
        assert masks[0].numel() == 0
        assert unpack_bits(masks[1], 3).all()


@pytest.mark.parametrize("mode", ["absolute", "signed", "squared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_accumulate(mode, dtype, took):
    g = torch.Generator().manual_seed(0)
    shapes = [(1,), (7, 9), (40, 60), (0,)]
    saliency = [torch.rand(shape, generator=g) for shape in shapes]
    gradients = [torch.randn(shape, generator=g).to(dtype) for shape in shapes]
    change = {"absolute": torch.abs, "signed": lambda x: x, "squared": torch.square}[mode]
    expected = [s.double() + change(g.double()) for s, g in zip(saliency, gradients, strict=True)]
    before = [gradient.clone() for gradient in gradients]
    accumulate_saliency_(saliency, gradients, mode=mode)
    for total, value, gradient, start in zip(saliency, expected, gradients, before, strict=True):
        torch.testing.assert_close(total.double(), value, rtol=1e-6, atol=1e-7)
        assert torch.equal(gradient, start)
    took("_accumulate_kernel", "accumulate_saliency_")


def test_accumulate_into_unaligned_and_from_strided():
    storage = torch.zeros(4001)
    gradient = torch.randn(50, 80, generator=torch.Generator().manual_seed(0))
    accumulate_saliency_([storage[1:].view(80, 50)], [gradient.t()])
    assert torch.equal(storage[1:].view(80, 50), gradient.t().abs())
    assert storage[0] == 0


@settings(HYPOTHESIS, max_examples=60)
@given(st.lists(st.booleans(), max_size=70))
def test_bits(values):
    mask = torch.tensor(values, dtype=torch.bool)
    bits = pack_bits(mask)
    assert bits.numpy().tobytes() == np.packbits(mask.numpy(), bitorder="little").tobytes()
    assert torch.equal(unpack_bits(bits, len(values)), mask)


ANY = {
    "sizes": st.lists(st.integers(1, 5000), min_size=1, max_size=3),
    "digits": st.sampled_from([0, 1, 8]),
    "density": st.floats(0, 1),
    "seed": st.integers(0, 10**6),
}


def check_any(sizes, digits, density, seed):
    g = torch.Generator().manual_seed(seed)
    check([torch.randn(n, generator=g).round(decimals=digits) for n in sizes], density)


@settings(HYPOTHESIS, max_examples=12)
@given(**ANY)
def test_any_values(**inputs):
    check_any(**inputs)


@pytest.mark.slow
@settings(HYPOTHESIS, max_examples=150)
@given(**ANY)
def test_many_values(**inputs):
    check_any(**inputs)
