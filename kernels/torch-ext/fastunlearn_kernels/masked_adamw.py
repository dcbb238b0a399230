"""AdamW that changes only the elements a bit mask selects: the optimizer; its launch is in ``_masked_adamw_kernel``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from . import reference
from ._masked_adamw_kernel import BLOCK_ELEMENTS, TensorStep, launch_masked_adamw
from .bits import num_bytes, pack_bits, unpack_bits
from .checks import FLOAT_DTYPES, check_tensor
from .gradient_dots import gradient_dots
from .launch import runs_triton

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT


class _PackedMask:
    """The mask of one parameter: as it was given, and as the step needs it, in the order of the parameter's memory."""

    def __init__(self, param: torch.Tensor, bits: torch.Tensor):
        self.bits = bits
        mask = unpack_bits(bits, param.shape)
        in_memory_order = mask.permute(_memory_order(param)).reshape(-1)
        self.flat_bits = pack_bits(in_memory_order)
        self.count = int(mask.sum())
        blocks = torch.nn.functional.pad(in_memory_order, (0, -mask.numel() % BLOCK_ELEMENTS)).view(-1, BLOCK_ELEMENTS)
        per_block = blocks.sum(1, dtype=torch.int64)
        self.ranks = per_block.cumsum(0) - per_block

    def flat_mask(self, numel: int) -> torch.Tensor:
        return unpack_bits(self.flat_bits, numel)

    def tensors(self) -> list[torch.Tensor]:
        return [self.bits, self.flat_bits, self.ranks]


def _memory_order(tensor: torch.Tensor) -> tuple[int, ...]:
    """The dimensions from the slowest to the fastest: permuted so, a dense tensor of any layout is contiguous."""
    strides = tensor.stride()
    return tuple(sorted(range(tensor.dim()), key=lambda d: -strides[d]))


class MaskedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019) for weights of which only selected elements may change.

    An element whose bit is 0 keeps its bits, and so do its states: no weight decay, no NaN of its gradient reaches it.
    A parameter without a mask is trained whole. Weights of 16 bits are stepped in fp32 masters and written back
    rounded. On CUDA and ROCm one launch steps all parameters of a group that share a dtype and a mode; no step waits
    for the device, and learning rate, clip factor and step counts are read there, so that a step can be captured in a
    CUDA graph (see :meth:`step`).

    Args:
        params: parameters or groups of them, as for ``torch.optim.AdamW``: dense, of any memory format, float16,
            bfloat16 or float32. Groups are read afresh at each step and may be replaced by one flat tensor each, as
            ZeRO does.
        lr: learning rate, a number or a () float32 tensor on the parameters' device.
        betas, eps, weight_decay: as for ``torch.optim.AdamW``; the decay is decoupled.
        grad_masks: parameter -> packed mask, as :meth:`set_grad_mask` takes it.
        compact: keep states only for the selected elements: 8 bytes (12 with masters) for each of them, not for each
            element. The steps are the same. The attribute of this name must not change once there are states.

    ``state[param]`` holds ``step``, () float32, and in float32 ``exp_avg``, ``exp_avg_sq`` and, for a parameter of 16
    bits, ``master``. These have the shape of the parameter; or, compact and masked, (selected,), in the order in which
    the selected elements lie in memory.

    Raises:
        TypeError, ValueError: what is wrong with the arguments.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        grad_masks: Mapping[torch.Tensor, torch.Tensor] | None = None,
        compact: bool = False,
    ):
        # kept out of `state`, where torch would cast them to the dtype of the parameter when a checkpoint is loaded
        self._selections: dict[torch.Tensor, _PackedMask] = {}
        self.compact = compact
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        for param, bits in (grad_masks or {}).items():
            self.set_grad_mask(param, bits)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            del self.param_groups[-1]
            raise

    @staticmethod
    def _check_group(group: dict[str, Any]) -> None:
        lr, betas = group["lr"], group["betas"]
        if isinstance(lr, torch.Tensor):
            check_tensor("lr", lr, (torch.float32,), ())
        elif not lr >= 0:
            raise ValueError(f"`lr` must be at least 0, got {lr}.")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"`betas` must be two numbers in [0, 1), got {betas}.")
        for name in ("eps", "weight_decay"):
            if not group[name] >= 0:
                raise ValueError(f"`{name}` must be at least 0, got {group[name]}.")
        for param in group["params"]:
            check_tensor("params", param, FLOAT_DTYPES, frozen=False)
            if not param.permute(_memory_order(param)).is_contiguous():
                raise ValueError(f"Parameters must be dense, got shape {tuple(param.shape)}, strides {param.stride()}.")

    def set_grad_mask(self, param: torch.Tensor, bits: torch.Tensor | None) -> None:
        """Lets ``param`` change only where the bit is 1; None lets it change everywhere.

        Args:
            param: a tensor that is, or will be, in the parameter groups.
            bits: (ceil(numel / 8),) uint8 on its device, as ``pack_bits(mask)`` makes it for a mask of ``param.shape``.

        Raises:
            TypeError, ValueError: wrong dtype, size or device; a bit beyond the last element; a parameter that already
                has compact states, which belong to the elements selected before.
        """
        if self.compact and self.state.get(param):
            raise ValueError(
                "The mask of a parameter with compact states cannot change. Set masks before the first step."
            )
        if bits is None:
            self._selections.pop(param, None)
            return
        check_tensor("bits", bits, (torch.uint8,), (num_bytes(param.numel()),), param.device)
        if param.numel() % 8 and int(bits[-1]) >> (param.numel() % 8):
            raise ValueError(f"`bits` selects elements beyond the {param.numel()} of its parameter.")
        self._selections[param] = _PackedMask(param, bits.clone())

    def grad_mask(self, param: torch.Tensor) -> torch.Tensor | None:
        """The packed mask of ``param``, None if it is trained whole."""
        selection = self._selections.get(param)
        return None if selection is None else selection.bits

    @torch.no_grad()
    def init_state(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        """The states of ``param``; if there are none, makes those that its first step starts from.

        So states that were saved elsewhere can be written into them before any step. Masks must be set by then. A
        parameter whose mask selects nothing is never stepped, but has states, too.
        """
        state: dict[str, torch.Tensor] = self.state[param]
        if not state:
            self._init_state(param, self._selections.get(param))
        return state

    def state_bytes(self) -> int:
        """The bytes that states and masks take now; those of gradients and weights are not among them."""
        states = [value for state in self.state.values() for value in state.values()]
        masks = [tensor for mask in self._selections.values() for tensor in mask.tensors()]
        return sum(tensor.nbytes for tensor in states + masks)

    @torch.no_grad()
    def clip_factor(self, max_grad_norm: float) -> tuple[torch.Tensor, torch.Tensor]:
        """``min(1, max_grad_norm / norm)`` and the norm of all selected gradients: () float32 on the device.

        The factor goes to :meth:`step` as ``grad_scale``; nothing is scaled in memory. No gradients: (1, 0).
        """
        by_device: dict[torch.device, tuple[list[torch.Tensor], list[torch.Tensor | None]]] = {}
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    grads, grad_masks = by_device.setdefault(param.device, ([], []))
                    grads.append(param.grad)
                    grad_masks.append(self.grad_mask(param))
        if not by_device:
            return torch.ones(()), torch.zeros(())
        squares = [gradient_dots(grads, grad_masks=grad_masks)[0] for grads, grad_masks in by_device.values()]
        norm = torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()
        return (max_grad_norm / (norm + 1e-6)).clamp(max=1.0), norm  # the 1e-6 of torch.nn.utils.clip_grad_norm_

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_scale: torch.Tensor | None = None,
        other_grads: Mapping[torch.Tensor, torch.Tensor] | None = None,
        other_coefficient: torch.Tensor | None = None,
    ) -> Any:
        """One step with the gradient ``grad_scale * (param.grad + other_coefficient * other_grads[param])``.

        In a CUDA graph: let ``lr`` be a tensor, run a step before the capture, and keep the gradients' addresses with
        ``zero_grad(set_to_none=False)``.

        Args:
            closure: as in torch: recomputes the loss, with gradients, before the step.
            grad_scale: () float32 on the device, such as :meth:`clip_factor`'s; None is 1.
            other_grads: a second gradient for each parameter that has a first, for projections; see ``gradient_dots``.
            other_coefficient: () float32 on the device; with ``other_grads``.

        Raises:
            TypeError, ValueError: arguments that do not fit; sparse gradients.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for name, value in (("grad_scale", grad_scale), ("other_coefficient", other_coefficient)):
            if value is not None:
                check_tensor(name, value, (torch.float32,), ())
        if (other_grads is None) != (other_coefficient is None):
            raise ValueError("`other_grads` and `other_coefficient` must be given together.")
        for group in self.param_groups:
            alike: dict[Any, list[TensorStep]] = {}
            for param in group["params"]:
                if param.grad is None or param.numel() == 0:
                    continue
                selection = self._selections.get(param)
                if selection is not None and selection.count == 0:
                    continue
                tensor = self._tensor_step(param, selection, other_grads)
                mode = "dense" if selection is None else "compact" if self.compact else "select"
                dtypes = (
                    param.dtype,
                    tensor.grad.dtype,
                    None if tensor.other_grad is None else tensor.other_grad.dtype,
                )
                alike.setdefault((param.device, dtypes, mode), []).append(tensor)
            for (_, _, mode), tensors in alike.items():
                run = launch_masked_adamw if runs_triton(tensors[0].param) else _run_reference
                run(
                    tensors, mode, group["lr"], group["betas"], group["eps"], group["weight_decay"],
                    grad_scale, other_coefficient,
                )  # fmt: skip
        return loss

    def _tensor_step(
        self,
        param: torch.Tensor,
        selection: _PackedMask | None,
        other_grads: Mapping[torch.Tensor, torch.Tensor] | None,
    ) -> TensorStep:
        order = None if param.is_contiguous() else _memory_order(param)
        state = self.init_state(param)
        master = state.get("master")
        packed = selection if self.compact else None

        def flat(tensor: torch.Tensor) -> torch.Tensor:
            return (tensor if order is None else tensor.permute(order)).reshape(-1)

        def flat_grad(name: str, grad: torch.Tensor | None) -> torch.Tensor:
            if grad is None or grad.shape != param.shape:
                got = None if grad is None else tuple(grad.shape)
                raise ValueError(f"{name} must have the shape {tuple(param.shape)} of its parameter, got {got}.")
            if grad.is_sparse:
                raise ValueError(f"{name} is sparse, which MaskedAdamW does not support.")
            check_tensor(name, grad, FLOAT_DTYPES, None, param.device)
            return flat(grad)  # a copy if it is laid out otherwise than the parameter

        return TensorStep(
            param=flat(param.detach()),
            grad=flat_grad("The gradient", param.grad),
            exp_avg=flat(state["exp_avg"]) if packed is None else state["exp_avg"],
            exp_avg_sq=flat(state["exp_avg_sq"]) if packed is None else state["exp_avg_sq"],
            step=state["step"],
            master=flat(master) if packed is None and master is not None else master,
            bits=None if selection is None else selection.flat_bits,
            ranks=None if packed is None else packed.ranks,
            other_grad=None if other_grads is None else flat_grad("The other gradient", other_grads.get(param)),
        )

    def _init_state(self, param: torch.Tensor, selection: _PackedMask | None) -> None:
        state = self.state[param]
        state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        if self.compact and selection is not None:
            values = (
                param.detach().permute(_memory_order(param)).reshape(-1)[selection.flat_mask(param.numel())].float()
            )
        else:
            values = param.detach().float()
        state["exp_avg"] = torch.zeros_like(values)
        state["exp_avg_sq"] = torch.zeros_like(values)
        if param.dtype != torch.float32:
            state["master"] = values

    def state_dict(self) -> dict[str, Any]:
        """As torch's, and ``grad_masks``: for each masked parameter, by its number, the bits and the memory layout."""
        result = super().state_dict()
        result["grad_masks"] = {
            i: {"bits": self._selections[param].bits, "layout": _layout(param)}
            for i, param in enumerate(param for group in self.param_groups for param in group["params"])
            if param in self._selections
        }
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores states and masks bit for bit; masks that the checkpoint does not know are kept.

        Raises:
            ValueError: compact states that do not fit the masks, or a parameter of another memory format than when they
                were saved.
        """
        params = [param for group in self.param_groups for param in group["params"]]
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        saved_masks = state_dict.get("grad_masks", {})
        super().load_state_dict(state_dict)
        for param, i in zip(params, saved_ids, strict=True):
            self.state.pop(param, None)
            if i in saved_masks:
                if _layout(param) != tuple(saved_masks[i]["layout"]):
                    raise ValueError("A parameter has another memory format than when its optimizer states were saved.")
                self.set_grad_mask(param, saved_masks[i]["bits"].to(param.device))
            # torch has cast these to the parameter's dtype; masters and moments are worth nothing rounded
            state = {k: v.to(param.device, copy=True) for k, v in state_dict["state"].get(i, {}).items()}
            selection = self._selections.get(param)
            expected = selection.count if self.compact and selection is not None else param.numel()
            if state and state["exp_avg"].numel() != expected:
                raise ValueError(
                    f"The saved states have {state['exp_avg'].numel()} elements where the mask selects {expected}."
                )
            if state:
                self.state[param] = state

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_selections": self._selections, "compact": self.compact}


def _layout(param: torch.Tensor) -> tuple[int, ...]:
    """Strides that matter: those of dimensions longer than 1, 0 for the others."""
    return tuple(stride if size > 1 else 0 for size, stride in zip(param.shape, param.stride(), strict=True))


def _run_reference(
    tensors: Sequence[TensorStep],
    mode: str,
    lr: float | torch.Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: torch.Tensor | None,
    other_coefficient: torch.Tensor | None,
) -> None:
    first = tensors[0]
    is_plain = mode == "dense" and first.master is None and first.other_grad is None
    if is_plain and first.param.is_cpu and first.grad.dtype == torch.float32:
        params, grads = [t.param for t in tensors], [t.grad for t in tensors]
        exp_avgs, exp_avg_sqs = [t.exp_avg for t in tensors], [t.exp_avg_sq for t in tensors]
        steps = [t.step for t in tensors]
        reference.fused_adamw_(
            params, grads, exp_avgs, exp_avg_sqs, steps, float(lr), betas, eps, weight_decay, grad_scale
        )
        return
    for tensor in tensors:
        reference.masked_adamw_(
            tensor.param,
            tensor.grad,
            tensor.exp_avg,
            tensor.exp_avg_sq,
            tensor.master,
            None if tensor.bits is None else unpack_bits(tensor.bits, tensor.param.numel()),
            mode == "compact",
            tensor.step,
            float(lr),
            betas,
            eps,
            weight_decay,
            grad_scale,
            tensor.other_grad,
            other_coefficient,
        )
        tensor.step.add_(1)
