"""Runs a method that is an edit: new weights in closed form, held to what is selected."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import nn

from ..errors import UserError
from ..methods.recipe import EMPTY, Edit, Weights
from ..models.base import Model
from .selection import Selection


@torch.no_grad()
def edit_weights(
    model: Model,
    edit: Edit,
    selection: Selection,
    gradient: Callable[[], Mapping[str, torch.Tensor]] | None = None,
) -> tuple[dict[str, torch.Tensor], Selection]:
    """The new values of the selected elements that the edit changes, (k,) float32 by parameter, and their selection.

    ``gradient``: what the edit finds as :class:`Weights`'.  The model keeps its weights.  Raises UserError where the
    edit gives anything but finite values of the parameters that are selected.
    """
    named = dict(model.denoiser.named_parameters())
    given = {name: named[name].detach().float() for name in selection.names}
    weights = Weights(given, tuple(name for name in text_matrices(model) if name in given))
    new = edit.change(weights if gradient is None else dataclasses.replace(weights, gradient=gradient))
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
    return {name: changed.take(name, new[name].float()) for name in changed.names}, changed


@torch.no_grad()
def put_weights(
    model: Model, values: Mapping[str, torch.Tensor], selection: Selection, dtypes: Mapping[str, torch.dtype]
) -> None:
    """Write values into the model, rounded to the types of its files, so that it is the model that was exported."""
    for name, parameter in model.denoiser.named_parameters():
        if name in values:
            selection.put(name, parameter, values[name].to(dtypes[name]))


@torch.no_grad()
def text_matrices(model: Model) -> list[str]:
    """The names of the weights of linear layers whose input is the text states themselves, in the module's order.

    Found by one forward, so that no family's names need to be known.
    """
    conditions = model.encode([EMPTY]).rows([0])
    states = conditions["encoder_hidden_states"].to(model.dtype)
    result: set[str] = set()

    def watch(name: str) -> object:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if inputs and inputs[0].shape == states.shape and torch.equal(inputs[0], states):
                result.add(f"{name}.weight")

        return hook

    layers = [(name, module) for name, module in model.denoiser.named_modules() if isinstance(module, nn.Linear)]
    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in layers]  # type: ignore[arg-type]
    try:
        latents = torch.zeros(1, *model.latent_shape, device=model.device)
        model.predict(latents, model.new_scheduler(1).timesteps[:1], conditions)
    finally:
        for hook in hooks:
            hook.remove()
    return [name for name, _ in model.denoiser.named_parameters() if name in result]
