"""Training and export: what may move moves, nothing else does, and a run is a function of its seed."""

import dataclasses
import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from toys import names_in

from fastunlearn.methods import get_method
from fastunlearn.methods.recipe import UNCONDITIONAL
from fastunlearn.methods.rules import Alternate, Saddle, Sum
from fastunlearn.models.loading import load_model
from fastunlearn.models.runtime import import_diffusers
from fastunlearn.progress import Reporter
from fastunlearn.training import trainer as trainer_module
from fastunlearn.training.bank import build_bank
from fastunlearn.training.config import TrainConfig
from fastunlearn.training.engine import TorchEngine
from fastunlearn.training.export import overlay
from fastunlearn.training.plan import plan_training
from fastunlearn.training.plan_words import plan_lines
from fastunlearn.training.selection import select_parameters
from fastunlearn.training.trainer import Interrupted, Schedule, Trainer
from fastunlearn.training.unlearn import unlearn

TINY = {"forget": "star", "trajectories": 1, "trajectory_steps": 4, "micro_batch_size": 4, "evaluation_prompts": "none"}
UNET = "unet/diffusion_pytorch_model.safetensors"


def config(tmp_path, name="run", **changes):
    return TrainConfig(output=str(tmp_path / name), **{**TINY, "steps": 3, **changes})


def weights(folder):
    return load_file(folder / "model" / UNET)


def make_trainer(tmp_path, method="ovw", rule=None, steps=4, **settings):
    """A trainer on a fresh bundled model, as `unlearn` builds it."""
    model = load_model("shapes", "cpu")
    plan = plan_training(config(tmp_path, method=method), get_method(method), model)
    bank = build_bank(model, plan.recipe, plan.bank)
    engine = TorchEngine(model.denoiser, plan.selection, learning_rate=1e-3, **settings)
    schedule = Schedule(steps, micro_batch_size=4, seed=0, log_every=1, checkpoint_every=0)
    return Trainer(model, bank, rule or plan.recipe.rule, engine, schedule, tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run with checkpoints, for the tests that only look."""
    folder = tmp_path_factory.mktemp("finished")
    unlearn(config(folder, steps=4, checkpoint_every=1, log_every=1))
    return folder / "run"


def test_what_is_not_selected_keeps_its_bytes(finished, bundled):
    original, trained = load_file(bundled.source / UNET), weights(finished)
    selected = set(select_parameters(bundled, "cross-attention-kv"))
    assert original.keys() == trained.keys()
    for name, before in original.items():
        after = trained[name]
        assert before.dtype == after.dtype
        if name not in selected:
            assert torch.equal(before.view(torch.int16), after.view(torch.int16)), name
    for path in sorted(bundled.source.rglob("*")):
        relative = path.relative_to(bundled.source)
        if path.is_file() and relative.as_posix() != UNET:
            assert (finished / "model" / relative).read_bytes() == path.read_bytes(), relative


def test_every_selected_tensor_moves(finished, bundled):
    original, trained = load_file(bundled.source / UNET), weights(finished)
    for name in select_parameters(bundled, "cross-attention-kv"):
        assert not torch.equal(original[name], trained[name]), name


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_small_rates_are_not_lost_to_rounding(tmp_path, precision):
    """ESD's bf16 weights lose most updates of 5e-5; float32 weights must take a step of that size everywhere."""
    run = make_trainer(tmp_path, steps=1, mixed_precision=precision)
    for group in run.engine.optimizer.param_groups:
        group["lr"] = 5e-5
    before = {name: p.detach().clone() for name, p in run.engine.parameters.items()}
    run.run()
    moved = [(p - before[name]).ne(0).float().mean().item() for name, p in run.engine.parameters.items()]
    assert min(moved) > 0.9


def test_the_exported_pipeline_is_the_trained_module(finished, tmp_path):
    run = make_trainer(tmp_path, steps=2)
    run.run()
    run.engine.export(run.model, tmp_path / "model")
    reloaded = load_model(str(tmp_path / "model"), "cpu")
    for name, parameter in run.model.denoiser.named_parameters():
        assert torch.equal(parameter, dict(reloaded.denoiser.named_parameters())[name]), name
    pipeline = import_diffusers().DiffusionPipeline.from_pretrained(finished / "model", safety_checker=None)
    assert type(pipeline).__name__ == "StableDiffusionPipeline"


def test_an_export_that_finds_no_tensor_says_so(tmp_path, bundled):
    with pytest.raises(ValueError, match="no tensor"):
        overlay(bundled.source / "vae", {"not.there": torch.zeros(1)})


def test_the_same_seed_gives_the_same_weights(tmp_path, finished):
    unlearn(config(tmp_path, steps=4, checkpoint_every=0))
    ours, theirs = weights(tmp_path / "run"), weights(finished)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    unlearn(config(tmp_path, "other", steps=4, seed=1))
    assert any(not torch.equal(tensor, theirs[name]) for name, tensor in weights(tmp_path / "other").items())


def test_an_interrupted_run_ends_like_one_that_was_not(tmp_path, finished):
    class Stop(Reporter):
        def training(self, step, total, metrics):
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="step 2 of 4"):
        unlearn(config(tmp_path, steps=4, log_every=1, checkpoint_every=0), reporter=Stop())
    assert not (tmp_path / "run" / "model").exists()
    unlearn(config(tmp_path, steps=4, log_every=1, checkpoint_every=0, resume=True))
    ours, theirs = weights(tmp_path / "run"), weights(finished)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_a_damaged_newest_checkpoint_is_an_error_that_names_it(tmp_path, finished):
    import shutil

    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step-4" / "rank-0.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="step-4 is damaged"):
        unlearn(config(tmp_path, steps=4, resume=True, checkpoint_every=1, log_every=1))


def test_resuming_another_run_is_an_error_that_names_the_setting(tmp_path, finished):
    import shutil

    shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(ValueError, match="learning_rate"):
        unlearn(config(tmp_path, steps=4, learning_rate=0.5, resume=True))


def test_two_checkpoints_are_kept(finished):
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["step-3", "step-4"]


def test_a_diverged_run_stops_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    genuine, calls = trainer_module.noise_pred_loss, []

    def poisoned(noise_pred, *args, **kwargs):
        calls.append(1)
        return genuine(noise_pred * (float("nan") if len(calls) > 4 else 1.0), *args, **kwargs)

    monkeypatch.setattr(trainer_module, "noise_pred_loss", poisoned)
    with pytest.raises(ValueError, match=r"not a finite number by step 3.*step-2"):
        unlearn(config(tmp_path, steps=6, checkpoint_every=1, log_every=3))
    saved = tmp_path / "run" / "checkpoints" / "step-2" / "rank-0.safetensors"
    assert all(tensor.isfinite().all() for tensor in load_file(saved).values())
    assert not (tmp_path / "run" / "model").exists()


def test_alternate_takes_two_updates_a_step_and_sum_one(tmp_path, monkeypatch):
    for rule, updates in ((Alternate(), 2), (Sum(), 1)):
        run = make_trainer(tmp_path, rule=rule, steps=3)
        count = []
        step = run.engine.step
        monkeypatch.setattr(run.engine, "step", lambda step=step, count=count: count.append(1) or step())
        run.run()
        assert len(count) == 3 * updates


def test_the_loss_of_a_step_is_the_weighted_sum_of_its_roles(tmp_path):
    run = make_trainer(tmp_path, rule=Sum(retain_weight=3.0), steps=1)
    seen = {}
    run.run(lambda step, metrics: seen.update(metrics))
    assert seen["loss"] == pytest.approx(seen["forget_loss"] + 3.0 * seen["retain_loss"], rel=1e-5)


def test_a_rows_weight_multiplies_its_loss_and_its_gradient(tmp_path):
    """Twice the weight on every row is twice the loss of its role."""
    logged = {}
    for weight in (1.0, 2.0):
        run = make_trainer(tmp_path / str(weight), rule=Sum(retain_weight=3.0), steps=1, max_grad_norm=1e9)
        run.checkpoints.parent.mkdir(parents=True, exist_ok=True)
        run.bank.weights[run.bank.role_rows["forget"]] = weight
        logged[weight] = seen = {}
        run.run(lambda step, metrics, seen=seen: seen.update(metrics))
    assert logged[2.0]["forget_loss"] == pytest.approx(2 * logged[1.0]["forget_loss"], rel=1e-5)
    assert logged[2.0]["retain_loss"] == pytest.approx(logged[1.0]["retain_loss"], rel=1e-5)
    assert logged[2.0]["grad_norm"] == pytest.approx(2 * logged[1.0]["grad_norm"], rel=1e-3)


def test_every_forget_prompt_takes_part_unless_fewer_trajectories_are_asked_for(tmp_path, bundled):
    """Here are 50 forget prompts, more than ESD's default of trajectories on the bundled model, and 13 to keep.

    These have ten trajectories more on which the unconditional is held: no prompts of the user's, so none is counted.
    """
    forget = ";".join(f"a star of kind {n}" for n in range(50))
    retain = ";".join(f"a ring of kind {n}" for n in range(13))
    given = {"forget_prompts": forget, "retain_prompts": retain, "trajectories": None}
    for method, changes, taking in (
        ("esd", {}, (50, 0)),
        ("esd", {"trajectories": 5}, (5, 0)),
        ("ovw", {}, (50, 13)),
        ("ovw", {"trajectories": 60}, (50, 13)),
        ("ovw", {"trajectories": 3}, (3, 1)),
        ("ovw", {"trajectories": 22}, (22, 12)),
    ):
        plan = plan_training(config(tmp_path, method=method, **{**given, **changes}), get_method(method), bundled)
        rows = [row for row, _ in plan.bank.assignments if row.condition != UNCONDITIONAL]
        used = [{row.trajectory for row in rows if row.role == role} for role in ("forget", "retain")]
        assert tuple(map(len, used)) == taking
        lines = {line[:6]: line for line in plan_lines(plan)}
        for (told, all_of_them, wanted), count in zip((("forget", 50, 50), ("keep  ", 13, 23)), taking, strict=True):
            left_out = f"{count} of {all_of_them} take part; `--trajectories {wanted}` for all"
            assert (left_out in lines.get(told, "")) == (0 < count < all_of_them)


def test_prompts_that_are_read_in_part_are_told(tmp_path, bundled):
    """Forget prompts are refused; of the others the plan names those that take part."""
    long = "a ring " * 10
    given = {"retain_prompts": f"{long};a heart", "trajectories": 2, "anchor": "b " * 20}
    for method in ("ovw", "uce"):
        settings = given | ({"steps": None} if method == "uce" else {})
        plan = plan_training(config(tmp_path, method=method, **settings), get_method(method), bundled)
        assert long.strip() in plan.cut
        (line,) = [line for line in plan_lines(plan) if line.startswith("cut")]
        assert "prompts are longer than the model reads, and read in part: " in line
    plan = plan_training(config(tmp_path, retain_prompts="a heart;a ring"), get_method("ovw"), bundled)
    assert plan.cut == ()
    assert not any(line.startswith("cut") for line in plan_lines(plan))


def test_a_stray_folder_among_the_checkpoints_and_a_stray_line_are_passed_over(tmp_path, finished):
    import shutil

    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step-abc").mkdir()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": "four"}\n{"step": true, "loss": 1}\n[4]\n{"st')
    run = make_trainer(tmp_path)
    run.checkpoints, run.metrics_path = tmp_path / "run" / "checkpoints", tmp_path / "run" / "metrics.jsonl"
    run.resume()
    assert run.step == 4
    assert [json.loads(line)["step"] for line in run.metrics_path.read_text().splitlines()] == [1, 2, 3, 4]


def test_retain_rows_start_at_zero_loss(tmp_path):
    """Student and teacher agree before training: self-distillation has nothing to correct yet."""
    run = make_trainer(tmp_path, method="placebo", steps=1)
    seen = {}
    run.run(lambda step, metrics: seen.update(metrics))
    assert seen["retain_loss"] < 1e-9


def test_the_dual_rises_below_the_margin_and_falls_above_it(tmp_path):
    run = make_trainer(tmp_path, method="saddle", steps=1)
    assert isinstance(run.rule, Saddle)
    start = run.state["dual"].item()
    run.run()
    risen = run.state["dual"].item()
    assert risen > start
    run.state["margin"].fill_(1e9)  # it must be fallen to, and is
    run.schedule = dataclasses.replace(run.schedule, steps=2)
    run.run()
    assert run.state["dual"].item() < risen


def test_saddle_starts_one_unit_from_its_reference(tmp_path):
    run = make_trainer(tmp_path, method="saddle", steps=1)
    run.schedule = dataclasses.replace(run.schedule, micro_batch_size=2 * len(run.bank.role_rows["forget"]))
    seen = {}
    run.run(lambda step, metrics: seen.update(metrics))
    assert seen["forget_loss"] == pytest.approx(run.bank.way_to_go(), rel=1e-3)


def test_identity_exports_the_original(tmp_path, bundled):
    unlearn(config(tmp_path, method="identity"))
    for path in bundled.source.rglob("*"):
        if path.is_file():
            assert (tmp_path / "run" / "model" / path.relative_to(bundled.source)).read_bytes() == path.read_bytes()


def test_a_run_leaves_its_files_and_no_scraps(finished):
    assert names_in(finished) == {
        "README.md",
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "model",
        "run-key.json",
        "run.json",
    }
    record = json.loads((finished / "run.json").read_text())
    assert record["rows"] == 8
    assert record["hashes"]["original"] != record["hashes"]["unlearned"]
    assert not list(finished.rglob("*.tmp"))


def test_a_linear_rate_falls_to_zero_and_a_constant_one_stays(tmp_path):
    for kind, expected in (("linear", [1e-3, 7.5e-4, 5e-4, 2.5e-4]), ("constant", [1e-3] * 4)):
        run = make_trainer(tmp_path, method="esd", steps=4)
        run.schedule = dataclasses.replace(run.schedule, lr_scheduler=kind)
        seen = []
        run.run(lambda step, metrics, run=run, seen=seen: seen.append(run.engine.optimizer.param_groups[0]["lr"]))
        assert seen == pytest.approx(expected)
