"""MACE: both closed forms by another way of computing them, the gradient of attention, and what stands where."""

import dataclasses
import math

import pytest
import torch
from plain import Plain
from row_runs import STEPS, close, planned
from tiny_models import build, flux, pixart, sd3

from fastunlearn import unlearn
from fastunlearn.errors import UserError
from fastunlearn.methods import get_method, mace
from fastunlearn.methods.recipe import Concept, Places, Suppression, Weights
from fastunlearn.models.attention_maps import attention_maps, mapped_layers
from fastunlearn.models.loading import load_model, wrap_pipeline
from fastunlearn.training import suppression
from fastunlearn.training.bank import BankBudget, build_bank, images_of
from fastunlearn.training.concept import places
from fastunlearn.training.edit import edit_weights, text_matrices
from fastunlearn.training.plan_words import plan_lines
from fastunlearn.training.selection import select_parameters

D, LENGTH = 8, 6
KV = "attn2.to_k,attn2.to_v"
# A mark, words, a mark, padding: w c w -> w a a w, and c -> a a.
PROMPTS = {"x star y": (2, 4), "x big circle y": (2, 5), "star": (1, 2), "big circle": (1, 3), "p": (1, 2), "": (0, 1)}
ANCHORS = {"x star y": "x big circle y", "star": "big circle"}
BESIDE = {"x star y": [(0, 0), (1, 1), (3, 4), (4, 5)], "star": [(0, 0), (2, 3), (3, 4), (4, 5)]}


def where(prompt, names):
    named, end = PROMPTS[prompt]
    return Places((named,) if names else tuple(range(1, end)), end)


def told(given, options=None, retain_weight=0.7, names=("star",)):
    method = get_method("mace")
    settings = dataclasses.replace(method.defaults_for("shapes"), retain_weight=retain_weight)
    settings = method.with_options(settings, options or {})

    def encode(prompts):
        return {"encoder_hidden_states": torch.stack([given[prompt] for prompt in prompts])}

    return Concept("circle", tuple(ANCHORS), ANCHORS, ("p",), settings, encode, names, places=where)


@pytest.fixture
def given():
    generator = torch.Generator().manual_seed(0)
    return {prompt: torch.randn(LENGTH, D, generator=generator) for prompt in PROMPTS}


@pytest.fixture
def layers():
    generator = torch.Generator().manual_seed(1)
    return {f"{n}.weight": torch.randn(size, D, generator=generator) for n, size in enumerate((5, 9))}


def least_squares(rows):
    """The minimum over W of sum strength |W c - wanted|^2, as one tall problem."""
    c = torch.cat([strength**0.5 * c.double() for strength, c, _ in rows])
    wanted = torch.cat([strength**0.5 * wanted.double() for strength, _, wanted in rows])
    return torch.linalg.lstsq(c, wanted, driver="gelsd").solution.T


def refined_of(w, given, ridge, keep):
    rows = [(ridge, torch.eye(D), w.T)]
    for prompt, pairs in BESIDE.items():
        for at, there in pairs:
            rows.append((1.0, given[prompt][at][None], (w @ given[ANCHORS[prompt]][there])[None]))
    rows += [(keep, given[prompt], given[prompt] @ w.T) for prompt in ("p", "")]
    return least_squares(rows)


# ---- closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ridge", "keep"), [(0.5, 0.7), (20.0, 0.0)])
def test_the_first_stage_is_the_papers_least_squares_over_the_other_words(given, layers, ridge, keep):
    concept = told(given, {"ridge": ridge, "attention_steps": 0}, keep)
    new = get_method("mace").recipe(concept).change(Weights(layers, tuple(layers)))
    for name, w in layers.items():
        expected = refined_of(w, given, ridge, keep)
        torch.testing.assert_close(new[name].double(), expected, rtol=1e-5, atol=1e-6)
        assert (expected - w).norm() > 0.01 * w.norm()


def test_the_fusion_is_the_papers_least_squares(given, layers):
    """Two concepts, each with a change of its own where its prompts are."""
    prompts = {"star": ("x star y", "star"), "p": ("p",)}
    tasks = {name: Suppression(dict.fromkeys(of, (1,)), 1, 1, 0.1) for name, of in prompts.items()}
    generator = torch.Generator().manual_seed(2)
    changes = {
        id(task): {name: torch.randn(w.shape, generator=generator) for name, w in layers.items()}
        for task in tasks.values()
    }
    seen = []

    def suppressed(values, wanted):
        seen.append(values)
        return changes[id(wanted)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mace, "suppressions", lambda concept: tasks)
        edit = get_method("mace").recipe(told(given, {"ridge": 0.5}, 0.7))
    new = edit.change(Weights(layers, tuple(layers), suppressed=suppressed))
    assert edit.suppressions == tuple(tasks.values())
    for name, w in layers.items():
        refined = refined_of(w, given, 0.5, 0.7)
        assert all(torch.allclose(values[name].double(), refined, atol=1e-5) for values in seen), "trained from W'"
        rows = [(0.5, torch.eye(D), refined.T)]
        for one, task in tasks.items():
            moved = refined + changes[id(task)][name]
            rows += [(1.0, given[prompt], given[prompt].double() @ moved.T) for prompt in prompts[one]]
        rows += [(0.7, given[prompt], given[prompt] @ w.T) for prompt in ("p", "")]
        torch.testing.assert_close(new[name].double(), least_squares(rows), rtol=1e-5, atol=1e-5)


def test_a_concept_is_unattended_at_its_words_and_at_the_end(given):
    (task,) = get_method("mace").recipe(told(given, {"attention_rank": "3"})).suppressions
    assert dict(task.places) == {"x star y": (2, 4), "star": (1, 2)}
    assert task.rank == 3
    (task,) = get_method("mace").recipe(told(given, {"suppress_end": "false"})).suppressions
    assert dict(task.places) == {"x star y": (2,), "star": (1,)}
    assert get_method("mace").recipe(told(given, {"attention_steps": 0})).suppressions == ()


def test_timesteps_are_drawn_as_the_paper_draws_them():
    at = {t: 1 / (1 + math.exp(-0.05 * (t - 200))) - 1 / (1 + math.exp(-0.05 * (t - 400))) for t in (0, 200, 300, 900)}
    assert {t: mace.importance(t) for t in at} == pytest.approx(at)
    assert max(at, key=at.get) == 300


# ---- where words stand -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "names", "named", "end"),
    [
        ("a red star", ["star"], (3,), 4),
        ("STAR", ["star"], (1,), 2),
        ("a star on a star background", ["star"], (2, 5), 7),
        ("a red star", ["red star"], (2, 3), 4),
        ("a red ring", ["star"], (1, 2, 3), 4),
        ("a red ring", [], (1, 2, 3), 4),
        ("a red ring", ["red", "ring"], (2, 3), 4),
        ("", [], (), 1),
    ],
)
def test_places_are_those_of_the_words(bundled, prompt, names, named, end):
    assert places(bundled, prompt, names) == Places(named, end)


def test_a_name_that_the_tokenizer_reads_otherwise_is_refused(bundled, monkeypatch):
    monkeypatch.setattr(bundled, "words", lambda text: [0])
    with pytest.raises(UserError, match="reads 'star' otherwise within 'a star'"):
        places(bundled, "a star", ["star"])


# ---- attention -------------------------------------------------------------------------------------------------------


class Explicit:
    """A processor in plain torch that keeps what the image attends to in the text."""

    def __init__(self, seen):
        self.seen = seen

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        states = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(states), attn.to_v(states)
        size = q.shape[-1] // attn.heads
        outputs, kept = [], []
        for head in range(attn.heads):
            part = slice(head * size, (head + 1) * size)
            probabilities = torch.softmax(q[..., part] @ k[..., part].transpose(1, 2) / size**0.5, -1)
            outputs.append(probabilities @ v[..., part])
            kept.append(probabilities)
        if encoder_hidden_states is not None:
            self.seen.append(torch.stack(kept, 1))
        return attn.to_out[0](torch.cat(outputs, -1))


def test_the_gradient_of_attention_is_that_of_plain_torch(tiny):
    model = load_model(tiny, "cpu")
    p, seen = Plain(model, STEPS), []
    p.student.set_attn_processor(Explicit(seen))
    marked = {"a red star": (3, 4), "a blue star on a ring": (3,)}
    recipe = images_of(marked)
    plan = BankBudget(3, STEPS, 3.0, 2, 0).plan(model, recipe)
    bank = build_bank(model, recipe, plan)
    names = select_parameters(model, KV)
    generator, values = torch.Generator().manual_seed(1), {}
    for name, parameter in model.denoiser.named_parameters():
        if name in names:
            moved = parameter + 0.3 * parameter.std() * torch.randn(parameter.shape, generator=generator)
            values[name] = moved.detach().requires_grad_(True)
    p.student.load_state_dict({**p.student.state_dict(), **{name: v.detach().double() for name, v in values.items()}})
    p.student.requires_grad_(True)
    rows = torch.tensor([0, 4, 8, 5])
    layers = suppression.watched_layers(model)
    loss = suppression.attended(model, values, layers, bank, rows, marked)
    gradient = torch.autograd.grad(loss, list(values.values()), allow_unused=True, materialize_grads=True)
    expected = 0
    for place in rows.tolist():
        (row, number), k = plan.assignments[place // STEPS], place % STEPS
        x, t, _ = p.noised_image(row.condition, number, k)
        seen.clear()
        p.s(x, t, row.condition)
        assert len(seen) == len(layers)
        columns = list(marked[row.condition])
        expected = expected + sum(one[..., columns].square().sum().sqrt() for one in seen) / len(rows)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    close(torch.cat([one.flatten() for one in gradient]), p.gradient(expected, names))


def test_the_maps_are_what_the_layers_attend_to(bundled):
    """Probabilities times values, through the layer's last matrix, are what the layer gives."""
    layers = mapped_layers(bundled.denoiser, text_matrices(bundled))
    assert layers == sorted({n.rpartition(".to_")[0] for n in select_parameters(bundled, KV)}, key=layers.index)
    conditions, outputs, values = bundled.encode(["a star", "a ring"]).rows([0, 1]), {}, {}
    hooks = []
    for name in layers:
        layer = bundled.denoiser.get_submodule(name)
        hooks.append(layer.register_forward_hook(lambda m, i, o, name=name: outputs.update({name: o})))
        hooks.append(layer.to_v.register_forward_hook(lambda m, i, o, name=name: values.update({name: o})))
    latents = torch.randn(2, *bundled.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), attention_maps(bundled.denoiser, layers) as maps:
        bundled.predict(latents, torch.tensor([300.0, 700.0]), conditions)
    for hook in hooks:
        hook.remove()
    for name in layers:
        layer = bundled.denoiser.get_submodule(name)
        v = values[name].unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        result = layer.to_out[0]((maps[name] @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(result, outputs[name], rtol=1e-4, atol=1e-5)


def test_training_on_attention_lowers_it_and_leaves_the_model_alone(tiny):
    model = load_model(tiny, "cpu")
    before = {name: p.detach().clone() for name, p in model.denoiser.named_parameters()}
    names = select_parameters(model, KV)
    values = {name: before[name] for name in names}
    places_of = {"a red star": (3, 4)}
    budget = BankBudget(1, STEPS, 3.0, micro_batch_size=2, seed=0)
    wanted = Suppression(places_of, 2, 12, 0.05, lambda timestep: 1.0)
    told = []
    changes = suppression.suppressed(
        model, values, wanted, budget, on_progress=lambda done, total: told.append((done, total))
    )
    assert told[-1] == (12, 12)
    assert all(torch.equal(p, before[name]) for name, p in model.denoiser.named_parameters())
    assert not any(p.requires_grad for p in model.denoiser.parameters())
    assert changes.keys() == set(names)
    assert max(int(torch.linalg.matrix_rank(change)) for change in changes.values()) <= 2
    recipe = images_of(wanted.places)
    plan = dataclasses.replace(budget, seed=5).plan(model, recipe)
    bank, layers = build_bank(model, recipe, plan), suppression.watched_layers(model)
    given = (layers, bank, torch.arange(STEPS), places_of)
    with torch.no_grad():
        start = suppression.attended(model, values, *given)
        end = suppression.attended(model, {name: values[name] + changes[name] for name in names}, *given)
    assert end < 0.8 * start, "also on noise that it was not trained on"
    again = suppression.suppressed(model, values, wanted, budget)
    assert all(torch.equal(changes[name], again[name]) for name in names)


# ---- runs ------------------------------------------------------------------------------------------------------------

SHORT = {"trajectories": 1, "trajectory_steps": 2, "micro_batch_size": 2, "evaluation_prompts": "none"}


def test_a_run_changes_the_selected_keys_and_values_alone_and_counts_its_work(tiny, tmp_path):
    given = {"forget_prompts": "a red star;a blue ring", "retain_prompts": "a heart", "trainable": KV}
    result = unlearn(
        tiny, "star;ring", "mace", output=tmp_path / "run", anchor="circle", attention_steps=3, **given, **SHORT
    )
    before, after = (dict(load_model(str(f), "cpu").denoiser.named_parameters()) for f in (tiny, result.model))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(select_parameters(load_model(tiny, "cpu"), KV))
    assert result.record.unet_evaluations == {"bank": 2 * 2 * 2, "loop": 3 * 2 * 3 * 2}
    assert result.record.edit["matrices"] == len(moved)


def test_the_plan_says_what_an_edit_trains_and_what_it_needs(tiny):
    model = load_model(tiny, "cpu")
    _, plan = planned(model, "mace", {"attention_steps": 5}, trainable=KV, dry_run=True)
    assert any("attention to 1 concept is trained away" in line for line in plan_lines(plan))
    (edit,) = (phase for phase in plan.memory.phases if phase.name == "edit")
    _, without = planned(model, "mace", {"attention_steps": 0}, trainable=KV, dry_run=True)
    (alone,) = (phase for phase in without.memory.phases if phase.name == "edit")
    assert edit.device_bytes > alone.device_bytes
    assert "edit        in closed form: no rows, no steps" in plan_lines(without)


@pytest.mark.parametrize("make", [sd3, flux, pixart])
def test_a_model_whose_attention_cannot_be_seen_is_refused(make):
    model = wrap_pipeline(build(make), "mine")
    with pytest.raises(UserError, match="mine has no cross-attention whose keys read the text states"):
        suppression.watched_layers(model)


def test_an_edit_without_a_model_has_no_attention(given, layers):
    with pytest.raises(RuntimeError, match="no attention"):
        get_method("mace").recipe(told(given)).change(Weights(layers, tuple(layers)))


def test_a_rate_that_leads_nowhere_is_said(tiny):
    model = load_model(tiny, "cpu")
    _, plan = planned(model, "mace", {"attention_steps": 3, "attention_rate": 1e30}, trainable=KV)

    def suppressed(values, wanted):
        return suppression.suppressed(model, values, wanted, BankBudget(1, 2, 3.0, 2, 0))

    with pytest.raises(UserError, match="no finite numbers"):
        edit_weights(model, plan.recipe, plan.selection, None, suppressed)
