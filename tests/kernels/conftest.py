"""Every test of a public function runs twice, on the same oracle, and says which way it took.

* As it is: CPU tensors take the plain-torch reference.
* Under Triton's interpreter: CPU tensors take the real kernels. Triton decides between compiler and interpreter when a
  kernel is decorated, so ``TRITON_INTERPRET=1`` must be set before it; ``test_interpreted.py`` runs these files in
  processes where it is, whatever else the suite has imported. By hand: ``TRITON_INTERPRET=1 pytest tests/kernels``.

``test_offline_compile.py`` runs the real compiler for GPUs that are not there, in processes where it is not set.
"""

import importlib

import pytest
import torch
from fastunlearn_kernels import launch, reference

REFERENCES = (
    "noise_pred_loss",
    "lpips_distance",
    "masked_adamw_",
    "fused_adamw_",
    "select_largest",
    "accumulate_saliency_",
    "gradient_dots",
)


@pytest.fixture(autouse=True)
def took(monkeypatch):
    """``took(kernel, reference)`` asserts that the one, under the interpreter, or else the other ran.

    Under the interpreter a call of any reference fails at once: no kernel test passes because its reference stood in.
    """
    ran = []

    if launch.INTERPRETED:
        from triton.runtime.interpreter import InterpretedFunction

        original = InterpretedFunction.run

        def run(self, *args, **kwargs):
            ran.append(self.fn.__name__)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(InterpretedFunction, "run", run)

    def watch(name, function):
        def watched(*args, **kwargs):
            assert not launch.INTERPRETED, f"the reference {name} ran where a kernel should have"
            ran.append(name)
            return function(*args, **kwargs)

        return watched

    for name in REFERENCES:
        monkeypatch.setattr(reference, name, watch(name, getattr(reference, name)))

    def check(kernel, reference_name):
        assert (kernel if launch.INTERPRETED else reference_name) in ran, f"not among what ran: {ran}"

    return check


class _PoisonedTorch:
    """torch, but what a kernel must write itself starts as NaN or the largest integer: an element left out shows."""

    def __getattr__(self, name):
        return getattr(torch, name)

    @staticmethod
    def _poison(tensor):
        return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

    def empty(self, *args, **kwargs):
        return self._poison(torch.empty(*args, **kwargs))

    def empty_like(self, *args, **kwargs):
        return self._poison(torch.empty_like(*args, **kwargs))


@pytest.fixture(autouse=True)
def _poisoned_buffers(monkeypatch):
    for name in ("noise_loss", "lpips_head", "_masked_adamw_kernel", "saliency", "gradient_dots"):
        # by import_module: the package's attribute `gradient_dots` is the function, not its file
        module = importlib.import_module(f"fastunlearn_kernels.{name}")
        monkeypatch.setattr(module, "torch", _PoisonedTorch())
