"""Where a kernel runs: the only file that asks whether Triton is there, and the only one that knows about devices."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's CPU wheels come without it, and the reference needs none of it
    triton = tl = None


if TYPE_CHECKING:  # a kernel is written in Triton's language, which no type checker reads
    from typing import no_type_check as jit
else:

    def jit(fn):
        """``triton.jit``; without Triton the bare function, which :func:`runs_triton` never lets anybody launch."""
        return fn if triton is None else triton.jit(fn)


@jit
def _probe_kernel():
    pass


# Triton decides between its compiler and its interpreter when a function is decorated, so this is settled at import.
INTERPRETED = triton is not None and not isinstance(_probe_kernel, triton.runtime.JITFunction)


def runs_triton(tensor: torch.Tensor) -> bool:
    """Whether operations on ``tensor`` launch Triton kernels (True) or the plain-torch reference (False).

    CUDA and ROCm tensors always launch: a machine whose GPU build lacks Triton gets an error, never a silent fallback.
    CPU tensors launch only under Triton's interpreter, that is with ``TRITON_INTERPRET=1`` set before the import.
    """
    if tensor.is_cuda:
        if triton is None:
            raise RuntimeError(
                "GPU tensors need Triton, which is not installed. Install `triton` or move them to the CPU."
            )
        return True
    return INTERPRETED and tensor.device.type == "cpu"


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one: Triton launches on the current device, whatever its arguments say."""
    if not tensor.is_cuda or torch.compiler.is_compiling():  # a compiled graph selects its device itself
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
