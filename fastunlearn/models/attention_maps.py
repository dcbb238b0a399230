"""What cross-attention looks at: its probabilities, computed from its queries and keys while a forward runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

#: Processors of diffusers that do nothing but q k^T, softmax and v: what is computed here is then what they attend to.
_PLAIN = ("AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor")


def mapped_layers(denoiser: nn.Module, text: Sequence[str]) -> list[str]:
    """The cross-attentions, by name, whose keys are one of the matrices ``text`` that read the text states."""
    names = [name.removesuffix(".to_k.weight") for name in text if name.endswith(".to_k.weight")]
    return [name for name in names if _is_plain(denoiser.get_submodule(name))]


def _is_plain(layer: Any) -> bool:
    is_normed = any(getattr(layer, name, None) is not None for name in ("norm_q", "norm_k", "norm_cross"))
    return type(getattr(layer, "processor", None)).__name__ in _PLAIN and not is_normed


@contextlib.contextmanager
def attention_maps(denoiser: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    """While this lasts: what each of the layers attended to in the newest forward, (B, heads, pixels, states)."""
    maps: dict[str, torch.Tensor] = {}
    queries: dict[str, torch.Tensor] = {}
    hooks: list[Any] = []

    def heads(values: torch.Tensor, layer: Any) -> torch.Tensor:
        return values.unflatten(-1, (layer.heads, -1)).transpose(1, 2).float()

    for name in layers:
        layer: Any = denoiser.get_submodule(name)

        def asked(module: nn.Module, inputs: object, output: torch.Tensor, name: str = name) -> None:
            queries[name] = output

        def answered(
            module: nn.Module, inputs: object, output: torch.Tensor, name: str = name, layer: Any = layer
        ) -> None:
            scores = heads(queries.pop(name), layer) @ heads(output, layer).transpose(-1, -2)
            maps[name] = (layer.scale * scores).softmax(-1)

        hooks += [layer.to_q.register_forward_hook(asked), layer.to_k.register_forward_hook(answered)]
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()
