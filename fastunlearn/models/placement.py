"""Where a model's networks lie and in which type: on the device all the time or by turns, in float32 or bfloat16."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
from torch import nn

from ..errors import UserError

WeightsDtype = Literal["fp32", "bf16"]
NOTHING_TO_OFFLOAD = "`--offload` changes nothing here: on the CPU every network is where it would wait."
_HOST = torch.device("cpu")
#: What autocast casts to bfloat16 wherever it is used, so that keeping it so loses nothing.
_MATRICES = (nn.Linear, nn.Conv2d)


class Shelf:
    """A device that holds one network at a time, of whichever model; the others wait on the host."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._held: nn.Module | None = None

    def hold(self, network: nn.Module) -> None:
        """Bring a network to the device, and the one that was there back."""
        if network is self._held:
            return
        if self._held is not None:
            self._held.to(_HOST)
        network.to(self.device)
        self._held = network


@dataclasses.dataclass(frozen=True)
class Placement:
    """How a model's networks are kept.

    ``reads_narrow``: whether a lean model is read in the type of its files, which may be half of float32's size.
    ``weights_dtype``: ``bf16`` keeps the matrices of denoiser and text encoders in bfloat16 and runs both under
    autocast; norms, embeddings and the VAE stay float32.  ``shelf``: shared by models that take turns on a device.
    """

    weights_dtype: WeightsDtype = "fp32"
    shelf: Shelf | None = None
    reads_narrow: bool = True

    @classmethod
    def of(cls, weights_dtype: WeightsDtype, device: torch.device, *, offload: bool) -> Placement:
        """On the CPU every network is where it would wait, so that there is nothing to offload."""
        return cls(weights_dtype, Shelf(device) if offload and device.type != "cpu" else None)

    @property
    def is_lean(self) -> bool:
        return self.weights_dtype == "bf16"

    def settle(self, pipeline: Any, device: torch.device, denoiser: nn.Module) -> None:
        """Place every network of a pipeline, but for a lean denoiser, which waits for :meth:`settle_denoiser`."""
        texts = text_encoders(pipeline)
        for network in networks(pipeline):
            if not self.is_lean or network not in (denoiser, *texts):
                self._place(network, device, torch.float32)
            elif network is not denoiser:
                self._place(thin(network, device), device, None)

    def settle_denoiser(self, denoiser: nn.Module, device: torch.device, trained: Collection[str] = ()) -> None:
        """Round what is not ``trained`` of a lean denoiser, and place it; others are in their place."""
        if self.is_lean:
            self._place(thin(denoiser, device, trained), device, None)

    def _place(self, network: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
        network.to(_HOST if self.shelf else device, dtype)
        if shelf := self.shelf:
            network.register_forward_pre_hook(lambda module, inputs: shelf.hold(module))


class Placed:
    """What a model does with the places and types of its networks."""

    pipeline: Any
    name: str
    device: torch.device
    denoiser: nn.Module
    placement: Placement

    def settle_denoiser(self, trained: Sequence[str] = ()) -> None:
        """Say, before the denoiser is used, which of its parameters train; a lean one has rounded the others then."""
        self.placement.settle_denoiser(self.denoiser, self.device, trained)
        self.denoiser.requires_grad_(False)

    def hold_denoiser(self) -> None:
        """Bring the denoiser to the device, where networks take turns: an engine works where the weights are."""
        if self.placement.shelf:
            self.placement.shelf.hold(self.denoiser)

    def checkpoint_gradients(self) -> None:
        """Let the denoiser compute its activations again in the backward instead of keeping them; same bits, slower."""
        if not getattr(self.denoiser, "_supports_gradient_checkpointing", False):
            raise UserError(
                f"`--gradient-checkpointing`: the {type(self.denoiser).__name__} of {self.name} cannot do that. Leave "
                "it out."
            )
        self.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]

    def discard(self) -> None:
        """Let go of every network, whose memory is needed for others; name, source and device stay."""
        for name, part in self.pipeline.components.items():
            if isinstance(part, nn.Module):
                setattr(self.pipeline, name, None)
        del self.denoiser

    @property
    def dtype(self) -> torch.dtype:
        """Of what the denoiser takes: float32, but where an engine keeps all its weights in bfloat16."""
        dtypes = (parameter.dtype for parameter in self.denoiser.parameters())
        if self.placement.is_lean:  # a few of them are float32
            return torch.float32 if torch.float32 in dtypes else torch.bfloat16
        return next(dtypes)


def networks(pipeline: Any) -> list[nn.Module]:
    """The networks of a pipeline, each once."""
    return list(dict.fromkeys(part for part in pipeline.components.values() if isinstance(part, nn.Module)))


def text_encoders(pipeline: Any) -> list[nn.Module]:
    """Those of them that read prompts."""
    named = pipeline.components.items()
    return [part for name, part in named if name.startswith("text_encoder") and isinstance(part, nn.Module)]


def thin(network: nn.Module, device: torch.device, trained: Collection[str] = ()) -> nn.Module:
    """Keep the network's matrices in bfloat16 and all else, and what is ``trained``, in float32; run it by autocast.

    Its results are bit for bit those that its float32 weights give under autocast, which casts matrices at every use.
    """
    replaced: dict[nn.Parameter, nn.Parameter] = {}  # a parameter may have two names
    for prefix, module in network.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            is_kept = not isinstance(module, _MATRICES) or f"{prefix}.{name}".lstrip(".") in trained
            dtype = torch.float32 if is_kept else torch.bfloat16
            if parameter.is_floating_point() and parameter.dtype != dtype:
                if parameter not in replaced:
                    replaced[parameter] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
                setattr(module, name, replaced[parameter])
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_floating_point():
                setattr(module, name, buffer.float())
    network.forward = torch.autocast(device.type, torch.bfloat16)(network.forward)
    return network
