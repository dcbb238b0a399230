"""Options of a method's own, a rule and an edit of another package: by flag, by YAML and by keyword."""

import dataclasses
import importlib
import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastunlearn import TrainConfig, plugins, unlearn
from fastunlearn.config import from_yaml, with_options
from fastunlearn.errors import UserError
from fastunlearn.methods import Method, all_methods, get_method
from fastunlearn.methods.recipe import Defaults, Edit, Recipe, option
from fastunlearn.methods.rules import Sum

TINY = {"trajectories": 1, "trajectory_steps": 3, "micro_batch_size": 2, "steps": 2, "evaluation_prompts": "none"}
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
EXAMPLE = Path(__file__).parents[1] / "examples" / "plugin" / "until_method.py"
UNET = "model/unet/diffusion_pytorch_model.safetensors"


@dataclasses.dataclass(frozen=True)
class Every:
    number: float = option("a number", 1.5, at_least=-2, at_most=2)
    count: int = option("a count", 3, at_least=1)
    flag: bool = option("a flag", False)
    text: str = option("a text", "x")
    kind: types.NoneType | str = None


def join(monkeypatch, **methods):
    """Methods as an installed package would bring them."""
    entries = [types.SimpleNamespace(name=n, value=f"theirs:{n}", load=lambda m=m: m) for n, m in methods.items()]
    monkeypatch.setattr(plugins, "entry_points", lambda group: entries if group == "fastunlearn.methods" else [])


@pytest.fixture
def until(tmp_path, monkeypatch):
    """The example, installed as a package of its own: a module and its metadata."""
    site = tmp_path / "site"
    info = site / "until-1.0.dist-info"
    info.mkdir(parents=True)
    shutil.copy(EXAMPLE, site)
    shutil.copy(EXAMPLE.with_name("until_rule.py"), site)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: until\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[fastunlearn.methods]\nuntil = until_method:UNTIL\n")
    monkeypatch.syspath_prepend(site)
    yield importlib.import_module("until_method").UNTIL
    for name in ("until_method", "until_rule"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, Every()),
        ({"number": "1e-3", "count": "7", "flag": "true", "text": "7", "kind": "none"}, Every(1e-3, 7, True, "7")),
        ({"number": 2, "count": 4.0, "flag": True, "kind": "a b"}, Every(2.0, 4, True, "x", "a b")),
        ({"flag": "False"}, Every()),
    ],
)
def test_values_and_texts_become_what_the_option_is(given, expected):
    result = with_options(Every(), given, "the method x")
    assert result == expected
    assert [type(v) for v in dataclasses.astuple(result)] == [type(v) for v in dataclasses.astuple(expected)]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"nubmer": 1},
            r"^the method x has no option 'nubmer'\. It has: .*, text, kind\. Did you mean `number`\?$",
        ),
        ({"number": "many"}, r"^the method x: the option `number` must be float, got 'many'\.$"),
        ({"number": True}, r"`number` must be float, got True"),
        ({"number": float("nan")}, r"`number` must be a finite number, got nan"),
        ({"number": "inf"}, r"`number` must be a finite number, got inf"),
        ({"number": 2.5}, r"`number` must be at most 2, got 2\.5"),
        ({"number": "-3"}, r"`number` must be at least -2, got -3\.0"),
        ({"count": 0}, r"`count` must be at least 1, got 0"),
        ({"count": "1.5"}, r"`count` must be int, got '1\.5'"),
        ({"count": None}, r"`count` must be int, got None"),
        ({"flag": "perhaps"}, r"`flag` must be bool, got 'perhaps'"),
        ({"flag": 1}, r"`flag` must be bool, got 1"),
        ({"text": ["a"]}, r"`text` must be str, got \['a'\]"),
    ],
)
def test_a_wrong_option_is_one_line(given, words):
    with pytest.raises(UserError, match=words) as error:
        with_options(Every(), given, "the method x")
    assert "\n" not in str(error.value)


def test_a_method_without_options_says_so():
    with pytest.raises(UserError, match=r"^the method ovw has no option 'kappa'\. It has none\.$"):
        unlearn(TrainConfig(forget="star", output="never", options={"kappa": 1}))


def test_the_four_ways_to_give_an_option_make_one_run(cli, tmp_path):
    yaml = tmp_path / "run.yaml"
    yaml.write_text("forget: star\nmethod: esd\noptions:\n  negative-guidance: 1\n" + lines(TINY))
    flags = ["train", "--forget", "star", "--method", "esd", *FLAGS]
    assert cli(*flags, "--set", "negative_guidance=1", "--output", tmp_path / "flag").status == 0
    assert cli("train", "--config", yaml, "--output", tmp_path / "yaml").status == 0
    unlearn("shapes", "star", "esd", negative_guidance=1, output=tmp_path / "keyword", **TINY)
    unlearn("shapes", "star", "esd", options={"negative_guidance": "1.0"}, output=tmp_path / "map", **TINY)
    assert cli("train", "--config", yaml, "--set", "negative-guidance=5", "--output", tmp_path / "other").status == 0
    runs = {name: (tmp_path / name / UNET).read_bytes() for name in ("flag", "yaml", "keyword", "map", "other")}
    assert runs["flag"] == runs["yaml"] == runs["keyword"] == runs["map"] != runs["other"]
    assert from_yaml(tmp_path / "yaml" / "config.yaml", TrainConfig).options["negative_guidance"] == 1.0
    assert from_yaml(tmp_path / "other" / "config.yaml", TrainConfig).options["negative_guidance"] == 5.0


def lines(settings):
    return "".join(f"{name}: {value}\n" for name, value in settings.items())


def test_a_saved_run_has_every_option_of_its_method(tmp_path):
    unlearn("shapes", "star", "saddle", output=tmp_path / "run", dual_rate=0.2, **TINY)
    saved = from_yaml(tmp_path / "run" / "config.yaml", TrainConfig).options
    method = get_method("saddle")
    defaults = dataclasses.asdict(method.defaults_for("shapes").options)
    assert saved == defaults | {"dual_rate": 0.2}


def test_a_flag_that_is_no_pair_is_refused(refused, tmp_path):
    line = refused("train", "--forget", "star", "--set", "kappa", "--output", tmp_path / "run")
    assert "--set: wants NAME=VALUE, got 'kappa'" in line


def test_options_in_yaml_must_be_a_map(refused, tmp_path):
    (tmp_path / "run.yaml").write_text("forget: star\noptions: 3\n")
    line = refused("train", "--config", tmp_path / "run.yaml", "--output", tmp_path / "run")
    assert "`options` must be a map of names to values, got 3" in line


@pytest.mark.parametrize("name", ["stepz", "kappa"])
def test_an_unknown_keyword_lists_settings_and_options(name):
    with pytest.raises(UserError, match=rf"^unknown setting '{name}'.*steps.*of the method esd: negative_guidance"):
        unlearn("shapes", "star", "esd", **{name: 3})


# ---- the page of a method --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", all_methods())
def test_every_method_has_a_page(cli, name):
    method = get_method(name)
    answer = cli("methods", name)
    assert (answer.status, answer.err) == (0, "")
    for words in (method.summary, method.paper, method.needs, *method.about.splitlines(), *method.defaults):
        assert words in answer.out
    for field in dataclasses.fields(method.options) if method.options else ():
        assert f"  {field.name} " in answer.out
        assert field.metadata["help"] in answer.out, "an option without a help text"


def test_the_page_of_a_method_that_is_not_there(refused):
    assert "unknown method 'esdd'. There are: esd, ovw" in refused("methods", "esdd")


# ---- another package's -----------------------------------------------------------------------------------------------


def test_a_method_with_an_option_and_a_rule_of_its_own_takes_at_most_forty_lines():
    assert len([line for line in EXAMPLE.read_text().splitlines() if line.strip()]) <= 40


def test_a_method_of_another_package_has_its_options_and_its_rule(until, cli, refused, tmp_path):
    run = ["train", "--forget", "star", "--method", "until", *FLAGS, "--log-every=1"]
    assert cli(*run, "--set=share=1", "--output", tmp_path / "run").status == 0
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all("forgetting" in line for line in logged)
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-2" / "state.json").read_text())
    assert state["trainer"]["state"]["rule"].keys() == {"forgetting", "limit"}
    assert "share" in cli("methods", "until").out
    line = refused(*run, "--set=shares=1", "--output", tmp_path / "other")
    assert "the method until has no option 'shares'. It has: share." in line
    assert "must be above 0, got 0" in refused(*run, "--set=share=0", "--output", tmp_path / "other")


def test_a_rules_state_goes_on_after_a_stop(until, tmp_path):
    """Steps 3 and 4 after a stop are those of a run that was not stopped."""
    whole = {**TINY, "steps": 4, "checkpoint_every": 2, "log_every": 1, "share": 0.9}
    unlearn("shapes", "star", "until", output=tmp_path / "whole", **whole)
    unlearn("shapes", "star", "until", output=tmp_path / "run", **whole)
    for name in ("model", "checkpoints/step-4"):
        shutil.rmtree(tmp_path / "run" / name)
    unlearn("shapes", "star", "until", output=tmp_path / "run", resume=True, **whole)
    assert (tmp_path / "run" / UNET).read_bytes() == (tmp_path / "whole" / UNET).read_bytes()
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("run", "whole")]
    kept = [[{k: v for k, v in json.loads(line).items() if "second" not in k} for line in log] for log in logs]
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"options": "share"}, "must be a dataclass"),
        (
            {"options": Every, "defaults": {"stable-diffusion": Defaults(1, 1, 1, 1, "all", options=3)}},
            "options of another kind",
        ),
        ({"defaults": {}}, "has no defaults for stable-diffusion"),
    ],
)
def test_a_method_that_contradicts_itself_is_refused_where_it_is_made(until, changes, words):
    with pytest.raises(TypeError, match=words):
        dataclasses.replace(until, **changes)


def test_an_edit_of_another_package_runs(monkeypatch, bundled, tmp_path):
    """It halves biases; nothing else changes."""

    def recipe(concept):
        return Edit(lambda weights: {name: values / 2 for name, values in weights.parameters.items()})

    halve = Method("halve", "-", "-", "-", recipe, {"stable-diffusion": Defaults(0, 1e-3, 1, 1, "attn2.to_out.0.bias")})
    join(monkeypatch, halve=halve)
    unlearn("shapes", "star", "halve", output=tmp_path / "run", evaluation_prompts="none")
    before = load_file(bundled.source / "unet" / "diffusion_pytorch_model.safetensors")
    for name, values in load_file(tmp_path / "run" / UNET).items():
        half = ".attn2.to_out.0.bias" in name
        assert torch.equal(values, (before[name].float() / (2 if half else 1)).to(values.dtype)), name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: {"conv_in.weight": torch.zeros(1)}, "'conv_in.weight', which is not selected"),
        (lambda w: {n: v * float("nan") for n, v in w.parameters.items()}, "values that are no numbers"),
        (lambda w: {}, "changes nothing"),
    ],
)
def test_an_edit_is_held_to_what_is_selected(monkeypatch, tmp_path, change, words):
    method = Method(
        "m", "-", "-", "-", lambda concept: Edit(change), {"stable-diffusion": Defaults(0, 1, 1, 1, "bias")}
    )
    join(monkeypatch, m=method)
    with pytest.raises(UserError, match=words):
        unlearn("shapes", "star", "m", output=tmp_path / "run", evaluation_prompts="none")
    assert not (tmp_path / "run").exists()


def test_a_recipe_without_rows_and_options_still_works(monkeypatch, tmp_path):
    method = Method("m", "-", "-", "-", lambda c: Recipe([], Sum()), {"stable-diffusion": Defaults(3, 1, 1, 1, "bias")})
    join(monkeypatch, m=method)
    result = unlearn("shapes", "star", "m", output=tmp_path / "run", evaluation_prompts="none")
    assert result.record.hashes["original"] == result.record.hashes["unlearned"]
