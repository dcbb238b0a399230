"""A training step of the whole denoiser: torch dense and masked, ZeRO 1 to 3 on one and two processes; on a GPU the
usual masked fine-tune beside ours, at the sizes of SD1.5 and SDXL.

    python -m pytest benchmarks/bench_training.py --benchmark-enable --benchmark-json raw.json
    python benchmarks/bench_training.py raw.json benchmarks/results/training_cpu.json

CPU: the bundled model, 8 rows per step over all processes, every case in processes of its own, two cores in all.  A
step is forward, loss, backward, clipping and update.  Peak memory is the highest resident size of a process, import of
the libraries and the making of the bank included, so differences count, not ratios; ``optimizer`` is counted: states,
float32 copies of the weights that DeepSpeed keeps, and masks, of one process.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import tempfile
from multiprocessing.connection import Listener
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("training_worker.py")
WARM_UP, ROUNDS = 2, 7
CASES = [
    ("torch, dense", None, None, 1),
    ("torch, mask 0.5", None, 0.5, 1),
    ("torch, mask 0.1", None, 0.1, 1),
    *(
        (f"ZeRO {stage}, mask 0.5, {processes} process{'es' * (processes > 1)}", stage, 0.5, processes)
        for processes in (1, 2)
        for stage in (1, 2, 3)
    ),
]


@pytest.mark.parametrize(("name", "stage", "density", "processes"), CASES, ids=[case[0] for case in CASES])
def test_step_on_the_cpu(benchmark, name, stage, density, processes):
    if stage is not None:
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    threads = max(1, 2 // processes)
    case = json.dumps({"stage": stage, "density": density, "threads": threads})
    with tempfile.TemporaryDirectory() as folder, Listener(f"{folder}/socket", "AF_UNIX") as listener:
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        with subprocess.Popen([*launcher, str(WORKER), folder, case], stderr=subprocess.DEVNULL) as worker:
            steps = listener.accept()

            def step():
                steps.send("step")
                assert steps.recv() == "done"

            benchmark.pedantic(step, rounds=ROUNDS, warmup_rounds=WARM_UP)
            steps.send("stop")
            assert worker.wait(timeout=60) == 0
        records = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("memory-*.json"))]
    assert len(records) == processes
    benchmark.extra_info |= {"case": name, "processes": processes, "threads": threads}
    benchmark.extra_info |= {key: max(record[key] for record in records) for key in records[0]}


# ---- with a GPU ------------------------------------------------------------------------------------------------------

SD15 = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
}
SDXL = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def unet_step(config, rows, kind, density):
    """A function that makes a step of a UNet with random weights and the real configuration.

    ``usual``: foreach AdamW, gradients multiplied by a float mask, clipped by torch.  ``ours``: the engine.  Both train
    all float32 weights under bfloat16 autocast.
    """
    from fastunlearn_kernels import pack_bits

    from fastunlearn.models.runtime import import_diffusers
    from fastunlearn.training.engine import TorchEngine
    from fastunlearn.training.selection import Selection

    torch.manual_seed(0)
    with torch.device("cuda"):
        unet = import_diffusers().UNet2DConditionModel(**config)
    size, wide = config["sample_size"], config["cross_attention_dim"]
    x, target = (torch.randn(rows, 4, size, size, device="cuda") for _ in range(2))
    timesteps, hidden = torch.full((rows,), 500, device="cuda"), torch.randn(rows, 77, wide, device="cuda")
    extra = None
    if "addition_embed_type" in config:
        extra = {"text_embeds": torch.randn(rows, 1280, device="cuda"), "time_ids": torch.ones(rows, 6, device="cuda")}

    def loss():
        with torch.autocast("cuda", torch.bfloat16):
            predicted = unet(x, timesteps, hidden, added_cond_kwargs=extra, return_dict=False)[0]
        return (predicted.float() - target).square().mean()

    named = dict(unet.named_parameters())
    if kind == "ours":
        bits = {name: pack_bits(torch.rand(p.shape, device="cuda") < density) for name, p in named.items()}
        engine = TorchEngine(unet, Selection.of(unet, list(named), bits), learning_rate=1e-5, mixed_precision="bf16")

        def step():
            engine.backward(loss())
            engine.step()

        return step
    masks = {name: (torch.rand(p.shape, device="cuda") < density).float() for name, p in named.items()}
    optimizer = torch.optim.AdamW(named.values(), lr=1e-5, weight_decay=0.0, foreach=True)

    def usual_step():
        loss().backward()
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        for name, parameter in named.items():
            parameter.grad.mul_(masks[name])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return usual_step


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["usual", "ours"])
@pytest.mark.parametrize(("size", "config", "rows"), [("SD1.5", SD15, 4), ("SDXL", SDXL, 4)], ids=["SD1.5", "SDXL"])
def test_masked_step_on_a_gpu(benchmark, size, config, rows, kind):
    """Density 0.5, everything trainable.  What does not fit is recorded as such: that is the result."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.cuda.reset_peak_memory_stats()
    benchmark.extra_info |= {"case": f"{size}, {kind}", "rows": rows, "device": torch.cuda.get_device_name()}

    def synchronized(step):
        step()
        torch.cuda.synchronize()

    try:
        step = unet_step(config, rows, kind, density=0.5)
        benchmark.pedantic(synchronized, args=(step,), rounds=10, warmup_rounds=3)
    except torch.cuda.OutOfMemoryError:
        benchmark.extra_info["does_not_fit"] = True
        benchmark.pedantic(lambda: None)
    benchmark.extra_info["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()


# ---- the result file -------------------------------------------------------------------------------------------------


def collect(raw: Path, target: Path) -> None:
    """One record a case, with its step's median beside the first case's of the same run."""
    content = json.loads(raw.read_text())
    records = []
    for entry in content["benchmarks"]:
        times = entry["stats"]["data"]
        info = entry["extra_info"]
        record = {"case": info["case"], "step_ms": round(1e3 * statistics.median(times), 1), "rounds": len(times)}
        if info.get("does_not_fit"):
            record = {"case": info["case"], "step_ms": None, "rounds": 0}
        records.append(record | {key: value for key, value in info.items() if key != "case"})
    first = records[0]["step_ms"]
    for record in records:
        if first and record["step_ms"]:
            record["times_the_first"] = round(record["step_ms"] / first, 3)
    machine = f"{platform.machine()}, {content['machine_info']['cpu']['count']} cores"
    result = {"machine": machine, "torch": torch.__version__, "python": platform.python_version(), "cases": records}
    target.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    collect(Path(sys.argv[1]), Path(sys.argv[2]))
