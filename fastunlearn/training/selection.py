"""What a method may change: parameters by name, and elements of them by a saliency mask of one bit per element."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from fastunlearn_kernels import accumulate_saliency_, pack_bits, saliency_mask, unpack_bits
from torch import nn

from ..errors import UserError
from ..files.atomic import whole_file
from ..files.weights import hash_part, read_tensors
from ..methods.recipe import NOISE, UNCONDITIONAL, Recipe, Row, Sum
from ..models.base import Model, matches
from ..models.sd import UNET_GROUPS
from .bank import Bank, build_bank, plan_bank

MASK_FORMAT = "fastunlearn-mask-1"
SALIENCY_GUIDANCE = 7.5  # of the loss whose gradient is the saliency, as SalUn's authors have it

#: name -> description, of the groups that the method's table names: those of a UNet.
GROUPS = {name: group.description for name, group in UNET_GROUPS.items()}


def select_parameters(model: Model | nn.Module, selector: str) -> list[str]:
    """Names of the denoiser's parameters that ``selector`` selects, in its order.

    ``selector`` is a group of the model's family (of a bare network: a UNet's) or a comma list of patterns as
    :func:`matches` reads them.  UserError if a pattern selects nothing.
    """
    network, groups = (model, UNET_GROUPS) if isinstance(model, nn.Module) else (model.denoiser, model.groups)
    names = [name for name, _ in network.named_parameters()]
    patterns = [pattern.strip() for pattern in selector.split(",") if pattern.strip()]
    selected: set[str] = set()
    if group := groups.get(selector):
        selected = {name for name in names if group.holds(name)}
    else:
        for pattern in patterns:
            found = {name for name in names if matches(name, pattern)}
            selected |= found or _nothing(names, groups, selector, pattern)
    return [name for name in names if name in selected] or _nothing(names, groups, selector)


def _nothing(names: list[str], groups: Iterable[str], selector: str, pattern: str = "") -> NoReturn:
    which = f"the part {pattern!r} of " if pattern and pattern != selector else ""
    raise UserError(
        f"`--trainable`: {which}{selector!r} selects no parameter. Use {', '.join(groups)}, or parts of names such as "
        f"{names[len(names) // 2]!r}."
    )


@dataclasses.dataclass(frozen=True)
class GradMask:
    """Which elements of a denoiser may change.  A parameter that is not named, or has no bit set, may not at all.

    ``bits``: parameter -> (ceil(numel / 8),) uint8 on the CPU: element i of the flattened tensor is bit i % 8 of byte
    i // 8, padding bits are 0.  ``model_hash`` tells the weights that it was made for, ``made`` how, in words.
    """

    bits: dict[str, torch.Tensor]
    shapes: dict[str, tuple[int, ...]]
    model_hash: str
    made: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The parameters of which any element may change."""
        return [name for name, bits in self.bits.items() if bool(bits.any())]

    def count(self, name: str) -> int:
        """How many elements of a parameter may change."""
        return int(unpack_bits(self.bits[name], self.shapes[name]).sum())

    def restrict(self, names: Sequence[str]) -> GradMask:
        """The mask of these parameters alone.  UserError if it lets nothing of them change."""
        bits = {name: self.bits[name] for name in names if name in self.bits and bool(self.bits[name].any())}
        if not bits:
            raise UserError("the mask lets no element of the trainable parameters change. Use another `--trainable`.")
        return dataclasses.replace(self, bits=bits, shapes={name: self.shapes[name] for name in bits})

    def save(self, path: Path) -> None:
        """Write a safetensors file: one uint8 tensor per parameter, shapes and hash in its metadata."""
        from safetensors.torch import save_file

        metadata = {"format": MASK_FORMAT, "denoiser": self.model_hash, "made": json.dumps(self.made)}
        metadata["shapes"] = json.dumps({name: list(shape) for name, shape in self.shapes.items()})
        with whole_file(path) as unfinished:
            save_file(self.bits, unfinished, metadata=metadata)


def load_mask(path: Path, model: Model) -> GradMask:
    """Read what :meth:`GradMask.save` wrote.  UserError if it is no mask, or one of another model."""
    if not path.is_file():
        raise UserError(f"the mask {path} does not exist. Make one with `fastunlearn mask`.")
    try:
        bits, result = read_tensors(path)
        metadata = result or {}
        if metadata.get("format") != MASK_FORMAT:
            raise UserError(f"its format is {metadata.get('format')!r}, not {MASK_FORMAT!r}")
        shapes = {name: tuple(shape) for name, shape in json.loads(metadata["shapes"]).items()}
        if shapes.keys() != bits.keys():
            raise UserError("names and shapes differ")
        for name, packed in bits.items():
            if not torch.equal(pack_bits(unpack_bits(packed, shapes[name])), packed):
                raise UserError(f"{name} has bits beyond its last element")
    except Exception as error:
        raise UserError(f"{path} is no mask of `fastunlearn mask`: {' '.join(str(error).split())}") from error
    parameters = dict(model.denoiser.named_parameters())
    for name, shape in shapes.items():
        if name not in parameters:
            raise UserError(f"the mask {path} is of another model: it names {name!r}, which {model.name} lacks.")
        if tuple(parameters[name].shape) != shape:
            raise UserError(
                f"the mask {path} is of another model: {name} has the shape {shape} there and "
                f"{tuple(parameters[name].shape)} in {model.name}."
            )
    if (ours := hash_part(model.source, model.denoiser_folder)) != metadata.get("denoiser"):
        raise UserError(
            f"the mask {path} is of other weights: their hash is {str(metadata.get('denoiser'))[:12]}, that of "
            f"{model.name} is {ours[:12]}. Make one for this model with `fastunlearn mask`."
        )
    in_order = [name for name in parameters if name in bits]
    made = json.loads(metadata.get("made", "{}"))
    return GradMask({name: bits[name] for name in in_order}, {n: shapes[n] for n in in_order}, ours, made)


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
    seed: int,
    mixed_precision: str = "no",
) -> GradMask:
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
    bank = build_bank(model, recipe, plan)
    totals = _concept_saliency(model, bank, names, micro_batch_size, mixed_precision)
    bits = saliency_mask(list(totals.values()), density, granularity=granularity)
    mask = GradMask(
        {name: packed.cpu() for name, packed in zip(totals, bits, strict=True)},
        {name: tuple(total.shape) for name, total in totals.items()},
        hash_part(model.source, model.denoiser_folder),
        {"density": f"{density:g}", "granularity": granularity, "prompts": "; ".join(forget_prompts)},
    )
    if not mask.names:
        raise UserError(f"a density of {density:g} selects no element of {len(totals)} parameters. Use a larger one.")
    return mask


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
