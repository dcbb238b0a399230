"""Compiles the kernels for GPUs that are not there, and reports what the compilers made of them, as JSON.

    PYTHONPATH=kernels/torch-ext python tests/kernels/offline_compile.py TARGET [SCENARIO ...]

TARGET is sm_80, sm_90, sm_100 or gfx942.

The public functions run on CPU tensors with a driver that claims to be the target and with launches replaced by
Triton's warm-up, which compiles. So the specialization is the one of a real call: which sizes are known to be multiples
of 16, which pointers are aligned, which flags are set. A script of its own, because TRITON_INTERPRET must not be set.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import fastunlearn_kernels as fk
import torch
import triton
from fastunlearn_kernels import launch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class _ClaimedDriver:
    """The few questions that Triton asks before it compiles."""

    def __init__(self, target):
        self.target = target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self.target


def noise_pred_loss(dtype=torch.bfloat16, size=64, **options):
    shape = (2, 4, size, size)
    noise_pred = torch.randn(shape).to(dtype).requires_grad_(True)
    teacher_preds = torch.randn((2, *shape)).to(dtype)
    loss, _ = fk.noise_pred_loss(noise_pred, teacher_preds, torch.ones(2, 2), torch.ones(2), **options)
    loss.backward()


def noise_pred_loss_all_options():
    noise_pred_loss(
        noise=torch.randn(2, 4, 64, 64).bfloat16(),
        noise_coefficients=torch.ones(2),
        latents=torch.randn(2, 4, 64, 64).bfloat16(),
        snr=torch.ones(2),
        snr_gamma=5.0,
        spatial_mask=torch.ones(2, 1, 64, 64),
        row_index=torch.tensor([0, 1]),
        huber_delta=1.0,
        prediction_type="v_prediction",
    )


def masked_adamw(mode, dtype=torch.bfloat16):
    param = torch.nn.Parameter(torch.randn(64, 64).to(dtype))
    param.grad = torch.randn(64, 64).to(dtype)
    masks = {} if mode == "dense" else {param: fk.pack_bits(torch.rand(64, 64) > 0.5)}
    optimizer = fk.MaskedAdamW([param], torch.tensor(1e-3), compact=mode == "compact", grad_masks=masks)
    optimizer.step(grad_scale=torch.ones(()))


def lpips_distance(channels, dtype=torch.bfloat16):
    features = [torch.rand(1, c, 7, 7).to(dtype).to(memory_format=torch.channels_last) for c in channels]
    fk.lpips_distance(features, features, [torch.rand(c) for c in channels])


def saliency():
    # what the kernels that do not run would write is read by torch: any counts will do, as long as they are there
    torch.empty = lambda *args, make=torch.empty, **kwargs: make(*args, **kwargs).fill_(100)
    scores = torch.rand(128, 128)
    fk.accumulate_saliency_([scores], [torch.rand(128, 128).bfloat16()])
    fk.saliency_mask(scores, 0.5)


def gradient_dots(with_bits):
    gradients = [torch.randn(128, 128).bfloat16()]
    masks = [fk.pack_bits(torch.rand(128, 128) > 0.5)] if with_bits else None
    fk.gradient_dots(gradients, gradients, grad_masks=masks)


SCENARIOS = {
    "loss": noise_pred_loss,
    "loss fp16": lambda: noise_pred_loss(torch.float16),
    "loss odd size": lambda: noise_pred_loss(size=63),
    "loss all options": noise_pred_loss_all_options,
    "adamw dense": lambda: masked_adamw("dense"),
    "adamw select": lambda: masked_adamw("select"),
    "adamw compact": lambda: masked_adamw("compact"),
    "adamw fp32 dense": lambda: masked_adamw("dense", torch.float32),
    "adamw fp32 select": lambda: masked_adamw("select", torch.float32),
    "adamw fp32 compact": lambda: masked_adamw("compact", torch.float32),
    "lpips alex": lambda: lpips_distance((64, 192, 384, 256, 256)),
    "lpips vgg": lambda: lpips_distance((64, 128, 256, 512, 512)),
    "lpips squeeze fp32": lambda: lpips_distance((64, 128, 256, 384, 384, 512, 512), torch.float32),
    "saliency": saliency,
    "dots": lambda: gradient_dots(False),
    "dots masked": lambda: gradient_dots(True),
}


def compile_all(target_name, scenarios):
    """{scenario: {kernel: report}} for one target."""
    driver.set_active(_ClaimedDriver(TARGETS[target_name]))
    launch.IS_AMD = target_name.startswith("gfx")
    launch.INTERPRETED = True  # CPU tensors take the Triton path; nothing is interpreted, nothing runs
    compiled = {}
    original = JITFunction.run

    def warm_up(self, *args, grid, warmup, **kwargs):
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        compiled[self.fn.__name__] = kernel
        return kernel

    JITFunction.run = warm_up
    reports = {}
    for name in scenarios:
        compiled.clear()
        SCENARIOS[name]()
        describe = describe_amd if target_name.startswith("gfx") else describe_nvidia
        reports[name] = {kernel: describe(result) for kernel, result in compiled.items()}
    return reports


def count(pattern, text):
    """{width in bits or name: occurrences} of the one group in ``pattern``."""
    counts = {}
    for match in re.finditer(pattern, text, re.MULTILINE):
        counts[match.group(1) or "32"] = counts.get(match.group(1) or "32", 0) + 1
    return counts


def describe_nvidia(kernel):
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        run = {"check": True, "capture_output": True, "text": True}
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], **run).stdout
        sass = subprocess.run([tool, "-sass", file.name], **run).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": numbers["REG"],
        "spills": numbers["STACK"] + numbers["LOCAL"] + len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "loads": count(r"\bLDG\.E(?:\.(?:EF|EL|LU|NA))*(?:\.CONSTANT)?(?:\.([US]8|[US]16|64|128))?", sass),
        "stores": count(r"\bSTG\.E(?:\.(?:EF|EL|LU|NA))*(?:\.([US]8|[US]16|64|128))?", sass),
        "float_atomics": len(re.findall(r"\b(?:ATOM|ATOMG|RED)\S*\.F(?:16|32|64)", sass)),
        "fused_multiply_adds": len(re.findall(r"\bFFMA\b", sass)),
    }


def describe_amd(kernel):
    assembly = kernel.asm["amdgcn"]

    def value(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly).group(1))

    widths = {"dwordx4": "128", "dwordx3": "96", "dwordx2": "64", "dword": "32"}
    patterns = {"loads": r"\b(?:global|buffer)_load_(\w+)", "stores": r"\b(?:global|buffer)_store_(\w+)"}
    return {
        "registers": value("vgpr_count"),
        "spills": value("vgpr_spill_count") + value("sgpr_spill_count"),
        **{
            kind: {widths.get(name, name): n for name, n in count(pattern, assembly).items()}
            for kind, pattern in patterns.items()
        },
        "float_atomics": len(re.findall(r"_atomic_\w*_f(?:16|32|64)", assembly)),
    }


if __name__ == "__main__":
    json.dump(compile_all(sys.argv[1], sys.argv[2:] or SCENARIOS), sys.stdout, indent=1)
