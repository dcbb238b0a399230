"""Where an operation runs: the only file that asks whether Triton is there, and the only one that knows about devices.

There are three backends behind every function: Triton kernels (CUDA and ROCm), the native library (CPU), and plain
torch, the reference: the oracle of the tests, and what serves where neither of the others can run. The environment
variable ``FASTUNLEARN_KERNELS`` names one of them for the whole process.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

import torch

from . import native

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


IS_AMD = torch.version.hip is not None

BACKENDS = ("reference", "native", "triton")
CHOICE = os.environ.get("FASTUNLEARN_KERNELS") or None  # None: for each tensor what is fastest


def backend_of(tensor: torch.Tensor) -> str:
    """What operations on ``tensor`` run: "triton", "native" or "reference".

    CUDA and ROCm tensors always launch Triton: a machine whose GPU build lacks it gets an error, never a silent
    fallback. CPU tensors take the native library where it can be loaded, else the reference; under Triton's
    interpreter, that is with ``TRITON_INTERPRET=1`` set before the import, the kernels. Other devices: the reference.

    Raises:
        RuntimeError: CUDA tensors without Triton, or a backend in ``FASTUNLEARN_KERNELS`` that cannot run them.
    """
    if CHOICE is not None:
        return _chosen(tensor)
    if tensor.is_cuda:
        if triton is None:
            raise RuntimeError(
                "GPU tensors need Triton, which is not installed. Install `triton` or move them to the CPU."
            )
        return "triton"
    if tensor.device.type != "cpu":
        return "reference"
    if INTERPRETED:
        return "triton"
    return "native" if native.is_available() else "reference"


def runs_triton(tensor: torch.Tensor) -> bool:
    return backend_of(tensor) == "triton"


def _chosen(tensor: torch.Tensor) -> str:
    check_choice()
    if CHOICE == "native" and tensor.device.type != "cpu":
        raise RuntimeError(f"FASTUNLEARN_KERNELS=native runs tensors on the CPU only, got one on {tensor.device}.")
    if CHOICE == "triton" and not tensor.is_cuda and not (INTERPRETED and tensor.device.type == "cpu"):
        raise RuntimeError(f"FASTUNLEARN_KERNELS=triton runs tensors on a GPU only, got one on {tensor.device}.")
    assert CHOICE is not None
    return CHOICE


def check_choice() -> None:
    """Raises RuntimeError, in one line, if ``FASTUNLEARN_KERNELS`` names what cannot run on this machine, or
    ``FASTUNLEARN_KERNELS_LEVEL`` an instruction set that its processor lacks."""
    if CHOICE is None and os.environ.get("FASTUNLEARN_KERNELS_LEVEL") and not native.is_available():
        raise RuntimeError(f"{native.why_not()}.")
    if CHOICE is None or CHOICE == "reference":
        return
    if CHOICE not in BACKENDS:
        raise RuntimeError(f"FASTUNLEARN_KERNELS must be one of {', '.join(BACKENDS)}, got {CHOICE!r}.")
    if CHOICE == "native":
        if not native.is_available():
            raise RuntimeError(f"FASTUNLEARN_KERNELS=native cannot run here: {native.why_not()}.")
    elif triton is None:
        raise RuntimeError("FASTUNLEARN_KERNELS=triton cannot run here: Triton is not installed.")
    elif not (INTERPRETED or torch.cuda.is_available()):
        raise RuntimeError("FASTUNLEARN_KERNELS=triton cannot run here: there is no CUDA or ROCm device.")


def describe() -> dict[str, str]:
    """Which backend serves the CPU, and a GPU if there is one, and why: {"CPU": ..., "GPU": ...}."""
    why = "" if CHOICE is None else " (FASTUNLEARN_KERNELS)"
    try:
        serves = backend_of(torch.empty(0))
    except RuntimeError as error:
        result = {"CPU": f"none: {error}"}
    else:
        reason = {"native": native.describe(), "reference": "plain torch", "triton": "Triton, interpreted"}[serves]
        if serves == "reference" and CHOICE is None:
            why = f": {native.why_not()}"
        result = {"CPU": reason + why}
    if torch.cuda.is_available():
        installed = "Triton is not installed" if triton is None else f"Triton {triton.__version__}"
        result["GPU"] = "plain torch" + why if CHOICE == "reference" else installed
    return result


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one: Triton launches on the current device, whatever its arguments say."""
    if not tensor.is_cuda or torch.compiler.is_compiling():  # a compiled graph selects its device itself
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def num_warps(on_nvidia: int) -> int:
    """Half of them on AMD, whose warps are twice as wide: else 8 elements a thread become 4, and loads 64 bits."""
    return max(1, on_nvidia // 2) if IS_AMD else on_nvidia


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
