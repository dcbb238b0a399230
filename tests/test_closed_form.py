"""RECE and SPEED: their weights equal the papers' formulas, layer by layer and state by state; what must stay stays."""

import dataclasses

import pytest
import torch

from fastunlearn.errors import UserError
from fastunlearn.methods import get_method
from fastunlearn.methods.closed_form import MAX_CONDITION, states, sums
from fastunlearn.methods.recipe import Concept, Weights

D, LENGTH = 12, 4
PROMPTS = ("c1", "c2", "g1", "g2", "p1", "p2", "p3", "p4", "")


def made(seed=0, rank=D):
    """Random states (L, D) of the prompts; those to keep lie in a space of this rank, and the rest anywhere."""
    generator = torch.Generator().manual_seed(seed)
    space = torch.linalg.qr(torch.randn(D, rank, generator=generator))[0]
    draw = {prompt: torch.randn(LENGTH, D, generator=generator) for prompt in PROMPTS}
    return {prompt: c @ space @ space.T if prompt.startswith("p") else c for prompt, c in draw.items()}


def told(name, given, options=None, masks=None, retain_weight=1.0):
    method = get_method(name)
    settings = dataclasses.replace(method.defaults_for("shapes"), retain_weight=retain_weight)

    def encode(prompts):
        encoded = {"encoder_hidden_states": torch.stack([given[prompt] for prompt in prompts])}
        if masks:
            encoded["encoder_attention_mask"] = torch.stack([masks[prompt] for prompt in prompts])
        return encoded

    anchors = {"c1": "g1", "c2": "g2"}
    return Concept(
        "g",
        ("c1", "c2"),
        anchors,
        ("p1", "p2", "p3", "p4"),
        method.with_options(settings, options or {}),
        encode,
    )


def layers(seed=1, sizes=(9, 20, 5)):
    generator = torch.Generator().manual_seed(seed)
    return {f"{index}.weight": torch.randn(size, D, generator=generator) for index, size in enumerate(sizes)}


def changed(name, given, weights, options=None, **settings):
    facts = {}
    edit = get_method(name).recipe(told(name, given, options, **settings))
    return edit.change(Weights(weights, tuple(weights), facts=facts)), facts


def double(given, *prompts):
    return torch.cat([given[prompt] for prompt in prompts]).double()


def uce_round(now, forgotten, anchors, kept, ridge, erase, keep):
    """The authors' step for one layer, from its present matrix: sums over states, one inverse."""
    left, right = ridge * now, ridge * torch.eye(D).double()
    for strength, sources, targets in ((erase, forgotten, anchors), (keep, kept, kept)):
        for c, g in zip(sources, targets, strict=True):
            left = left + strength * torch.outer(now @ g, c)
            right = right + strength * torch.outer(c, c)
    return left @ torch.linalg.inv(right)


@pytest.mark.parametrize("rounds", [1, 3])
def test_rece_is_the_papers_loop_of_attack_and_erasure(rounds):
    given, weights = made(), layers()
    options = {"rounds": rounds, "ridge": 0.3, "attack_ridge": 0.01, "erase_weight": 1.5}
    new, facts = changed("rece", given, weights, options, retain_weight=0.4)
    original = {name: w.double() for name, w in weights.items()}
    forgotten, anchors = double(given, "c1", "c2"), double(given, "g1", "g2")
    kept = double(given, "p1", "p2", "p3", "p4", "")
    now = {name: uce_round(w, forgotten, anchors, kept, 0.3, 1.5, 0.4) for name, w in original.items()}
    for _ in range(rounds):
        rows, wanted = [0.01**0.5 * torch.eye(D).double()], [torch.zeros(D, len(forgotten)).double()]
        rows += list(now.values())
        wanted += [original[name] @ forgotten.T for name in now]
        attack = torch.linalg.lstsq(torch.cat(rows), torch.cat(wanted), driver="gelsd").solution.T
        now = {name: uce_round(w, attack, anchors, kept, 0.3, 1.5, 0.4) for name, w in now.items()}
    for name in weights:
        torch.testing.assert_close(new[name].double(), now[name], rtol=1e-5, atol=1e-6)
    assert facts["condition"] > 1


def test_rece_leaves_less_to_the_attack_than_uce():
    """How near the best state comes to what the concept's states gave, over all layers."""
    given, weights = made(), layers()
    wanted = torch.cat([w.double() @ double(given, "c1", "c2").T for w in weights.values()])

    def left(new):
        stacked = torch.cat([w.double() for w in new.values()])
        ridge = 1e-3**0.5 * torch.eye(D).double()
        zero = torch.zeros(D, wanted.shape[1]).double()
        attack = torch.linalg.lstsq(torch.cat([stacked, ridge]), torch.cat([wanted, zero])).solution
        return float((stacked @ attack - wanted).norm() / wanted.norm())

    assert left(changed("rece", given, weights, {"rounds": 3})[0]) > left(changed("uce", given, weights)[0])


def speed_of_one(w, stack, given, options):
    """The paper's D of one matrix with its multipliers; ``stack``: the matrices that decide on the null space."""
    n, ridge = 2, options["ridge"]
    c, g = double(given, "c1", "c2"), double(given, "g1", "g2")
    target, anchored, eye = c.T @ c / n, g.T @ c / n, torch.eye(D).double()
    prior = double(given, "p1", "p2", "p3", "p4")
    if options["filter_prior"]:
        free = stack @ (anchored - target) @ torch.linalg.inv(ridge * eye + target)
        influence = (free @ prior.T).norm(dim=0)
        prior = prior[influence >= influence.mean()]
    moment = prior.T @ prior / len(prior)
    _, _, v = torch.linalg.svd(stack, full_matrices=False)
    moment = moment + options["augment"] / (1 + options["augment"]) * torch.outer(v[-1], v[-1])
    u, s, _ = torch.linalg.svd(moment)
    u = u[:, s < options["null_below"] * s.mean()]
    p = u @ u.T
    empty = double(given, "")
    k2 = torch.cat([empty[:1], torch.linalg.svd(empty[1:])[2][: options["invariant_directions"]]]).T
    m = torch.linalg.inv(target @ p + ridge * eye)
    held = m @ k2 @ torch.linalg.pinv(k2.T @ p @ m @ k2, rtol=1e-9) @ k2.T @ p
    return w + w @ (anchored - target) @ p @ (eye - held) @ m, p, k2


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize(("filter_prior", "augment", "rank"), [(True, 10.0, D), (False, 0.0, 5), (True, 0.0, 6)])
def test_speed_is_the_papers_formula_with_its_multipliers(by_layer, filter_prior, augment, rank):
    given, weights = made(rank=rank), layers()
    options = {"ridge": 0.7, "null_below": 0.9, "filter_prior": filter_prior, "augment": augment}
    options |= {"invariant_directions": 1, "by_layer": by_layer}
    new, _ = changed("speed", given, weights, options)
    for name, w in weights.items():
        stack = w if by_layer else torch.cat(list(weights.values()))
        expected, _, _ = speed_of_one(w.double(), stack.double(), given, options)
        assert (expected - w.double()).norm() > 1e-3 * w.norm(), "else nothing is tested"
        torch.testing.assert_close(new[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_speed_keeps_the_invariants_and_states_outside_the_null_space_exactly():
    given, weights = made(rank=5), layers()
    options = {"null_below": 1e-9, "augment": 0, "filter_prior": False, "invariant_directions": 2}
    new, facts = changed("speed", given, weights, options)
    assert facts["null_space"] == D - 5 - 3
    kept = double(given, "p1", "p2", "p3", "p4")
    empty = double(given, "")
    directions = torch.linalg.svd(empty[1:])[2][:2]
    for name, w in weights.items():
        change = new[name].double() - w.double()
        size = float(w.norm())
        assert float((change @ double(given, "c1").T).norm()) > 0.01 * size, "the concept moves"
        for still in (kept, empty[:1], directions):
            assert float((change @ still.T).norm()) < 1e-5 * size


def test_speed_without_prompts_to_keep_holds_the_empty_prompt():
    given, weights = made(), layers()
    concept = dataclasses.replace(told("speed", given, {"augment": 0, "null_below": 1e-9}), retain_prompts=())
    new = get_method("speed").recipe(concept).change(Weights(weights, tuple(weights)))
    change = new["0.weight"].double() - weights["0.weight"].double()
    # What the change without a null space moves more than the mean is held; the first state and three directions are.
    assert float((change @ double(given, "").T).norm()) < 1e-5
    assert float(change.norm()) > 1e-2


def test_speed_with_states_to_keep_everywhere_is_refused():
    with pytest.raises(UserError, match="nothing left to change"):
        changed("speed", made(), layers(), {"null_below": 1e-9, "filter_prior": False, "augment": 0})


@pytest.mark.parametrize("name", ["uce", "rece", "speed"])
def test_the_condition_number_is_said_and_what_means_nothing_is_refused(name):
    given, weights = made(rank=4), layers()
    _, facts = changed(name, given, weights, {"ridge": 0.5})
    if name == "uce":
        c, kept = double(given, "c1", "c2"), double(given, "p1", "p2", "p3", "p4", "")
        matrix = 0.5 * torch.eye(D).double() + c.T @ c + kept.T @ kept
        assert facts["condition"] == pytest.approx(float(torch.linalg.cond(matrix)), rel=1e-6)
    assert 1 <= facts["condition"] < 1e6
    options = {"ridge": 1e-30} if name != "speed" else {"ridge": 1e-30, "null_below": 0.9}
    few = {prompt: c[:1].expand(LENGTH, D) if prompt[:1] != "g" else c for prompt, c in given.items()}
    with pytest.raises(UserError, match=r"ill-conditioned.*condition number.*`ridge`"):
        changed(name, few, weights, options)
    given["c1"] = given["c1"] * float("nan")
    with pytest.raises(UserError, match="condition number inf"):
        changed(name, given, weights)
    assert 1 / torch.finfo(torch.float64).eps > MAX_CONDITION


def test_positions_that_the_mask_hides_take_no_part_and_an_anchor_that_ends_earlier_goes_on_with_its_end():
    given = made()
    masks = {prompt: torch.tensor([1, 1, 1, 0]) for prompt in PROMPTS} | {"g1": torch.tensor([1, 1, 0, 0])}
    concept = told("uce", given, masks=masks)
    found = sums(concept)
    c, g = given["c1"].double(), given["g1"].double()
    pairs = [(c[0], g[0]), (c[1], g[1]), (c[2], g[1])]
    pairs += list(zip(given["c2"].double()[:3], given["g2"].double()[:3], strict=True))
    torch.testing.assert_close(found.anchored, sum(torch.outer(g, c) for c, g in pairs))
    torch.testing.assert_close(found.forgotten, sum(torch.outer(c, c) for c, _ in pairs))
    ((values, is_read),) = states(concept, ["p1"])
    assert values[is_read].shape == (3, D)


def test_the_sums_do_not_depend_on_how_many_prompts_are_encoded_at_a_time(monkeypatch):
    given = made()
    whole = sums(told("uce", given))
    monkeypatch.setattr("fastunlearn.methods.closed_form._PROMPTS", 1)
    single = sums(told("uce", given))
    torch.testing.assert_close(whole.anchored, single.anchored, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole.forgotten, single.forgotten, rtol=1e-12, atol=1e-12)
