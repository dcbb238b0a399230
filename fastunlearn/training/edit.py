"""Runs a method that is an edit: new weights in closed form, held to what is selected."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from ..methods.recipe import EMPTY, MASK, STATES, Edit, Reader, Suppression, Weights
from ..models.base import Model, Tensors
from ..models.sketch import is_sketch
from .selection import Selection, select_parameters


@dataclasses.dataclass(frozen=True)
class Edited:
    """What an edit makes of a model, which keeps its weights.

    ``values``: the selected elements of the parameters that it changes, (k,) float32 by name; ``selection``: these.
    ``facts``: what the record states of the edit.
    """

    values: dict[str, torch.Tensor]
    selection: Selection
    facts: dict[str, float]


@torch.no_grad()
def edit_weights(
    model: Model,
    edit: Edit,
    selection: Selection,
    gradient: Callable[[], Mapping[str, torch.Tensor]] | None = None,
    suppressed: Callable[[Mapping[str, torch.Tensor], Suppression], Mapping[str, torch.Tensor]] | None = None,
) -> Edited:
    """Run the edit.

    ``gradient``, ``suppressed``: what the edit finds as :class:`Weights`'.  Raises UserError where it gives anything
    but finite values of the parameters that are selected.
    """
    named = dict(model.denoiser.named_parameters())
    given = {name: named[name].detach().float() for name in selection.names}
    layers = {name: norm for name, norm in text_layers(model).items() if name in given}
    pooled = {name: argument for name, argument in pooled_layers(model).items() if name in given}
    readers: dict[Any, Callable[[Mapping[str, torch.Tensor]], torch.Tensor]] = {
        **{norm: functools.partial(_normed, norm) for norm in layers.values() if norm is not None},
        **{argument: functools.partial(_whole, argument) for argument in pooled.values()},
    }
    before = {name: readers[what] for name, what in (*layers.items(), *pooled.items()) if what is not None}
    weights = Weights(given, tuple(layers), tuple(pooled), before)
    weights = dataclasses.replace(
        weights, gradient=gradient or weights.gradient, suppressed=suppressed or weights.suppressed
    )
    new = edit.change(weights)
    for name, values in new.items():
        if name not in given:
            raise UserError(f"the edit changes {name!r}, which is not selected. Use another `--trainable`.")
        if values.shape != given[name].shape:
            raise ValueError(f"the edit gives {name} the shape {tuple(values.shape)}, not {tuple(given[name].shape)}")
        if not torch.isfinite(values).all():
            raise UserError(f"the edit gives {name} values that are no numbers. Use other options of the method.")
    if not new:
        raise UserError("the edit changes nothing of what is selected. Use another `--trainable`.")
    changed = selection.restrict([name for name in selection.names if name in new])
    facts = {"matrices": len(new), **weights.facts}
    return Edited({name: changed.take(name, new[name].float()) for name in changed.names}, changed, facts)


def check_readers(model: Model, edit: Edit, names: Collection[str], method: str, by: str) -> None:
    """UserError where the edit changes matrices that read the text and none of ``names`` is one; two forwards at most.

    ``by``: what selected ``names``, for the message.  A sketch has no values to follow: of it, what its family says.
    """
    if not edit.reads:
        return
    if is_sketch(model):
        if model.text_readers and set(select_parameters(model, model.text_readers)).isdisjoint(names):
            raise UserError(_reads_nothing(method, by, model.text_readers))
        return
    found: dict[Reader, Callable[[Model], Collection[str]]] = {"text": text_layers, "pooled": pooled_layers}
    readers: list[str] = []
    for kind in edit.reads:
        readers += found[kind](model)
        if not set(readers).isdisjoint(names):
            return
    if not readers:
        raise UserError(
            f"{method} changes the matrices that read the text, and {model.name} has none that reads it as it is. Use "
            "another method."
        )
    raise UserError(_reads_nothing(method, by, model.text_readers or ",".join(readers)))


def _reads_nothing(method: str, by: str, readers: str) -> str:
    return f"{method} changes the matrices that read the text, and {by} selects none of them. Have it select {readers}."


@torch.no_grad()
def put_weights(
    model: Model, values: Mapping[str, torch.Tensor], selection: Selection, dtypes: Mapping[str, torch.dtype]
) -> None:
    """Write values into the model, rounded to the types of its files, so that it is the model that was exported."""
    for name, parameter in model.denoiser.named_parameters():
        if name in values:
            selection.put(name, parameter, values[name].to(dtypes[name]))


def text_matrices(model: Model) -> list[str]:
    """The names of :func:`text_layers`."""
    return list(text_layers(model))


@torch.no_grad()
def text_layers(model: Model) -> dict[str, Callable[[torch.Tensor], torch.Tensor] | None]:
    """The names of the weights of linear layers that read the text states, in the module's order.

    Each with the norm that the states go through first, None where there is none.  Found by one forward, so that no
    family's names need to be known.  A layer reads them where it is given states and nothing else, be it all of them or
    those of the prompt alone, in whatever shape.
    """
    conditions = model.encode([EMPTY]).rows([0])
    states = conditions[STATES].to(model.dtype)
    width, most = states.shape[-1], states.shape[:-1].numel()
    seen: list[tuple[set[bytes], nn.Module | None]] = [(_rows(states), None)]
    found: dict[str, nn.Module | None] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: object) -> None:
            given = inputs[0] if inputs else None
            if not isinstance(given, torch.Tensor) or given.shape[-1:] != (width,) or given.numel() > width * most:
                return
            rows = _rows(given)
            for known, norm in seen:
                if rows and rows <= known:
                    if isinstance(module, nn.Linear):
                        found[f"{name}.weight"] = norm
                    elif norm is None and isinstance(output, torch.Tensor) and output.shape == given.shape:
                        seen.append((_rows(output), module))
                    return

        return hook

    # A norm has no parts and changes no shape: what else has none and takes the states, a dropout, does no harm.
    _forward_watched(model, conditions, watch, lambda module: not list(module.children()))
    return {name: found[name] for name, _ in model.denoiser.named_parameters() if name in found}


def _rows(values: torch.Tensor) -> set[bytes]:
    """The vectors (..., D), but for those of zeros."""
    return {row.tobytes() for row in values.float().reshape(-1, values.shape[-1]).cpu().numpy() if row.any()}


def _forward_watched(
    model: Model,
    conditions: Tensors,
    watch: Callable[[str], Callable[..., None]],
    is_watched: Callable[[nn.Module], bool],
) -> None:
    """One forward of one sample, with the hook ``watch(name)`` on every layer of the denoiser that is watched."""
    layers = [(name, module) for name, module in model.denoiser.named_modules() if is_watched(module)]
    hooks = [module.register_forward_hook(watch(name)) for name, module in layers]
    try:
        latents = torch.zeros(1, *model.latent_shape, device=model.device)
        model.predict(latents, model.new_scheduler(1).timesteps[:1], conditions)
    finally:
        for hook in hooks:
            hook.remove()


def _normed(norm: Callable[[torch.Tensor], torch.Tensor], conditions: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return norm(conditions[STATES])


def _whole(argument: str, conditions: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A vector of the whole text (n, D) as if it were the state of one place, (n, 1, D)."""
    return conditions[argument][:, None]


def _vectors(conditions: Tensors) -> Tensors:
    """The conditions that are one vector a text."""
    return {name: values for name, values in conditions.items() if values.dim() == 2 and name != MASK}


@torch.no_grad()
def pooled_layers(model: Model) -> dict[str, str]:
    """The names of the weights of linear layers that read a vector of the whole text, each with its argument."""
    conditions = model.encode([EMPTY]).rows([0])
    vectors = {name: values.to(model.dtype) for name, values in _vectors(conditions).items()}
    found: dict[str, str] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: object) -> None:
            given = inputs[0] if inputs else None
            for argument, values in vectors.items():
                if isinstance(given, torch.Tensor) and given.shape == values.shape and torch.equal(given, values):
                    found[f"{name}.weight"] = argument

        return hook

    if vectors:
        _forward_watched(model, conditions, watch, lambda module: isinstance(module, nn.Linear))
    return found


def pooled_inputs(model: Model, prompt: str, names: Collection[str] = ()) -> list[str]:
    """The arguments by which text enters the denoiser beside its states, such as a pooled vector.

    Without those that a layer of ``names`` reads: an edit sees these.
    """
    seen = {argument for name, argument in pooled_layers(model).items() if name in names} if names else set()
    others = _vectors(model.encode([prompt, EMPTY]).tensors)
    return [name for name, values in others.items() if name not in seen and not torch.equal(values[0], values[1])]
