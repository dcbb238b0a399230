"""Every test of a public function runs on each backend, on the same oracle, and says which way it took.

* ``native``: CPU tensors take the compiled library. Where the package's own is missing or stale it is compiled anew
  for the session; only where there is no compiler these tests are skipped, and say so.
* ``reference``: CPU tensors take plain torch.
* Under Triton's interpreter: CPU tensors take the real kernels. Triton decides between compiler and interpreter when a
  kernel is decorated, so ``TRITON_INTERPRET=1`` must be set before it; ``test_interpreted.py`` runs these files in
  processes where it is, whatever else the suite has imported. By hand: ``TRITON_INTERPRET=1 pytest tests/kernels``.

``test_offline_compile.py`` runs the real compiler for GPUs that are not there, in processes where it is not set.
"""

import importlib

import pytest
import torch
from fastunlearn_kernels import build, launch, native, native_calls, plans, reference

REFERENCES = (
    "noise_pred_loss",
    "lpips_distance",
    "masked_adamw_",
    "fused_adamw_",
    "select_largest",
    "accumulate_saliency_",
    "gradient_dots",
)
# reference: the module and the function that calls the library for it
NATIVE = {
    "noise_pred_loss": (native_calls, "noise_pred_loss"),
    "lpips_distance": (native_calls, "lpips_distance"),
    "masked_adamw_": (plans, "masked_adamw_"),
    "fused_adamw_": (plans, "masked_adamw_"),
    "select_largest": (native_calls, "select_largest"),
    "accumulate_saliency_": (native_calls, "accumulate_saliency_"),
    "gradient_dots": (native_calls, "dots_of"),
}


@pytest.fixture(scope="session")
def native_library(tmp_path_factory):
    """The library of this very source, loaded for the session."""
    if not native.is_available():
        if build.find_compiler() is None:
            pytest.skip("there is no C++ compiler, so no native library")
        native.load(build.build(tmp_path_factory.mktemp("native") / "_native.so"))
        assert native.is_available(), native.why_not()
    return native.library()


@pytest.fixture(params=["interpreted"] if launch.INTERPRETED else ["native", "reference"])
def backend(request, monkeypatch):
    """What CPU tensors run in this test."""
    if request.param == "native":
        request.getfixturevalue("native_library")
    monkeypatch.setattr(launch, "CHOICE", {"interpreted": None}.get(request.param, request.param))
    return request.param


@pytest.fixture
def took(monkeypatch, backend):
    """``took(kernel, reference)`` asserts that the one, under the interpreter, or what stands for the other ran.

    A call of a reference where something else should run fails at once: no test passes because its reference stood in.
    """
    ran = []

    if launch.INTERPRETED:
        from triton.runtime.interpreter import InterpretedFunction

        original = InterpretedFunction.run

        def run(self, *args, **kwargs):
            ran.append(self.fn.__name__)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(InterpretedFunction, "run", run)

    def watch(name, function, label):
        def watched(*args, **kwargs):
            assert label is not None, f"the reference {name} ran where {backend} should have"
            ran.append(label)
            return function(*args, **kwargs)

        return watched

    for name in REFERENCES:
        label = name if backend == "reference" else None
        monkeypatch.setattr(reference, name, watch(name, getattr(reference, name), label))
    for module, name in set(NATIVE.values()):
        monkeypatch.setattr(module, name, watch(name, getattr(module, name), (module, name)))

    def check(kernel, reference_name):
        expected = {"interpreted": kernel, "native": NATIVE[reference_name], "reference": reference_name}[backend]
        assert expected in ran, f"{expected} is not among what ran: {ran}"

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
    for name in (
        "noise_loss",
        "_noise_loss_kernel",
        "lpips_head",
        "_masked_adamw_kernel",
        "saliency",
        "gradient_dots",
        "native_calls",
        "plans",
    ):
        # by import_module: the package's attribute `gradient_dots` is the function, not its file
        module = importlib.import_module(f"fastunlearn_kernels.{name}")
        monkeypatch.setattr(module, "torch", _PoisonedTorch())
