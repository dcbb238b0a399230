"""How long Python takes for a GPU's step over the 686 tensors of Stable Diffusion 1.5: launches stubbed, no GPU needed.

    PYTHONPATH=kernels/torch-ext python benchmarks/host_time.py [--rounds N]

CPU seconds of this process, median. ``step_ms``: with gradients at new addresses, as ``zero_grad`` leaves them;
``same_ms``: at the same ones, as in a CUDA graph's warm-up; ``norm_ms``: the clip factor.  ``in_floors``: a step
and its norm in units of the floor, measured in the same round: Python asking each parameter and its gradient for
address, size, type and device.
"""

import argparse
import json
import math
import statistics
import time

import torch
from bench_kernels import sd15_shapes
from fastunlearn_kernels import MaskedAdamW, launch, pack_bits
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class _NoDriver:
    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def median_ms(run, rounds, prepare=lambda: None):
    times = []
    for _ in range(rounds):
        prepare()
        times.append(seconds(run))
    return round(1e3 * statistics.median(times), 3)


def seconds(run):
    start = time.process_time()
    run()
    return time.process_time() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    driver.set_active(_NoDriver())
    launch.CHOICE, launch.INTERPRETED = None, True  # CPU tensors take the Triton path; nothing runs
    launches = []
    JITFunction.run = lambda self, *args, **options: launches.append(self.fn.__name__)
    modes = {}
    for mode in ("dense", "select", "compact"):
        # what a tensor's size costs is the GPU's: small ones stand for them
        params = [torch.nn.Parameter(torch.zeros(math.prod(shape) % 4096 + 8)) for shape in sd15_shapes()]
        masks = {} if mode == "dense" else {p: pack_bits(torch.rand(p.shape) < 0.5) for p in params}
        optimizer = MaskedAdamW(params, 1e-5, grad_masks=masks, compact=mode == "compact")
        scale = torch.ones(())
        kept = []

        def step(optimizer=optimizer, scale=scale):
            optimizer.step(grad_scale=scale)

        def move(params=params, kept=kept):
            fresh = [torch.zeros_like(p) for p in params]  # while the old ones are still there
            for param, gradient in zip(params, fresh, strict=True):
                param.grad = gradient
            kept[:] = fresh

        def norm(optimizer=optimizer):
            optimizer.clip_factor(1.0)

        def floor(params=params):
            return [(t.data_ptr(), t.numel(), t.dtype, t.device) for p in params for t in (p, p.grad)]

        def in_floors(step=step, norm=norm, floor=floor, move=move):
            move()
            own = seconds(norm) + seconds(step)
            return own / seconds(floor)

        move()
        step()
        norm()
        launches.clear()
        step()
        modes[mode] = {
            "launches_of_a_step": len(launches),
            "step_ms": median_ms(step, rounds, move),
            "same_ms": median_ms(step, rounds),
            "norm_ms": median_ms(norm, rounds, move),
            "in_floors": round(statistics.median(in_floors() for _ in range(rounds)), 2),
        }
    print(json.dumps({"tensors": 686, "rounds": rounds, "modes": modes}, indent=1))


if __name__ == "__main__":
    main()
