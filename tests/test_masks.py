"""What may change: parameters by groups and patterns, never silently nothing, and elements by a saliency mask."""

import math

import pytest
import torch
from fastunlearn_kernels import unpack_bits
from safetensors.torch import load_file
from torch import nn

from fastunlearn.methods.recipe import NOISE, UNCONDITIONAL, Recipe, Row
from fastunlearn.methods.rules import Sum
from fastunlearn.models.loading import load_model
from fastunlearn.training.bank import BankBudget, build_bank, plan_bank
from fastunlearn.training.saliency import make_mask
from fastunlearn.training.selection import Selection, load_mask, save_mask, select_parameters


class Attention(nn.Module):
    def __init__(self, *extra):
        super().__init__()
        for name in ("to_q", "to_k", "to_v", *extra):
            setattr(self, name, nn.Linear(2, 2, bias=False))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn1 = Attention()
        self.norm = nn.LayerNorm(2)
        self.attn2 = Attention("to_kv")


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(1, 1, 1)
        self.blocks = nn.ModuleList([Block(), Block()])


MODULE = Denoiser()
NAMES = [name for name, _ in MODULE.named_parameters()]


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("all", NAMES),
        ("cross-attention", [n for n in NAMES if ".attn2." in n]),
        ("non-cross-attention", [n for n in NAMES if ".attn2." not in n]),
        ("cross-attention-kv", [f"blocks.{i}.attn2.{p}.weight" for i in (0, 1) for p in ("to_k", "to_v")]),
        ("attn2.to_k", [f"blocks.{i}.attn2.to_k.weight" for i in (0, 1)]),
        ("to_k", [f"blocks.{i}.{a}.to_k.weight" for i in (0, 1) for a in ("attn1", "attn2")]),
        ("blocks.1.attn1", [n for n in NAMES if n.startswith("blocks.1.attn1.")]),
        ("bias", ["conv_in.bias", "blocks.0.norm.bias", "blocks.1.norm.bias"]),
        ("conv_in.weight", ["conv_in.weight"]),
        ("*.attn?.to_q.*", [n for n in NAMES if ".to_q." in n]),
        ("blocks.0.*", [n for n in NAMES if n.startswith("blocks.0.")]),
    ],
)
def test_a_selector_selects(selector, expected):
    assert select_parameters(MODULE, selector) == expected


def test_a_list_is_a_union_in_the_modules_order():
    result = select_parameters(MODULE, " norm , conv_in,norm.bias,")
    assert result == [n for n in NAMES if "norm" in n or "conv_in" in n]


def test_a_name_part_is_whole():
    """`to_k` is no prefix of `to_kv`."""
    assert not any("to_kv" in name for name in select_parameters(MODULE, "attn2.to_k"))


def test_the_groups_split_the_bundled_denoiser(bundled):
    groups = {name: set(select_parameters(bundled, name)) for name in bundled.groups}
    assert groups["cross-attention"] | groups["non-cross-attention"] == groups["all"]
    assert not groups["cross-attention"] & groups["non-cross-attention"]
    assert groups["cross-attention-kv"] < groups["cross-attention"]
    assert groups["all"] == {name for name, _ in bundled.denoiser.named_parameters()}


@pytest.mark.parametrize(
    ("selector", "named"),
    [
        ("attn9", "'attn9'"),
        ("attn2.to_k,attn9", "the part 'attn9' of"),
        ("tto_k", "'tto_k'"),
        ("attn", "'attn'"),
        ("*.attn9.*", "attn9"),
        ("Cross-Attention", "'Cross-Attention'"),
        ("", "''"),
        (" , ", "' , '"),
    ],
)
def test_a_selector_that_selects_nothing_is_refused_with_what_there_is(selector, named):
    with pytest.raises(ValueError, match=r"`--trainable`.*selects no parameter.*cross-attention") as error:
        select_parameters(MODULE, selector)
    assert named in str(error.value)


@pytest.mark.parametrize("group", ["cross-attention", "cross-attention-kv"])
def test_a_group_that_a_module_lacks_is_refused(group):
    with pytest.raises(ValueError, match="selects no parameter"):
        select_parameters(nn.Linear(2, 2), group)


# ---- masks of elements -----------------------------------------------------------------------------------------------

BUDGET = BankBudget(trajectories=1, num_inference_steps=3, guidance_scale=3.0, micro_batch_size=2, seed=0)
KV = "cross-attention-kv"


def make(model, density=0.25, **changes):
    names = select_parameters(model, KV)
    return make_mask(model, ["star"], names, BUDGET, density=density, **changes)


@pytest.fixture(scope="module")
def mask(bundled):
    return make(bundled)


@pytest.mark.parametrize("granularity", ["element", "sector", "row"])
def test_a_mask_has_its_density_and_granularity(bundled, granularity):
    result = make(bundled, granularity=granularity)
    named = dict(bundled.denoiser.named_parameters())
    total = sum(named[name].numel() for name in select_parameters(bundled.denoiser, KV))
    assert result.total == total // 4
    assert {name: int(unpack_bits(bits, result.shapes[name]).sum()) for name, bits in result.bits.items()} == dict(
        result.lengths
    )
    for name, bits in result.bits.items():
        unpacked = unpack_bits(bits, result.shapes[name])
        if granularity == "row":
            assert torch.equal(unpacked.any(1), unpacked.all(1))
        if granularity == "sector":
            assert set(bits.tolist()) <= {0, 255}


def test_a_mask_selects_where_the_guided_denoising_loss_is_steepest(bundled, mask):
    """Against the gradient by autograd on the same rows, in one batch."""
    recipe = Recipe([Row("forget", "star", "star", {NOISE: 1.0})], Sum())
    plan = plan_bank(bundled, recipe, trajectories=1, num_inference_steps=3, guidance_scale=3.0, seed=0)
    bank = build_bank(bundled, recipe, plan)
    parameters = [dict(bundled.denoiser.named_parameters())[name].requires_grad_(True) for name in mask.bits]
    predict = [
        bundled.predict(bank.latents, bank.timesteps, bank.conditions.of([p] * 3)) for p in ("star", UNCONDITIONAL)
    ]
    loss = (8.5 * predict[0] - 7.5 * predict[1] - bank.teacher_preds[0]).square().mean()
    gradients = torch.autograd.grad(loss, parameters)
    bundled.denoiser.requires_grad_(False)
    magnitudes = torch.cat([g.abs().flatten() for g in gradients])
    chosen = torch.cat([unpack_bits(bits, mask.shapes[name]).flatten() for name, bits in mask.bits.items()])
    threshold = magnitudes.sort(descending=True).values[int(chosen.sum())]
    assert (chosen == (magnitudes > threshold)).float().mean() > 0.999


def test_making_a_mask_leaves_the_model_as_it_was(bundled):
    before = {name: p.clone() for name, p in bundled.denoiser.named_parameters()}
    make(bundled)
    for name, p in bundled.denoiser.named_parameters():
        assert torch.equal(p, before[name])
        assert not p.requires_grad
        assert p.grad is None


def test_a_mask_is_read_as_it_was_written(bundled, mask, tmp_path):
    save_mask(mask, tmp_path / "mask.safetensors", bundled)
    result = load_mask(tmp_path / "mask.safetensors", bundled)
    assert result.shapes == mask.shapes
    assert result.made == mask.made
    assert all(torch.equal(result.bits[name], bits) for name, bits in mask.bits.items())
    plain = load_file(tmp_path / "mask.safetensors")  # by safetensors alone: bits, least significant first
    name = next(iter(plain))
    assert bool(plain[name][1] >> 2 & 1) == bool(unpack_bits(mask.bits[name], mask.shapes[name]).view(-1)[10])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("weights", "of other weights"),
        ("rename", "of another model: it names 'somewhere.else'"),
        ("shape", "of another model: .* has the shape"),
    ],
)
def test_a_mask_of_another_model_is_refused(bundled, mask, tmp_path, pipeline_copy, change, said):
    name = next(iter(mask.bits))
    bits, shapes = dict(mask.bits), dict(mask.shapes)
    if change == "rename":
        bits["somewhere.else"], shapes["somewhere.else"] = bits.pop(name), shapes.pop(name)
    if change == "shape":
        shapes[name] = torch.Size([math.prod(shapes[name])])
    made_for = bundled
    if change == "weights":
        (pipeline_copy / "unet" / "config.json").write_text((pipeline_copy / "unet" / "config.json").read_text() + " ")
        made_for = load_model(str(pipeline_copy), "cpu")
    save_mask(Selection(shapes, bits), tmp_path / "mask.safetensors", made_for)
    with pytest.raises(ValueError, match=said):
        load_mask(tmp_path / "mask.safetensors", bundled)


def test_a_file_that_is_no_mask_is_refused(bundled, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_mask(tmp_path / "none.safetensors", bundled)
    (tmp_path / "text").write_text("no mask")
    with pytest.raises(ValueError, match="is no mask"):
        load_mask(tmp_path / "text", bundled)
    weights = bundled.source / "unet" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(ValueError, match="its format is"):
        load_mask(weights, bundled)


def test_a_density_that_selects_nothing_is_refused(bundled):
    with pytest.raises(ValueError, match="selects no element"):
        make(bundled, density=1e-9)


def test_a_mask_that_leaves_nothing_of_the_trainable_is_refused(mask):
    with pytest.raises(ValueError, match="lets no element"):
        mask.restrict(["conv_in.weight"])
