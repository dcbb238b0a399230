"""Trains low-rank changes by which the image attends less to some words, as an edit asks for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.func import functional_call

from ..errors import UserError
from ..methods.recipe import STATES, Suppression
from ..models.attention_maps import attention_maps, mapped_layers
from ..models.base import Model
from ..progress import OnProgress, untold
from .bank import Bank, BankBudget, build_bank, images_of
from .edit import text_matrices

DECAY = 0.01  # AdamW's, as MACE's authors have it


def watched_layers(model: Model) -> list[str]:
    """The layers on whose attention a suppression trains.  Raises UserError for a model that has none."""
    layers = mapped_layers(model.denoiser, text_matrices(model))
    if not layers:
        raise UserError(
            f"{model.name} has no cross-attention whose keys read the text states, so that what it attends to cannot "
            "be seen. Use another method, such as uce or rece."
        )
    return layers


@torch.enable_grad()
def suppressed(
    model: Model,
    values: Mapping[str, torch.Tensor],
    wanted: Suppression,
    budget: BankBudget,
    on_progress: OnProgress = untold,
) -> dict[str, torch.Tensor]:
    """name -> B A, (out, in) float32: what the suppression adds to the denoiser's matrices of these values.

    The images are the model's own, whose weights stay as they are.  ``on_progress`` counts the steps.  Raises UserError
    for a model whose attention cannot be seen.
    """
    layers = watched_layers(model)
    recipe = images_of(wanted.places)
    bank = build_bank(model, recipe, budget.plan(model, recipe), micro_batch_size=budget.bank_batch_size)
    generator = torch.Generator().manual_seed(budget.seed)
    down: dict[str, torch.Tensor] = {}
    up: dict[str, torch.Tensor] = {}
    for name, matrix in values.items():
        drawn = torch.randn(wanted.rank, matrix.shape[1], generator=generator) / wanted.rank
        down[name] = drawn.to(matrix).requires_grad_(True)
        up[name] = matrix.new_zeros(matrix.shape[0], wanted.rank).requires_grad_(True)
    factors = [*down.values(), *up.values()]
    optimizer = torch.optim.AdamW(factors, lr=wanted.learning_rate, weight_decay=DECAY)
    chances = _chances(model, bank, wanted)
    for step in range(wanted.steps):
        rows = torch.multinomial(chances, budget.micro_batch_size, replacement=True, generator=generator).to(
            model.device
        )
        now = {name: matrix + up[name] @ down[name] for name, matrix in values.items()}
        with torch.autocast(model.device.type, torch.bfloat16, enabled=budget.mixed_precision == "bf16"):
            loss = attended(model, now, layers, bank, rows, wanted.places)
        # The last layer's values lead to nothing that is looked at.
        gradients = torch.autograd.grad(loss, factors, allow_unused=True, materialize_grads=True)
        for factor, gradient in zip(factors, gradients, strict=True):
            factor.grad = gradient
        optimizer.step()
        on_progress(step + 1, wanted.steps)
    if not all(factor.isfinite().all() for factor in factors):
        raise UserError("training on attention leads to no finite numbers. Use a smaller rate of it.")
    return {name: (up[name] @ down[name]).detach() for name in values}


def attended(
    model: Model,
    values: Mapping[str, torch.Tensor],
    layers: Sequence[str],
    bank: Bank,
    rows: torch.Tensor,
    places: Mapping[str, Sequence[int]],
) -> torch.Tensor:
    """Mean over rows of the sum over layers of the norm of what is attended to at the places of the row's prompt.

    ``values``: of the denoiser's parameters that are not its own.  () float32, a function of ``values``.
    """
    conditions = bank.conditions.rows(bank.condition[rows])
    marked = torch.zeros(len(rows), conditions[STATES].shape[1], device=model.device)
    for number, condition in enumerate(bank.condition[rows].tolist()):
        marked[number, list(places[bank.conditions.prompts[condition]])] = 1.0

    def student(*inputs: Any, **named: Any) -> Any:
        return functional_call(model.denoiser, dict(values), inputs, named)

    with attention_maps(model.denoiser, layers) as maps:
        model.predict(bank.latents[rows], bank.timesteps[rows], conditions, student)  # type: ignore[arg-type]
    norms = [(one * marked[:, None, None]).flatten(1).norm(dim=1).mean() for one in maps.values()]
    return torch.stack(norms).sum()


def _chances(model: Model, bank: Bank, wanted: Suppression) -> torch.Tensor:
    """How often each row is drawn, to a factor, (P,) float32 on the CPU."""
    timesteps = bank.timesteps * (1000 / model.pipeline.scheduler.config.num_train_timesteps)
    importance: Callable[[float], float] = wanted.importance or (lambda timestep: 1.0)
    return torch.tensor([importance(timestep) for timestep in timesteps.tolist()])
