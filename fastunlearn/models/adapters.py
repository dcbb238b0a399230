"""Low-rank adapters (LoRA) on layers of a denoiser, through peft: planned, put on, switched off, merged.

An adapter adds ``alpha / rank * B A`` to the weight of a layer.  B begins at zero, so that a fresh one changes no bit,
and switched off it leaves the layer's own weight as it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..errors import UserError

if TYPE_CHECKING:
    from .base import Model

NAME = "default"  # as peft and diffusers call the only one
KINDS = ("lora_A", "lora_B")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What an adapter is of.

    ``layers``: name of a layer in the denoiser -> shapes of its A and B.  ``made``: the hash of the base's files, the
    method, the concept.
    """

    layers: Mapping[str, tuple[torch.Size, torch.Size]]
    rank: int
    alpha: float
    made: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def total(self) -> int:
        """How many elements it has."""
        return sum(shape.numel() for shapes in self.layers.values() for shape in shapes)

    @property
    def weights(self) -> list[str]:
        """The parameters of the denoiser that it adds to."""
        return [f"{layer}.weight" for layer in self.layers]

    def parameters(self) -> Iterator[tuple[str, str, torch.Size]]:
        """(name in the denoiser that carries it, the same without peft's name of the adapter, shape) of each tensor."""
        for layer, shapes in self.layers.items():
            for kind, shape in zip(KINDS, shapes, strict=True):
                yield f"{layer}.{kind}.{NAME}.weight", f"{layer}.{kind}.weight", shape


def plan_adapter(network: nn.Module, names: Sequence[str], rank: int, alpha: float | None = None) -> Adapter:
    """An adapter on the layers whose weights are among the parameters ``names``; ``alpha``: None for the rank.

    Raises UserError where none of them can carry one, and where all are smaller than the rank.
    """
    layers = {}
    for name, module in network.named_modules():
        if f"{name}.weight" in names and can_carry(module):
            layers[name] = factor_shapes(module, rank)
    if not layers:
        raise UserError(
            "`--adapter lora`: nothing of what is selected is the weight of a linear or convolution layer. Use another "
            "`--trainable`."
        )
    modules = dict(network.named_modules())
    largest = max(layers, key=lambda name: full_rank(modules[name]))
    if rank > (limit := full_rank(modules[largest])):
        raise UserError(
            f"`--rank` {rank} is more than any selected layer has: the largest, {largest}, has rank {limit}. Use a "
            "smaller rank, or leave `--adapter` out."
        )
    return Adapter(layers, rank, float(rank) if alpha is None else alpha)


def beyond_full_rank(network: nn.Module, adapter: Adapter) -> list[str]:
    """The layers that are smaller than the adapter's rank: there it holds more numbers than the weight."""
    modules = dict(network.named_modules())
    return [name for name in adapter.layers if full_rank(modules[name]) < adapter.rank]


def can_carry(module: nn.Module) -> bool:
    """Whether peft can adapt the layer and merge it again."""
    if isinstance(module, nn.Conv2d):  # the others it builds otherwise than the layer is
        return module.groups == 1 and module.dilation == (1, 1) and module.padding_mode == "zeros"
    return isinstance(module, nn.Linear)


def factor_shapes(module: nn.Module, rank: int) -> tuple[torch.Size, torch.Size]:
    """The shapes of A and B for a layer's weight (out, in) or (out, in, height, width)."""
    out, *rest = weight_of(module).shape
    return torch.Size([rank, *rest]), torch.Size([out, rank, *([1] * (len(rest) - 1))])


def full_rank(module: nn.Module) -> int:
    """The rank that a layer's weight, as a matrix, can have."""
    shape = weight_of(module).shape
    return min(shape[0], shape[1:].numel())


def weight_of(module: nn.Module) -> torch.Tensor:
    """The weight of a layer."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight


def put_on(model: Model, adapter: Adapter, seed: int = 0) -> list[str]:
    """Put a fresh adapter on the model's denoiser; A is drawn from the seed, B is zero.

    Returns the names of its tensors among the denoiser's parameters, in order.
    """
    peft = import_peft()
    alternatives = "|".join(re.escape(layer) for layer in adapter.layers)
    alpha = int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha
    config = peft.LoraConfig(r=adapter.rank, lora_alpha=alpha, target_modules=f"(?:{alternatives})")
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model.denoiser, adapter_name=NAME)
    model.denoiser.requires_grad_(False)
    model.denoiser.eval()
    model.adapter = adapter
    for _, module in adapted_layers(model.denoiser):  # of a layer in bfloat16 peft makes bfloat16 ones
        for kind in KINDS:
            getattr(module, kind).float()
    ours = {name for name, _, _ in adapter.parameters()}
    found = [name for name, _ in model.denoiser.named_parameters() if name in ours]
    assert len(found) == len(ours), "peft adapts what was planned"
    return found


@torch.no_grad()
def set_values(model: Model, adapter: Adapter, values: Mapping[str, torch.Tensor]) -> None:
    """Give the adapter that the model carries its values, by name without peft's name of the adapter."""
    parameters = dict(model.denoiser.named_parameters())
    for name, plain, _ in adapter.parameters():
        parameters[name].copy_(values[plain])


@contextlib.contextmanager
def without_adapter(model: Model) -> Iterator[None]:
    """The teacher out of the student: while this lasts, the denoiser computes what it did before it was adapted."""
    layers = [module for _, module in adapted_layers(model.denoiser)]
    trained = [parameter for parameter in model.denoiser.parameters() if parameter.requires_grad]
    for layer in layers:
        layer.enable_adapters(False)  # type: ignore[operator]
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)  # type: ignore[operator]
        model.denoiser.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)


@torch.no_grad()
def merge(network: nn.Module) -> dict[str, bool]:
    """Add the adapters that a network carries to its weights, and take them off: the layers are plain ones again.

    Returns, for each layer that carried one, whether its weight has changed.
    """
    result = {}
    for name, layer in adapted_layers(network):
        base = layer.get_base_layer()  # type: ignore[operator]
        before = base.weight.detach().clone()
        layer.merge()  # type: ignore[operator]
        result[name] = not torch.equal(before, base.weight)
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, base)
    if hasattr(network, "peft_config"):
        del network.peft_config
    if hasattr(network, "_hf_peft_config_loaded"):
        network._hf_peft_config_loaded = False  # type: ignore[assignment]
    network.requires_grad_(False)
    return result


def adapted_layers(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers of a network that carry an adapter, by name."""
    kind = importlib.import_module("peft.tuners.tuners_utils").BaseTunerLayer
    return [(name, module) for name, module in network.named_modules() if isinstance(module, kind)]


def import_peft() -> ModuleType:
    """``peft``.  UserError where it is missing."""
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise UserError(
            f"adapters need peft, which cannot be imported ({error}). Install it with "
            "`pip install 'fastunlearn[lora]'`."
        ) from error
