"""What may change: parameters by name, and elements of them by one bit per element."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from fastunlearn_kernels import pack_bits, unpack_bits
from torch import nn

from ..errors import UserError
from ..files.tensors import load_tensors, refused, save_tensors
from ..files.weights import hash_part
from ..models.base import Model, matches
from ..models.sd import UNET_GROUPS

MASK_FORMAT = "fastunlearn-mask-2"

#: name -> description, of the groups that the method's table names: those of a UNet.
GROUPS = {name: group.description for name, group in UNET_GROUPS.items()}


def select_parameters(model: Model | nn.Module, selector: str) -> list[str]:
    """Names of the denoiser's parameters that ``selector`` selects, in its order.

    ``selector`` is a comma list of groups of the model's family (of a bare network: a UNet's) and of patterns as
    :func:`matches` reads them.  UserError if one of them selects nothing.
    """
    network, groups = (model, UNET_GROUPS) if isinstance(model, nn.Module) else (model.denoiser, model.groups)
    names = [name for name, _ in network.named_parameters()]
    patterns = [pattern.strip() for pattern in selector.split(",") if pattern.strip()]
    selected: set[str] = set()
    for pattern in patterns:
        group = groups.get(pattern)
        found = {name for name in names if (group.holds(name) if group else matches(name, pattern))}
        selected |= found or _nothing(names, groups, selector, pattern)
    return [name for name in names if name in selected] or _nothing(names, groups, selector)


def _nothing(names: list[str], groups: Iterable[str], selector: str, pattern: str = "") -> NoReturn:
    which = f"the part {pattern!r} of " if pattern and pattern != selector else ""
    raise UserError(
        f"`--trainable`: {which}{selector!r} selects no parameter. Use {', '.join(groups)}, or parts of names such as "
        f"{names[len(names) // 2]!r}."
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Selection:
    """What may change of a module, from the mask's file to the optimizer.

    ``shapes``: every parameter of which any element may change, in the module's order.  ``bits``: those of them that
    may not change whole -> (ceil(numel / 8),) uint8 on the CPU: element i of the flattened tensor is bit i % 8 of byte
    i // 8, padding bits are 0.  ``made``: how the bits were found, in words.
    """

    shapes: Mapping[str, torch.Size]
    bits: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    made: Mapping[str, str] = dataclasses.field(default_factory=dict)
    lengths: Mapping[str, int] = dataclasses.field(init=False)  # elements that may change, by parameter

    def __post_init__(self) -> None:
        counts = {
            name: int(unpack_bits(self.bits[name], shape).sum()) if name in self.bits else shape.numel()
            for name, shape in self.shapes.items()
        }
        # Whole parameters of no element stay: an optimizer knows what to do with them.
        names = [name for name in self.shapes if counts[name] or name not in self.bits]
        object.__setattr__(self, "shapes", {name: torch.Size(self.shapes[name]) for name in names})
        object.__setattr__(self, "bits", {name: self.bits[name] for name in names if name in self.bits})
        object.__setattr__(self, "lengths", {name: counts[name] for name in names})

    @classmethod
    def of(
        cls,
        module: nn.Module,
        names: Sequence[str],
        bits: Mapping[str, torch.Tensor] | None = None,
        made: Mapping[str, str] | None = None,
    ) -> Selection:
        """These parameters of the module: all their elements, or those that ``bits`` selects."""
        named = dict(module.named_parameters())
        selected = {name: packed for name, packed in (bits or {}).items() if name in names}
        return cls({name: named[name].shape for name in names}, selected, made or {})

    @property
    def names(self) -> list[str]:
        """The parameters of which any element may change."""
        return list(self.shapes)

    @property
    def total(self) -> int:
        """How many elements may change."""
        return sum(self.lengths.values())

    def restrict(self, names: Sequence[str]) -> Selection:
        """Only what it selects of these parameters.  Raises UserError if that is nothing."""
        shapes = {name: shape for name, shape in self.shapes.items() if name in names}
        if not shapes:
            raise UserError("the mask lets no element of the trainable parameters change. Use another `--trainable`.")
        return Selection(shapes, {name: bits for name, bits in self.bits.items() if name in shapes}, self.made)

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


def save_mask(selection: Selection, path: Path, model: Model) -> None:
    """Write a selection's bits: a uint8 tensor per parameter; shapes and a hash in the metadata.

    The hash is that of the denoiser's files, which the mask was made for.
    """
    content = {
        "denoiser": hash_part(model.source, model.denoiser_folder),
        "made": dict(selection.made),
        "shapes": {name: list(selection.shapes[name]) for name in selection.bits},
    }
    save_tensors(path, selection.bits, MASK_FORMAT, content)


def load_mask(path: Path, model: Model) -> Selection:
    """Read what :func:`save_mask` wrote.  UserError if it is no mask, or one of another model."""
    if not path.is_file():
        raise UserError(f"the mask {path} does not exist. Make one with `fastunlearn mask`.")
    what = "mask of `fastunlearn mask`"
    bits, content = load_tensors(path, MASK_FORMAT, what)
    with refused(path, what):
        denoiser = str(content["denoiser"])
        shapes = {name: tuple(int(size) for size in shape) for name, shape in content["shapes"].items()}
        made = {str(key): str(value) for key, value in content["made"].items()}
        if shapes.keys() != bits.keys():
            raise ValueError("its shapes are of other tensors")
    parameters = dict(model.denoiser.named_parameters())
    for name, shape in shapes.items():
        if name not in parameters:
            raise UserError(f"the mask {path} is of another model: it names {name!r}, which {model.name} lacks.")
        if tuple(parameters[name].shape) != shape:
            raise UserError(
                f"the mask {path} is of another model: {name} has the shape {shape} there and "
                f"{tuple(parameters[name].shape)} in {model.name}."
            )
    with refused(path, what):  # only now: a shape that is not the model's could ask for any amount of memory
        for name, packed in bits.items():
            if not torch.equal(pack_bits(unpack_bits(packed, shapes[name])), packed):
                raise ValueError(f"{name} has bits beyond its last element")
    if (ours := hash_part(model.source, model.denoiser_folder)) != denoiser:
        raise UserError(
            f"the mask {path} is of other weights: their hash is {denoiser[:12]}, that of "
            f"{model.name} is {ours[:12]}. Make one for this model with `fastunlearn mask`."
        )
    selection = Selection.of(model.denoiser, [name for name in parameters if name in bits], bits, made)
    if not selection.names:
        raise UserError(f"the mask {path} selects no element. Make one with `fastunlearn mask`.")
    return selection
