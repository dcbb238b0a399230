"""AdamW that changes only the elements a bit mask selects: the optimizer; its launch is in ``_masked_adamw_kernel``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain, repeat
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any, cast

import torch

from ._masked_adamw_kernel import BLOCK_ELEMENTS
from .bits import num_bytes, pack_bits, unpack_bits
from .checks import FLOAT_DTYPES, check_tensor
from .plans import NORMS, STEPS, Member, Plan, memory_order
from .tables import Moving

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT


class _PackedMask:
    """The mask of one parameter: as it was given, and as the step needs it, in the order of the parameter's memory."""

    def __init__(self, param: torch.Tensor, bits: torch.Tensor):
        self.bits = bits
        mask = unpack_bits(bits, param.shape)
        in_memory_order = mask.permute(memory_order(param)).reshape(-1)
        self.flat_bits = pack_bits(in_memory_order)
        self.count = int(mask.sum())
        blocks = torch.nn.functional.pad(in_memory_order, (0, -mask.numel() % BLOCK_ELEMENTS)).view(-1, BLOCK_ELEMENTS)
        per_block = blocks.sum(1, dtype=torch.int64)
        self.ranks = per_block.cumsum(0) - per_block

    def flat_mask(self, numel: int) -> torch.Tensor:
        return unpack_bits(self.flat_bits, numel)

    def tensors(self) -> list[torch.Tensor]:
        return [self.bits, self.flat_bits, self.ranks]


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
        self._forget_plans()
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
            if not param.permute(memory_order(param)).is_contiguous():
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
            self._forget_plans()
            return
        check_tensor("bits", bits, (torch.uint8,), (num_bytes(param.numel()),), param.device)
        if param.numel() % 8 and int(bits[-1]) >> (param.numel() % 8):
            raise ValueError(f"`bits` selects elements beyond the {param.numel()} of its parameter.")
        self._selections[param] = _PackedMask(param, bits.clone())
        self._forget_plans()

    def _forget_plans(self) -> None:
        """What passes over the tensors have been planned, once masks are others."""
        self._plans: dict[str, Plan] = {}
        self._idle = {id(param) for param, selection in self._selections.items() if selection.count == 0}

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
        plan, moving = self._plan("norm", None)
        squares = [part.run(moving).to(plan.parts[0].device) for part in plan.parts]
        if not squares:
            return torch.ones(()), torch.zeros(())
        norm = torch.stack(squares).sum().float().sqrt()
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
        plan, moving = self._plan("step", other_grads)
        for part in plan.parts:
            part.run(moving, self.param_groups, grad_scale, other_coefficient)
        return loss

    def _plan(self, kind: str, other_grads: Mapping[torch.Tensor, torch.Tensor] | None) -> tuple[Plan, Moving]:
        """What the pass does, as the last one did where nothing but gradients has moved."""
        key, moving = self._read(kind, other_grads)
        plan = self._plans.get(kind)
        if plan is None or plan.key != key:
            members = self._members(kind, other_grads)
            key, moving = self._read(kind, other_grads)  # with the states that are there now
            plan = Plan(key, members, STEPS if kind == "step" else NORMS, moving)
            if plan.is_lasting:
                self._plans[kind] = plan
        return plan, plan.moving(moving)

    def _read(self, kind: str, other_grads: Mapping[torch.Tensor, torch.Tensor] | None) -> tuple[list[Any], Moving]:
        """The addresses of what a pass would touch, and what they hang on, in lists: it is Python's share of a step."""
        params: list[torch.Tensor] = []
        grads: list[torch.Tensor] = []
        ends = []
        for group in self.param_groups:
            here = group["params"]
            its = [param.grad for param in here]
            if self._idle or any(map(is_, its, repeat(None))):
                here = [p for p, grad in zip(here, its, strict=True) if grad is not None and id(p) not in self._idle]
                its = [param.grad for param in here]
            params += here
            grads += cast("list[torch.Tensor]", its)
            ends.append(len(params))
        if not {torch.strided}.issuperset(map(_LAYOUT, grads)):
            raise ValueError("The gradient is sparse, which MaskedAdamW does not support.")
        addresses = list(map(_ADDRESS, grads))
        if 0 in addresses:  # what is empty is in no launch
            addresses = [address for address in addresses if address]
            grads = [grad for grad in grads if grad.data_ptr()]
        key = [
            self.compact, ends, list(map(id, params)), list(map(_ADDRESS, params)),
            list(map(_DTYPE, grads)), [grad.stride() for grad in grads], _unaligned(addresses),
        ]  # fmt: skip
        if kind == "step":
            states = chain.from_iterable(map(dict.values, self.state.values()))
            key += [list(map(id, self.state)), list(map(_ADDRESS, states))]
        if other_grads is None:
            return key, Moving(addresses, None, grads, ())
        others = [_other_gradient(p, other_grads) for p in params if p.grad is not None and p.grad.data_ptr()]
        other_addresses = list(map(_ADDRESS, others))
        key += [[(other.dtype, other.stride()) for other in others], _unaligned(other_addresses)]
        return key, Moving(addresses, other_addresses, grads, others)

    def _members(self, kind: str, other_grads: Mapping[torch.Tensor, torch.Tensor] | None) -> list[Member]:
        members = []
        for number, group in enumerate(self.param_groups):
            for param in group["params"]:
                grad, selection = param.grad, self._selections.get(param)
                if grad is None or grad.data_ptr() == 0 or id(param) in self._idle:
                    continue
                check_gradient("The gradient", param, grad)
                other = None if other_grads is None else _other_gradient(param, other_grads)
                mode = "dense" if selection is None else "compact" if self.compact else "select"
                members.append(
                    Member(
                        param, grad, other, number, mode,
                        None if selection is None else selection.flat_bits,
                        selection.ranks if selection is not None and self.compact else None,
                        self.init_state(param) if kind == "step" else {},
                    )
                )  # fmt: skip
        return members

    def _init_state(self, param: torch.Tensor, selection: _PackedMask | None) -> None:
        state = self.state[param]
        state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        if self.compact and selection is not None:
            values = param.detach().permute(memory_order(param)).reshape(-1)[selection.flat_mask(param.numel())].float()
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

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_plans()


def _layout(param: torch.Tensor) -> tuple[int, ...]:
    """Strides that matter: those of dimensions longer than 1, 0 for the others."""
    return tuple(stride if size > 1 else 0 for size, stride in zip(param.shape, param.stride(), strict=True))


_ADDRESS, _LAYOUT, _DTYPE = torch.Tensor.data_ptr, attrgetter("layout"), attrgetter("dtype")


def _unaligned(addresses: Sequence[int]) -> list[int]:
    """Places of what does not start at a multiple of 16 bytes, as accesses of 128 bits need."""
    return [i for i, address in enumerate(addresses) if address & 15]


def _other_gradient(param: torch.Tensor, other_grads: Mapping[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    assert other_grads is not None
    return check_gradient("The other gradient", param, other_grads.get(param))


def check_gradient(name: str, param: torch.Tensor, grad: torch.Tensor | None) -> torch.Tensor:
    """``grad`` if it fits its parameter; TypeError or ValueError says why not."""
    if grad is None or grad.shape != param.shape:
        got = None if grad is None else tuple(grad.shape)
        raise ValueError(f"{name} must have the shape {tuple(param.shape)} of its parameter, got {got}.")
    if grad.is_sparse:
        raise ValueError(f"{name} is sparse, which MaskedAdamW does not support.")
    check_tensor(name, grad, FLOAT_DTYPES, None, param.device)
    return grad
