"""Result files: the same after a round trip, and every file that is none of ours is told in one line."""

import ast
import copy
import dataclasses
import json
import subprocess
import sys

import pytest
from test_report import content, evaluation
from toys import run_record

from fastunlearn import record, schema
from fastunlearn.errors import UserError
from fastunlearn.schema import AttackRecord, Comparison, Demo, Evaluation, FoldersEvaluation, RunRecord


def folders_evaluation():
    distances = {
        "mean": 0.1,
        "ci95": None,
        "interval": "none: one prompt",
        "quantiles": {"q50": 0.1},
        "unchanged": 0.5,
        "n_pairs": 2,
        "n_prompts": 1,
    }
    return {
        "schema": 1,
        "kind": "images",
        "fastunlearn": "0.1.0",
        "integrity": distances | {"metric": "m@1", "clusters": "pairs"},
        "groups": {"a [b]": distances},
        "notes": ["2 pairs are of one color"],
        "spec": {"hashes": {"original_images": "a", "unlearned_images": "b"}},
    }


def gap():
    return {
        "difference": 0.1,
        "ci95": [0.0, 0.2],
        "p_value": 0.03,
        "ci90": [0.01, 0.19],
        "equivalence_p_value": None,
        "equivalent": None,
    }


def comparison():
    run = {"name": "a", "folder": "f", "mean": 0.1, "hash": "h", "judge": content()["judge"]}
    pair = gap() | {"a": "a", "b": "b", "p_value_holm": 0.03, "groups": {"g": gap()}, "verdict": "undecided"}
    sections = {"margin": None, "unit": "R", "interval": "t", "n_pairs": 2, "n_prompts": 2}
    head = {"schema": 1, "kind": "comparison", "fastunlearn": "0.1.0"}
    return head | sections | {"runs": [run, run], "comparisons": [pair]}


def attack_record():
    side = {"broken": 1, "n_prompts": 2, "share": 0.5, "share_ci95": [0.0, 1.0], "images": 3, "cost": 40}
    side |= {"curve": [{"cost": 20, "share": 0.5, "ci95": [0.0, 1.0]}], "broken_by": {"seed 1": 1}}
    side |= {"kinds": {"[b]": {"broken": 1, "n_prompts": 2}}}
    result = {
        "name": "seeds",
        "summary": "asks",
        "unknown": "noise",
        "source": "best of N",
        "budget": 20,
        "interval": "t",
    }
    result |= {"models": {"original": side, "unlearned": side}, "control": side}
    result |= {"minus_control": None, "minus_gold": {"mean": 0.1, "ci95": [-0.1, 0.3]}}
    head = {"schema": 1, "kind": "attack", "fastunlearn": "0.1.0", "name": "run", "method": "esd", "concept": "star"}
    head |= {"model": "shapes", "judge": content()["judge"], "n_prompts": 2, "prepared": 10, "attacks": [result]}
    return head | {"notes": ["n"], "spec": {"hashes": {"original": "a", "unlearned": "b"}}}


FILES = {
    Evaluation: content,
    AttackRecord: attack_record,
    FoldersEvaluation: folders_evaluation,
    RunRecord: lambda: {name: value for name, value in run_record().to_dict().items() if name != "sha256"},
    Comparison: comparison,
    Demo: lambda: {
        **{"schema": 1, "kind": "demo", "fastunlearn": "0.1.0", "seconds": 3.5},
        **{"evaluations": [content()], "comparison": comparison()["comparisons"][0]},
    },
}


@pytest.fixture(params=FILES, ids=lambda kind: kind.kind)
def kind(request):
    return request.param


def test_a_file_is_the_same_after_a_round_trip(kind, tmp_path):
    one = kind.from_dict(FILES[kind]())
    one.write(tmp_path / "result.json")
    again = kind.read(tmp_path / "result.json")
    assert again == one
    assert again.to_json() == one.to_json() == (tmp_path / "result.json").read_text()
    assert list(json.loads(one.to_json()))[:3] == ["schema", "kind", "fastunlearn"]
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_keys_that_this_version_does_not_know_are_left_out(kind):
    known = kind.from_dict(FILES[kind]())
    assert kind.from_dict(FILES[kind]() | {"later": [1, {"a": None}]}) == known


def test_a_file_whose_content_was_changed_by_hand_is_refused(kind):
    given = kind.from_dict(FILES[kind]()).to_dict()
    assert kind.from_dict(given, "result.json").to_dict() == given
    assert kind.from_dict(json.loads(json.dumps(given)), "result.json").to_dict() == given
    for changed in (given | {"fastunlearn": "0.0.1"}, given | {"later": 1}, given | {"sha256": "0" * 64}):
        with pytest.raises(
            UserError, match=r"^result\.json is damaged: its content has changed since it was written\. Make"
        ):
            kind.from_dict(changed, "result.json")


def paths_of(value, path=()):
    """Every key of nested objects, as a path; what is free-form is one key."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield (*path, key)
            if key not in ("spec", "metrics"):
                yield from paths_of(item, (*path, key))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        yield from paths_of(value[0], (*path, 0))


def at(value, path):
    for key in path:
        value = value[key]
    return value


@pytest.mark.parametrize("bad", ["text", [], {}, True, None, 1.5, float("nan")], ids=repr)
def test_no_damage_of_any_key_gives_more_than_one_line(kind, bad):
    """Each key in turn is another thing: it is refused in one line, or it is what that key may be."""
    lines = []
    for path in paths_of(FILES[kind]()):
        damaged = copy.deepcopy(FILES[kind]())
        at(damaged, path[:-1])[path[-1]] = bad
        try:
            one = kind.from_dict(damaged, "result.json")
        except UserError as error:
            lines.append(str(error))
        else:
            json.dumps(one.to_dict(), allow_nan=False)
    assert len(lines) > 5
    assert all(line.startswith("result.json ") and "\n" not in line for line in lines)


def test_every_missing_key_is_named_or_has_a_default(kind):
    lines = {}
    for path in paths_of(FILES[kind]()):
        damaged = copy.deepcopy(FILES[kind]())
        del at(damaged, path[:-1])[path[-1]]
        try:
            kind.from_dict(damaged, "result.json")
        except UserError as error:
            lines[path] = str(error)
    assert len(lines) > 5
    assert all(str(path[-1]) in line for path, line in lines.items())


SAID = {
    "older": ({"schema": None}, "result.json is of version 0.1 or older, which wrote no schema; fastunlearn "),
    "newer": ({"schema": 2, "fastunlearn": "0.9"}, "result.json has schema 2, of fastunlearn 0.9; fastunlearn "),
    "no number": ({"schema": "1"}, 'result.json is damaged: schema must be a number from 1 on, got "1".'),
    "unknown": ({"kind": "poem"}, 'result.json is damaged: it has the unknown kind "poem".'),
    "no kind": ({"kind": None}, "result.json is damaged: it has the unknown kind null."),
}


@pytest.mark.parametrize(("changes", "said"), SAID.values(), ids=SAID)
def test_what_another_version_wrote_is_told_with_what_to_do(kind, changes, said):
    given = FILES[kind]() | changes
    if changes.get("schema", 1) is None:
        del given["schema"]
    with pytest.raises(UserError) as error:
        kind.from_dict(given, "result.json")
    assert str(error.value).startswith(said)
    assert "Update fastunlearn." in str(error.value) or f"`fastunlearn {kind.command}`" in str(error.value)


def test_another_commands_file_is_told(kind):
    for other, make in FILES.items():
        if other is not kind:
            with pytest.raises(UserError, match=rf"a result of `fastunlearn {other.command}` .* Name such a one"):
                kind.from_dict(make(), "result.json")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '"x"', '{"schema": NaN}', "\xff\xfe", "[" * 100_000, '{"schema": 1e999}']
)
def test_what_is_no_result_at_all_is_told(kind, tmp_path, text):
    (tmp_path / "result.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"result\.json is damaged") as error:
        kind.read(tmp_path / "result.json")
    assert "\n" not in str(error.value)


def test_both_kinds_of_evaluations_are_read_by_what_they_say_they_are(tmp_path):
    for make, kind in ((content, Evaluation), (folders_evaluation, FoldersEvaluation)):
        kind.from_dict(make()).write(tmp_path / "evaluation.json")
        assert type(schema.read_evaluation(tmp_path / "evaluation.json")) is kind


def test_infinite_numbers_have_a_form_where_anything_may_stand_and_nowhere_else():
    limits = {"lambda_min_clipped": float("-inf"), "top": float("inf"), "no": float("nan"), "pair": (1, 2.5), "x": {1}}
    one = dataclasses.replace(evaluation(), spec=evaluation().spec | {"sampler_config": limits})
    written = one.to_dict()["spec"]["sampler_config"]
    assert written == {"lambda_min_clipped": "-inf", "top": "inf", "no": "nan", "pair": [1, 2.5], "x": "{1}"}
    again = Evaluation.from_dict(json.loads(one.to_json()))
    assert again.to_dict() == one.to_dict()
    with pytest.raises(UserError, match=r"^seconds\.bank_s must be a finite number, got inf$"):
        run_record(seconds={"bank_s": float("inf")}).to_dict()


def test_what_was_not_measured_is_left_out_or_null():
    written = evaluation(erasure=None, judge=None, retain=None).to_dict()
    assert (written["erasure"], written["judge"], written["retain"]) == (None, None, None)
    assert "minus_placebo" not in written["integrity"]
    assert "retention" not in written["groups"]["forget"]
    assert "shown" not in written["groups"]["near"]
    assert "metrics" not in written


def test_shares_are_shares():
    with pytest.raises(UserError, match=r"erasure\.shown must be from 0 to 1, got 1\.2"):
        evaluation(erasure__shown=1.2)
    with pytest.raises(UserError, match=r"erasure\.shown_ci95 must be a list of 2"):
        evaluation(erasure__shown_ci95=[0.1])


def test_the_schema_is_light():
    script = "import fastunlearn.schema, sys; print(sorted({'torch', 'numpy', 'jinja2', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_evaluating_loads_nothing_of_training():
    script = """
import fastunlearn.evaluation.evaluate, fastunlearn.evaluation.evaluate_images, fastunlearn.evaluation.compare, sys
heavy = {"deepspeed", "matplotlib", "pandas"}
print(sorted(name for name in sys.modules if name in heavy or name.startswith("fastunlearn.training")))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def test_only_a_world_and_its_judge_know_its_words(request):
    """The evaluator, the reports and the terminal ask a judge and a `World`; no module of theirs imports one."""
    package = request.config.rootpath / "fastunlearn"
    modules = [path for wing in ("evaluation", "reports", "cli") for path in (package / wing).rglob("*.py")]
    modules += [package / name for name in ("schema.py", "record.py", "judges/base.py")]
    assert len(modules) > 20
    for path in modules:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            source = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            assert not source.endswith(("worlds.shapes", "judges.shapes")), path
            assert "worlds.shapes." not in source, path
    texts = [*modules, *(package / "reports" / "templates").glob("*.html.j2")]
    for path in texts:
        words = path.read_text(encoding="utf-8")
        for word in (
            "shape_accuracy",
            "right shape",
            "Right shape",
            '"color"',
            '"background"',
            "SHAPES_WORLD",
            "HEADS",
        ):
            assert word not in words, f"{path}: {word}"


def test_records_are_told_apart_by_their_kind():
    kinds = [kind.kind for kind in FILES]
    assert len(set(kinds)) == len(kinds)
    assert set(kinds) <= record.Record._commands.keys()
