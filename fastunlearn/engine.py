"""Turns losses into weight updates and weights into files: backward, step, save, load, export.

Engines are interchangeable behind these verbs; :class:`TorchEngine` is the one for a single device.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from fastunlearn_kernels import MaskedAdamW
from torch import nn

from .models import Model
from .run_folder import whole_folder, write_json


class TorchEngine:
    """AdamW in float32 on one device, changing only the named parameters of the module.

    Weights stay float32 also under ``mixed_precision="bf16"`` (autocast), so no update is lost to rounding.
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
    ) -> None:
        parameters = dict(module.named_parameters())
        self.module = module.requires_grad_(False)
        self.parameters: dict[str, torch.Tensor] = {name: parameters[name].requires_grad_(True) for name in names}
        self.learning_rate, self.max_grad_norm, self.mixed_precision = learning_rate, max_grad_norm, mixed_precision
        self.optimizer = MaskedAdamW(self.parameters.values(), lr=learning_rate, weight_decay=weight_decay)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision of the student's forward."""
        device = next(iter(self.parameters.values())).device
        return torch.autocast(device.type, torch.bfloat16, enabled=self.mixed_precision == "bf16")

    def scale_learning_rate(self, factor: float) -> None:
        """Set the rate of the next steps to ``factor`` times the one the engine was made with."""
        for group in self.optimizer.param_groups:
            group["lr"] = factor * self.learning_rate

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> torch.Tensor:
        """Clip, update, forget the gradients.  Returns the gradient's norm before clipping, a scalar on the device."""
        factor, norm = self.optimizer.clip_factor(self.max_grad_norm)
        self.optimizer.step(grad_scale=factor)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def all_finite(self) -> bool:
        return all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters.values())

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        """Write weights, optimizer states and the trainer's ``state`` (JSON values); all of it or nothing."""
        from safetensors.torch import save_file

        tensors = {f"weight/{name}": parameter.detach() for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}/{name}"] = value
        with whole_folder(folder) as unfinished:
            save_file(
                {key: value.contiguous().cpu() for key, value in tensors.items()}, unfinished / "state.safetensors"
            )
            write_json(unfinished / "state.json", state)

    def load(self, folder: Path) -> dict[str, Any]:
        """Continue from what :meth:`save` wrote; returns the trainer's state.  ValueError if it is another run's."""
        from safetensors.torch import load_file

        try:
            tensors = load_file(folder / "state.safetensors")
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        except Exception as error:
            raise ValueError(
                f"the checkpoint {folder} is damaged ({error}). Delete it to resume from an older one."
            ) from error
        names = {key.split("/", 1)[1] for key in tensors if key.startswith("weight/")}
        if names != set(self.parameters):
            raise ValueError(f"the checkpoint {folder} is of another run: it trained other parameters.")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors.pop(f"weight/{name}"))
        for key, value in tensors.items():
            kind, name = key.split("/", 1)
            parameter = self.parameters[name]
            self.optimizer.state[parameter][kind] = value.to(parameter.device)
        return state

    def export(self, model: Model, folder: Path) -> None:
        """Write the pipeline: the original's files, byte for byte, with the trained tensors laid over them.

        A tensor keeps the type that it has in the original's file; the module's weights are rounded to it as well, so
        that the module in memory and the pipeline on disk are the same model.
        """
        with whole_folder(folder) as unfinished:
            _copy_pipeline(model.source, unfinished)
            overlay(unfinished / model.denoiser_folder, self.parameters)


def overlay(folder: Path, parameters: dict[str, torch.Tensor]) -> None:
    """Replace the tensors named in ``parameters`` in the folder's safetensors files; all others keep their bytes."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    missing = set(parameters)
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
        changed = set(parameters) & set(tensors)
        for name in changed:
            stored = parameters[name].data.to(tensors[name].dtype)
            if not torch.isfinite(stored).all():
                raise ValueError(
                    f"{name} has grown past what the original's {stored.dtype} holds. Use a smaller `--learning-rate`."
                )
            parameters[name].data.copy_(stored)
            tensors[name] = stored.cpu().contiguous()
        if changed:
            missing -= changed
            save_file(tensors, path, metadata=metadata)
    if missing:
        raise ValueError(f"{folder} has no tensor {min(missing)!r}: the pipeline's weights are not in the usual form.")


def _copy_pipeline(source: Path, target: Path) -> None:
    """Copy the pipeline's parts, leaving out pickles that stand beside safetensors and files of no part."""
    index = json.loads((source / "model_index.json").read_text(encoding="utf-8"))
    shutil.copy(source / "model_index.json", target)
    for part in sorted(index):
        if part.startswith("_") or not (source / part).is_dir():
            continue
        redundant = ("*.bin", "*.msgpack", "*.ckpt") if any((source / part).glob("*.safetensors")) else ()
        shutil.copytree(source / part, target / part, ignore=shutil.ignore_patterns(*redundant))
