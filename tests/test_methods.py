"""Methods are data: which rows each makes, that every target is a prediction, and how others join."""

import dataclasses
import itertools
import types
from pathlib import Path

import pytest
import torch

from fastunlearn import plugins
from fastunlearn.errors import UserError
from fastunlearn.methods import Method, all_methods, broken_methods, get_method
from fastunlearn.methods.recipe import EMPTY, NOISE, UNCONDITIONAL, Concept, Edit, Places, Recipe, Row, rows_to_keep
from fastunlearn.methods.rules import Alternate, Saddle, Sum
from fastunlearn.training.config import TrainConfig

NAMES = (
    *("esd", "ovw", "saddle", "salun", "neggrad", "uce", "rece", "speed", "concept-ablation", "ace", "erasediff"),
    *("scissorhands", "selective-amnesia", "instance", "advanchor", "race", "advunlearn", "spm", "mace", "holdfast"),
    *("placebo", "placebo-noise", "identity"),
)
FAMILIES = ("shapes", "stable-diffusion")
OWNERS = [("kappa", "saddle"), ("attack_ridge", "rece"), ("null_below", "speed"), ("redrawn_share", "scissorhands")]


def concept(name, family="shapes", options=None, **settings):
    method = get_method(name)
    defaults = dataclasses.replace(method.defaults_for(family), **settings)
    pictures = {"picture_folder": "i", "surrogate_folder": "s"} if name == "instance" else {}
    defaults = method.with_options(defaults, pictures | (options or {}))
    anchors = {"a star": "a circle", "star": "circle"}
    found = {"pictures": lambda folder: {"a": Path(folder, "a.png")}, "encode": encoded}
    found |= {"concepts": ("star",), "places": lambda prompt, names: Places((1,), 2)}
    without = {"a star": "a", "star": UNCONDITIONAL}
    return Concept("circle", tuple(anchors), anchors, ("a ring", "a heart"), defaults, without=without, **found)


def encoded(prompts):
    """Every prompt's states, (n, 4, 8): the empty one's are zeros."""
    return {"encoder_hidden_states": torch.stack([torch.full((4, 8), float(len(prompt))) for prompt in prompts])}


def recipe(name, **settings):
    return get_method(name).recipe(concept(name, **settings))


def assert_keeps(result):
    """The two prompts, and the unconditional: with one of them, with one of the concept's, and by itself."""
    rows = [(row.trajectory, row.condition, dict(row.target)) for row in rows_of(result, "retain")]
    nothing = (UNCONDITIONAL, {UNCONDITIONAL: 1.0})
    assert rows == [
        ("a ring", "a ring", {"a ring": 1.0}),
        ("a heart", "a heart", {"a heart": 1.0}),
        *[(trajectory, *nothing) for trajectory in ("a ring", "a star", UNCONDITIONAL)],
    ]


def trains(name):
    return not isinstance(recipe(name), Edit)


TRAINED = [name for name in NAMES if trains(name)]


def rows_of(result, role):
    return [row for row in result.rows if row.role == role]


def test_the_methods_are_these_in_this_order():
    assert tuple(all_methods()) == NAMES
    assert all(name == method.name for name, method in all_methods().items())


def test_an_unknown_method_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown method 'oww'.*esd, ovw, saddle"):
        get_method("oww")


@pytest.mark.parametrize("eta", [0.5, 1.0, 2.0, 7.5])
def test_esd_guides_the_concept_away_from_itself(eta):
    """T(c) - eta * (T(c) - T("")), on the concept's own trajectory, and nothing about other prompts."""
    options = {"negative_guidance": eta, "reference": "empty"}
    told = dataclasses.replace(concept("esd", options=options), anchor=None, anchors={})
    result = get_method("esd").recipe(told)
    assert result.rule == Sum()
    assert [row.condition for row in result.rows] == ["a star", "star"]
    for row in result.rows:
        assert (row.role, row.trajectory) == ("forget", row.condition)
        assert dict(row.target) == {row.condition: 1 - eta, UNCONDITIONAL: eta}


def test_esd_can_guide_away_along_the_concept_alone():
    """T(c) - eta * (T(c) - T(r)), r being the prompt without the concept; of the bare word that is nothing."""
    told = concept("esd", options={"negative_guidance": 1.5, "reference": "without"})
    rows = get_method("esd").recipe(dataclasses.replace(told, anchor=None, anchors={})).rows
    assert [dict(row.target) for row in rows] == [{"a star": -0.5, "a": 1.5}, {"star": -0.5, UNCONDITIONAL: 1.5}]


def test_esd_with_an_anchor_starts_from_the_anchor():
    """T(a) - eta * (T(c) - T(""))."""
    rows = recipe("esd", options={"negative_guidance": 2.0, "reference": "empty"}).rows
    assert [(row.trajectory, row.condition, dict(row.target)) for row in rows] == [
        ("a star", "a star", {"a circle": 1.0, "a star": -2.0, UNCONDITIONAL: 2.0}),
        ("star", "star", {"circle": 1.0, "star": -2.0, UNCONDITIONAL: 2.0}),
    ]


def test_esd_with_the_empty_anchor_counts_the_unconditional_once():
    told = concept("esd", options={"negative_guidance": 2.0, "reference": "empty"})
    told = dataclasses.replace(told, anchor="", anchors={"a star": EMPTY, "star": EMPTY})
    assert [dict(row.target) for row in get_method("esd").recipe(told).rows] == [
        {EMPTY: 1.0, "a star": -2.0, UNCONDITIONAL: 2.0},
        {EMPTY: 1.0, "star": -2.0, UNCONDITIONAL: 2.0},
    ]


def test_concept_ablation_keeps_retain_prompts_only_where_there_are_some():
    told = concept("concept-ablation", options={"prior": "retain", "prior_weight": 2.0})
    result = get_method("concept-ablation").recipe(told)
    assert result.rule == Sum(2.0)
    assert_keeps(result)
    with pytest.raises(UserError, match="needs retain prompts"):
        get_method("concept-ablation").recipe(dataclasses.replace(told, retain_prompts=()))


def test_which_methods_take_an_anchor():
    assert {name: method.anchor for name, method in all_methods().items()} == {
        "esd": "optional",
        "ovw": "needed",
        "saddle": "none",
        "salun": "needed",
        "neggrad": "none",
        "uce": "needed",
        "rece": "needed",
        "speed": "needed",
        "concept-ablation": "needed",
        "ace": "none",
        "erasediff": "needed",
        "scissorhands": "needed",
        "selective-amnesia": "needed",
        "instance": "none",
        "advanchor": "needed",
        "race": "none",
        "advunlearn": "none",
        "spm": "optional",
        "mace": "needed",
        "holdfast": "needed",
        "placebo": "none",
        "placebo-noise": "none",
        "identity": "none",
    }


def test_ovw_overwrites_by_the_anchor_and_holds_the_rest():
    result = recipe("ovw", retain_weight=3.0)
    assert result.rule == Alternate(retain_weight=3.0)
    assert [(row.trajectory, row.condition, dict(row.target)) for row in rows_of(result, "forget")] == [
        ("a star", "a star", {"a circle": 1.0}),
        ("star", "star", {"circle": 1.0}),
    ]
    assert_keeps(result)


def test_saddle_measures_from_the_guided_prediction_and_names_no_replacement():
    result = recipe("saddle", family="stable-diffusion", options={"kappa": 2.5})
    assert isinstance(result.rule, Saddle)
    assert result.rule.kappa == 2.5
    assert [dict(row.target) for row in rows_of(result, "forget")] == [
        {"a star": 2.0, UNCONDITIONAL: -1.0},
        {"star": 2.0, UNCONDITIONAL: -1.0},
    ]
    assert_keeps(result)
    assert "circle" not in " ".join(result.prompts())


@pytest.mark.parametrize(("guidance", "kappa"), [(0.0, 3.0), (1.0, 0.5), (-1.5, 2.0), (1.0, 1.0)])
def test_saddle_refuses_a_margin_on_the_wrong_side(guidance, kappa):
    with pytest.raises(UserError, match="and `kappa` above 0 and 1, or gets to one"):
        recipe("saddle", options={"reference_guidance": guidance, "kappa": kappa})


def test_saddle_can_measure_from_what_is_guided_by_the_concept_alone():
    result = recipe("saddle", options={"reference": "without", "reference_guidance": -1.5, "kappa": 0.2})
    assert [dict(row.target) for row in rows_of(result, "forget")] == [
        {"a star": -0.5, "a": 1.5},
        {"star": -0.5, UNCONDITIONAL: 1.5},
    ]
    assert isinstance(result.rule, Saddle)
    assert result.rule.kappa == 0.2


def test_salun_relabels_the_concept_and_trains_on_what_is_kept():
    result = recipe("salun", family="stable-diffusion", retain_weight=0.3)
    assert result.rule == Sum(retain_weight=0.3)
    assert [dict(row.target) for row in rows_of(result, "forget")] == [{"a circle": 1.0}, {"circle": 1.0}]
    assert [(r.trajectory, r.condition, dict(r.target)) for r in rows_of(result, "retain")] == [
        ("a ring", "a ring", {NOISE: 1.0}),
        ("a heart", "a heart", {NOISE: 1.0}),
    ]


def test_salun_can_keep_without_the_noise():
    assert_keeps(recipe("salun", options={"retain_noise": False}))


@pytest.mark.parametrize(
    ("kept", "forgotten", "beside"), [(56, 10, (14, 10, 7)), (1, 1000, (1, 1, 1)), (5, 1, (2, 1, 1))]
)
def test_the_unconditional_is_held_beside_the_prompts(kept, forgotten, beside):
    """On a quarter of their trajectories, evenly, on no more of the concept's, however many there are, and its own."""
    told = concept("ovw")
    names = tuple(f"keep {number}" for number in range(kept)), tuple(f"star {number}" for number in range(forgotten))
    rows = rows_to_keep(dataclasses.replace(told, retain_prompts=names[0], forget_prompts=names[1]))
    assert [row.trajectory for row in rows[:kept]] == list(names[0])
    held = [row.trajectory for row in rows[kept:]]
    assert all(row.condition == UNCONDITIONAL and dict(row.target) == {UNCONDITIONAL: 1.0} for row in rows[kept:])
    counts = [sum(name in known for name in held) for known in (*names, (UNCONDITIONAL,))]
    assert tuple(counts) == beside
    places = [names[0].index(name) for name in held if name in names[0]]
    assert len(rows_to_keep(dataclasses.replace(told, is_guided=False))) == 2, "a distilled model asks for none"
    assert {later - earlier for earlier, later in itertools.pairwise(places)} <= {2, 4}


def test_neggrad_ascends_the_concepts_loss_and_descends_the_others():
    result = recipe("neggrad", retain_weight=0.5)
    assert result.rule == Sum(retain_weight=0.5, forget_weight=-1.0)
    assert all(row.condition == row.trajectory and dict(row.target) == {NOISE: 1.0} for row in result.rows)
    assert result.prompts() == [UNCONDITIONAL, "a star", "star", "a ring", "a heart"]


def test_noise_does_not_mix_with_predictions():
    with pytest.raises(ValueError, match="noise or a mix"):
        Row("forget", "a", "a", {NOISE: 0.5, "a": 0.5})


def test_the_placebo_forgets_nothing():
    result = recipe("placebo", retain_weight=2.0)
    assert result.rule == Sum(retain_weight=2.0)
    assert {row.role for row in result.rows} == {"retain"}
    assert all(dict(row.target) == {row.condition: 1.0} and row.trajectory == row.condition for row in result.rows)


def test_the_identity_has_no_rows():
    assert not recipe("identity").rows
    assert all(defaults.steps == 0 for defaults in get_method("identity").defaults.values())


@pytest.mark.parametrize(("name", "family"), list(itertools.product(NAMES, FAMILIES)))
def test_defaults_are_settings_that_a_user_could_give(name, family):
    method = get_method(name)
    defaults = dataclasses.asdict(method.defaults_for(family))
    options = defaults.pop("options") or {}
    config = TrainConfig(forget="star", output="run", options=options, **defaults)
    assert all(getattr(config, field) == value for field, value in defaults.items())
    again = method.with_options(method.defaults_for(family), {name: str(value) for name, value in options.items()})
    assert again == method.defaults_for(family), "as texts of the command line, too"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("setting", "owner"), OWNERS)
def test_a_methods_own_option_belongs_to_it_alone(setting, owner, family):
    having = [m.name for m in all_methods().values() if hasattr(m.defaults_for(family).options, setting)]
    assert having == [owner]


def test_spm_alone_trains_an_adapter_by_default():
    assert {m.name: m.adapter_rank for m in all_methods().values() if m.adapter_rank is not None} == {"spm": 1}


@pytest.mark.parametrize("family", FAMILIES)
def test_salun_alone_makes_a_mask_by_default(family):
    assert [m.name for m in all_methods().values() if m.defaults_for(family).mask_density is not None] == ["salun"]


@pytest.mark.parametrize("name", TRAINED)
def test_a_method_that_needs_retain_prompts_asks_for_them(name):
    """And one that does not ask does without."""
    method = get_method(name)
    used = {row.condition for row in rows_of(recipe(name), "retain")}
    if method.needs_retain:
        assert used >= {"a ring", "a heart"}
    else:
        told = dataclasses.replace(concept(name, family="stable-diffusion"), retain_prompts=())
        assert method.recipe(told).rows or name == "identity"


@pytest.mark.parametrize("name", TRAINED)
def test_controls_are_those_without_forget_rows(name):
    assert get_method(name).is_control == (not rows_of(recipe(name), "forget"))


@pytest.mark.parametrize(
    ("key", "chosen"),
    [("shapes", "shapes"), ("stable-diffusion", "stable-diffusion"), ("a-family-of-its-own", "stable-diffusion")],
)
def test_a_world_or_a_family_picks_its_defaults(key, chosen):
    method = get_method("esd")
    defaults = method.defaults_for(key)
    named = method.defaults[chosen]
    assert dataclasses.replace(defaults, options=named.options) == named
    assert defaults.options == (named.options or method.options())


def test_where_a_world_has_no_defaults_those_of_its_like_come_before_the_fields():
    assert get_method("esd").key_of("a-world", "shapes") == "shapes"
    assert get_method("uce").key_of("gallery", "shapes") == "gallery"
    assert get_method("uce").key_of("a-world") == "stable-diffusion"


@pytest.mark.parametrize("target", [{}, {"a": 0.5}, {"a": 1.0, "": 1.0}, {"a": float("nan")}, {"a": 1 + 1e-6}], ids=str)
def test_a_target_that_is_no_mix_of_predictions_is_refused(target):
    with pytest.raises(ValueError, match="must sum to 1"):
        Row("forget", "a", "a", target)


def test_rounding_in_a_target_is_no_mistake():
    row = Row("retain", "a", "a", {"a": 0.1, "b": 0.2, "c": 0.7})
    assert dict(row.target) == {"a": 0.1, "b": 0.2, "c": 0.7}


def test_an_unknown_role_is_refused():
    with pytest.raises(ValueError, match=r"role is one of .*'forget', 'retain'.*'keep'"):
        Row("keep", "a", "a", {"a": 1.0})


def test_a_recipe_lists_every_prompt_once_the_empty_one_first():
    rows = [Row("forget", "x", "y", {"z": 2.0, UNCONDITIONAL: -1.0}), Row("retain", "z", "z", {"z": 1.0})]
    assert Recipe(rows, Sum()).prompts() == [UNCONDITIONAL, "x", "y", "z"]


def entry(name, method):
    return types.SimpleNamespace(name=name, value=f"theirs:{name}", load=lambda: method)


def test_methods_of_other_packages_join_and_cannot_replace_ours(monkeypatch):
    theirs = dataclasses.replace(get_method("esd"), name="theirs")
    impostor = dataclasses.replace(theirs, name="ovw")
    asked = []
    monkeypatch.setattr(
        plugins, "entry_points", lambda group: asked.append(group) or [entry("theirs", theirs), entry("ovw", impostor)]
    )
    result = all_methods()
    assert asked == ["fastunlearn.methods"]
    assert tuple(result) == (*NAMES, "theirs")
    assert result["theirs"] is theirs
    assert isinstance(result["ovw"], Method)
    assert result["ovw"] is not impostor
    assert "taken" in str(broken_methods())
