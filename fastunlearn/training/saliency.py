"""SalUn's saliency: which elements of the weights matter most for a concept, and the command that finds them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from fastunlearn_kernels import accumulate_saliency_, saliency_mask

from ..errors import UserError
from ..files.run_folder import claimed_file
from ..methods import get_method
from ..methods.recipe import NOISE, UNCONDITIONAL, Recipe, Row
from ..methods.rules import Sum
from ..models.base import Model
from ..models.loading import load_model
from ..models.options import ModelOptions
from ..models.placement import NOTHING_TO_OFFLOAD, Placement
from ..models.runtime import resolve_device
from ..models.schedulers import check_deterministic
from ..progress import Reporter
from .bank import Bank, build_bank, plan_bank
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
    defaults = get_method("salun").defaults_for(model.defaults_key)
    forget = forget_prompts(config, model)
    names = select_parameters(model, config.trainable)
    check_deterministic(model.pipeline.scheduler)
    reporter.stage("mask")
    result = make_mask(
        model,
        forget,
        names,
        density=config.density,
        granularity=config.granularity,
        trajectories=config.trajectories or max(defaults.trajectories, len(forget)),
        num_inference_steps=config.trajectory_steps,
        trajectory_guidance_scale=config.trajectory_guidance_scale,
        micro_batch_size=config.micro_batch_size or defaults.micro_batch_size,
        bank_batch_size=config.bank_batch_size,
        seed=config.seed,
        mixed_precision=config.mixed_precision,
    )
    save_mask(result, path, model)
    return result


def make_mask(
    model: Model,
    forget_prompts: Sequence[str],
    names: Sequence[str],
    *,
    density: float,
    granularity: str = "element",
    trajectories: int,
    num_inference_steps: int,
    trajectory_guidance_scale: float,
    micro_batch_size: int,
    bank_batch_size: int | None = None,
    seed: int,
    mixed_precision: str = "no",
) -> Selection:
    """SalUn's mask: the share ``density`` of the elements on which the concept's denoising loss is steepest.

    The gradient of ``|(1 + w) S(c) - w S("") - noise|^2``, w = 7.5, is summed over all forget rows, signs and all, and
    the largest magnitudes are selected over all parameters together (Fan et al. 2024; ``generate_mask.py``).  A
    function of model, prompts, ``names`` and settings alone.  ``granularity``: element, sector (8 neighbours) or row.
    """
    rows = [Row("forget", prompt, prompt, {NOISE: 1.0}) for prompt in forget_prompts]
    recipe = Recipe(rows, Sum())
    plan = plan_bank(
        model,
        recipe,
        trajectories=trajectories,
        num_inference_steps=num_inference_steps,
        guidance_scale=trajectory_guidance_scale,
        seed=seed,
    )
    bank = build_bank(model, recipe, plan, micro_batch_size=bank_batch_size)
    totals = _concept_saliency(model, bank, names, micro_batch_size, mixed_precision)
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


def _concept_saliency(
    model: Model, bank: Bank, names: Sequence[str], micro_batch_size: int, mixed_precision: str
) -> dict[str, torch.Tensor]:
    """name -> the summed gradient of the guided denoising loss over all rows of the bank, float32."""
    named = dict(model.denoiser.named_parameters())
    parameters = {name: named[name].requires_grad_(True) for name in names}
    totals = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    try:
        for rows in torch.arange(len(bank), device=model.device).split(micro_batch_size):
            conditional = bank.conditions.rows(bank.condition[rows])
            unconditional = bank.conditions.of([UNCONDITIONAL] * len(rows))
            conditions = {key: torch.cat([unconditional[key], conditional[key]]) for key in conditional}
            with torch.autocast(model.device.type, torch.bfloat16, enabled=mixed_precision == "bf16"):
                both = model.predict(bank.latents[rows].repeat(2, 1, 1, 1), bank.timesteps[rows].repeat(2), conditions)
            without, with_concept = both.chunk(2)
            guided = torch.lerp(without, with_concept, 1 + SALIENCY_GUIDANCE)
            loss = (guided - bank.teacher_preds[0, rows]).square().mean() * (len(rows) / len(bank))
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            accumulate_saliency_(list(totals.values()), list(gradients), mode="signed")
    finally:
        model.denoiser.requires_grad_(False)
    return totals
