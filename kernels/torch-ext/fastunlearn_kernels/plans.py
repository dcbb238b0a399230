"""What a pass over the optimizer's tensors reads and writes, kept from one step to the next.

A plan is made of addresses. Its key holds the address of everything that it points at, so a weight, a state or a mask
that has moved makes a new one; it holds no tensor, so nothing is kept alive for it. Gradients move in every step, as
``zero_grad`` frees them: their addresses are written into a plan that otherwise stays.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from . import native_calls, reference
from ._masked_adamw_kernel import TritonStep
from .bits import unpack_bits
from .checks import flattened
from .gradient_dots import TritonNorm
from .launch import backend_of
from .native import library
from .native_calls import DTYPES, address_of
from .tables import Moving, pick

MODES = {"dense": 0, "select": 1, "compact": 2}


class Member(NamedTuple):
    """A parameter in a pass."""

    param: torch.Tensor
    grad: torch.Tensor
    other: torch.Tensor | None = None  # a second gradient
    group: int = 0
    mode: str = "dense"
    bits: torch.Tensor | None = None  # in the order of the parameter's memory
    ranks: torch.Tensor | None = None
    state: Mapping[str, torch.Tensor] = {}

    @property
    def is_plain(self) -> bool:
        """Whether torch's own fused step does it."""
        return self.mode == "dense" and self.other is None and self.param.dtype == self.grad.dtype == torch.float32

    @property
    def order(self) -> tuple[int, ...]:
        return memory_order(self.param)


def memory_order(tensor: torch.Tensor) -> tuple[int, ...]:
    """The dimensions from the slowest to the fastest: permuted so, a dense tensor of any layout is contiguous."""
    strides = tensor.stride()
    return tuple(sorted(range(tensor.dim()), key=lambda d: -strides[d]))


def flat(tensor: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """As a vector in the given order: a view if it is laid out so, else a copy."""
    return flattened(tensor.permute(order))


def places_of(keys: Iterable[Hashable]) -> dict[Any, list[int]]:
    """For each key where it stands, in order."""
    places: dict[Any, list[int]] = {}
    for i, key in enumerate(keys):
        places.setdefault(key, []).append(i)
    return places


class Column:
    """The gradients' addresses in a pass; of copies where one is laid out otherwise than its parameter."""

    def __init__(self, members: Sequence[Member], name: str) -> None:
        self.name = name
        self.copied: list[tuple[int, tuple[int, ...]]] = []
        for i, member in enumerate(members):
            tensor, order = getattr(member, name), member.order
            if tensor is not None and not tensor.permute(order).is_contiguous():
                self.copied.append((i, order))

    def of(self, read: list[int], members: Sequence[torch.Tensor], copies: list[torch.Tensor]) -> list[int]:
        if not self.copied:
            return read
        result = list(read)
        for i, order in self.copied:
            copies.append(flat(members[i], order))
            result[i] = copies[-1].data_ptr()
        return result


class NativeNorm:
    """The squared norm of CPU gradients in one call."""

    device = torch.device("cpu")

    def __init__(self, members: Sequence[Member], places: Sequence[int], launch: tuple[Any, ...] = ()) -> None:
        self.places = places
        self.records = array("q")
        for member in (members[i] for i in places):
            bits = 0 if member.bits is None else member.bits.data_ptr()
            self.records.extend((0, 0, bits, member.grad.numel(), DTYPES[member.grad.dtype], 0))

    def run(self, moving: Moving) -> torch.Tensor:
        """() float64."""
        self.records[0::6] = array("q", pick(moving.grads, self.places))
        return native_calls.dots_of(self.records)[0]


class ReferenceNorm:
    def __init__(self, members: Sequence[Member], places: Sequence[int], launch: tuple[Any, ...] = ()) -> None:
        self.members = [members[i] for i in places]
        self.device = self.members[0].param.device

    def run(self, moving: Moving) -> torch.Tensor:
        grads = [flat(member.grad, member.order) for member in self.members]
        selected = [
            None if m.bits is None else unpack_bits(m.bits, g.numel()) for m, g in zip(self.members, grads, strict=True)
        ]
        return reference.gradient_dots(grads, None, selected)[0].double()


class NativeStep:
    """A step of CPU parameters, whatever their groups, dtypes and modes, in one call and one parallel region."""

    device = torch.device("cpu")

    def __init__(self, members: Sequence[Member], places: Sequence[int], launch: tuple[Any, ...] = ()) -> None:
        self.places = places
        self.tensors, self.gradients = array("q"), array("q")
        for member in (members[i] for i in places):
            state = member.state
            master, bits, ranks = state.get("master"), member.bits, member.ranks
            self.tensors.extend((
                member.param.data_ptr(), state["exp_avg"].data_ptr(), state["exp_avg_sq"].data_ptr(),
                0 if master is None else master.data_ptr(), state["step"].data_ptr(),
                0 if bits is None else bits.data_ptr(), 0 if ranks is None else ranks.data_ptr(),
                member.param.numel(), DTYPES[member.param.dtype] | MODES[member.mode] << 32, member.group,
            ))  # fmt: skip
            other = 0 if member.other is None else DTYPES[member.other.dtype]
            self.gradients.extend((0, 0, DTYPES[member.grad.dtype], other))

    def run(
        self,
        moving: Moving,
        groups: Sequence[Mapping[str, Any]],
        grad_scale: torch.Tensor | None,
        other_coefficient: torch.Tensor | None,
    ) -> None:
        self.gradients[0::4] = array("q", pick(moving.grads, self.places))
        if moving.others is not None:
            self.gradients[1::4] = array("q", pick(moving.others, self.places))
        options = array("d")
        for group in groups:
            options.extend((float(group["lr"]), *group["betas"], group["eps"], group["weight_decay"]))
        masked_adamw_(
            self.tensors, self.gradients, options, len(self.places),
            1.0 if grad_scale is None else float(grad_scale),
            0.0 if other_coefficient is None else float(other_coefficient),
        )  # fmt: skip


def masked_adamw_(
    tensors: array[int], gradients: array[int], options: array[float], count: int, scale: float, coefficient: float
) -> None:
    """``count`` records of each kind; ``options`` are the groups'."""
    status = library().fu_adamw(
        address_of(tensors), address_of(gradients), address_of(options), count, scale, coefficient,
        torch.get_num_threads(),
    )  # fmt: skip
    native_calls.check_status(status)


class ReferenceStep:
    """In plain torch: dense fp32 tensors of a group at once, the others one by one."""

    def __init__(self, members: Sequence[Member], places: Sequence[int], launch: tuple[Any, ...] = ()) -> None:
        self.members = [members[i] for i in places]
        self.device = self.members[0].param.device

    def run(
        self,
        moving: Moving,
        groups: Sequence[Mapping[str, Any]],
        grad_scale: torch.Tensor | None,
        other_coefficient: torch.Tensor | None,
    ) -> None:
        if other_coefficient is not None:
            other_coefficient = other_coefficient.to(self.device)
        if grad_scale is not None:
            grad_scale = grad_scale.to(self.device)
        for number, places in places_of(member.group for member in self.members).items():
            group, members = groups[number], [self.members[i] for i in places]
            settings = (float(group["lr"]), group["betas"], group["eps"], group["weight_decay"], grad_scale)
            plain = [m for m in members if m.param.is_cpu and m.is_plain]
            if plain:
                reference.fused_adamw_(
                    [flat(m.param.detach(), m.order) for m in plain], [flat(m.grad, m.order) for m in plain],
                    [flat(m.state["exp_avg"], m.order) for m in plain],
                    [flat(m.state["exp_avg_sq"], m.order) for m in plain],
                    [m.state["step"] for m in plain], *settings,
                )  # fmt: skip
            for m in members:
                if m.param.is_cpu and m.is_plain:
                    continue
                states = {name: m.state[name] for name in ("exp_avg", "exp_avg_sq", "master") if name in m.state}
                if m.mode != "compact":
                    states = {name: flat(state, m.order) for name, state in states.items()}
                reference.masked_adamw_(
                    flat(m.param.detach(), m.order), flat(m.grad, m.order), states["exp_avg"], states["exp_avg_sq"],
                    states.get("master"), None if m.bits is None else unpack_bits(m.bits, m.param.numel()),
                    m.mode == "compact", m.state["step"], *settings,
                    None if m.other is None else flat(m.other, m.order), other_coefficient,
                )  # fmt: skip
                m.state["step"].add_(1)


class Plan:
    """The parts of a pass, and the key that says of what; ``is_lasting``: may serve the next step, too."""

    def __init__(self, key: Any, members: Sequence[Member], kinds: Mapping[str, Any], moving: Moving) -> None:
        self.key = key
        self.grads = Column(members, "grad")
        self.others = Column(members, "other")
        backends = [backend_of(member.param) for member in members]
        moved = self.moving(moving)
        launches = places_of(
            (backend, *(kinds[backend].launch_of(member, moved, i) if backend == "triton" else [member.param.device]))
            for i, (backend, member) in enumerate(zip(backends, members, strict=True))
        )
        self.parts = [kinds[backend](members, places, launch) for (backend, *launch), places in launches.items()]
        self.is_lasting = "reference" not in backends

    def moving(self, read: Moving) -> Moving:
        """What was read, with copies where a gradient is laid out otherwise than its parameter."""
        copies: list[torch.Tensor] = []
        grads = self.grads.of(read.grads, read.tensors, copies)
        others = None if read.others is None else self.others.of(read.others, read.other_tensors, copies)
        return read._replace(grads=grads, others=others, copies=copies)


STEPS = {"native": NativeStep, "triton": TritonStep, "reference": ReferenceStep}
NORMS = {"native": NativeNorm, "triton": TritonNorm, "reference": ReferenceNorm}
