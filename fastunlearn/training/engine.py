"""Turns losses into weight updates and weights into files: backward, step, save, load, export.

Engines are interchangeable behind these verbs.  :class:`TorchEngine` is the one for a single device;
:class:`~fastunlearn.training.engine_deepspeed.DeepSpeedEngine` divides the work over processes.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from fastunlearn_kernels import MaskedAdamW, gradient_dots, projection_coefficient
from torch import nn

from ..distributed import ALONE, World
from ..errors import UserError
from ..models.base import Model
from .checkpoint import Piece, load_checkpoint, save_checkpoint
from .export import Save, export
from .selection import Selection

ClipScope = Literal["selected", "all"]


class Engine(ABC):
    """What the trainer and the exports need of an engine, whichever it is.

    ``can_project``: whether it has :meth:`set_aside`; ``can_hold``: whether it has :meth:`hold`.  ``measured``: what
    the last step has measured beside the norm, () tensors on the device.
    """

    can_project: ClassVar[bool] = False
    can_hold: ClassVar[bool] = False
    measured: Mapping[str, torch.Tensor] = MappingProxyType({})
    module: nn.Module
    selection: Selection
    optimizer: MaskedAdamW
    learning_rate: float
    world: World = ALONE
    accumulation: int = 1

    @abstractmethod
    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision of the student's forward."""

    @abstractmethod
    def backward(self, loss: torch.Tensor) -> None:
        """Add the loss' gradient; ``accumulation`` of them, in each process, make a step: their mean."""

    @abstractmethod
    def step(self) -> torch.Tensor:
        """Clip, update, forget the gradients.  Returns the gradient's norm before clipping, a scalar on the device."""

    @abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """What this process holds of the trained elements and of the optimizer's states, for a checkpoint."""

    @abstractmethod
    def values(self) -> dict[str, torch.Tensor]:
        """The trained elements of every parameter, (k,) float32; whole only in the main process."""

    @abstractmethod
    def restore(self, folder: Path) -> dict[str, Any]:
        """Take weights and states from a checkpoint, and give its ``state`` back."""

    def close(self) -> None:  # noqa: B027 - may have nothing to do
        """Give back what the engine holds."""

    def set_aside(self, along: float, rate: float = 0.0) -> None:
        """Keep the gradient so far as the one that the next step must not point against.

        The next :meth:`step` is along its own gradient h plus ``max(rate - <h, g> / <g, g>, 0) + along`` times this
        one, g.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot project gradients")

    def hold(self, curvature: Mapping[str, torch.Tensor]) -> None:
        """Hold the weights to what they are now: each step's loss gets ``sum_i f_i (w_i - w0_i)^2`` added to it.

        ``curvature``: parameter -> f, of its shape, float32.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot hold weights")

    def scale_learning_rate(self, factor: float) -> None:
        """Set the rate of the next steps to ``factor`` times the one the engine was made with."""
        for group in self.optimizer.param_groups:
            group["lr"] = factor * self.learning_rate

    def all_finite(self) -> bool:
        finite = all(bool(torch.isfinite(piece.values["weight"]).all()) for piece in self.pieces())
        return not self.world.any(not finite, next(self.module.parameters()).device)

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        """Write weights, optimizer states and the trainer's ``state`` (JSON values); all of it or nothing."""
        content = {"selection": self.selection.digest(), "state": state}
        save_checkpoint(folder, self.world, list(self.pieces()), self.selection.lengths, content)

    def load(self, folder: Path) -> dict[str, Any]:
        """Continue from what :meth:`save` wrote; returns the trainer's state.  UserError if it is another run's."""
        content = self.restore(folder)
        if content["selection"] != self.selection.digest():
            raise UserError(f"the checkpoint {folder} is of another run: it trained other elements.")
        return content["state"]

    def export(self, model: Model, path: Path, save: Save = "model") -> None:
        """Write the pipeline, or the delta, of the original's files with the trained elements laid over them."""
        values = self.values()
        if self.world.is_main:
            self.exported(export(model, path, save, values, self.selection))
        self.world.barrier()

    def exported(self, dtypes: Mapping[str, torch.dtype]) -> None:  # noqa: B027 - may have nothing to do
        """Told the types to which an export has rounded the weights."""


class TorchEngine(Engine):
    """AdamW in float32 on one device, changing only what is selected of the module.

    Weights stay float32 also under ``mixed_precision="bf16"`` (autocast), so no update is lost to rounding.  The
    optimizer's states hold only the selected elements.
    ``clip_scope`` says whose gradients the norm sees: ``selected`` elements', or those of ``all`` elements of the
    parameters.
    """

    can_project = True
    can_hold = True

    def __init__(
        self,
        module: nn.Module,
        selection: Selection,
        *,
        learning_rate: float,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        mixed_precision: str = "no",
        clip_scope: ClipScope = "selected",
        accumulation: int = 1,
    ) -> None:
        parameters = dict(module.named_parameters())
        self.module = module.requires_grad_(False)
        self.selection = selection
        self.parameters: dict[str, torch.Tensor] = {n: parameters[n].requires_grad_(True) for n in selection.names}
        self._aside: tuple[dict[torch.Tensor, torch.Tensor], float, float] | None = None
        self._held: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # weight, f, w0
        self.learning_rate, self.max_grad_norm, self.mixed_precision = learning_rate, max_grad_norm, mixed_precision
        self.clip_scope, self.accumulation = clip_scope, accumulation
        masks = {
            self.parameters[name]: packed.to(parameters[name].device) for name, packed in self.selection.bits.items()
        }
        self.optimizer = MaskedAdamW(
            self.parameters.values(), lr=learning_rate, weight_decay=weight_decay, grad_masks=masks, compact=True
        )

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        device = next(iter(self.parameters.values())).device
        return torch.autocast(device.type, torch.bfloat16, enabled=self.mixed_precision == "bf16")

    def backward(self, loss: torch.Tensor) -> None:
        (loss if self.accumulation == 1 else loss / self.accumulation).backward()

    def set_aside(self, along: float, rate: float = 0.0) -> None:
        self._aside = {p: p.grad for p in self.parameters.values() if p.grad is not None}, along, rate
        self.optimizer.zero_grad(set_to_none=True)

    def hold(self, curvature: Mapping[str, torch.Tensor]) -> None:
        parameters = self.parameters.items()
        self._held = [(p, curvature[name].to(p), p.detach().clone()) for name, p in parameters]

    def step(self) -> torch.Tensor:
        self.measured = {"held": self._pull()} if self._held else {}
        if self._aside is not None:
            return self._projected_step(*self._aside)
        factor, norm = self.optimizer.clip_factor(self.max_grad_norm)
        if self.clip_scope == "all" and self.selection.bits:
            norm = nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
            factor = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        self.optimizer.step(grad_scale=factor)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    @torch.no_grad()
    def _pull(self) -> torch.Tensor:
        """Add the gradient of ``sum f (w - w0)^2``; the sum, () float32."""
        total = torch.zeros((), device=next(iter(self.parameters.values())).device)
        for parameter, curvature, start in self._held:
            force = curvature * (parameter - start)
            total += (force * (parameter - start)).sum()
            parameter.grad = 2 * force if parameter.grad is None else parameter.grad.add_(force, alpha=2)
        return total

    def _projected_step(self, other: dict[torch.Tensor, torch.Tensor], along: float, rate: float) -> torch.Tensor:
        """A step along g + c h, h being ``other``: c brings g to ``rate`` along h, and adds ``along`` times h."""
        parameters = [p for p in self.parameters.values() if p.grad is not None or p in other]
        grads, others = [], []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            grads.append(parameter.grad)
            others.append(other.setdefault(parameter, torch.zeros_like(parameter)))
        dots = gradient_dots(grads, others, grad_masks=[self.optimizer.grad_mask(p) for p in parameters])
        # What is missing of `rate` times h is what is against h of g - rate h.
        lacking = projection_coefficient(torch.stack([dots[0], dots[1] - rate * dots[2], dots[2]]))
        coefficient = lacking + along
        self.measured = {**self.measured, "coefficient": coefficient}
        if self.clip_scope == "all" and self.selection.bits:
            dots = gradient_dots(grads, others)
        norm = (dots[0] + 2 * coefficient * dots[1] + coefficient.square() * dots[2]).clamp(min=0).sqrt()
        factor = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        self.optimizer.step(grad_scale=factor, other_grads=other, other_coefficient=coefficient)
        self.optimizer.zero_grad(set_to_none=True)
        self._aside = None
        return norm

    def pieces(self) -> Iterator[Piece]:
        for name, parameter in self.parameters.items():
            state = self.optimizer.state[parameter]
            values = {"weight": self.selection.take(name, parameter)}
            values |= {kind: state[kind].reshape(-1) for kind in ("exp_avg", "exp_avg_sq") if kind in state}
            yield Piece(name, 0, values, float(state.get("step", 0.0)))

    def values(self) -> dict[str, torch.Tensor]:
        return {name: self.selection.take(name, parameter) for name, parameter in self.parameters.items()}

    def restore(self, folder: Path) -> dict[str, Any]:
        wanted = {name: (0, length) for name, length in self.selection.lengths.items()}
        pieces, content = load_checkpoint(folder, self.selection.lengths, wanted)
        for name, parameter in self.parameters.items():
            values = pieces[name].values
            self.selection.put(name, parameter, values.pop("weight"))
            if values:
                shape = values["exp_avg"].shape if name in self.selection.bits else parameter.shape
                state = {kind: value.view(shape).to(parameter.device) for kind, value in values.items()}
                state["step"] = torch.tensor(pieces[name].step, dtype=torch.float32, device=parameter.device)
                self.optimizer.state[parameter] = state
        return content

    def exported(self, dtypes: Mapping[str, torch.dtype]) -> None:
        """Round the module's weights too, so that it and the pipeline on disk are the same model."""
        for name, parameter in self.parameters.items():
            parameter.data.copy_(parameter.data.to(dtypes[name]))
