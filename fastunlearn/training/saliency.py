"""SalUn's saliency: which elements of the weights matter most for a concept, and the command that finds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from fastunlearn_kernels import accumulate_saliency_, saliency_mask

from ..concepts import read_concepts
from ..errors import UserError
from ..files.run_folder import claimed_file
from ..methods import get_method
from ..methods.recipe import UNCONDITIONAL
from ..models.base import Model
from ..models.loading import load_model
from ..models.options import ModelOptions
from ..models.placement import NOTHING_TO_OFFLOAD, Placement
from ..models.runtime import resolve_device
from ..models.schedulers import check_deterministic
from ..progress import OnProgress, Reporter, untold
from .bank import Bank, BankBudget, build_bank, images_of
from .concept import forget_prompts
from .config import MaskConfig
from .selection import Selection, save_mask, select_parameters

SALIENCY_GUIDANCE = 7.5  # of the loss whose gradient is the saliency, as SalUn's authors have it


def mask(config: MaskConfig, reporter: Reporter | None = None) -> Selection:
    """Find the weights that matter most for a concept and write their mask to a file; see :func:`make_mask`."""
    reporter = reporter or Reporter()
    path = Path(config.output).expanduser()
    if path.is_dir() or (path.exists() and not config.overwrite):
        kind = "is a folder. Name a file" if path.is_dir() else "exists. Use another name or `--overwrite`"
        raise UserError(f"`--output` {path} {kind}.")
    if not path.parent.is_dir():
        raise UserError(f"`--output` {path}: the folder {path.parent} does not exist. Make it first.")
    with claimed_file(path):
        return _mask(config, path, reporter)


def _mask(config: MaskConfig, path: Path, reporter: Reporter) -> Selection:
    reporter.stage("loading")
    device = resolve_device(config.device)
    placement = Placement.of("fp32", device, offload=config.offload)
    model = load_model(config.model, device, ModelOptions.of(config), placement=placement)
    if model.adapter_files:
        raise UserError(
            f"{config.model!r} is an adapter over a base, and a mask is for one model's weights. Make them one with "
            "`fastunlearn export --format diffusers` and give `--model` that."
        )
    if config.gradient_checkpointing:
        model.checkpoint_gradients()
    if config.offload and placement.shelf is None:
        reporter.note(NOTHING_TO_OFFLOAD)
    defaults = get_method("salun").defaults_for(*model.defaults_keys)
    words = [one.concept for one in read_concepts(config.forget)]
    forget = forget_prompts(config, model, words)
    names = select_parameters(model, config.trainable)
    check_deterministic(model.pipeline.scheduler)
    reporter.stage("mask")
    settings = dataclasses.replace(
        defaults,
        trajectories=config.trajectories or max(defaults.trajectories, len(forget)),
        trajectory_steps=config.trajectory_steps or defaults.trajectory_steps,
        micro_batch_size=config.micro_batch_size or defaults.micro_batch_size,
    )
    budget = BankBudget.of(config, settings)
    told = partial(reporter.working, "mask")
    result = make_mask(
        model, forget, names, budget, density=config.density, granularity=config.granularity, on_progress=told
    )
    save_mask(result, path, model)
    return result


def make_mask(
    model: Model,
    forget_prompts: Sequence[str],
    names: Sequence[str],
    budget: BankBudget,
    *,
    density: float,
    granularity: str = "element",
    on_progress: OnProgress = untold,
) -> Selection:
    """SalUn's mask: the share ``density`` of the elements on which the concept's denoising loss is steepest.

    The gradient of ``|(1 + w) S(c) - w S("") - noise|^2``, w = 7.5, is summed over all forget rows, signs and all, and
    the largest magnitudes are selected over all parameters together (Fan et al. 2024; ``generate_mask.py``).  A
    function of model, prompts, ``names`` and settings alone.  ``granularity``: element, sector (8 neighbours) or row.
    """
    totals = concept_gradient(model, forget_prompts, names, budget, guidance=SALIENCY_GUIDANCE, on_progress=on_progress)
    bits = saliency_mask(list(totals.values()), density, granularity=granularity)
    selection = Selection.of(
        model.denoiser,
        list(totals),
        {name: packed.cpu() for name, packed in zip(totals, bits, strict=True)},
        {"density": f"{density:g}", "granularity": granularity, "prompts": "; ".join(forget_prompts)},
    )
    if not selection.names:
        raise UserError(f"a density of {density:g} selects no element of {len(totals)} parameters. Use a larger one.")
    return selection


@torch.enable_grad()
def concept_gradient(
    model: Model,
    forget_prompts: Sequence[str],
    names: Sequence[str],
    budget: BankBudget,
    *,
    guidance: float,
    on_progress: OnProgress = untold,
) -> dict[str, torch.Tensor]:
    """name -> the gradient of ``|(1 + w) S(c) - w S("") - noise|^2``, w = ``guidance``, over all forget rows, float32.

    Signs and all: the mean over the rows.  With a guidance of 0 it is the concept's usual training loss.
    ``on_progress`` counts the rows twice: when they are made, and when they are in the gradient.
    """
    recipe = images_of(forget_prompts)
    bank = build_bank(
        *(model, recipe, budget.plan(model, recipe)),
        micro_batch_size=budget.bank_batch_size,
        on_progress=lambda done, total: on_progress(done, 2 * total),
    )
    parameters = _parameters(model, names)
    totals = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    done = len(bank)
    try:
        for index in torch.arange(len(bank), device=model.device).split(budget.micro_batch_size):
            with torch.autocast(model.device.type, torch.bfloat16, enabled=budget.mixed_precision == "bf16"):
                predicted = _guided(model, bank, index, guidance)
            loss = (predicted - bank.teacher_preds[0, index]).square().mean() * (len(index) / len(bank))
            gradients = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
            accumulate_saliency_(list(totals.values()), list(gradients), mode="signed")
            done += len(index)
            on_progress(done, 2 * len(bank))
    finally:
        model.denoiser.requires_grad_(False)
    return totals


def fisher_information(
    model: Model, bank: Bank, names: Sequence[str], *, points: int, micro_batch_size: int, mixed_precision: str = "no"
) -> dict[str, torch.Tensor]:
    """name -> the diagonal of the Fisher information of the retain rows' images, float32.

    The likelihood of an image is estimated by its denoising loss summed over all the timesteps T of the model's
    training, and that sum by ``points`` of them: F is the mean over images of ``(T / points * sum_t gradient_t)^2``
    (Heng & Soh 2023, equation 6), the gradients of one image being summed before they are squared.
    """
    parameters = _parameters(model, names)
    totals = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    images = bank.role_rows["retain"].to(model.device).view(-1, points)
    all_timesteps = model.pipeline.scheduler.config.num_train_timesteps
    try:
        for rows in images:
            sums = {name: torch.zeros_like(total) for name, total in totals.items()}
            for index in rows.split(micro_batch_size):
                with torch.autocast(model.device.type, torch.bfloat16, enabled=mixed_precision == "bf16"):
                    predicted = _guided(model, bank, index, 0.0)
                losses = (predicted - bank.teacher_preds[0, index]).square().mean(dim=(1, 2, 3))
                total = losses.sum() * (all_timesteps / points)
                gradients = torch.autograd.grad(total, list(parameters.values()), materialize_grads=True)
                accumulate_saliency_(list(sums.values()), list(gradients), mode="signed")
            for name, total in totals.items():
                total += sums[name].square() / len(images)
    finally:
        model.denoiser.requires_grad_(False)
    return totals


def _parameters(model: Model, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """These parameters of the denoiser, made to take gradients."""
    named = dict(model.denoiser.named_parameters())
    return {name: named[name].requires_grad_(True) for name in names}


def _guided(model: Model, bank: Bank, index: torch.Tensor, guidance: float) -> torch.Tensor:
    """The denoiser's answer for rows of the bank, (B, C, H, W), guided where ``guidance`` is not 0."""
    conditions = bank.conditions.rows(bank.condition[index])
    if not guidance:
        return model.predict(bank.latents[index], bank.timesteps[index], conditions)
    unconditional = bank.conditions.of([UNCONDITIONAL] * len(index))
    both = {key: torch.cat([unconditional[key], conditions[key]]) for key in conditions}
    predicted = model.predict(bank.latents[index].repeat(2, 1, 1, 1), bank.timesteps[index].repeat(2), both)
    without, with_concept = predicted.chunk(2)
    return torch.lerp(without, with_concept, 1 + guidance)
