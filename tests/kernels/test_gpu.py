"""On a GPU: the compiled kernels against the references in float64, in CUDA graphs, under torch.compile, beyond 2^31.

Needs torch, triton and pytest, nothing else: ``benchmarks/gpu_check.sh`` runs it before it measures anything.
"""

import pytest
import torch
from fastunlearn_kernels import (
    MaskedAdamW,
    accumulate_saliency_,
    gradient_dots,
    lpips_distance,
    noise_pred_loss,
    pack_bits,
    reference,
    saliency_mask,
    unpack_bits,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


SELECT_LARGEST = reference.select_largest  # the oracle of one test


@pytest.fixture(autouse=True)
def took(monkeypatch):
    """A public function that calls a reference is an error: kernels only."""

    def fell_back(*args, **kwargs):
        raise AssertionError("a reference ran where a kernel should have")

    for name in ("noise_pred_loss", "lpips_distance", "masked_adamw_", "select_largest", "gradient_dots"):
        monkeypatch.setattr(reference, name, fell_back)
    monkeypatch.setattr(reference, "accumulate_saliency_", fell_back)


@pytest.fixture(autouse=True)
def _poisoned_buffers():
    """Plain buffers, unlike in the other files: torch.compile traces what allocates them."""


def make_loss_inputs(shape, dtype):
    g = torch.Generator("cuda").manual_seed(0)

    def randn(*size):
        return torch.randn(size, generator=g, device="cuda")

    return {
        "noise_pred": randn(*shape).to(dtype).requires_grad_(True),
        "teacher_preds": randn(2, *shape).to(dtype),
        "coefficients": randn(shape[0], 2),
        "weights": randn(shape[0]),
        "spatial_mask": randn(shape[0], 1, *shape[2:]) > 0,
    }


def expected_loss(noise_pred, teacher_preds, coefficients, weights, spatial_mask):
    x = noise_pred.detach().double().requires_grad_(True)
    target = torch.einsum("bk,kbchw->bchw", coefficients.double(), teacher_preds.double())
    per_row = (spatial_mask * (x - target) ** 2).flatten(1).mean(1)
    loss = (weights.double() * per_row).mean()
    loss.backward()
    return loss.detach(), per_row.detach(), x.grad


def run_loss(inputs, function=noise_pred_loss):
    leading = [inputs[key] for key in ("noise_pred", "teacher_preds", "coefficients", "weights")]
    loss, per_row = function(*leading, spatial_mask=inputs["spatial_mask"])
    (gradient,) = torch.autograd.grad(loss, inputs["noise_pred"])
    return loss.detach(), per_row, gradient


def assert_loss_is(result, expected, dtype):
    tolerance = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-8}[dtype]
    for value, right, relative in zip(result, expected, (1e-4, 1e-5, tolerance), strict=True):
        size = float(right.abs().max())
        torch.testing.assert_close(value.double(), right, rtol=relative, atol=1e-5 * size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 7, 3, 3), (3, 4, 33, 17), (4, 4, 64, 64), (300, 4, 64, 64)], ids=str
)
def test_loss(shape, dtype):
    inputs = make_loss_inputs(shape, dtype)
    first = run_loss(inputs)
    assert_loss_is(first, expected_loss(**inputs), dtype)
    assert all(torch.equal(a, b) for a, b in zip(first, run_loss(inputs), strict=True))


def test_loss_under_torch_compile():
    inputs = make_loss_inputs((4, 4, 64, 64), torch.bfloat16)
    compiled = torch.compile(noise_pred_loss, fullgraph=True)
    assert_loss_is(run_loss(inputs, compiled), expected_loss(**inputs), torch.bfloat16)


def test_loss_in_a_cuda_graph():
    inputs = make_loss_inputs((4, 4, 64, 64), torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run_loss(inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run_loss(inputs)
    with torch.no_grad():
        inputs["noise_pred"].mul_(-2.0)
    graph.replay()
    assert_loss_is(results, expected_loss(**inputs), torch.bfloat16)


def test_loss_beyond_2_to_the_31_elements():
    rows = 2**17 + 3  # of 2^14 elements: 2^31 + 49152
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of free GPU memory")
    noise_pred = torch.zeros(rows, 4, 64, 64, device="cuda", dtype=torch.bfloat16)
    noise_pred[-1] = 3.0
    noise_pred.requires_grad_(True)
    teacher = torch.ones(1, 1, 4, 64, 64, device="cuda", dtype=torch.bfloat16)
    index, ones = torch.zeros(rows, device="cuda", dtype=torch.int64), torch.ones(rows, 1, device="cuda")
    loss, per_row = noise_pred_loss(noise_pred, teacher, ones, ones[:, 0].contiguous(), row_index=index)
    loss.backward()
    assert (per_row[:-1] == 1).all()
    assert per_row[-1] == 4
    assert (noise_pred.grad[:-1] < 0).all()
    assert (noise_pred.grad[-1] > 0).all()


SHAPES = [(1,), (5,), (63,), (1000, 37), (320, 320, 3, 3), (1280, 768)]


def make_adamw(mode, dtype, lr=1e-2):
    g = torch.Generator("cuda").manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=g, device="cuda").to(dtype)) for s in SHAPES]
    masks = [torch.rand(s, generator=g, device="cuda") > 0.5 for s in SHAPES]
    packed = {} if mode == "dense" else {p: pack_bits(m) for p, m in zip(params, masks, strict=True)}
    if mode == "dense":
        masks = [torch.ones_like(m) for m in masks]
    optimizer = MaskedAdamW(params, lr, weight_decay=0.1, grad_masks=packed, compact=mode == "compact")
    for param, mask in zip(params, masks, strict=True):
        gradient = torch.randn(param.shape, generator=g, device="cuda").to(dtype)
        param.grad = torch.where(mask, gradient, float("nan"))
    return params, masks, optimizer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["dense", "select", "compact"])
def test_masked_adamw(mode, dtype):
    params, masks, optimizer = make_adamw(mode, dtype)
    before = [param.detach().clone() for param in params]
    twins = [torch.nn.Parameter(param.detach().double()) for param in params]
    oracle = torch.optim.AdamW(twins, 1e-2, weight_decay=0.1)
    norm = torch.cat([p.grad[m].double() for p, m in zip(params, masks, strict=True)]).norm()
    for _ in range(3):
        factor, measured = optimizer.clip_factor(1.0)
        torch.testing.assert_close(measured.double(), norm, rtol=1e-5, atol=0)
        for param, twin in zip(params, twins, strict=True):
            twin.grad = param.grad.double().nan_to_num(nan=0.0) * factor.double()
        optimizer.step(grad_scale=factor)
        oracle.step()
    rounding = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-8}[dtype]
    for param, start, mask, twin in zip(params, before, masks, twins, strict=True):
        assert torch.equal(param[~mask], start[~mask])
        torch.testing.assert_close(param[mask].double(), twin[mask], rtol=rounding, atol=4e-6)


def test_masked_adamw_in_a_cuda_graph():
    results = []
    for captured in (False, True):
        params, _, optimizer = make_adamw("compact", torch.bfloat16, lr=torch.tensor(1e-2, device="cuda"))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())

        def step(optimizer=optimizer):
            optimizer.step(grad_scale=optimizer.clip_factor(1.0)[0])

        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            step = graph.replay
        step()
        optimizer.param_groups[0]["lr"].fill_(1e-3)
        step()
        results.append([param.detach().clone() for param in params])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_capture_that_would_upload_addresses_is_refused():
    params, _, optimizer = make_adamw("select", torch.float32)
    with pytest.raises(RuntimeError, match="Run one step"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
    assert len(params) == len(SHAPES)


@pytest.mark.parametrize("density", [0.001, 0.5, 0.999])
def test_saliency_mask(density):
    g = torch.Generator("cuda").manual_seed(0)
    tensors = [torch.randn(n, generator=g, device="cuda").round(decimals=2) for n in (1, 63, 300_001, 2_000_000)]
    count = int(density * sum(t.numel() for t in tensors) + 0.5)
    packed = saliency_mask(tensors, density)
    expected = SELECT_LARGEST([t.cpu() for t in tensors], count)
    for bits, mask in zip(packed, expected, strict=True):
        assert torch.equal(unpack_bits(bits.cpu(), mask.shape), mask)
    totals = [torch.zeros_like(t) for t in tensors]
    accumulate_saliency_(totals, [t.bfloat16() for t in tensors])
    assert all(torch.equal(a, t.bfloat16().float().abs()) for a, t in zip(totals, tensors, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lpips_distance(dtype):
    g = torch.Generator("cuda").manual_seed(0)
    layers = [(64, 63), (192, 31), (384, 15), (256, 15), (512, 7)]
    features = [[torch.randn(3, c, s, s, generator=g, device="cuda").relu().to(dtype) for c, s in layers] for _ in "01"]
    weights = [torch.rand(c, generator=g, device="cuda") for c, _ in layers]
    distance = lpips_distance(*features, weights)
    doubled = [[f.double() for f in side] for side in features]
    expected = 0
    for f0, f1, w in zip(*doubled, weights, strict=True):
        unit0, unit1 = (f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10) for f in (f0, f1))
        expected = expected + ((unit0 - unit1) ** 2 * w.double().view(1, -1, 1, 1)).sum(1).mean((1, 2))
    torch.testing.assert_close(distance.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(distance, lpips_distance(features[1], features[0], weights))
    assert torch.equal(
        lpips_distance(features[0], [f.clone() for f in features[0]], weights), torch.zeros_like(distance)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_dots(dtype):
    g = torch.Generator("cuda").manual_seed(0)
    sides = [[torch.randn(s, generator=g, device="cuda").to(dtype) for s in SHAPES] for _ in "01"]
    masks = [torch.rand(s, generator=g, device="cuda") > 0.3 for s in SHAPES]
    dots = gradient_dots(*sides, grad_masks=[pack_bits(m) for m in masks])
    flat0, flat1 = (torch.cat([t[m].double() for t, m in zip(side, masks, strict=True)]) for side in sides)
    expected = torch.stack([flat0 @ flat0, flat0 @ flat1, flat1 @ flat1])
    torch.testing.assert_close(dots.double(), expected, rtol=1e-5, atol=1e-5 * float(expected[0]))
    assert torch.equal(dots, gradient_dots(*sides, grad_masks=[pack_bits(m) for m in masks]))


def test_one_unaligned_tensor_is_a_launch_of_its_own():
    params, _, optimizer = make_adamw("select", torch.float32)
    optimizer.step()
    assert len(optimizer._plans["step"].parts) == 1
    params[-1].grad = torch.cat([torch.zeros(1, device="cuda"), params[-1].grad.flatten()])[1:].view(SHAPES[-1])
    optimizer.step()
    assert len(optimizer._plans["step"].parts) == 2


def test_scalars_on_the_host_are_brought_to_the_device():
    results = []
    for device in ("cpu", "cuda"):
        params, _, optimizer = make_adamw("compact", torch.bfloat16, lr=torch.tensor(1e-2, device=device))
        optimizer.step(grad_scale=torch.tensor(0.5, device=device))
        results.append([param.detach().clone() for param in params])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_lpips_in_a_cuda_graph_outlives_other_sizes():
    layers = [(64, 15), (192, 7)]
    features = [[torch.rand(2, c, s, s, device="cuda") for c, s in layers] for _ in "01"]
    weights = [torch.rand(c, device="cuda") for c, _ in layers]
    features = [[f.to(memory_format=torch.channels_last) for f in side] for side in features]
    expected = lpips_distance(*features, weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = lpips_distance(*features, weights)
    for size in range(1, 80):
        other = [torch.rand(1, 64, size, size, device="cuda")]
        lpips_distance(other, other, weights[:1])
    graph.replay()
    assert torch.equal(result, expected)
