"""UCE: its weights are the minimum of the paper's objective, by another way of computing it; and it runs as a run."""

import dataclasses
import json

import pytest
import torch
from fastunlearn_kernels import pack_bits
from safetensors.torch import load_file

from fastunlearn import unlearn
from fastunlearn.errors import UserError
from fastunlearn.methods import get_method
from fastunlearn.methods.recipe import Concept, Weights
from fastunlearn.training.config import ApplyConfig, TrainConfig
from fastunlearn.training.edit import edit_weights, text_matrices
from fastunlearn.training.export import apply
from fastunlearn.training.plan import plan_training
from fastunlearn.training.plan_words import plan_lines
from fastunlearn.training.selection import Selection, save_mask, select_parameters

UNET = "unet/diffusion_pytorch_model.safetensors"
KV = "cross-attention-kv"


def told(states, options=None, retain_weight=1.0):
    """A concept of two forget prompts and three to keep, with given states (L, D) for each prompt."""
    uce = get_method("uce")
    settings = dataclasses.replace(uce.defaults_for("shapes"), retain_weight=retain_weight)
    settings = uce.with_options(settings, options or {})
    return Concept(
        "g",
        ("c1", "c2"),
        {"c1": "g1", "c2": "g1"},  # two prompts may become the same
        ("p1", "p2", "p3"),
        settings,
        lambda prompts: {"encoder_hidden_states": torch.stack([states[prompt] for prompt in prompts])},
    )


def least_squares(weight, bias, states, ridge, erase, keep):
    """The minimum of the objective as one tall least-squares problem, row weights under the root; the bias fixed."""
    pairs = [("c1", "g1", erase), ("c2", "g1", erase), *((p, p, keep) for p in ("p1", "p2", "p3", ""))]
    rows, wanted = [ridge**0.5 * torch.eye(weight.shape[1]).double()], [ridge**0.5 * weight.double().T]
    for source, target, strength in pairs:
        for c, g in zip(states[source].double(), states[target].double(), strict=True):
            output = weight.double() @ g + bias.double()  # what the layer gave for the anchor, bias and all
            rows.append(strength**0.5 * c[None])
            wanted.append(strength**0.5 * (output - bias.double())[None])
    return torch.linalg.lstsq(torch.cat(rows), torch.cat(wanted), driver="gelsd").solution.T


@pytest.mark.parametrize(("ridge", "erase", "keep"), [(0.5, 1.0, 1.0), (0.05, 2.0, 0.3), (10.0, 0.1, 5.0)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_weights_minimise_the_papers_objective(ridge, erase, keep, has_bias):
    torch.manual_seed(0)
    states = {name: torch.randn(4, 6) for name in ("c1", "c2", "g1", "p1", "p2", "p3", "")}
    concept = told(states, {"ridge": ridge, "erase_weight": erase}, keep)
    layers = {"a": torch.nn.Linear(6, 5, bias=has_bias), "b": torch.nn.Linear(6, 9, bias=has_bias)}
    parameters = {f"{n}.{k}": p.detach() for n, layer in layers.items() for k, p in layer.named_parameters()}
    edit = get_method("uce").recipe(concept)
    new = edit.change(Weights(parameters, ("a.weight", "b.weight")))
    assert new.keys() == {"a.weight", "b.weight"}, "a bias stands on both sides and stays"
    for name, layer in layers.items():
        bias = layer.bias.detach() if has_bias else torch.zeros(layer.out_features)
        expected = least_squares(layer.weight.detach(), bias, states, ridge, erase, keep)
        torch.testing.assert_close(new[f"{name}.weight"].double(), expected, rtol=1e-5, atol=1e-6)
        assert new[f"{name}.weight"].dtype == torch.float32


def test_text_matrices_are_found_by_what_they_are_fed(bundled):
    assert text_matrices(bundled) == select_parameters(bundled, KV)


def test_the_edit_of_the_bundled_model_maps_the_concept_to_the_anchor(bundled):
    config = TrainConfig(forget="star", output="never", method="uce")
    plan = plan_training(config, get_method("uce"), bundled)
    edited = edit_weights(bundled, plan.recipe, plan.selection)
    values, changed = edited.values, edited.selection
    assert changed.names == select_parameters(bundled, KV)
    named = dict(bundled.denoiser.named_parameters())
    states = {p: bundled.encode([p]).tensors["encoder_hidden_states"][0] for p in ("a star", "a circle", "a red ring")}
    for name in changed.names:
        old, new = named[name], values[name].view_as(named[name])
        moved = (states["a star"] - states["a circle"]) @ old.T
        left = states["a star"] @ new.T - states["a circle"] @ old.T
        assert left.norm() < 0.5 * moved.norm(), name
        kept = states["a red ring"] @ (new - old).T
        assert kept.norm() < 0.2 * (states["a red ring"] @ old.T).norm(), name


def test_uce_runs_from_the_command_line_as_a_model_and_as_a_delta(cli, bundled, tmp_path):
    run = ["train", "--forget", "ring", "--method", "uce", "--anchor", "a heart", "--set", "ridge=0.1"]
    run += ["--evaluation-prompts", "none"]
    answer = cli(*run, "--output", tmp_path / "model")
    assert (answer.status, answer.err) == (0, "")
    assert "edit        in closed form" in answer.out
    assert "bank" not in answer.out
    assert cli(*run, "--save", "delta", "--output", tmp_path / "delta").status == 0
    apply(
        ApplyConfig(model="shapes", delta=str(tmp_path / "delta" / "delta.safetensors"), output=str(tmp_path / "new"))
    )
    assert (tmp_path / "new" / UNET).read_bytes() == (tmp_path / "model" / "model" / UNET).read_bytes()
    record = json.loads((tmp_path / "delta" / "run.json").read_text())
    assert record["hashes"] == json.loads((tmp_path / "model" / "run.json").read_text())["hashes"]
    assert (record["method"], record["rows"], record["unet_evaluations"]) == ("uce", 0, {"bank": 0, "loop": 0})
    before, after = load_file(bundled.source / UNET), load_file(tmp_path / "new" / UNET)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(select_parameters(bundled, KV))


def test_an_edit_is_repeated_by_its_config_and_by_resume(cli, tmp_path):
    first = unlearn("shapes", "star", "uce", output=tmp_path / "run", evaluation_prompts="none")
    whole = (first.model / UNET).read_bytes()
    assert cli("train", "--config", tmp_path / "run" / "config.yaml", "--output", tmp_path / "again").status == 0
    assert (tmp_path / "again" / "model" / UNET).read_bytes() == whole
    (first.model / UNET).unlink()
    assert cli("train", "--resume", "--output", tmp_path / "run").status == 0
    assert (first.model / UNET).read_bytes() == whole


def test_an_edit_keeps_to_a_mask(bundled, tmp_path):
    names = select_parameters(bundled, "attn2.to_v")
    named = dict(bundled.denoiser.named_parameters())
    keep = {name: torch.arange(named[name].numel()).view(named[name].shape) % 3 == 0 for name in names}
    mask = Selection.of(bundled.denoiser, names, {name: pack_bits(bits) for name, bits in keep.items()})
    save_mask(mask, tmp_path / "mask", bundled)
    masked = unlearn("shapes", "star", "uce", output=tmp_path / "a", mask=tmp_path / "mask", evaluation_prompts="none")
    whole = unlearn("shapes", "star", "uce", output=tmp_path / "b", trainable="attn2.to_v", evaluation_prompts="none")
    before, a, b = (load_file(folder / UNET) for folder in (bundled.source, masked.model, whole.model))
    for name in before:
        expected = torch.where(keep[name], b[name], before[name]) if name in keep else before[name]
        assert torch.equal(a[name], expected), name


@pytest.mark.parametrize(
    ("held", "trainable", "by"),
    [("conv_in", None, "`--mask`"), (f"conv_in,{KV}", "conv_in", "`--mask` within `--trainable`")],
)
def test_what_selects_nothing_that_reads_the_text_is_named(held, trainable, by, bundled, tmp_path):
    named = dict(bundled.denoiser.named_parameters())
    bits = {name: pack_bits(torch.ones_like(named[name]).bool()) for name in select_parameters(bundled, held)}
    save_mask(Selection.of(bundled.denoiser, list(bits), bits), tmp_path / "mask", bundled)
    with pytest.raises(UserError, match=f", and {by} selects none of them"):
        unlearn("shapes", "star", "uce", output=tmp_path / "run", mask=tmp_path / "mask", trainable=trainable)


def test_an_edit_takes_a_saliency_mask(tmp_path):
    settings = {"mask_density": 0.1, "trajectories": 1, "trajectory_steps": 3, "evaluation_prompts": "none"}
    result = unlearn("shapes", "star", "uce", output=tmp_path / "run", **settings)
    assert result.record.trainable_parameters == round(0.1 * 131072)
    assert (tmp_path / "run" / "mask.safetensors").is_file()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"trainable": "conv_in"}, "`--trainable` selects none of them"),
        ({"trainable": "conv_in", "dry_run": True}, "`--trainable` selects none of them"),
        ({"steps": 3}, "Leave `--steps` out"),
        ({"deepspeed": "ds.json"}, "Leave `--deepspeed` out"),
        ({"ridge": 0}, "`ridge` must be above 0"),
        ({"kappa": 1}, "unknown setting 'kappa'"),
    ],
)
def test_what_an_edit_has_no_use_for_is_refused(settings, words, tmp_path, monkeypatch):
    if "deepspeed" in settings:
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds.json").write_text("{}")
    with pytest.raises(UserError, match=words):
        unlearn("shapes", "star", "uce", output=tmp_path / "run", evaluation_prompts="none", **settings)
    assert not (tmp_path / "run").exists()


def test_the_plan_of_an_edit_names_what_is_kept(bundled):
    config = TrainConfig(forget="star", output="never", method="uce", retain_prompts="a red ring;a heart")
    lines = plan_lines(plan_training(config, get_method("uce"), bundled))
    assert "keep        'a red ring', 'a heart'" in lines
    assert not any(line.startswith(("bank", "loop", "estimate")) for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "word"), [("uce", "star"), ("uce", "crescent"), ("rece", "star"), ("speed", "heart")]
)
def test_an_edit_forgets_and_keeps(method, word, tmp_path):
    unlearn("shapes", word, method, output=tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert summary["erasure"]["shown_original"] >= 0.9
    assert summary["erasure"]["shown"] <= 0.05
    assert summary["integrity"]["retention"] >= 0.97
