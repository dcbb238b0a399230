"""Selection of parameters: groups and patterns, in the module's order, and never silently nothing."""

import pytest
from torch import nn

from fastunlearn.masks import GROUPS, select_parameters


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
    found = select_parameters(MODULE, " norm , conv_in,norm.bias,")
    assert found == [n for n in NAMES if "norm" in n or "conv_in" in n]


def test_a_name_part_is_whole():
    """`to_k` is no prefix of `to_kv`."""
    assert not any("to_kv" in name for name in select_parameters(MODULE, "attn2.to_k"))


def test_the_groups_split_the_bundled_denoiser(bundled):
    groups = {name: set(select_parameters(bundled.denoiser, name)) for name in GROUPS}
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
