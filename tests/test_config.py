"""Settings: what a field accepts is the same by flag, by YAML and by constructor, and nonsense is named."""

import argparse
import dataclasses

import pytest

from fastunlearn.cli.demo import DemoConfig
from fastunlearn.cli.flags import add_flags, build
from fastunlearn.config import from_yaml, read_yaml, to_yaml
from fastunlearn.errors import UserError
from fastunlearn.evaluation.config import CompareConfig, EvaluateConfig
from fastunlearn.training.config import ApplyConfig, MaskConfig, TrainConfig

KINDS = (TrainConfig, EvaluateConfig, CompareConfig, MaskConfig, ApplyConfig, DemoConfig)
REQUIRED = {
    TrainConfig: {"forget": "star", "output": "run"},
    EvaluateConfig: {"original": "shapes", "unlearned": ("run",), "output": "evaluation"},
    CompareConfig: {"runs": ("one", "two"), "output": "comparison"},
    MaskConfig: {"forget": "star", "output": "star.mask.safetensors"},
    ApplyConfig: {"model": "shapes", "delta": "delta.safetensors", "output": "model"},
    DemoConfig: {},
}
NAN, INF = float("nan"), float("inf")

# field: (accepted at the edge, refused)
TRAIN_NUMBERS = {
    "steps": ((0, 1), (-1, 10**30)),
    "micro_batch_size": ((1,), (0, -1, 10**30)),
    "trajectories": ((1,), (0, -1, 10**30)),
    "trajectory_steps": ((1,), (0, 10**30)),
    "log_every": ((1,), (0, -5)),
    "checkpoint_every": ((0,), (-1,)),
    "seed": ((0, 2**32 - 1), (-1, 2**32, 10**400)),
    "gradient_accumulation_steps": ((1,), (0, -1, 10**30)),
    "num_processes": ((), (0, -1, 10**30)),
    "rank": ((), (0, -1, 10**30)),  # good ones need `--adapter`
    "lora_alpha": ((), (0.0, -1.0, NAN, INF)),
    "mask_density": ((1e-6, 1.0), (0.0, -0.5, 1.1, NAN, INF)),
    "learning_rate": ((1e-12, 1.0), (0.0, -1e-3, 1.1, NAN, INF, -INF)),
    "max_grad_norm": ((0.0, 1e-6, 100.0), (-1.0, NAN, INF)),
    "trajectory_guidance_scale": ((0.0, 1.0), (-0.5, NAN, INF)),
    "weight_decay": ((0.0, 0.1), (-0.1, NAN, INF)),
    "bank_batch_size": ((1,), (0, -1, 10**30)),
    "evaluation_batch_size": ((1,), (0, -1, 10**30)),
    "decode_batch_size": ((1,), (0, -1, 10**30)),
    "device_memory_gib": ((0.5, 24.0), (0.0, -1.0, NAN, INF)),
    "retain_weight": ((0.0, 5.0), (-1.0, NAN, INF)),
    "stop_residual": ((0.0, 0.5), (-0.1, 1.0, NAN, INF)),
}
EVALUATE_NUMBERS = {
    "seeds_per_prompt": ((1,), (0, 10**30)),
    "batch_size": ((1,), (0, -1)),
    "num_inference_steps": ((1,), (0,)),
    "guidance_scale": ((0.0, 1.0), (-1.0, NAN, INF)),
    "control_pairs": ((1,), (0,)),
    "decode_batch_size": ((1,), (0, -2)),
    "cache_limit_gib": ((0.1,), (0.0, NAN, INF)),
    "num_processes": ((1,), (0,)),
}
MASK_NUMBERS = {
    "density": ((1e-6, 1.0), (0.0, 1.1, NAN)),
    "trajectories": ((1,), (0,)),
    "trajectory_steps": ((1,), (0,)),
    "trajectory_guidance_scale": ((0.0,), (-0.1, NAN)),
    "micro_batch_size": ((1,), (0,)),
    "bank_batch_size": ((1,), (0,)),
    "seed": ((0,), (-1,)),
}
NUMBERS = [(TrainConfig, *item) for item in TRAIN_NUMBERS.items()]
NUMBERS += [(EvaluateConfig, *item) for item in EVALUATE_NUMBERS.items()]
NUMBERS += [(MaskConfig, *item) for item in MASK_NUMBERS.items()]
NUMBERS += [(CompareConfig, "margin", ((0.01,), (0.0, NAN, INF)))]
NUMBERS += [(DemoConfig, "seed", ((0,), (-1, 10**30)))]


def make(kind, **values):
    return kind(**{**REQUIRED[kind], **values})


def flag_of(name):
    return "--" + name.replace("_", "-")


def parse(kind, arguments):
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_flags(parser, kind)
    return vars(parser.parse_args(arguments))


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        pytest.param(kind, name, value, id=f"{kind.__name__}-{name}={value}")
        for kind, name, (good, _) in NUMBERS
        for value in good
    ],
)
def test_numbers_in_range_are_kept(kind, name, value):
    assert getattr(make(kind, **{name: value}), name) == value


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        pytest.param(kind, name, value, id=f"{kind.__name__}-{name}={str(value)[:32]}")
        for kind, name, (_, bad) in NUMBERS
        for value in bad
    ],
)
def test_numbers_out_of_range_are_refused_by_the_flags_name(kind, name, value):
    with pytest.raises(ValueError, match=f"`{flag_of(name)}` must be .*(at least|at most|above)"):
        make(kind, **{name: value})


def test_every_number_has_a_range():
    """A new numeric field must come with its limits, and with its line in the tables above."""
    numeric = {
        (kind, field.name)
        for kind in KINDS
        for field in dataclasses.fields(kind)
        if str(field.type).startswith(("int", "float"))
    }
    assert numeric == {(kind, name) for kind, name, _ in NUMBERS}


@pytest.mark.parametrize("forget", ["", " ", "\t\n"])
def test_an_empty_concept_is_refused(forget):
    with pytest.raises(ValueError, match="`--forget` is empty"):
        make(TrainConfig, forget=forget)


@pytest.mark.parametrize("kind", [TrainConfig, EvaluateConfig])
def test_resume_and_overwrite_exclude_each_other(kind):
    with pytest.raises(ValueError, match=r"--resume.*--overwrite"):
        make(kind, resume=True, overwrite=True)


def test_a_flag_may_be_given_several_times_and_a_list_stand_in_a_file(tmp_path):
    assert parse(EvaluateConfig, ["--unlearned", "a", "--unlearned", "b"])["unlearned"] == ["a", "b"]
    flags = {"config": None, "original": "shapes", "output": "o", "unlearned": ["a", "b"]}
    assert build(EvaluateConfig, flags).unlearned == ("a", "b")
    path = tmp_path / "run.yaml"
    for text, wanted in (("unlearned: a", ("a",)), ("unlearned: [a, b]", ("a", "b"))):
        path.write_text(f"original: shapes\noutput: o\n{text}\n")
        assert from_yaml(path, EvaluateConfig).unlearned == wanted
    path.write_text("original: shapes\noutput: o\nunlearned: [3]\n")
    with pytest.raises(ValueError, match="`unlearned` must be a text or a list of texts"):
        from_yaml(path, EvaluateConfig)


def test_nothing_to_evaluate_or_to_compare_is_refused():
    with pytest.raises(ValueError, match="name at least one unlearned pipeline"):
        make(EvaluateConfig, unlearned=())
    with pytest.raises(ValueError, match="at least 2 runs, got 1"):
        make(CompareConfig, runs=("one",))


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_cannot_be_changed(kind):
    config = make(kind)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.output = "elsewhere"


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_is_a_flag_with_a_help_text(kind):
    parser = argparse.ArgumentParser()
    add_flags(parser, kind)
    flags = {(action.option_strings or [action.dest])[0]: action for action in parser._actions}
    special = {(TrainConfig, "options"): "--set"}
    names = {
        f.name: f.name if f.metadata.get("positional") else special.get((kind, f.name), flag_of(f.name))
        for f in dataclasses.fields(kind)
    }
    assert set(flags) == {"-h", "--config", *names.values()}
    for field in dataclasses.fields(kind):
        assert len(field.metadata["help"]) > 5
        assert field.metadata["help"] in flags[names[field.name]].help.replace("%%", "%")


@pytest.mark.parametrize("kind", KINDS)
def test_flags_not_given_are_absent(kind):
    assert parse(kind, []) == {"config": None}


def test_flags_have_the_types_of_the_fields():
    given = {
        "lr-scheduler": "linear",
        "steps": "3",
        "learning-rate": "1e-4",
        "forget": "star",
        "mixed-precision": "bf16",
    }
    values = parse(TrainConfig, ["--dry-run", *(f"--{name}={value}" for name, value in given.items())])
    assert values == {
        "config": None,
        "lr_scheduler": "linear",
        "steps": 3,
        "learning_rate": 1e-4,
        "forget": "star",
        "dry_run": True,
        "mixed_precision": "bf16",
    }


CONFIGS = {
    "defaults": make(TrainConfig),
    "everything": make(
        TrainConfig,
        forget="Van Gogh: “the painter”",
        anchor="",
        retain_prompts="a dog; a cat #2",
        steps=7,
        learning_rate=3e-7,
        options={"negative_guidance": -0.5, "flag": True, "name": "no"},
        lr_scheduler="linear",
        mixed_precision="no",
        device="cpu",
        seed=2**32 - 1,
        overwrite=True,
    ),
    "looks like other types": make(TrainConfig, forget="no", output="2024-01-01", anchor="null", trainable="1e3"),
    "several models": make(EvaluateConfig, unlearned=("a", "b"), placebo="c"),
    "compare": make(CompareConfig, margin=0.02),
    "evaluate": make(EvaluateConfig, prompts="a;b", mixed_precision="bf16", guidance_scale=7.5),
    "demo": make(DemoConfig, output="d", seed=3),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_yaml_gives_back_an_equal_config(config, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert from_yaml(path, type(config)) == config


def test_flags_win_over_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("forget: ring\nsteps: 5\nlearning-rate: 1e-4\n")
    config = build(TrainConfig, {"config": str(path), "output": "run", "steps": 9})
    assert (config.forget, config.steps, config.learning_rate) == ("ring", 9, 1e-4)


def test_names_in_a_file_may_have_dashes_or_underscores(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("forget: star\noutput: run\nmicro-batch-size: 3\ntrajectory_steps: 4\n")
    config = from_yaml(path, TrainConfig)
    assert (config.micro_batch_size, config.trajectory_steps) == (3, 4)


@pytest.mark.parametrize(
    ("line", "name", "wanted"),
    [
        ("seed: 012", "seed", 12),  # YAML 1.1: ten
        ("seed: 0_9", "seed", 9),
        ("steps: 1e2", "steps", 100),
        ("learning_rate: 1e-5", "learning_rate", 1e-5),  # YAML 1.1: a text
        ("learning_rate: .5E-3", "learning_rate", 5e-4),
        ("forget: 2026-11-28", "forget", "2026-11-28"),  # YAML 1.1: a date
        ("forget: 1:30", "forget", "1:30"),  # YAML 1.1: ninety
        ("forget: '012'", "forget", "012"),
    ],
)
def test_a_number_in_yaml_is_what_it_looks_like(tmp_path, line, name, wanted):
    path = tmp_path / "run.yaml"
    path.write_text(line)
    assert read_yaml(path, TrainConfig)[name] == wanted


@pytest.mark.parametrize("line", ["seed: 1:30", "seed: 0x10", "seed: 0o17", "seed: 2026-11-28", "seed: .inf"])
def test_a_number_in_yaml_that_no_flag_would_take_is_refused(tmp_path, line):
    path = tmp_path / "run.yaml"
    path.write_text(line)
    with pytest.raises(UserError, match="`seed` must be int, got"):
        read_yaml(path, TrainConfig)


@pytest.mark.parametrize(
    "text", ["012", "1e3", ".5", "-.5e2", "1:30", "0x1F", "1_000", "2026-11-28", ".inf", "=", "~", "on"]
)
def test_a_text_like_a_number_comes_back_from_yaml_as_the_text(tmp_path, text):
    config = TrainConfig(model="shapes", forget=text, method="esd", output="run")
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    assert from_yaml(tmp_path / "run.yaml", TrainConfig) == config


def test_a_name_that_stands_twice_in_yaml_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("seed: 1\nsteps: 2\nseed: 3\n")
    with pytest.raises(UserError, match="the name 'seed' comes twice"):
        read_yaml(path, TrainConfig)


def test_a_bare_no_is_the_precision_and_not_yamls_false(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("forget: star\noutput: run\nmixed_precision: no\n")
    assert from_yaml(path, TrainConfig).mixed_precision == "no"


def test_a_whole_number_written_as_a_float_is_accepted(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("forget: star\noutput: run\nsteps: 20.0\n")
    assert from_yaml(path, TrainConfig).steps == 20


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("stepz: 3", "unknown name 'stepz'", id="unknown name"),
        pytest.param("steps: many", "`steps` must be int, got 'many'", id="word for a number"),
        pytest.param("steps: 1.5", "`steps` must be int, got 1.5", id="fraction of a step"),
        pytest.param("steps: .inf", "`steps` must be int, got inf", id="infinite steps"),
        pytest.param("steps: .nan", "`steps` must be int, got nan", id="nan steps"),
        pytest.param("steps: true", "`steps` must be int, got True", id="truth for a number"),
        pytest.param("steps: [3]", "`steps` must be int", id="list for a number"),
        pytest.param("steps: -3", "`--steps` must be at least 0", id="negative steps"),
        pytest.param("learning_rate: .nan", "`--learning-rate` must be a number above 0", id="nan rate"),
        pytest.param("learning_rate: " + "9" * 400, "`learning_rate` must be float", id="rate past floats"),
        pytest.param("dry_run: maybe", "`dry_run` must be bool", id="word for a truth"),
        pytest.param("lr_scheduler: cosine", "`lr_scheduler` must be constant or linear", id="unknown optional choice"),
        pytest.param("device: tpu", "`device` must be auto or cpu or cuda", id="unknown choice"),
        pytest.param("forget:", "`forget` must be str, got None", id="required left empty"),
        pytest.param("log_every:", "`log_every` must be int, got None", id="number left empty"),
        pytest.param("forget: {a: b}", "`forget` must be str", id="mapping for a text"),
        pytest.param("- forget", "must hold `name: value` lines", id="list"),
        pytest.param("", "must hold `name: value` lines", id="empty file"),
        pytest.param("a: [", "cannot read the config file", id="no yaml"),
        pytest.param("!!python/object/apply:os.getcwd []", "cannot read the config file", id="code in yaml"),
    ],
)
def test_mistakes_in_a_file_are_named_in_one_line(text, said, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"config file|must be") as error:
        build(TrainConfig, {"config": str(path), "output": "run"} | ({} if "forget" in text else {"forget": "star"}))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the config file .*nowhere\.yaml"):
        build(TrainConfig, {"config": str(tmp_path / "nowhere.yaml")})


def test_a_missing_setting_is_named_as_a_flag():
    with pytest.raises(ValueError, match="missing: --forget, --output"):
        build(TrainConfig, {})


def test_the_demos_methods_exist_and_are_two_or_more():
    assert DemoConfig().compared(("esd", "uce", "ovw")) == ("esd", "uce", "ovw")
    assert DemoConfig(methods="uce, esd,uce,placebo").compared(("ovw",)) == ("uce", "esd")
    for given in ("esd", "esd,placebo", "esd,nobody"):
        with pytest.raises(UserError):
            DemoConfig(methods=given).compared(("esd", "ovw"))


def test_a_tilde_is_the_users_home_wherever_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("output: ~/run\nmask: '~/m.safetensors'\nmodel: ~/sd15\n")
    config = build(TrainConfig, {"config": "~/run.yaml", "forget": "star", "deepspeed": "~/ds.json"})
    assert config.output == f"{tmp_path}/run"
    assert config.mask == f"{tmp_path}/m.safetensors"
    assert config.model == f"{tmp_path}/sd15"
    assert config.deepspeed == f"{tmp_path}/ds.json"
    assert TrainConfig(forget="~", output=tmp_path / "x").output == f"{tmp_path}/x", "a Path, and a concept"
    several = EvaluateConfig(original="~/a", unlearned=("~/b", "shapes", "a~b"), output="~/e", cache="~/c")
    assert several.unlearned == (f"{tmp_path}/b", "shapes", "a~b")
    assert (several.original, several.output, several.cache) == tuple(f"{tmp_path}/{name}" for name in "aec")
    assert CompareConfig(runs=("~/a", "b"), output="~").runs == (f"{tmp_path}/a", "b")
    with pytest.raises(UserError, match="names a user that this machine does not have"):
        TrainConfig(forget="star", output="~nobody-of-that-name/run")
