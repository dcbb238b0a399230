"""The kernels beside eager torch, torch.compile and what peers do, on a GPU or, at sizes for it, on the CPU.

    pytest benchmarks/bench_kernels.py --benchmark-enable --benchmark-json=raw.json
    python benchmarks/report_kernels.py collect raw.json

The first provider of an operation is eager torch. A GPU is timed with device events, over buffers that rotate where the
caches would hold them; the floor is the bytes of ``fastunlearn_kernels.traffic`` at the copy bandwidth of the same run.
"""

import functools
import itertools
import platform
import statistics
import time

import pytest
import torch
from fastunlearn_kernels import (
    MaskedAdamW,
    accumulate_saliency_,
    gradient_dots,
    lpips_distance,
    noise_pred_loss,
    pack_bits,
    saliency_mask,
    traffic,
    unpack_bits,
)
from torch import nn

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
ROUNDS, HEAVY_ROUNDS = (50, 10) if ON_GPU else (7, 3)
ROTATION = 4  # buffer sets: 4 x 64 MiB is five times an H100's second-level cache


def synchronize():
    if ON_GPU:
        torch.cuda.synchronize()


def device_name():
    if ON_GPU:
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


@functools.cache
def environment():
    """The machine, and its copy bandwidth: read and written bytes of a copy far larger than its caches."""
    source = torch.empty(2**30 if ON_GPU else 2**27, dtype=torch.uint8, device=DEVICE).fill_(1)
    target = torch.empty_like(source)
    times = (
        device_seconds(lambda: target.copy_(source), 10) if ON_GPU else host_seconds(lambda: target.copy_(source), 5)
    )
    return {
        "kind": "GPU" if ON_GPU else "CPU",
        "device": device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "copy_gb_per_s": 2 * source.numel() / statistics.median(times) / 1e9,
    }


def device_seconds(run, rounds):
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for _ in range(3):
        run()
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def host_seconds(run, rounds):
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times[1:]


def measure(benchmark, operation, size, provider, run, num_bytes=None, rounds=ROUNDS):
    """Times ``run``: the wall clock by pytest-benchmark, a GPU also by its own events."""
    benchmark.extra_info.update(operation=operation, size=size, provider=provider, environment=environment())
    if num_bytes is not None:
        benchmark.extra_info["bytes"] = num_bytes

    def timed():
        run()
        synchronize()

    if ON_GPU and not benchmark.disabled:
        benchmark.extra_info["device_median_s"] = statistics.median(device_seconds(run, rounds))
    benchmark.pedantic(timed, rounds=rounds, warmup_rounds=2 if rounds > 3 else 1)


# ---- noise_pred_loss


def eager_loss(noise_pred, teacher_preds, coefficients, weights):
    target = coefficients[:, 0].view(-1, 1, 1, 1) * teacher_preds[0].float()
    target = target + coefficients[:, 1].view(-1, 1, 1, 1) * teacher_preds[1].float()
    per_row = ((noise_pred.float() - target) ** 2).flatten(1).mean(1)
    return (weights * per_row).mean(), per_row.detach()


def run_graphed(step):
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


LOSS_SIZES = {"B=4, 4x64x64": (4, 4, 64, 64), "B=16, 4x64x64": (16, 4, 64, 64), "B=4, 4x128x128": (4, 4, 128, 128)}
if ON_GPU:
    LOSS_SIZES["64 MiB of latents"] = (2048, 4, 64, 64)
else:
    LOSS_SIZES["16 MiB of latents"] = (256, 4, 64, 64)
LOSS_PROVIDERS = ["eager", "torch.compile", "fastunlearn"] + ["fastunlearn, CUDA graph"] * ON_GPU


@pytest.mark.parametrize(("size", "provider"), list(itertools.product(LOSS_SIZES, LOSS_PROVIDERS)))
def test_noise_pred_loss(benchmark, size, provider):
    shape = LOSS_SIZES[size]
    sets = []
    for _ in range(ROTATION):
        noise_pred = torch.randn(shape, device=DEVICE).to(DTYPE).requires_grad_(True)
        teacher_preds = torch.randn(2, *shape, device=DEVICE).to(DTYPE)
        sets.append(
            (noise_pred, teacher_preds, torch.randn(shape[0], 2, device=DEVICE), torch.ones(shape[0], device=DEVICE))
        )
    function = eager_loss if provider == "eager" else noise_pred_loss
    if provider == "torch.compile":
        torch._dynamo.reset()
        function = torch.compile(eager_loss, dynamic=False)
    turn = itertools.cycle(sets)

    def step():
        inputs = next(turn)
        inputs[0].grad = None
        function(*inputs)[0].backward()

    num_bytes = traffic.noise_pred_loss_bytes(sets[0][0], 2, sets[0][1].element_size())
    run = run_graphed(step) if "graph" in provider else step
    measure(benchmark, "loss, forward + backward", size, provider, run, num_bytes)


# ---- MaskedAdamW


def sd15_shapes():
    """The 686 parameters of Stable Diffusion 1.5's UNet, 859,520,964 elements."""
    shapes = []

    def weight(*shape, bias=True):
        shapes.append(shape)
        if bias:
            shapes.append((shape[0],))

    def norm(channels):
        shapes.extend([(channels,), (channels,)])

    def resnet(inner, outer):
        norm(inner)
        weight(outer, inner, 3, 3)
        weight(outer, 1280)
        norm(outer)
        weight(outer, outer, 3, 3)
        if inner != outer:
            weight(outer, inner, 1, 1)

    def transformer(c):
        norm(c)
        weight(c, c, 1, 1)
        for context in (c, 768):
            norm(c)
            weight(c, c, bias=False)
            weight(c, context, bias=False)
            weight(c, context, bias=False)
            weight(c, c)
        norm(c)
        weight(8 * c, c)
        weight(c, 4 * c)
        weight(c, c, 1, 1)

    weight(320, 4, 3, 3)
    weight(1280, 320)
    weight(1280, 1280)
    skips, channels = [320], 320
    for level, outer in enumerate((320, 640, 1280, 1280)):
        for _ in range(2):
            resnet(channels, outer)
            channels = outer
            if level < 3:
                transformer(outer)
            skips.append(outer)
        if level < 3:
            weight(outer, outer, 3, 3)
            skips.append(outer)
    resnet(1280, 1280)
    transformer(1280)
    resnet(1280, 1280)
    for level, outer in enumerate((1280, 1280, 640, 320)):
        for _ in range(3):
            resnet(channels + skips.pop(), outer)
            channels = outer
            if level > 0:
                transformer(outer)
        if level < 3:
            weight(outer, outer, 3, 3)
    norm(320)
    weight(4, 320, 3, 3)
    return shapes


def adamw_shapes():
    """All of SD1.5 on a GPU; on a CPU its cross-attention keys and values, 19.2 M elements."""
    shapes = sd15_shapes()
    return (
        ("SD1.5, 859.5 M in 686", shapes)
        if ON_GPU
        else ("SD1.5 K and V, 19.2 M in 32", [s for s in shapes if s[1:] == (768,)])
    )


def eager_flat_adamw(param, grad, exp_avg, exp_avg_sq, mask, step):
    grad = torch.where(mask, grad, 0.0)
    grad = grad * (1.0 / (grad.norm() + 1e-6)).clamp(max=1.0)
    exp_avg.lerp_(grad, 0.1)
    exp_avg_sq.mul_(0.999).addcmul_(grad, grad, value=0.001)
    update = exp_avg / (1 - 0.9**step) / ((exp_avg_sq / (1 - 0.999**step)).sqrt() + 1e-8)
    param.copy_(torch.where(mask, param * (1 - 1e-5 * 0.01) - 1e-5 * update, param))


ADAMW_PROVIDERS = [
    ("torch foreach + bool mask + clip", 0.5),
    ("torch fused + bool mask + clip", 0.5),  # the strongest peer, on a CPU, too
    ("torch.compile, one flat tensor, + bool mask + clip", 0.5),
    ("int64 mask on the CPU, copied each step (SalUn)", 0.5),
    ("fastunlearn dense", 1.0),
    *[(f"fastunlearn {mode}", density) for mode in ("select", "compact") for density in (0.5, 0.1, 0.01)],
    *[("fastunlearn compact, bfloat16 weights", density) for density in (0.5, 0.1)],
    *[("fastunlearn select, whole sectors", 0.1)],
]


@pytest.mark.parametrize(("provider", "density"), ADAMW_PROVIDERS)
def test_masked_adamw(benchmark, provider, density):
    size, shapes = adamw_shapes()
    if "flat" in provider:
        shapes = [(sum(torch.Size(shape).numel() for shape in shapes),)]
    dtype = torch.bfloat16 if "bfloat16" in provider else torch.float32
    params = [nn.Parameter(torch.randn(shape, device=DEVICE).to(dtype) * 0.02) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    if "sectors" in provider:
        masks = [
            (torch.rand(-(-p.numel() // 8), device=DEVICE) < density).repeat_interleave(8)[: p.numel()].view(p.shape)
            for p in params
        ]
    else:
        masks = [torch.rand(param.shape, device=DEVICE) < density for param in params]
    num_bytes = None
    if provider.startswith("fastunlearn"):
        mode = "dense" if "dense" in provider else "select" if "select" in provider else "compact"
        packed = [] if mode == "dense" else [pack_bits(mask) for mask in masks]
        optimizer = MaskedAdamW(
            params, 1e-5, grad_masks=dict(zip(params, packed, strict=False)), compact=mode == "compact"
        )
        selected = sum(int(mask.sum()) for mask in masks)
        touched = sum(8 * int((bits != 0).sum()) for bits in packed)
        numel, item = sum(param.numel() for param in params), params[0].element_size()
        num_bytes = traffic.masked_adamw_bytes(numel, touched, selected, mode, item, item)
        num_bytes += traffic.gradient_dots_bytes(numel if mode == "dense" else touched, item)  # the norm
        masks = None

        def run():
            optimizer.step(grad_scale=optimizer.clip_factor(1.0)[0])

    elif "compile" in provider:
        states = [torch.zeros_like(params[0]) for _ in range(2)]
        step = torch.ones((), device=DEVICE)
        torch._dynamo.reset()
        compiled = torch.compile(eager_flat_adamw, dynamic=False)

        def run():
            compiled(params[0].detach(), params[0].grad, *states, masks[0], step)

    else:
        if "int64" in provider:
            masks = [mask.to("cpu", torch.int64) for mask in masks]
        optimizer = torch.optim.AdamW(params, 1e-5, foreach="fused" not in provider, fused="fused" in provider or None)

        def run():
            for param, mask in zip(params, masks, strict=True):
                param.grad *= mask.to(DEVICE)
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()

    rounds = 2 if "int64" in provider and ON_GPU else HEAVY_ROUNDS
    measure(benchmark, "AdamW with mask and clip", size, f"{provider}, density {density}", run, num_bytes, rounds)


# ---- saliency

SALIENCY_SIZE = 859_520_964 if ON_GPU else 4_000_000


@pytest.mark.parametrize("provider", ["argsort", "kthvalue", "fastunlearn"])
def test_saliency_mask(benchmark, provider):
    values = torch.randn(SALIENCY_SIZE, device=DEVICE)
    count = SALIENCY_SIZE // 2

    def run():
        if provider == "argsort":
            mask = torch.zeros(SALIENCY_SIZE, dtype=torch.bool, device=DEVICE)
            mask[values.abs().argsort(descending=True)[:count]] = True
        elif provider == "kthvalue":
            magnitude = values.abs()
            mask = magnitude >= magnitude.kthvalue(SALIENCY_SIZE - count + 1).values
        else:
            saliency_mask(values, 0.5)

    num_bytes = traffic.saliency_mask_bytes(SALIENCY_SIZE) if provider == "fastunlearn" else None
    rounds = HEAVY_ROUNDS if provider == "fastunlearn" else 2  # kthvalue runs one block on the whole tensor: seconds
    measure(benchmark, "saliency mask", f"{SALIENCY_SIZE / 1e6:.0f} M, density 0.5", provider, run, num_bytes, rounds)


@pytest.mark.parametrize("provider", ["eager", "fastunlearn"])
def test_accumulate_saliency(benchmark, provider):
    size, shapes = adamw_shapes()
    totals = [torch.zeros(shape, device=DEVICE) for shape in shapes]
    gradients = [torch.randn(shape, device=DEVICE).to(DTYPE) for shape in shapes]

    def run():
        if provider == "eager":
            torch._foreach_add_(totals, torch._foreach_abs(gradients))
        else:
            accumulate_saliency_(totals, gradients)

    num_bytes = traffic.accumulate_saliency_bytes(sum(t.numel() for t in totals), gradients[0].element_size())
    measure(benchmark, "accumulate saliency", size, provider, run, num_bytes, HEAVY_ROUNDS)


# ---- LPIPS


class Trunk(nn.Module):
    """AlexNet's or VGG16's convolutions, in the stages that LPIPS reads. Random weights cost what trained ones do."""

    def __init__(self, name):
        super().__init__()
        if name == "alex":
            stages = [
                [nn.Conv2d(3, 64, 11, 4, 2)],
                [nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2)],
                [nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, padding=1)],
                [nn.Conv2d(384, 256, 3, padding=1)],
                [nn.Conv2d(256, 256, 3, padding=1)],
            ]
        else:
            stages, channels = [], 3
            for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
                stages.append([nn.MaxPool2d(2, 2)] if stages else [])
                for _ in range(depth):
                    stages[-1].append(nn.Conv2d(channels, width, 3, padding=1))
                    channels = width
        self.stages = nn.ModuleList(
            nn.Sequential(*itertools.chain(*((m, nn.ReLU(True)) if isinstance(m, nn.Conv2d) else (m,) for m in stage)))
            for stage in stages
        )
        self.channels = [stage[-2].out_channels for stage in self.stages]

    def forward(self, x):
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


def published_head(features0, features1, heads):
    """The operations of lpips.LPIPS.forward, in its order."""
    total = 0
    for feature0, feature1, head in zip(features0, features1, heads, strict=True):
        unit0 = feature0 / (feature0.square().sum(1, keepdim=True).sqrt() + 1e-10)
        unit1 = feature1 / (feature1.square().sum(1, keepdim=True).sqrt() + 1e-10)
        total = total + nn.functional.conv2d((unit0 - unit1) ** 2, head.view(1, -1, 1, 1)).mean((2, 3), keepdim=True)
    return total.flatten()


LPIPS_CASES = [("alex", 512, n) for n in (1, 32, 128)] + [("vgg", 512, n) for n in (1, 32)]
if not ON_GPU:
    LPIPS_CASES = [("alex", 256, 1), ("alex", 256, 16)]
LPIPS_PROVIDERS = ["lpips", "lpips, no graph"] + ["lpips, bfloat16 channels_last"] * ON_GPU + ["fastunlearn"]


@pytest.mark.parametrize(("case", "provider"), list(itertools.product(LPIPS_CASES, LPIPS_PROVIDERS)))
def test_lpips_pair(benchmark, case, provider):
    """From images: two passes and the head as ``lpips`` has them, or one pass of both sides and the fused head."""
    name, size, batch = case
    torch.manual_seed(0)
    low = provider == "fastunlearn" or "bfloat16" in provider
    trunk = Trunk(name).requires_grad_(False).to(DEVICE, DTYPE if low else torch.float32)
    images = torch.rand(2, batch, 3, size, size, device=DEVICE).to(DTYPE if low else torch.float32)
    heads = [torch.rand(c, device=DEVICE, requires_grad=provider == "lpips") for c in trunk.channels]
    if low:
        trunk = trunk.to(memory_format=torch.channels_last)
    both = images.flatten(0, 1).to(memory_format=torch.channels_last)

    @torch.inference_mode(provider != "lpips")
    def run():
        if provider == "fastunlearn":
            features = trunk(both)
            return lpips_distance([f[:batch] for f in features], [f[batch:] for f in features], heads)
        sides = images if not low else [side.contiguous(memory_format=torch.channels_last) for side in images]
        return published_head(trunk(sides[0]), trunk(sides[1]), [head.to(images.dtype) for head in heads])

    measure(benchmark, f"LPIPS {name}, pairs", f"{batch} of {size}x{size}", provider, run, rounds=HEAVY_ROUNDS)


@pytest.mark.parametrize("provider", ["eager", "torch.compile", "fastunlearn"])
@pytest.mark.parametrize("name", ["alex", "vgg"] if ON_GPU else ["alex"])
def test_lpips_head(benchmark, name, provider):
    size, batch = (512, 32) if ON_GPU else (256, 8)
    trunk = Trunk(name).to(DEVICE, DTYPE, memory_format=torch.channels_last)
    with torch.no_grad():
        images = torch.rand(batch, 3, size, size, device=DEVICE).to(DTYPE, memory_format=torch.channels_last)
        sides = [trunk(images), trunk(images.flip(0))]
    heads = [torch.rand(c, device=DEVICE) for c in trunk.channels]
    low_heads = [head.to(DTYPE) for head in heads]
    torch._dynamo.reset()
    functions = {
        "eager": lambda: published_head(*sides, low_heads),
        "torch.compile": functools.partial(torch.compile(published_head, dynamic=False), *sides, low_heads),
        "fastunlearn": lambda: lpips_distance(*sides, heads),
    }
    with torch.no_grad():
        num_bytes = traffic.lpips_distance_bytes(sides[0])
        measure(benchmark, f"LPIPS {name}, head", f"{batch} of {size}x{size}", provider, functions[provider], num_bytes)


# ---- gradient dots


@pytest.mark.parametrize("provider", ["eager", "torch.compile, one flat tensor", "fastunlearn"])
def test_gradient_dots(benchmark, provider):
    size, shapes = adamw_shapes()
    if "flat" in provider:
        shapes = [(sum(torch.Size(shape).numel() for shape in shapes),)]
    sides = [[torch.randn(shape, device=DEVICE).to(DTYPE) for shape in shapes] for _ in range(2)]

    def eager(gradients0, gradients1):
        pairs = ((gradients0, gradients0), (gradients0, gradients1), (gradients1, gradients1))
        return torch.stack([sum((a.float() * b.float()).sum() for a, b in zip(*pair, strict=True)) for pair in pairs])

    torch._dynamo.reset()
    function = {"eager": eager, "fastunlearn": gradient_dots}.get(provider) or torch.compile(eager, dynamic=False)
    item = sides[0][0].element_size()
    num_bytes = traffic.gradient_dots_bytes(sum(g.numel() for g in sides[0]), item, item)
    measure(benchmark, "gradient dots", size, provider, lambda: function(*sides), num_bytes, HEAVY_ROUNDS)


# ---- what regional compile leaves: measured to decide whether kernels for it would pay


@pytest.mark.parametrize("provider", ["eager", "torch.compile"])
@pytest.mark.parametrize("operation", ["GEGLU", "GroupNorm + SiLU"])
def test_candidates(benchmark, operation, provider):
    if operation == "GEGLU":
        x = torch.randn(4 * 4096 if ON_GPU else 64, 2560, device=DEVICE).to(DTYPE).requires_grad_(True)

        def function(x):
            hidden, gate = x.chunk(2, dim=-1)
            return hidden * nn.functional.gelu(gate)

    else:
        shape = (4, 320, 64, 64) if ON_GPU else (1, 320, 16, 16)
        x = torch.randn(shape, device=DEVICE).to(DTYPE, memory_format=torch.channels_last).requires_grad_(True)
        weight, bias = torch.ones(320, device=DEVICE, dtype=DTYPE), torch.zeros(320, device=DEVICE, dtype=DTYPE)

        def function(x):
            return nn.functional.silu(nn.functional.group_norm(x, 32, weight, bias))

    torch._dynamo.reset()
    call = torch.compile(function, dynamic=False) if provider == "torch.compile" else function
    upstream = torch.ones_like(call(x))

    def run():
        x.grad = None
        call(x).backward(upstream)

    measure(benchmark, operation, "x".join(map(str, x.shape)), provider, run)


def test_shapes_are_those_of_stable_diffusion():
    shapes = sd15_shapes()
    assert len(shapes) == 686
    assert sum(torch.Size(shape).numel() for shape in shapes) == 859_520_964
    bits = torch.tensor([5], dtype=torch.uint8)
    assert unpack_bits(bits, 3).tolist() == [True, False, True]
