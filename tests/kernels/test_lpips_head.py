"""lpips_distance against LPIPS' formula in float64 and against the package ``lpips`` itself."""

import pytest
import torch
from fastunlearn_kernels import lpips_distance
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("took")  # on each backend

# the trunks' channels, with maps as small as keep them odd: the real ones only repeat more pixels
TRUNKS = {
    "alex": [(64, 15), (192, 7), (384, 3), (256, 3), (256, 3)],
    "vgg": [(64, 16), (128, 8), (256, 4), (512, 2), (512, 1)],
    "squeeze": [(64, 15), (128, 7), (256, 3), (384, 1), (384, 1), (512, 1), (512, 1)],
}


def make(layers, batch=2, dtype=torch.float32, seed=0, noise=0.3):
    g = torch.Generator().manual_seed(seed)
    features0 = [torch.randn(batch, c, s, s, generator=g).relu() for c, s in layers]
    features1 = [(f + noise * torch.randn(f.shape, generator=g)).relu() for f in features0]
    weights = [torch.rand(c, generator=g) for c, _ in layers]
    return [f.to(dtype) for f in features0], [f.to(dtype) for f in features1], weights


def oracle(features0, features1, weights):
    total = 0
    for f0, f1, weight in zip(features0, features1, weights, strict=True):
        unit0, unit1 = (f.double() / (f.double().square().sum(1, keepdim=True).sqrt() + 1e-10) for f in (f0, f1))
        total = total + ((unit0 - unit1) ** 2 * weight.double().view(1, -1, 1, 1)).sum(1).mean((1, 2))
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trunk", TRUNKS)
def test_trunks(trunk, dtype, took):
    features0, features1, weights = make(TRUNKS[trunk], dtype=dtype)
    distance = lpips_distance(features0, features1, weights)
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance.double(), oracle(features0, features1, weights), rtol=2e-6, atol=1e-7)
    took("_lpips_head_kernel", "lpips_distance")


@pytest.mark.parametrize("net", ["alex", "vgg", "squeeze"])
def test_it_is_lpips(net):
    from fastunlearn.models.runtime import mend_torchvision

    mend_torchvision()
    import lpips

    torch.manual_seed(0)
    model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)  # its trained heads on a random trunk
    images = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        expected = model(*images).flatten()
        features0, features1 = (list(model.net(model.scaling_layer(image))) for image in images)
        weights = [head.model[-1].weight.flatten() for head in model.lins]
        distance = lpips_distance(features0, features1, weights)
    assert expected.min() > 1e-3
    torch.testing.assert_close(distance, expected, rtol=0, atol=1e-5)


def test_images_that_are_nearly_alike():
    """1 - 2 <u0, u1> + 1 would lose every digit here."""
    features0, features1, weights = make(TRUNKS["alex"], noise=1e-4)
    distance = lpips_distance(features0, features1, weights)
    expected = oracle(features0, features1, weights)
    assert 0 < expected.max() < 1e-5
    torch.testing.assert_close(distance.double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_is_0_and_order_is_nothing(dtype):
    features0, features1, weights = make(TRUNKS["alex"], dtype=dtype)
    assert torch.equal(lpips_distance(features0, features0, weights), torch.zeros(2))
    assert torch.equal(lpips_distance(features0, features1, weights), lpips_distance(features1, features0, weights))
    copies = [f.clone() for f in features0]
    assert torch.equal(lpips_distance(features0, copies, weights), torch.zeros(2))


def test_layouts_batches_inputs_and_repeats():
    features0, features1, weights = make(TRUNKS["alex"], batch=3)
    before = [f.clone() for f in features0 + features1]
    expected = lpips_distance(features0, features1, weights)
    last = [[f.to(memory_format=torch.channels_last) for f in features] for features in (features0, features1)]
    torch.testing.assert_close(lpips_distance(*last, weights), expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(lpips_distance(*last, weights), lpips_distance(*last, weights))
    one = lpips_distance([f[1:2] for f in features0], [f[1:2] for f in features1], weights)
    torch.testing.assert_close(one, expected[1:2], rtol=1e-6, atol=1e-7)
    assert all(torch.equal(f, start) for f, start in zip(features0 + features1, before, strict=True))


def test_maps_of_zeros():
    features0, features1, weights = make([(64, 3)])
    zeros = [torch.zeros_like(f) for f in features0]
    torch.testing.assert_close(lpips_distance(zeros, features1, weights).double(), oracle(zeros, features1, weights))
    assert torch.equal(lpips_distance(zeros, zeros, weights), torch.zeros(2))


def test_no_pairs():
    features0, features1, weights = make([(64, 3)], batch=0)
    assert lpips_distance(features0, features1, weights).shape == (0,)


def test_nan_stays_in_its_pair():
    features0, features1, weights = make([(64, 3), (10, 2)])
    features0[1][1, 2, 0, 0] = float("nan")
    assert lpips_distance(features0, features1, weights).isnan().tolist() == [False, True]


HYPOTHESIS = settings(
    deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
ANY = {
    "layers": st.lists(st.tuples(st.integers(1, 130), st.integers(1, 9)), min_size=1, max_size=3),
    "batch": st.integers(1, 3),
    "seed": st.integers(0, 10**6),
}


def check_any(layers, batch, seed):
    features0, features1, weights = make(layers, batch, seed=seed)
    distance = lpips_distance(features0, features1, weights)
    torch.testing.assert_close(distance.double(), oracle(features0, features1, weights), rtol=5e-6, atol=1e-6)


@settings(HYPOTHESIS, max_examples=10)
@given(**ANY)
def test_any_maps(**inputs):
    check_any(**inputs)


@pytest.mark.slow
@settings(HYPOTHESIS, max_examples=150)
@given(**ANY)
def test_many_maps(**inputs):
    check_any(**inputs)
