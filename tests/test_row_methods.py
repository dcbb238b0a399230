"""The methods that are rows: what each asks for, what came with them (pictures, an edit before rows), short runs."""

import dataclasses
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fastunlearn_kernels import pack_bits, unpack_bits
from PIL import Image
from plain import Plain
from row_runs import BATCH, FORGET, RETAIN, ROW_METHODS, STEPS, Run, own_options, planned
from test_methods import concept
from tiny_models import build, ddim, flux, sd1, sd3

from fastunlearn import unlearn
from fastunlearn.errors import UserError
from fastunlearn.methods import all_methods, get_method, spm
from fastunlearn.methods.recipe import NOISE, UNCONDITIONAL, Edit, Inner, Pursuit, Recipe, Row, picture
from fastunlearn.methods.rules import Bilevel, Project, Sum
from fastunlearn.models.loading import load_model, wrap_pipeline
from fastunlearn.training import adversary, fit, saliency
from fastunlearn.training.bank import BankBudget, build_bank
from fastunlearn.training.edit import edit_weights, put_weights
from fastunlearn.training.engine import TorchEngine
from fastunlearn.training.pictures import encode_pictures, noise_share, prediction_towards
from fastunlearn.training.plan_words import plan_lines
from fastunlearn.training.selection import Selection
from fastunlearn.training.trainer import Schedule, Trainer

# ---- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: sd1(ddim()), lambda: sd1(ddim(prediction_type="v_prediction")), sd3])
def test_the_prediction_towards_a_picture_leads_there(make, folders):
    """Towards the picture itself it is the truth of the training loss; towards another it decodes to that one."""
    model = wrap_pipeline(build(make), "mine")
    pictures = {name: folders / "images" / f"{name}.png" for name in ("a", "b")}
    encoded = encode_pictures(model, pictures)
    timesteps = model.new_scheduler(STEPS).timesteps.float()
    noise = torch.randn(STEPS, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    x, truth = model.noised(encoded["a"], noise, timesteps)
    torch.testing.assert_close(prediction_towards(model, encoded["a"], x, timesteps), truth, atol=1e-3, rtol=1e-3)
    towards = prediction_towards(model, encoded["b"], x, timesteps)
    share = noise_share(model, timesteps).view(-1, 1, 1, 1)
    assert ((share > 0) & (share <= 1)).all()
    if hasattr(model.pipeline.scheduler, "scale_noise"):  # x = (1 - s) clean + s noise, the velocity noise - clean
        clean = x - share * towards
    else:
        signal = (1 - share.square()).sqrt()
        kinds = {"epsilon": (x - share * towards) / signal, "v_prediction": signal * x - share * towards}
        clean = kinds[model.pipeline.scheduler.config.prediction_type]
    torch.testing.assert_close(clean, encoded["b"].expand_as(clean), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("make", [sd1, sd3, flux])
def test_images_are_encoded_as_they_are_decoded(make, folders):
    """The VAE has random weights, so the way back is held by its own encoder, scaled as the decoder undoes it."""
    model = wrap_pipeline(build(make), "mine")
    pixels = torch.tensor(np.asarray(Image.open(folders / "images" / "a.png"))).permute(2, 0, 1)[None]
    latents = model.encode_images(pixels)
    assert latents.shape[1:] == model.latent_shape
    vae = model.pipeline.vae
    with torch.no_grad():
        raw = vae.encode(pixels / 127.5 - 1).latent_dist.mode()
        assert torch.allclose(model.decode_latents(latents), vae.decode(raw).sample, atol=1e-4)


def test_rows_of_a_picture_ask_the_teacher_nothing(tiny, folders):
    run = Run(tiny, "instance", own_options("instance", folders) | {"window_start": 0.4}, trajectories=4)
    retain = [row for row, _ in run.plan.bank.assignments if row.role == "retain"]
    assert run.plan.bank.unet_evaluations == len(retain) * STEPS * 2
    places = run.bank.role_rows["forget"].view(-1, 1)
    assert set((places % STEPS).flatten().tolist()) == {2}, "a window of the sampler's points"
    share = noise_share(run.model, run.bank.timesteps)
    torch.testing.assert_close(run.bank.weights[places], share[places].square())
    assert len(run.recipe.pictures) == 4


# ---- what a recipe says ----------------------------------------------------------------------------------------------


def told(name, options=None, **settings):
    result = concept(name, options=options or {}, **settings)
    return dataclasses.replace(result, pictures=lambda folder: {"a": Path(f"{folder}/a.png")})


def recipe(name, options=None, **settings):
    if name == "instance":
        options = {"picture_folder": "i", "surrogate_folder": "s"} | (options or {})
    return get_method(name).recipe(told(name, options, **settings))


@pytest.mark.parametrize("method", ROW_METHODS)
def test_every_target_of_every_row_sums_to_one_and_says_where_it_is_from(method):
    result = recipe(method)
    assert result.rows
    for row in result.rows:
        assert math.fsum(row.target.values()) == pytest.approx(1.0)
    about = get_method(method).about
    assert "paper" in about or "authors" in about or get_method(method).is_control


def test_the_rules_are_these():
    assert recipe("concept-ablation", {"prior_weight": 3.0}).rule == Sum(3.0)
    assert recipe("erasediff", {"forget_rate": 2.0}).rule == Bilevel(2.0)
    assert recipe("erasediff", {"constant_weight": "0.1"}).rule == Sum(1.0, forget_weight=0.1)
    assert recipe("instance", retain_weight=3.0).rule == Project(3.0)
    assert recipe("ace", {"prior_weight": 0.25}).rule == Sum(0.25, forget_weight=0.75)
    assert recipe("race", {"attack_radius": 0.2, "attack_steps": 7}).inner == Inner(7, 0.2, 0.5)


def test_leco_is_spm_without_anchors_and_its_target_is_esds():
    """T(n) - g (T(c) - T(n)) with n the unconditional is ESD's target with eta = g + 1."""
    g = 1.5
    leco = dataclasses.replace(concept("spm", options={"negative_guidance": g}, retain_weight=0.0), anchors={})
    esd = dataclasses.replace(concept("esd", options={"negative_guidance": g + 1, "reference": "empty"}), anchors={})
    ours, theirs = get_method("spm").recipe(leco), get_method("esd").recipe(esd)
    assert list(ours.rows) == list(theirs.rows)
    assert not ours.embeddings
    assert dict(ours.rows[0].target) == {UNCONDITIONAL: 1 + g, "a star": -g}


# ---- latent anchors --------------------------------------------------------------------------------------------------


def test_spm_holds_noise_in_the_place_of_states_on_the_concepts_trajectories():
    result = recipe("spm", trajectories=5)
    kept = [row for row in result.rows if row.role == "retain"]
    assert [row.trajectory for row in kept] == ["a star", "star", "a star", "star", "a star"]
    assert {row.condition for row in kept} == set(result.embeddings)
    assert all(dict(row.target) == {row.condition: 1.0} for row in kept)
    assert not set(result.embeddings) & set(result.prompts())
    for row in kept:
        (states,) = concept("spm").encode([row.trajectory])["encoder_hidden_states"]
        embedding = result.embeddings[row.condition]["encoder_hidden_states"]
        assert 0.8 <= embedding.norm() / states.norm() <= 1.2
    assert all(
        dict(row.target) == {"a circle" if "a " in row.condition else "circle": 2.0, row.condition: -1.0}
        for row in result.rows
        if row.role == "forget"
    )


def test_latent_anchors_are_encoded_when_they_are_read():
    """A dry run plans for a model without weights, whose states hold nothing to look at."""

    def encode(prompts):
        raise AssertionError("nothing is to be encoded yet")

    assert len(get_method("spm").recipe(dataclasses.replace(concept("spm"), encode=encode)).embeddings) == 16


def test_a_latent_anchor_replaces_text_alone():
    """Sizes and masks, which are no text, stay; a vector of the whole text is noise, too."""

    def encode(prompts):
        texts = torch.tensor([float(len(prompt)) for prompt in prompts])
        return {
            "encoder_hidden_states": texts.view(-1, 1, 1).expand(-1, 3, 6),
            "text_embeds": texts.view(-1, 1).expand(-1, 5),
            "time_ids": torch.full((len(prompts), 6), 64.0),
            "encoder_attention_mask": (torch.arange(3) < texts.view(-1, 1)).float(),
        }

    told = dataclasses.replace(concept("spm"), encode=encode)
    embedding = next(iter(get_method("spm").recipe(told).embeddings.values()))
    before = {name: values[0] for name, values in encode(["a star"]).items()}
    assert {name for name in before if not torch.equal(before[name], embedding[name])} == {
        "encoder_hidden_states",
        "text_embeds",
    }
    assert embedding["encoder_hidden_states"].std() > 0


def test_latent_anchors_near_the_concept_are_the_fewest():
    """In two dimensions, where it shows: by a density of min(1, 1 - cos) the mean cosine is -pi / (4 pi - 4)."""
    states, generator = torch.tensor([[3.0, 4.0]]), torch.Generator().manual_seed(0)
    drawn = torch.cat([spm._near_in_norm(states, generator) for _ in range(2000)])
    cosine = torch.cosine_similarity(drawn, states)
    assert cosine.mean().item() == pytest.approx(-math.pi / (4 * math.pi - 4), abs=0.03)
    norms = drawn.norm(dim=1)
    assert (norms.min().item(), norms.max().item()) == pytest.approx((4.0, 6.0), abs=0.01)


def test_the_noise_variant_of_concept_ablation_does_not_ask_for_the_anchor(tiny):
    """The authors' code computes T(a) there and throws it away."""
    for noise_based in (False, True):
        _, plan = planned(load_model(tiny, "cpu"), "concept-ablation", {"noise_based": noise_based})
        assert plan.bank.unet_evaluations == 2 * 2 * STEPS, "two trajectories, guided by two predictions"


def test_ace_takes_its_anchors_evenly_and_none_where_it_is_told():
    many = dataclasses.replace(told("ace", trajectories=8), retain_prompts=tuple(f"r{n}" for n in range(20)))
    result = get_method("ace").recipe(many)
    anchors = [key for row in result.rows for key in row.target if key.startswith("r") and row.role == "forget"]
    assert len(set(anchors)) == len(anchors) == 8
    assert sum(row.role == "forget" for row in result.rows) == 8
    none = recipe("ace", {"anchors_per_row": 0})
    assert {key for row in none.rows if row.role == "forget" for key in row.target} == {UNCONDITIONAL, "a star", "star"}


@pytest.mark.parametrize(
    ("rows", "given", "words"),
    [
        ([Row("retain", "a", "a", {"a": 1.0})], {"elastic": 1.0}, "target is noise"),
        ([Row("forget", "a", "a", {NOISE: 1.0})], {"inner": Inner(1, 0.1)}, "attack needs"),
        ([Row("forget", picture("a"), "a", {"a": 1.0})], {"inner": Inner(1, 0.1)}, "attack needs"),
        ([Row("forget", "a", "a", {NOISE: 1.0})], {"pursuit": Pursuit(1, 0.1, 9)}, "attack needs"),
    ],
)
def test_what_does_not_go_together_is_refused(rows, given, words):
    with pytest.raises(ValueError, match=words):
        Recipe(rows, Sum(), **given)


def test_a_picture_is_the_target_of_pictures_alone():
    with pytest.raises(ValueError, match="rows of pictures alone"):
        Row("forget", "a", "a", {picture("b"): 1.0})


# ---- the edit before rows --------------------------------------------------------------------------------------------


def test_scissorhands_draws_the_most_sensitive_share_anew(tiny):
    model = load_model(tiny, "cpu")
    _, plan = planned(model, "scissorhands", {"redrawn_share": 0.05}, trainable="all")
    names = plan.selection.names
    prompts, budget = plan.concept.forget_prompts, BankBudget(2, STEPS, 3.0, BATCH, 0)
    before = {name: p.detach().clone() for name, p in model.denoiser.named_parameters()}
    edited = edit_weights(
        model,
        plan.recipe.start,
        plan.selection,
        lambda: saliency.concept_gradient(model, prompts, names, budget, guidance=0.0),
    )
    put_weights(model, edited.values, edited.selection, dict.fromkeys(edited.values, torch.float32))
    p = Plain(wrap_pipeline(build(lambda: sd1(ddim())), "again"), STEPS)
    p.student.requires_grad_(True)
    loss = 0
    for prompt, number in [(row.condition, n) for row, n in plan.bank.assignments if row.role == "forget"]:
        for k in range(STEPS):
            x, t, noise = p.noised_image(prompt, number, k)
            loss = loss + (p.s(x, t, prompt) - noise).square().mean() / (2 * STEPS)
    gradient = p.gradient(loss, names)
    scores = (gradient * torch.cat([before[name].flatten() for name in names]).double()).abs()
    chosen = scores >= scores.sort(descending=True).values[round(0.05 * len(scores)) - 1]
    moved = torch.cat([(before[name] != p).flatten() for name, p in model.denoiser.named_parameters()])
    inside = torch.cat([torch.full((before[name].numel(),), "attn2" in name) for name in names])
    assert not (moved & ~inside).any(), "only in cross-attention"
    is_bias = torch.cat([torch.full((before[name].numel(),), before[name].ndim == 1) for name in names])
    wanted = chosen & inside
    agree = (moved == wanted) | is_bias
    assert agree.double().mean() > 0.9999
    drawn = torch.cat([p.detach().flatten() for p in model.denoiser.parameters()])[moved & ~is_bias]
    assert drawn.abs().max() < 0.1
    assert 0.015 < drawn.std() < 0.025
    assert not torch.cat([p.detach().flatten() for p in model.denoiser.parameters()])[moved & is_bias].any()


def test_an_edit_before_rows_keeps_to_a_mask_and_rows_are_of_the_weights_before(tmp_path, tiny):
    model = load_model(tiny, "cpu")
    _, plan = planned(model, "scissorhands", {"redrawn_share": 1.0}, trainable="attn2.to_k")
    bits = {n: torch.arange(s.numel()).view(s) % 2 == 0 for n, s in plan.selection.shapes.items()}
    masked = Selection.of(model.denoiser, list(bits), {n: pack_bits(b) for n, b in bits.items()})
    gradient = {name: torch.ones(shape) for name, shape in masked.shapes.items()}
    before = {name: p.detach().clone() for name, p in model.denoiser.named_parameters()}
    edited = edit_weights(model, plan.recipe.start, masked, lambda: gradient)
    put_weights(model, edited.values, edited.selection, dict.fromkeys(edited.values, torch.float32))
    for name, parameter in model.denoiser.named_parameters():
        free = unpack_bits(masked.bits[name], parameter.shape) if name in masked.bits else torch.zeros(parameter.shape)
        assert torch.equal(parameter != before[name], free.bool()), name
    assert "start       weights edited in closed form, then trained" in plan_lines(plan)


def test_an_edit_without_a_gradient_says_so(tiny):
    model = load_model(tiny, "cpu")
    _, plan = planned(model, "scissorhands")
    with pytest.raises(RuntimeError, match="no gradient"):
        edit_weights(model, plan.recipe.start, plan.selection)


# ---- runs ------------------------------------------------------------------------------------------------------------

SHORT = {"steps": 2, "trajectories": 1, "trajectory_steps": 2, "micro_batch_size": 2, "evaluation_prompts": "none"}


@pytest.fixture(scope="module")
def flow_folders(tmp_path_factory):
    """Tiny SD3 and FLUX, saved."""
    made = {}
    for make in (sd3, flux):
        made[make.__name__] = str(tmp_path_factory.mktemp(make.__name__))
        build(make).save_pretrained(made[make.__name__])
    return made


FLOWS = [
    pytest.param(method, name, marks=[] if place % 2 == other else [pytest.mark.slow])
    for place, method in enumerate(ROW_METHODS)
    for other, name in enumerate(("sd3", "flux"))
]


@pytest.mark.parametrize(("method", "family"), FLOWS)
def test_every_method_trains_flow_models(method, family, folders, flow_folders):
    model = load_model(flow_folders[family], "cpu")
    config, plan = planned(model, method, own_options(method, folders), trainable=None, **SHORT)
    before = {name: p.detach().clone() for name, p in model.denoiser.named_parameters()}
    recipe = adversary.with_found(model, plan.recipe, BankBudget(1, 2, 3.0, 2, 0))
    bank = build_bank(model, recipe, plan.bank)
    curvature = fit._curvature(model, plan, bank, plan.selection, config)
    engine = TorchEngine(model.denoiser, plan.selection, learning_rate=1e-3)
    if curvature:
        engine.hold(curvature)
    trainer = Trainer(
        model, bank, recipe.rule, engine, Schedule(2, 2, 0, 10, 0), Path(), None, recipe.inner, recipe.pursuit
    )
    for _ in range(2):
        metrics = trainer._train_step()
        trainer.step += 1
    assert math.isfinite(float(metrics["loss"]))
    moved = {name for name, p in model.denoiser.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert moved <= set(plan.selection.names)


@pytest.mark.parametrize("method", ROW_METHODS)
def test_a_short_run_changes_what_is_selected_alone(method, tiny, folders, tmp_path):
    anchor = {"anchor": "circle"} if get_method(method).anchor == "needed" else {}
    anchor |= {"adapter": "none"} if get_method(method).adapter_rank else {}
    given = {"forget_prompts": FORGET, "retain_prompts": RETAIN, "trainable": "attn2.to_k"} | anchor | SHORT
    result = unlearn(tiny, "star", method, output=tmp_path / "run", **given, **own_options(method, folders))
    before, after = (load_model(str(folder), "cpu").denoiser for folder in (tiny, result.model))
    after = dict(after.named_parameters())
    moved = {name for name, p in before.named_parameters() if not torch.equal(p, after[name])}
    assert moved
    assert all("attn2.to_k" in name for name in moved)


def test_a_run_that_was_stopped_ends_as_one_that_was_not_with_an_edit_and_held_weights(tiny, tmp_path):
    """What training starts from, and what the weights are held to, is computed again."""
    for method in ("scissorhands", "selective-amnesia", "holdfast"):
        given = {"forget_prompts": FORGET, "retain_prompts": RETAIN, "anchor": "circle", "trainable": "attn2"} | SHORT
        given |= {"steps": 3, "checkpoint_every": 1}
        whole = unlearn(tiny, "star", method, output=tmp_path / method, **given)
        expected = {n: p.clone() for n, p in load_model(str(whole.model), "cpu").denoiser.named_parameters()}
        (tmp_path / method / "checkpoints" / "step-3").rename(tmp_path / f"{method}-gone")
        unlearn(tiny, "star", method, output=tmp_path / method, resume=True, **given)
        again = dict(load_model(str(whole.model), "cpu").denoiser.named_parameters())
        assert all(torch.equal(again[name], value) for name, value in expected.items()), method


def test_a_run_with_other_pictures_is_not_resumed(tiny, folders, tmp_path):
    copied = Path(shutil.copytree(folders, tmp_path / "pictures"))
    given = {"forget_prompts": FORGET, "retain_prompts": RETAIN, "trainable": "attn2.to_k"} | SHORT
    given |= own_options("instance", copied)
    unlearn(tiny, "star", "instance", output=tmp_path / "run", **given)
    shutil.copy(copied / "images" / "b.png", copied / "images" / "a.png")
    with pytest.raises(UserError, match="has other pictures"):
        unlearn(tiny, "star", "instance", output=tmp_path / "run", resume=True, **given)


@pytest.mark.parametrize(
    ("method", "words"),
    [("selective-amnesia", "holds each weight"), ("race", "attacks the student"), ("holdfast", "attacks the student")],
)
def test_deepspeed_is_refused_what_it_cannot_do(method, words, tiny, tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    (tmp_path / "ds.json").write_text("{}")
    with pytest.raises(UserError, match=rf"{words}.*Leave `--deepspeed` out"):
        planned(load_model(tiny, "cpu"), method, deepspeed=str(tmp_path / "ds.json"), micro_batch_size=None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "needs `--set picture_folder=FOLDER`"),
        ({"picture_folder": "none", "surrogate_folder": "{surrogates}"}, "none is no folder"),
        ({"picture_folder": "{empty}", "surrogate_folder": "{surrogates}"}, "holds no image"),
        ({"picture_folder": "{images}", "surrogate_folder": "{one}"}, "no surrogate named b"),
        ({"picture_folder": "{large}", "surrogate_folder": "{large}"}, "has 32 x 64 pixels and .* generates 64 x 64"),
        (
            {"picture_folder": "{images}", "surrogate_folder": "{surrogates}", "window_start": 0.6, "window_end": 0.5},
            "window .* is empty",
        ),
        (
            {"picture_folder": "{images}", "surrogate_folder": "{surrogates}", "window_start": 0.95},
            "holds none of a trajectory's",
        ),
    ],
)
def test_pictures_that_do_not_serve_are_refused_in_one_line(options, words, tiny, folders, tmp_path):
    for kind in ("empty", "one", "large"):
        (tmp_path / kind).mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "one" / "a.png")
    Image.new("RGB", (32, 64)).save(tmp_path / "large" / "a.png")
    places = {name: tmp_path / name for name in ("empty", "one", "large")}
    places |= {name: folders / name for name in ("images", "surrogates")}
    given = {name: value.format(**places) if isinstance(value, str) else value for name, value in options.items()}
    with pytest.raises(UserError, match=words) as refused:
        planned(load_model(tiny, "cpu"), "instance", given)
    assert "\n" not in str(refused.value)


def test_the_paths_of_options_are_saved_whole(tiny, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(folders)
    given = {"forget_prompts": FORGET, "retain_prompts": RETAIN, "trainable": "attn2.to_k"} | SHORT
    result = unlearn(
        tiny,
        "star",
        "instance",
        output=tmp_path / "run",
        picture_folder="images",
        surrogate_folder="surrogates",
        **given,
    )
    saved = (result.folder / "config.yaml").read_text()
    assert f"picture_folder: {folders / 'images'}" in saved


def test_all_of_them_are_listed():
    assert set(ROW_METHODS) < set(all_methods())
    assert not any(isinstance(recipe(name), Edit) for name in ROW_METHODS)
