"""Turns losses into weight updates and weights into files: backward, step, save, load, export.

Engines are interchangeable behind these verbs.  :class:`TorchEngine` is the one for a single device;
:class:`~fastunlearn.training.engine_deepspeed.DeepSpeedEngine` divides the work over processes.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from fastunlearn_kernels import MaskedAdamW, unpack_bits
from torch import nn

from ..distributed import ALONE, World
from ..errors import UserError
from ..files.atomic import whole_folder
from ..models.base import Model
from .checkpoint import Piece, load_checkpoint, save_checkpoint
from .export import export_delta, export_model

ClipScope = Literal["selected", "all"]


class Selection:
    """Which parameters train, and which elements of them: ``bits`` has a packed mask for those not trained whole."""

    def __init__(self, module: nn.Module, names: list[str], bits: Mapping[str, torch.Tensor] | None = None) -> None:
        named = dict(module.named_parameters())
        self.names = list(names)
        self.shapes = {name: named[name].shape for name in names}
        self.bits = {name: packed for name, packed in (bits or {}).items() if name in self.shapes}
        self.lengths = {name: self._length(name) for name in names}

    def mask(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """The bool mask of the elements start to stop of the flattened parameter, on the CPU."""
        numel = self.shapes[name].numel()
        if name not in self.bits:
            return torch.ones((numel if stop is None else stop) - start, dtype=torch.bool)
        return unpack_bits(self.bits[name], numel)[start:stop]

    def range(self, name: str, start: int, stop: int) -> tuple[int, int]:
        """Which of the parameter's selected elements lie among its elements start to stop."""
        if name not in self.bits:
            return start, stop
        mask = self.mask(name)
        first = int(mask[:start].sum())
        return first, first + int(mask[start:stop].sum())

    def take(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The selected elements of a tensor of the parameter's shape, (k,)."""
        flat = tensor.detach().reshape(-1)
        return flat if name not in self.bits else flat[self.mask(name).to(flat.device)]

    def put(self, name: str, tensor: torch.Tensor, values: torch.Tensor) -> None:
        """Write the selected elements of a contiguous tensor of the parameter's shape, in place."""
        flat = tensor.detach().view(-1)
        values = values.to(flat.device, flat.dtype)
        if name in self.bits:
            flat[self.mask(name).to(flat.device)] = values
        else:
            flat.copy_(values)

    def digest(self) -> str:
        """Tells two selections apart."""
        digest = hashlib.sha256()
        for name in sorted(self.names):
            digest.update(name.encode() + b"\0")
            digest.update(self.bits[name].cpu().numpy().tobytes() if name in self.bits else b"\0")
        return digest.hexdigest()

    def _length(self, name: str) -> int:
        return int(self.mask(name).sum()) if name in self.bits else self.shapes[name].numel()


class Engine:
    """What the trainer and the exports need of an engine, whichever it is."""

    module: nn.Module
    selection: Selection
    optimizer: MaskedAdamW
    learning_rate: float
    world: World = ALONE
    accumulation: int = 1

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision of the student's forward."""
        raise NotImplementedError

    def backward(self, loss: torch.Tensor) -> None:
        """Add the loss' gradient; ``accumulation`` of them, in each process, make a step: their mean."""
        raise NotImplementedError

    def step(self) -> torch.Tensor:
        """Clip, update, forget the gradients.  Returns the gradient's norm before clipping, a scalar on the device."""
        raise NotImplementedError

    def pieces(self) -> Iterator[Piece]:
        """What this process holds of the trained elements and of the optimizer's states, for a checkpoint."""
        raise NotImplementedError

    def values(self) -> dict[str, torch.Tensor]:
        """The trained elements of every parameter, (k,) float32; whole only in the main process."""
        raise NotImplementedError

    def restore(self, folder: Path) -> dict[str, Any]:
        """Take weights and states from a checkpoint, and give its ``state`` back."""
        raise NotImplementedError

    def close(self) -> None:
        """Give back what the engine holds."""

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

    def export(self, model: Model, path: Path, save: Literal["model", "delta"] = "model") -> None:
        """Write the pipeline, or the delta, of the original's files with the trained elements laid over them.

        A tensor keeps the type that it has in the original's file.
        """
        values = self.values()
        if self.world.is_main:
            parts = (model.source, model.denoiser_folder)
            if save == "delta":
                dtypes = export_delta(*parts, path, values, self.selection.bits)
            else:
                with whole_folder(path) as unfinished:
                    dtypes = export_model(*parts, unfinished, values, self.selection.bits)
            self.exported(dtypes)
        self.world.barrier()

    def exported(self, dtypes: Mapping[str, torch.dtype]) -> None:
        """Told the types to which an export has rounded the weights."""


class TorchEngine(Engine):
    """AdamW in float32 on one device, changing only the named parameters of the module, or elements of them.

    Weights stay float32 also under ``mixed_precision="bf16"`` (autocast), so no update is lost to rounding.  ``bits``
    (see :class:`Selection`) lets only the selected elements change, and the optimizer's states hold only those.
    ``clip_scope`` says whose gradients the norm sees: ``selected`` elements', or those of ``all`` elements of the
    parameters.
    """

    def __init__(
        self,
        module: nn.Module,
        names: list[str],
        *,
        learning_rate: float,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        mixed_precision: str = "no",
        bits: Mapping[str, torch.Tensor] | None = None,
        clip_scope: ClipScope = "selected",
        accumulation: int = 1,
    ) -> None:
        parameters = dict(module.named_parameters())
        self.module = module.requires_grad_(False)
        self.selection = Selection(module, names, bits)
        self.parameters: dict[str, torch.Tensor] = {name: parameters[name].requires_grad_(True) for name in names}
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

    def step(self) -> torch.Tensor:
        factor, norm = self.optimizer.clip_factor(self.max_grad_norm)
        if self.clip_scope == "all" and self.selection.bits:
            norm = nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
            factor = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        self.optimizer.step(grad_scale=factor)
        self.optimizer.zero_grad(set_to_none=True)
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
