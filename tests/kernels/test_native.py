"""The native library: the same bits for every number of threads and instruction set, and what keeps it from running."""

import mmap
import os
import platform
import re
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from fastunlearn_kernels import (
    MaskedAdamW,
    accumulate_saliency_,
    build,
    gradient_dots,
    launch,
    lpips_distance,
    native,
    noise_pred_loss,
    pack_bits,
    reference,
    saliency_mask,
    unpack_bits,
)

ROOT = Path(__file__).parents[2]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _native(native_library, monkeypatch):
    """Only the library may run here; its level and the threads are put back."""
    monkeypatch.setattr(launch, "CHOICE", "native")
    monkeypatch.setattr(launch, "INTERPRETED", False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    native.use_level(native_library, None)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def as_integers(tensor):
    return tensor.contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def step(dtype, mode, with_other=False):
    """Three steps of tensors of odd sizes, with a gradient of NaN wherever it must not be read."""
    shapes = [(1,), (7, 9), (1024,), (130, 1031)]
    params = [torch.nn.Parameter(randn(*shape, seed=i).to(dtype)) for i, shape in enumerate(shapes)]
    masks = [randn(*shape, seed=10 + i) > (0 if mode != "dense" else -99) for i, shape in enumerate(shapes)]
    packed = {} if mode == "dense" else {p: pack_bits(m) for p, m in zip(params, masks, strict=True)}
    optimizer = MaskedAdamW(params, 1e-2, weight_decay=0.1, grad_masks=packed, compact=mode == "compact")
    before = [param.detach().clone() for param in params]
    norms = []
    for i in range(3):
        for j, (param, mask) in enumerate(zip(params, masks, strict=True)):
            gradient = randn(*param.shape, seed=100 * i + j)
            param.grad = torch.where(mask, gradient, float("nan")).to(dtype)
        others = {p: torch.where(m, -p.grad.float(), float("nan")) for p, m in zip(params, masks, strict=True)}
        factor, norm = optimizer.clip_factor(1.0)
        arguments = {"other_grads": others, "other_coefficient": torch.tensor(0.3)} if with_other else {}
        optimizer.step(grad_scale=factor, **arguments)
        norms.append(norm)
    for param, start, mask in zip(params, before, masks, strict=True):
        assert torch.equal(as_integers(param.detach()[~mask]), as_integers(start[~mask]))
        assert not param.isnan().any()
    states = [value for param in params for value in optimizer.state[param].values()]
    return [*(param.detach() for param in params), *norms, *states]


def losses(dtype, **options):
    batch, shape = 5, (5, 4, 71, 33)
    noise_pred = randn(*shape).to(dtype).requires_grad_(True)
    teacher, coefficients = randn(2, *shape, seed=1).to(dtype), randn(batch, 2, seed=2)
    coefficients[0, 0] = 0
    loss, per_row = noise_pred_loss(noise_pred, teacher, coefficients, randn(batch, seed=3), **options)
    (gradient,) = torch.autograd.grad(loss, noise_pred)
    return [loss.detach(), per_row, gradient]


def saliency():
    tensors = [randn(n, seed=n).round(decimals=2) for n in (1, 7, 70001, 200_003)]
    tensors[2][5:9] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40])
    for mode in ("absolute", "signed", "squared"):
        accumulate_saliency_(tensors, [randn(t.numel(), seed=4).bfloat16() for t in tensors], mode=mode)
    return [*tensors, *saliency_mask(tensors, 0.37), *saliency_mask([t.round() for t in tensors], 0.37)]


def dots(dtype0, dtype1):
    sides = [[randn(n, seed=n + s).to(d) for n in (1, 63, 70001, 200_003)] for s, d in enumerate((dtype0, dtype1))]
    masks = [pack_bits(randn(t.numel(), seed=9) > 0) for t in sides[0]]
    return [gradient_dots(*sides), gradient_dots(*sides, grad_masks=masks), gradient_dots(sides[0], grad_masks=masks)]


def heads(dtype):
    layers = [(64, 31), (192, 15), (5, 9), (17, 3), (1, 2)]
    features = [[randn(3, c, n, n, seed=s + c).relu().to(dtype) for c, n in layers] for s in (0, 50)]
    return [lpips_distance(*features, [randn(c, seed=c).abs() for c, _ in layers])]


MODES = ("dense", "select", "compact")
WORK = {
    **{f"{mode}, {dtype}": (step, dtype, mode) for mode in MODES for dtype in DTYPES},
    "compact with a projection": (step, torch.bfloat16, "compact", True),
    "select with a projection": (step, torch.float32, "select", True),
    **{f"loss, {dtype}": (losses, dtype) for dtype in DTYPES},
    "saliency": (saliency,),
    **{f"dots, {dtype}": (dots, dtype, torch.float32) for dtype in DTYPES},
    "dots of two of bfloat16": (dots, torch.bfloat16, torch.bfloat16),
    **{f"LPIPS, {dtype}": (heads, dtype) for dtype in DTYPES},
}  # fmt: skip


@pytest.mark.parametrize("name", WORK)
def test_the_same_bits_for_every_number_of_threads_and_instruction_set(name, native_library):
    function, *arguments = WORK[name]
    results = {}
    best = native_library.fu_best_level()
    for level in native.LEVELS[: best + 1]:
        native.use_level(native_library, level)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results[level, threads] = function(*arguments)
    first = results["baseline", 1]
    assert len(results) == 2 * (best + 1)
    for case, result in results.items():
        for i, (a, b) in enumerate(zip(first, result, strict=True)):
            same = torch.equal(a, b) if a.dtype == torch.uint8 else torch.equal(as_integers(a), as_integers(b))
            assert same, f"{name}, result {i}: {case} is not what the baseline gives with one thread"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_loss_with_all_options_is_the_same_everywhere(dtype, native_library):
    options = {
        "noise": randn(5, 4, 71, 33, seed=5).to(dtype), "noise_coefficients": randn(5, seed=6),
        "latents": randn(5, 4, 71, 33, seed=7), "snr": randn(5, seed=8).abs() + 0.1, "snr_gamma": 5.0,
        "spatial_mask": randn(5, 1, 71, 33, seed=9) > 0, "huber_delta": 0.7, "prediction_type": "v_prediction",
    }  # fmt: skip
    results = []
    for level in native.LEVELS[: native_library.fu_best_level() + 1]:
        native.use_level(native_library, level)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(losses(dtype, **options))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_are_read_and_rounded_as_torch_does(dtype, native_library):
    """Every value there is, read; and fp32 values near every rounding, written."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    close = torch.cat([every.float(), *(every.float() * (1 + k * 2**-12) for k in (-5, -1, 1, 3))])
    close = torch.cat([close, torch.tensor([65519.99, 65520.0, 3.3e38, 5.9e-8, 2.9e-8, 1e-45])])
    close = close[close.isfinite()]
    for level in native.LEVELS[: native_library.fu_best_level() + 1]:
        native.use_level(native_library, level)
        totals = torch.zeros(every.numel())
        accumulate_saliency_([totals], [every], mode="signed")
        expected = every.float()
        assert torch.equal(totals.nan_to_num(nan=7), expected.nan_to_num(nan=7))
        # a step without a gradient, decay or momentum writes the master, rounded
        param = torch.nn.Parameter(close.to(dtype))
        optimizer = MaskedAdamW([param], lr=1.0, weight_decay=0.0)
        optimizer.init_state(param)["master"].copy_(close)
        param.grad = torch.zeros_like(param)
        optimizer.step()
        assert torch.equal(param.detach(), close.to(dtype))


def test_equal_maps_are_at_distance_0_on_every_level(native_library):
    features = [randn(2, c, 9, 9, seed=c).relu() for c in (64, 3, 100)]
    copies = [f.clone() for f in features]
    for level in native.LEVELS[: native_library.fu_best_level() + 1]:
        native.use_level(native_library, level)
        assert torch.equal(lpips_distance(features, copies, [torch.rand(c) for c in (64, 3, 100)]), torch.zeros(2))


def test_the_mask_is_the_references(native_library):
    tensors = [randn(n, seed=n).round(decimals=1) for n in (1, 63, 70001)]
    total = sum(t.numel() for t in tensors)
    for count in (1, 2, total // 3, total - 1, total):
        expected = reference.select_largest(tensors, count)
        for bits, mask in zip(saliency_mask(tensors, count / total), expected, strict=True):
            assert torch.equal(unpack_bits(bits, mask.shape), mask)


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 4096, 70_003])
def test_packing_is_what_the_reference_packs(n, monkeypatch):
    mask = randn(n) > 0
    packed = pack_bits(mask)
    assert torch.equal(unpack_bits(packed, n), mask)
    monkeypatch.setattr(launch, "CHOICE", "reference")
    assert torch.equal(pack_bits(mask), packed)


def test_unaligned_and_strided_tensors_give_the_bits_of_aligned_dense_ones():
    n = 70_001
    base, mask = randn(n + 1), pack_bits(randn(n, seed=1) > 0)
    aligned, shifted = base[1:].clone(), base[1:]
    assert shifted.data_ptr() % 16
    strided = torch.stack([aligned, aligned], dim=1)[:, 0]
    assert torch.equal(gradient_dots([aligned], grad_masks=[mask]), gradient_dots([shifted], grad_masks=[mask]))
    assert torch.equal(gradient_dots([aligned]), gradient_dots([strided]))
    assert torch.equal(saliency_mask(aligned, 0.3), saliency_mask(shifted, 0.3))
    assert torch.equal(saliency_mask(aligned, 0.3), saliency_mask(strided, 0.3))
    params = [torch.nn.Parameter(t.clone()) for t in (aligned, aligned)]
    params[1].data = torch.cat([torch.zeros(1), aligned])[1:]
    for param, gradient in zip(params, (shifted, strided), strict=True):
        param.grad = gradient
        MaskedAdamW([param], 0.1, grad_masks={param: mask}).step()
    assert torch.equal(*params)


@pytest.mark.slow
def test_more_than_2_to_the_31_elements_are_summed_and_selected():
    """Pages of memory that nobody has written are all the one page of zeros: they can be read without being there."""
    n = 2**31 + 11
    memory = mmap.mmap(-1, 4 * n, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    values = torch.frombuffer(memory, dtype=torch.float32)
    values[-1], values[5] = 3.0, -4.0
    assert gradient_dots([values])[0] == 25
    bits = saliency_mask(values, 2 / n)
    assert bits[0] == 1 << 5
    assert int(bits[-1]) == 1 << (n - 1) % 8
    assert int(bits.count_nonzero()) == 2


def test_a_row_outside_the_bank_is_an_index_error():
    noise_pred, bank = torch.zeros(2, 1, 2, 2), torch.zeros(1, 3, 1, 2, 2)
    for row in (3, -1):
        for dtype in (torch.int32, torch.int64):
            index = torch.tensor([0, row], dtype=dtype)
            with pytest.raises(IndexError, match="row_index"):
                noise_pred_loss(noise_pred, bank, torch.ones(2, 1), torch.ones(2), row_index=index)


# ---- what keeps it from running --------------------------------------------------------------------------------------


def why_it_does_not_load(path):
    with pytest.raises(native.LibraryError) as caught:
        native.open_library(path)
    message = str(caught.value)
    assert "\n" not in message
    assert "python -m fastunlearn_kernels.build" in message
    return message


def test_a_library_that_is_not_there(tmp_path, monkeypatch):
    assert "is not built; run" in why_it_does_not_load(tmp_path / "_native.so")
    monkeypatch.setattr(native, "find_compiler", lambda: None)
    assert "is not built, and there is no C++ compiler: install g++" in why_it_does_not_load(tmp_path / "_native.so")


def test_a_level_that_the_processor_lacks_is_refused_when_it_loads(native_library, monkeypatch):
    monkeypatch.setenv("FASTUNLEARN_KERNELS_LEVEL", "avx9")
    try:
        with pytest.warns(UserWarning, match="LEVEL must be one of baseline"):
            native.load(Path(native_library._name))
        with pytest.raises(RuntimeError, match="cannot run here: FASTUNLEARN_KERNELS_LEVEL must be one of baseline"):
            gradient_dots([torch.ones(1)])
    finally:
        monkeypatch.delenv("FASTUNLEARN_KERNELS_LEVEL")
        native.load(Path(native_library._name))


def test_a_library_of_another_architecture(tmp_path, native_library):
    content = bytearray(Path(native_library._name).read_bytes())
    machine = struct.unpack_from("<H", content, 18)[0]
    struct.pack_into("<H", content, 18, 183 if machine != 183 else 62)  # e_machine of ELF: AArch64, x86-64
    (tmp_path / "_native.so").write_bytes(content)
    assert "does not load" in why_it_does_not_load(tmp_path / "_native.so")
    (tmp_path / "_native.so").write_bytes(b"no library at all")
    assert "does not load" in why_it_does_not_load(tmp_path / "_native.so")
    (tmp_path / "_native.so").write_bytes(content[:5000])
    assert "does not load" in why_it_does_not_load(tmp_path / "_native.so")


def compile_text(text, folder):
    source, target = folder / "other.cpp", folder / "_native.so"
    source.write_text(text)
    subprocess.run([*build.find_compiler(), "-shared", "-fPIC", str(source), "-o", str(target)], check=True)
    return target


def test_a_library_that_lacks_a_function_or_is_of_another_source(tmp_path):
    assert "lacks fu_source" in why_it_does_not_load(compile_text('extern "C" int fu_adamw() { return 0; }', tmp_path))
    names = [name for name in native._FUNCTIONS if name != "fu_source"]
    text = 'extern "C" const char *fu_source() { return "stale"; }\n'
    text += "\n".join(f'extern "C" int {name}() {{ return 0; }}' for name in names)
    other = tmp_path / "other"
    other.mkdir()
    assert "another native.cpp" in why_it_does_not_load(compile_text(text, other))


def test_a_library_that_cannot_be_used_is_a_warning_and_the_reference_serves(tmp_path, monkeypatch, native_library):
    monkeypatch.setattr(launch, "CHOICE", None)
    try:
        (tmp_path / "_native.so").write_bytes(b"damaged")
        with pytest.warns(UserWarning, match="does not load.*plain torch serves"):
            native.load(tmp_path / "_native.so")
        assert launch.backend_of(torch.ones(1)) == "reference"
        assert launch.describe()["CPU"].startswith("plain torch: the native library does not load")
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # one that was never built is no warning
            native.load(tmp_path / "absent.so")
        assert launch.describe()["CPU"].startswith("plain torch: the native library is not built")
        monkeypatch.setattr(launch, "CHOICE", "native")
        with pytest.raises(RuntimeError, match="FASTUNLEARN_KERNELS=native cannot run here: the native library is not"):
            gradient_dots([torch.ones(1)])
    finally:
        native.load(Path(native_library._name))
    assert native.is_available()


@pytest.mark.parametrize(
    ("choice", "match"),
    [
        ("triton", "there is no CUDA or ROCm device|Triton is not installed"),
        ("cuda", "must be one of reference, native, triton, got 'cuda'"),
    ],
)
def test_a_choice_that_cannot_run_is_one_line(choice, match, monkeypatch):
    if choice == "triton" and torch.cuda.is_available():
        pytest.skip("here it can")
    monkeypatch.setattr(launch, "CHOICE", choice)
    with pytest.raises(RuntimeError, match=match) as caught:
        gradient_dots([torch.ones(1)])
    assert "\n" not in str(caught.value)


def test_a_processor_without_avx2_runs_the_baseline_and_cannot_be_told_otherwise(native_library, monkeypatch):
    """``fu_best_level`` asks the processor; what lies above its answer is refused."""

    class Old:
        used = None

        def fu_best_level(self):
            return 0

        def fu_use_level(self, level):
            self.used = level

    old = Old()
    assert native.use_level(old, None) == "baseline"
    assert old.used == 0
    for wanted in ("avx2", "avx512", "sse9"):
        with pytest.raises(native.LibraryError, match="must be one of baseline on this processor"):
            native.use_level(old, wanted)


def run_python(code, **environment):
    path = os.pathsep.join([str(ROOT / "kernels/torch-ext"), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
    )


def test_the_environment_chooses(native_library):
    code = f"""
import pathlib, torch
from fastunlearn_kernels import launch, native
native.load(pathlib.Path({native_library._name!r}))
print(launch.backend_of(torch.ones(1)), launch.describe()["CPU"])
"""
    result = run_python(code, FASTUNLEARN_KERNELS="native", FASTUNLEARN_KERNELS_LEVEL="baseline")
    assert result.stdout.startswith("native native C++, baseline"), result.stderr
    assert run_python(code, FASTUNLEARN_KERNELS="reference").stdout.startswith(
        "reference plain torch (FASTUNLEARN_KERNELS)"
    )


# ---- the build -------------------------------------------------------------------------------------------------------


def test_without_a_compiler_the_build_says_so_in_one_line(tmp_path):
    code = f"import runpy, sys; sys.argv = ['build', '--output', {str(tmp_path / 'x.so')!r}]; " + (
        f"runpy.run_path({str(build.SOURCE.with_name('build.py'))!r}, run_name='__main__')"
    )
    result = run_python(code, PATH="/nonexistent")
    assert result.returncode == 2
    assert result.stderr == ("fastunlearn_kernels.build: there is no C++ compiler: install g++, or set CXX\n")
    result = run_python(code, CXX="/nonexistent/c++")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    result = run_python(code, CXX=f"{sys.executable} -c 'raise SystemExit(1)'")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_library_needs_torchs_openmp_and_the_c_library_alone(native_library):
    """No C++ library, whose version would bind it to a machine; and no fused multiply-add, which rounds otherwise."""
    if platform.system() != "Linux":
        pytest.skip("needs Linux")
    content = Path(native_library._name).read_bytes()
    assert b"libgomp.so.1" in content
    assert b"libstdc++.so" not in content
    with open("/proc/self/maps") as file:
        pools = {line.split()[-1] for line in file if "libgomp" in line}
    assert len(pools) == 1, f"a second OpenMP library was loaded: {pools}"


def test_every_function_of_the_library_is_declared(native_library):
    source = build.SOURCE.read_text()
    exported = set(re.findall(r"^EXPORT [\w *]*?\b\*?(fu_\w+)\(", source, re.MULTILINE))
    assert exported == set(native._FUNCTIONS)
