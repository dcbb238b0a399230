"""Evaluating as a user does: any kind of model, stopped and continued, shared by ranks, cached, to the same bits."""

import dataclasses
import inspect
import json
import os
import signal
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from outputs import files_of
from toys import NOISE, PROMPTS, SETTINGS, Brightness, MeanDifference, Reader, deaf, draw, names_in, run_record, shifted

from fastunlearn import EvaluateConfig, evaluate
from fastunlearn.distributed import Failure, World
from fastunlearn.errors import UserError
from fastunlearn.evaluation.evaluate import _record
from fastunlearn.evaluation.evaluator import Evaluator
from fastunlearn.evaluation.generators import as_source
from fastunlearn.evaluation.image_cache import ImageCache
from fastunlearn.evaluation.inputs import run_of
from fastunlearn.evaluation.journal import Journal, PairScores
from fastunlearn.evaluation.plan import Plan, PromptGroups
from fastunlearn.evaluation.ranks import Ranks
from fastunlearn.files.run_folder import claimed, own, prepare_output
from fastunlearn.models.sampling import SamplerSpec

GROUPED = [(prompt, "forget" if index < 3 else "near" if index < 7 else "far") for index, prompt in enumerate(PROMPTS)]


# ---- both ends of the scale ------------------------------------------------------------------------------------------


def test_a_model_against_itself_keeps_everything():
    result = evaluate(draw, draw, PROMPTS, **SETTINGS)
    assert {pair["distance"] for pair in result.pairs} == {0.0}
    assert result.summary["integrity"]["mean"] == 0.0
    assert result.summary["integrity"]["retention"] == 1.0
    low, high = result.summary["integrity"]["retention_ci95"]
    assert 1 - 4 / len(PROMPTS) < low < high == 1.0  # what so few prompts cannot exclude of others
    assert result.summary["controls"]["repeat"] == 0.0


def test_a_model_that_ignores_prompts_keeps_nothing():
    assert evaluate(draw, deaf, PROMPTS, **SETTINGS).summary["integrity"]["retention"] < 0


def test_a_model_that_redraws_from_other_noise_keeps_nothing_but_the_prompt():
    def redrawn(prompts, noise):
        return draw(prompts, noise.flip(2))

    assert evaluate(draw, redrawn, PROMPTS, **SETTINGS).summary["integrity"]["retention"] == pytest.approx(0, abs=0.05)


# ---- the same bits ---------------------------------------------------------------------------------------------------


def test_order_and_company_change_no_bit(tmp_path):
    models = {"a": shifted(3), "b": shifted(9)}
    evaluate(draw, models, GROUPED, output=tmp_path / "one", metrics=[Brightness()], **SETTINGS)
    evaluate(draw, models, GROUPED[::-1], output=tmp_path / "two", metrics=[Brightness()], **SETTINGS)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    alone = evaluate(draw, {"b": shifted(9)}, GROUPED, **SETTINGS)
    assert alone.pairs == [json.loads(line) for line in (tmp_path / "one" / "b" / "pairs.jsonl").open()]


def plan_of(function=draw, groups=GROUPED, **changes):
    source = as_source(function, SamplerSpec(micro_batch_size=4), noise_shape=NOISE)
    sources = {"a": as_source(shifted(5), SamplerSpec(micro_batch_size=4), noise_shape=NOISE)}
    settings = {"seeds_per_prompt": 3, "metrics": [Brightness()]} | changes
    return Plan(source, sources, PromptGroups.of(groups, None), MeanDifference(), **settings)


def by_ranks(folder, world_size, order):
    """The summary and pairs of an evaluation that so many ranks shared, one after the other."""
    plan = plan_of()
    journals = {rank: Journal(folder, rank, world_size) for rank in range(world_size)}
    journals[0].begin(plan.spec(), "", plan.grouped, resume=False)
    for rank in order:
        if rank:
            journals[rank].join(plan.spec())
        with Evaluator(plan) as evaluator:
            _record(plan, evaluator, journals[rank], Ranks(World(rank, world_size), True))
    Ranks(World(0, world_size), True).wait(journals[0].folder)
    with Evaluator(plan) as evaluator:
        result = evaluator.conclude(PairScores.merge(list(journals[0].batches())), {}).results[0]
    for journal in journals.values():
        journal.close()
    return result.summary, result.pairs


def test_any_number_of_ranks_gives_the_same_bits(tmp_path):
    alone = by_ranks(tmp_path / "1", 1, [0])
    assert by_ranks(tmp_path / "2", 2, [1, 0]) == alone
    assert by_ranks(tmp_path / "3", 3, [2, 0, 1]) == alone
    assert len(alone[1]) == 3 * len(PROMPTS)


def test_finishing_a_batch_beside_the_next_changes_no_bit(tmp_path, monkeypatch):
    """As on a GPU: decoding, scoring and writing run in a thread of their own."""
    settings = {"seeds_per_prompt": 2, "metrics": [Brightness()], **SETTINGS}
    evaluate(draw, shifted(5), GROUPED, output=tmp_path / "one", **settings)
    threads = set()
    monkeypatch.setattr("fastunlearn.evaluation.evaluator._AtOnce", lambda: ThreadPoolExecutor(1))
    genuine = Evaluator._score
    monkeypatch.setattr(Evaluator, "_score", lambda *a: threads.add(threading.current_thread().name) or genuine(*a))
    evaluate(draw, shifted(5), GROUPED, output=tmp_path / "two", **settings)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert threads
    assert threading.main_thread().name not in threads
    with pytest.raises(ValueError, match="check for NaN"):
        evaluate(draw, returning(lambda p: p / 255), GROUPED, output=tmp_path / "three", **settings)
    assert not (tmp_path / "three").exists()


SHAPES = {"prompts": "a red ring;a blue heart;a star;a green cross;a pink circle", "num_inference_steps": 1}
SHAPES |= {"batch_size": 2, "device": "cpu", "control_pairs": 2}


def test_the_cache_changes_no_bit_and_is_not_believed(bundled, tmp_path):
    def run(name, **cache):
        notes = []
        reporter = types.SimpleNamespace(stage=print, scoring=lambda *_: None, note=notes.append)
        models = bundled, {"same": bundled}
        evaluate(*models, output=tmp_path / name, metric=MeanDifference(), reporter=reporter, **SHAPES, **cache)
        return files_of(tmp_path / name), notes

    cache = {"cache": tmp_path / "cache"}
    plain, cold, warm = run("plain"), run("cold", **cache), run("warm", **cache)
    assert plain == cold == warm
    entries = sorted((tmp_path / "cache").rglob("*.image"))
    assert len(entries) == 10, "five prompts, two seeds"
    # One damaged, one that belongs to another key, one cut short.
    content = bytearray(entries[0].read_bytes())
    content[-1] ^= 1
    entries[0].write_bytes(content)
    entries[1].write_bytes(entries[2].read_bytes())
    entries[3].write_bytes(entries[3].read_bytes()[:40])
    again, notes = run("again", **cache)
    assert again == plain[0]
    assert notes == ["3 entries of the cache were damaged or foreign and were made anew"]
    healed = ImageCache(tmp_path / "cache", 10**9)
    assert all(healed.load(path.parent.name + path.stem) is not None for path in entries)
    assert healed.rejected == 0


def test_another_model_finds_nothing_in_the_cache(bundled, pipeline_copy):
    spec = SamplerSpec(num_inference_steps=1, micro_batch_size=2)
    config = pipeline_copy / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.5}))
    states = [as_source(bundled, spec).state(), as_source(pipeline_copy, spec, device="cpu").state()]
    states.append(as_source(bundled, dataclasses.replace(spec, guidance_scale=2.0)).state())
    assert len({json.dumps(state, sort_keys=True) for state in states}) == 3


def test_the_cache_stays_below_its_limit_and_drops_the_longest_unused(tmp_path):
    image = torch.zeros(3, 20, 20, dtype=torch.uint8)
    cache = ImageCache(tmp_path, 100_000)
    for index in range(300):
        cache.store(f"{index:064x}", image)
        cache.load(f"{0:064x}")
        size = sum(path.stat().st_size for path in tmp_path.rglob("*.image"))
        assert size <= 100_000
    assert cache.load(f"{0:064x}") is not None, "in use all the time"
    assert cache.load(f"{1:064x}") is None
    assert cache.load(f"{299:064x}") is not None
    assert not list(tmp_path.rglob("*.tmp"))


# ---- stopped and continued -------------------------------------------------------------------------------------------


def stopping(after, error):
    """A model that fails after so many batches, and a list of the prompts it was asked for."""
    asked = []

    def function(prompts, noise):
        if len(asked) // 4 >= after:
            raise error
        asked.extend(prompts)
        return shifted(5)(prompts, noise)

    function.__name__ = "shifted"
    return function, asked


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), RuntimeError("x")])
def test_a_stopped_evaluation_goes_on_without_repeating_a_pair(tmp_path, error):
    settings = SETTINGS | {"metrics": [Brightness()], "seeds_per_prompt": 2}
    evaluate(draw, shifted(5), GROUPED, output=tmp_path / "whole", **settings)
    broken, asked = stopping(3, error)
    with pytest.raises(type(error)):
        evaluate(draw, broken, GROUPED, output=tmp_path / "run", **settings)
    assert names_in(tmp_path / "run") == {"journal"}
    journal = tmp_path / "run" / "journal" / "0.jsonl"
    done = journal.read_bytes()
    assert done.count(b"\n") == len(asked) == 12
    # As a kill leaves it: half a line, and rows of a metric without theirs.
    journal.write_bytes(done + b'["half a li')
    with (tmp_path / "run" / "journal" / "0.brightness.rows").open("ab") as rows:
        rows.write(b"\0" * 12)
    rest, others = stopping(10**6, error)
    evaluate(draw, rest, GROUPED, output=tmp_path / "run", resume=True, **settings)
    images = len(asked) + len(set(PROMPTS)) * 2 - 12
    assert len(others) >= len(PROMPTS) * 2 - 12, "what was left"
    assert images == len(PROMPTS) * 2
    assert files_of(tmp_path / "run") == files_of(tmp_path / "whole")


def test_resuming_asks_for_nothing_that_is_done(tmp_path):
    """The report's images apart, which are drawn once more where they are not held."""
    broken, asked = stopping(2, RuntimeError("x"))
    prompts = [f"prompt {index}" for index in range(40)]
    with pytest.raises(RuntimeError, match="x"):
        evaluate(draw, broken, prompts, output=tmp_path / "run", **SETTINGS)
    rest, others = stopping(10**6, RuntimeError("x"))
    plan_keys = set(prompts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "_illustrated", lambda self, results, records, wanted: None)
        patch.setattr("fastunlearn.evaluation.evaluate.write_results", lambda folder, result: None)
        evaluate(draw, rest, prompts, output=tmp_path / "run", resume=True, **SETTINGS)
    assert not set(asked) & set(others)
    assert set(asked) | set(others) == plan_keys


def test_resuming_something_else_is_refused_by_the_setting(tmp_path):
    broken, _ = stopping(1, RuntimeError("x"))
    with pytest.raises(RuntimeError, match="x"):
        evaluate(draw, broken, PROMPTS, output=tmp_path / "run", **SETTINGS)
    before = files_of(tmp_path)
    for changes, said in (
        ({"seeds_per_prompt": 2}, "has seeds_per_prompt = 1, now it is 2"),
        ({"batch_size": 8}, "has micro_batch_size = 4, now it is 8"),
    ):
        with pytest.raises(ValueError, match=said):
            evaluate(draw, broken, PROMPTS, output=tmp_path / "run", resume=True, **SETTINGS | changes)
    with pytest.raises(ValueError, match="has prompts = "):
        evaluate(draw, broken, PROMPTS[1:], output=tmp_path / "run", resume=True, **SETTINGS)
    assert files_of(tmp_path) == before
    with pytest.raises(ValueError, match="holds no run"):
        evaluate(draw, draw, PROMPTS, output=tmp_path / "new", resume=True, **SETTINGS)
    evaluate(draw, draw, PROMPTS, output=tmp_path / "finished", **SETTINGS)
    with pytest.raises(ValueError, match="holds no unfinished evaluation"):
        evaluate(draw, draw, PROMPTS, output=tmp_path / "finished", resume=True, **SETTINGS)


def test_a_second_evaluation_of_one_folder_is_refused(tmp_path):
    with claimed(tmp_path / "run"):
        prepare_output(tmp_path / "run", "evaluate", overwrite=False)
        (tmp_path / "run" / "journal").mkdir()
        for how in ("resume", "overwrite"):
            with pytest.raises(ValueError, match="another command is writing"):
                evaluate(draw, draw, PROMPTS, output=tmp_path / "run", **{how: True}, **SETTINGS)


def test_an_earlier_result_stays_until_there_is_a_new_one(tmp_path):
    evaluate(draw, shifted(5), PROMPTS, output=tmp_path / "run", **SETTINGS)
    before = files_of(tmp_path / "run")
    broken, _ = stopping(2, RuntimeError("x"))
    with pytest.raises(RuntimeError, match="x"):
        evaluate(draw, broken, PROMPTS, output=tmp_path / "run", overwrite=True, **SETTINGS)
    now = files_of(tmp_path / "run")
    assert {name: content for name, content in now.items() if not name.startswith("journal")} == before
    evaluate(draw, draw, PROMPTS, output=tmp_path / "run", overwrite=True, **SETTINGS)
    assert files_of(tmp_path / "run").keys() == before.keys()
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["integrity"]["mean"] == 0


def command(folder, *more):
    prompts = ";".join(f"a {color} {shape}" for color in ("red", "blue", "pink") for shape in ("ring", "star", "heart"))
    settings = ["--original", "shapes", "--unlearned", "shapes", "--forget", "star", "--device", "cpu"]
    settings += ["--prompts", prompts, "--num-inference-steps", "1", "--batch-size", "2", "--control-pairs", "2"]
    settings += ["--output", str(folder)]
    return [sys.executable, "-m", "fastunlearn", "evaluate", *(settings if not more else [*more, str(folder)])]


@pytest.mark.slow
def test_killed_it_continues_and_several_processes_give_the_same_bits(tmp_path):
    process = subprocess.Popen(command(tmp_path / "killed"), stdout=subprocess.DEVNULL)
    journal = tmp_path / "killed" / "journal" / "0.jsonl"
    try:
        deadline = time.monotonic() + 300
        while not journal.exists() or journal.read_bytes().count(b"\n") < 4:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    finally:
        process.kill()
    assert names_in(tmp_path / "killed") == {"journal"}, "killed in the middle"
    subprocess.run(command(tmp_path / "killed", "--resume", "--output"), check=True, timeout=300)
    subprocess.run([*command(tmp_path / "three"), "--num-processes", "3"], check=True, timeout=300)
    assert len(files_of(tmp_path / "killed")) == 4
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "three")


@pytest.mark.slow
def test_launched_ranks_meet_in_the_folder(tmp_path):
    started = [
        subprocess.Popen(
            command(tmp_path / "run"), env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2"}, stdout=subprocess.PIPE
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["integrity"]["n_pairs"] == 9
    assert started[1].stdout.read() == b"", "only the first rank speaks"


def test_a_rank_that_fails_is_told(tmp_path):
    class Failed:
        def failed(self):
            return Failure(1, 2)

    (tmp_path / "1.log").write_text("noise\nfastunlearn: the disk is full.\n\n")
    ranks = Ranks(World(0, 2), False, Failed(), tmp_path)
    with pytest.raises(UserError, match=r"^rank 1 of 2 failed: the disk is full\.$"):
        ranks.wait(tmp_path)


@pytest.mark.slow
def test_a_hundred_thousand_pairs_stay_under_one_gigabyte(tmp_path):
    script = f"""
import sys
from pathlib import Path
sys.path.insert(0, {os.path.dirname(__file__)!r})
from toys import NOISE, MeanDifference, draw, shifted, names_in
from fastunlearn import evaluate
prompts = [f"a thing of number {{place}} on a background" for place in range(50_000)]
found = evaluate(draw, [shifted(4), shifted(9, "more")], prompts, output={str(tmp_path / "run")!r},
                 metric=MeanDifference(), noise_shape=NOISE, batch_size=500, seeds_per_prompt=2)
assert found.summary["integrity"]["n_pairs"] == 100_000
# Not getrusage's ru_maxrss, in which a new process starts at the peak of the one that started it.
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) * 1024 < 1e9


# ---- what can be given -----------------------------------------------------------------------------------------------


def test_the_function_and_the_command_have_the_same_settings():
    signature = inspect.signature(evaluate).parameters
    fields = {field.name: field for field in dataclasses.fields(EvaluateConfig)}
    assert fields.keys() | {"noise_shape", "reporter"} == signature.keys()
    for name, field in fields.items():
        if field.default is not dataclasses.MISSING:
            assert signature[name].default == field.default, name


def test_folders_loaded_pipelines_and_functions_are_judged_alike(bundled):
    """A loaded pipeline and a function that wraps the same model give a folder's distances."""
    from fastunlearn.evaluation.generators import PipelineSource
    from fastunlearn.models.runtime import import_diffusers

    pipeline = import_diffusers().StableDiffusionPipeline.from_pretrained(bundled.source, safety_checker=None)
    source = PipelineSource(bundled, SamplerSpec(num_inference_steps=1, micro_batch_size=2))

    def wrapped(prompts, noise):
        return source.finish(source.begin(prompts, noise))

    given = {"pipeline": pipeline, "function": wrapped, "gold": "shapes-gold-star"}
    found = evaluate(bundled, given, **SHAPES)
    assert [result.summary["integrity"]["retention"] for result in found.results[:2]] == [1.0, 1.0]
    assert found.results[2].summary["integrity"]["retention"] < 1
    hashes = [result.summary["spec"]["hashes"]["unlearned"] for result in found.results]
    assert len(set(hashes)) == 3
    assert evaluate(pipeline, {"same": bundled}, **SHAPES).summary["integrity"]["mean"] == 0


def test_two_models_placebo_and_groups_are_written_side_by_side(tmp_path):
    result = evaluate(
        draw,
        [shifted(3, "mild"), shifted(20, "harsh")],
        GROUPED,
        placebo=shifted(1),
        output=tmp_path / "run",
        metrics=[Brightness()],
        **SETTINGS,
    )
    names = names_in(tmp_path / "run")
    assert names == {"mild", "harsh", "placebo", "grid.png", "report.html"}
    mild, harsh, placebo = (
        json.loads((tmp_path / "run" / name / "evaluation.json").read_text()) for name in ("mild", "harsh", "placebo")
    )
    assert [one["integrity"]["retention"] for one in (placebo, mild, harsh)] == sorted(
        [one["integrity"]["retention"] for one in (placebo, mild, harsh)], reverse=True
    )
    assert set(mild["groups"]) == {"forget", "near", "far"}
    assert mild["groups"]["near"]["n_prompts"] == 4
    assert "retention" not in mild["groups"]["forget"]
    assert list(mild["integrity"]["changed"]) == ["numeric", "placebo", "redrawn"]
    assert mild["controls"]["placebo"]["mean"] == placebo["integrity"]["mean"]
    gap = mild["integrity"]["minus_placebo"]
    assert gap["mean"] == pytest.approx(mild["integrity"]["mean"] - placebo["integrity"]["mean"])
    assert "minus_placebo" not in placebo["integrity"]
    assert mild["metrics"]["brightness"]["original"] == harsh["metrics"]["brightness"]["original"]
    assert mild["metrics"]["brightness"]["unlearned"] < harsh["metrics"]["brightness"]["unlearned"]
    assert json.loads(result.to_json()).keys() == {"mild", "harsh", "placebo"}
    evaluate(draw, draw, PROMPTS, output=tmp_path / "run", overwrite=True, **SETTINGS)
    assert "mild" not in names_in(tmp_path / "run")


def test_no_interval_of_a_distance_reaches_below_zero():
    def one(prompts, noise):
        """Changes a single prompt, and that one much."""
        return torch.where(
            torch.tensor([p == PROMPTS[5] for p in prompts])[:, None, None, None], 0, draw(prompts, noise)
        )

    result = evaluate(draw, lambda *given: one(*given).to(torch.uint8), GROUPED, **SETTINGS).summary
    assert result["integrity"]["ci95"][0] == result["groups"]["near"]["ci95"][0] == 0 < result["integrity"]["ci95"][1]
    assert result["integrity"]["retention"] < result["integrity"]["retention_ci95"][1] < 1
    assert all(0 <= end <= 1 for limit in result["integrity"]["changed"].values() for end in limit["ci95"])


def test_a_floor_above_zero_is_what_nobody_is_charged_for():
    def rough(prompts, noise):
        """Rounding that depends on the size of the batch."""
        return (draw(prompts, noise).int() + (len(prompts) == 2)).clamp(0, 255).to(torch.uint8)

    result = evaluate(rough, draw, PROMPTS, **SETTINGS).summary
    assert result["integrity"]["floor"] == pytest.approx(1 / 255, rel=0.1)
    assert result["integrity"]["retention"] == 1.0
    everywhere = evaluate(rough, shifted(9), PROMPTS, **SETTINGS | {"control_pairs": 100}).summary
    assert everywhere["controls"]["numeric"]["n_pairs"] == len(PROMPTS)
    span = everywhere["integrity"]["ceiling"] - everywhere["integrity"]["floor"]
    expected = 1 - (everywhere["integrity"]["mean"] - everywhere["integrity"]["floor"]) / span
    assert everywhere["integrity"]["retention"] == pytest.approx(expected)


def test_the_report_can_be_had_as_json_frame_and_page(tmp_path, monkeypatch):
    result = evaluate(draw, shifted(5), GROUPED, **SETTINGS)
    assert json.loads(result.to_json())["shifted"] == result.summary
    result.html(tmp_path / "page.html")
    assert "<!doctype html>" in (tmp_path / "page.html").read_text()
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=list))
    rows = result.to_dataframe()
    assert rows[0] == {"model": "shifted", **result.pairs[0]}
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ValueError, match="needs the package pandas"):
        result.to_dataframe()


def test_ten_thousand_prompts_with_every_oddity_of_a_file(tmp_path):
    lines = [f"Ding Nummer {index} – größer als ‘{index}’, 物" for index in range(9_997)]
    text = "\ufeff" + "\r\n".join(["", *lines, "  ", lines[0], "a\u2028b", "c\x0bd", "", ""])
    (tmp_path / "prompts.txt").write_bytes(text.encode())
    result = evaluate(draw, draw, tmp_path / "prompts.txt", **SETTINGS | {"batch_size": 500})
    assert result.summary["integrity"]["n_pairs"] == len(lines) + 2
    assert {"a\u2028b", "c\x0bd", lines[0]} <= {pair["prompt"] for pair in result.pairs}


def test_the_empty_prompt_is_a_group_of_its_own(tmp_path):
    (tmp_path / "prompts.csv").write_text("prompt,group\na,near\nb,near\n,empty\n,near\n")
    result = evaluate(draw, shifted(5), tmp_path / "prompts.csv", seeds_per_prompt=2, **SETTINGS)
    assert result.summary["groups"]["empty"]["n_pairs"] == 2
    assert result.summary["groups"]["empty"]["ci95"] is None
    assert result.summary["groups"]["near"]["n_prompts"] == 2


# ---- mistakes --------------------------------------------------------------------------------------------------------


def returning(images):
    def function(prompts, noise):
        return images(draw(prompts, noise))

    return function


BAD_PICTURES = {
    "floats": (returning(lambda p: p / 255), r"must return images \(B, 3, H, W\) as uint8, got torch.float32"),
    "nan": (returning(lambda p: p.float() * float("nan")), "check for NaN"),
    "gray": (returning(lambda p: p[:, :1]), r"got torch.uint8 \(4, 1, 8, 8\)"),
    "too few": (returning(lambda p: p[:2]), "got 4 prompts and returned 2 images"),
    "another size": (returning(lambda p: p[:, :, :4]), "generates images of 3x4x8, the original of 3x8x8"),
    "nothing": (returning(lambda p: None), "got NoneType"),
}


@pytest.mark.parametrize(("function", "said"), BAD_PICTURES.values(), ids=BAD_PICTURES)
def test_images_that_are_none_are_refused(tmp_path, function, said):
    with pytest.raises(ValueError, match=said):
        evaluate(draw, function, PROMPTS, output=tmp_path / "run", **SETTINGS)
    assert not list(tmp_path.iterdir())


def test_nan_weights_are_no_black_images(bundled):
    from fastunlearn.models.loading import load_model

    broken = load_model("shapes", "cpu")
    broken.denoiser.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="generates images that are NaN or infinite"):
        evaluate(bundled, {"broken": broken}, **SHAPES)


CALLS = {
    "no noise shape": ((draw, draw), {"noise_shape": None}, "`noise_shape` is missing"),
    "no model": ((draw, []), {}, "name at least one unlearned pipeline"),
    "no kind of model": ((draw, 3), {}, "a model is a folder, a name, a diffusers pipeline or a function"),
    "resume without a folder": ((draw, draw), {"resume": True}, "`output` is missing"),
    "processes without a folder": ((draw, draw), {"num_processes": 2}, "`output` is missing"),
    "processes with functions": ((draw, draw), {"num_processes": 2, "output": "run"}, "cannot share objects"),
    "cache of a function": ((draw, draw), {"cache": "cache"}, "which a function has not"),
    "no number": ((draw, draw), {"batch_size": 0}, "`--batch-size` must be at least 1"),
    "prompt of numbers": ((draw, draw, [(1, "near"), "b"]), {}, "a prompt is a text"),
    "prompt in two groups": ((draw, draw, [("a", "near"), ("a", "far"), "b"]), {}, "is in two groups"),
    "one prompt": ((draw, draw, ["a"]), {}, "at least 2 retain prompts"),
}


@pytest.mark.parametrize(("given", "settings", "said"), CALLS.values(), ids=CALLS)
def test_a_mistaken_call_says_what_to_do(tmp_path, monkeypatch, given, settings, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, TypeError), match=said):
        evaluate(*given, *([] if len(given) > 2 else [PROMPTS]), **SETTINGS | settings)
    assert not list(tmp_path.iterdir())


def test_launched_and_started_ranks_exclude_each_other(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="`--num-processes` 3 within 2 launched processes"):
        evaluate("shapes", "shapes", forget="star", output=tmp_path / "run", num_processes=3)
    with pytest.raises(ValueError, match="Empty the folder first"):
        evaluate("shapes", "shapes", forget="star", output=tmp_path / "run", overwrite=True)


def test_a_run_is_known_by_its_record(tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "model_index.json").write_text("{}")
    record = run_record(method="esd", concept="a [red] star")
    record.write(tmp_path / "run" / "run.json")
    for given in (tmp_path / "run", str(tmp_path / "run" / "model")):
        assert run_of(given) == record
    assert run_of(tmp_path) is None
    assert run_of("shapes") is None


def test_a_run_of_another_version_is_told_and_another_programs_record_is_not_read(tmp_path):
    model = tmp_path / "run" / "model"
    model.mkdir(parents=True)
    (model / "model_index.json").write_text("{}")
    path = tmp_path / "run" / "run.json"
    for foreign in ("", "[1]", '{"id": "abc", "schema": 7}', "{"):
        path.write_text(foreign)
        assert run_of(model) is None
    path.write_text('{"fastunlearn": "0.1.0", "method": "esd", "concept": "star"}')
    with pytest.raises(UserError, match=r"run\.json is of version 0\.1 or older.*`fastunlearn train`"):
        run_of(model)
    path.write_text(run_record().to_json().replace('"schema": 1', '"schema": 9'))
    with pytest.raises(UserError, match=r"has schema 9.* Update fastunlearn"):
        run_of(model)
    path.write_text("{")
    own(tmp_path / "run", "train")
    with pytest.raises(UserError, match="is damaged"):
        run_of(model)


# ---- names and texts of users ----------------------------------------------------------------------------------------


def without_hashes(content):
    """evaluation.json but for the hash of pairs.jsonl, and the hash that takes it in."""
    return {key: value for key, value in content.items() if key not in ("sha256", "pairs_sha256")}


def test_no_model_is_dropped_for_its_name(tmp_path):
    """Names that fold to one, that are ours, that differ in capitals, that are nothing or too long for a folder."""
    names = [
        "a b",
        "a-b",
        "A b",
        "journal",
        "report.html",
        "Evaluation.json",
        "../up",
        "  ",
        "-",
        "x" * 300,
        "物" * 300,
    ]
    models = {name: shifted(index) for index, name in enumerate(names)}
    result = evaluate(draw, models, PROMPTS, placebo=shifted(1), output=tmp_path / "run", **SETTINGS)
    found = [one.name for one in result.results]
    assert found[:3] == ["a-b", "a-b-again", "A-b-again-again"]
    assert found[3:7] == ["journal-model", "report.html-model", "Evaluation.json-model", "up"]
    assert found[-1] == result.placebo == "placebo"
    assert len({name.casefold() for name in found}) == len(names) + 1
    assert names_in(tmp_path / "run") == {*found, "grid.png", "report.html"}
    means = [one.evaluation.integrity.mean for one in result.results[:-1]]
    assert means == sorted(set(means)), "each has its own numbers"
    for one in result.results:
        assert without_hashes(json.loads((tmp_path / "run" / one.name / "evaluation.json").read_text())) == (
            without_hashes(one.summary)
        )
        assert len((tmp_path / "run" / one.name / "pairs.jsonl").read_text().splitlines()) == len(PROMPTS)
    again = evaluate(draw, models, PROMPTS, placebo=shifted(1), output=tmp_path / "run", overwrite=True, **SETTINGS)
    assert [one.name for one in again.results] == found


def test_a_model_called_placebo_does_not_displace_the_placebo():
    result = evaluate(draw, {"placebo": shifted(9)}, PROMPTS, placebo=shifted(1), **SETTINGS)
    assert [one.name for one in result.results] == ["placebo", "placebo-again"]
    assert result.placebo == "placebo-again"
    assert [one.evaluation.method for one in result.results] == ["placebo", "placebo"]
    assert result.results[0].evaluation.controls.placebo.mean == result.results[1].evaluation.integrity.mean


def test_a_table_holds_no_formulas(monkeypatch):
    evil = ["=HYPERLINK(1)", "+1", "-1+2", "@SUM(A1)", "a = b", "plain"]
    groups = [(prompt, "=cmd|x" if index else "near") for index, prompt in enumerate(evil)]
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=list))
    result = evaluate(draw, {"m": shifted(2)}, groups, judge=Reader(), forget="x", **SETTINGS)
    rows = result.to_dataframe()
    assert sorted(row["prompt"] for row in rows) == sorted(["'" + text for text in evil[:4]] + evil[4:])
    assert {row["group"] for row in rows} == {"near", "'=cmd|x"}
    assert {line["prompt"] for line in result.pairs} == set(evil), "records stay as they are"
    assert rows[0]["original.attributes.tint"] in Reader.vocabulary["tint"]
    assert all(isinstance(row["distance"], float) for row in rows)


def test_prompts_come_from_the_bundled_world_or_must_be_given():
    with pytest.raises(UserError, match="`--prompts` is missing: only the bundled model has prompts of its own"):
        evaluate(draw, draw, **SETTINGS)


def test_a_sampler_with_an_infinite_setting_is_evaluated(pipeline_copy, tmp_path):
    """DPM-Solver's config holds -inf, which is no JSON."""
    path = pipeline_copy / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    keep = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type"}
    config = {key: value for key, value in config.items() if key in keep}
    path.write_text(json.dumps(config | {"_class_name": "DPMSolverMultistepScheduler", "steps_offset": 1}))
    index = pipeline_copy / "model_index.json"
    parts = json.loads(index.read_text())
    index.write_text(json.dumps(parts | {"scheduler": ["diffusers", "DPMSolverMultistepScheduler"]}))
    settings = SHAPES | {"num_inference_steps": 3}
    result = evaluate(pipeline_copy, {"same": str(pipeline_copy)}, output=tmp_path / "out", **settings)
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert without_hashes(written) == without_hashes(result.summary)
    assert written["spec"]["sampler_config"]["lambda_min_clipped"] == "-inf"
    assert written["integrity"]["retention"] == 1.0
