"""What is left of the concept, measured on held-out rows: right, repeatable, and the end of a training."""

import itertools
import json

import pytest
import torch
from test_trainer import config, weights

from fastunlearn.errors import UserError
from fastunlearn.methods import get_method
from fastunlearn.methods.rules import Saddle
from fastunlearn.models.loading import load_model
from fastunlearn.reports.sentences import how_it_ended
from fastunlearn.schema import Ending, RunRecord
from fastunlearn.training.bank import build_bank
from fastunlearn.training.concept import make_concept
from fastunlearn.training.engine import TorchEngine
from fastunlearn.training.evidence import Evidence
from fastunlearn.training.plan import plan_training
from fastunlearn.training.plan_words import plan_lines
from fastunlearn.training.trainer import Trainer
from fastunlearn.training.unlearn import unlearn


def planned(tmp_path, method="ovw", model=None, **settings):
    model = model or load_model("shapes", "cpu")
    return model, plan_training(config(tmp_path, method=method, **settings), get_method(method), model)


def test_the_residual_is_the_formula_on_rows_of_its_own(tmp_path):
    """Computed anew from plain forwards, prompt by prompt, in float64."""
    model, plan = planned(tmp_path, stop_residual=0.1)
    evidence = Evidence(model, plan.evidence)
    assert evidence.measure(model.denoiser, {}, 16) == pytest.approx(1.0, abs=1e-6)  # nothing is forgotten yet
    weights_before = {name: value.clone() for name, value in model.denoiser.state_dict().items()}
    with torch.no_grad():
        for value in model.denoiser.parameters():
            value.mul_(1.01)
    student, teacher = 0.0, 0.0
    anchors = plan.concept.anchors
    for row in evidence.index.tolist():
        latents, timestep = evidence.bank.latents[row : row + 1], evidence.bank.timesteps[row : row + 1]
        prompt = evidence.bank.conditions.prompts[int(evidence.bank.condition[row])]
        answers = {}
        for name, state in (("student", None), ("teacher", weights_before)):
            trained = {key: value.clone() for key, value in model.denoiser.state_dict().items()}
            if state is not None:
                model.denoiser.load_state_dict(state)
            for asked in (prompt, anchors[prompt]):
                states = model.encode_texts([asked])
                answers[name, asked] = model.denoiser(
                    latents, timestep, encoder_hidden_states=states["encoder_hidden_states"]
                ).sample.double()
            model.denoiser.load_state_dict(trained)
        target = answers["teacher", anchors[prompt]]
        student += (answers["student", prompt] - target).square().sum().item()
        teacher += (answers["teacher", prompt] - target).square().sum().item()
    assert evidence.measure(model.denoiser, {}, 5) == pytest.approx(student / teacher, rel=1e-4)


def test_the_rows_are_held_out(tmp_path):
    """No latents of the evidence are any of training's, though the prompts may be."""
    model, plan = planned(tmp_path, stop_residual=0.1)
    held, trained = Evidence(model, plan.evidence).bank, build_bank(model, plan.recipe, plan.bank)
    assert not {tuple(one.flatten()[:8].tolist()) for one in held.latents} & {
        tuple(one.flatten()[:8].tolist()) for one in trained.latents
    }


def test_a_training_ends_on_evidence_and_says_so(tmp_path, cli):
    words = ["--method", "ovw", "--steps", "40", "--stop-residual", "0.9"]
    words += ["--trajectories", "2", "--trajectory-steps", "4"]
    answer = cli("train", "--forget", "star", *words, "--evaluation-prompts", "none", "--output", tmp_path / "run")
    assert answer.status == 0
    assert "at most 40 steps" in answer.out
    assert "looked at every 10 steps, and the rate has then got to 0" in answer.out
    ending = RunRecord.read(tmp_path / "run" / "run.json").ending
    assert ending.steps == 15  # met at 10, and half as many again for the rate to fall
    assert ending.steps_bound == 40
    assert ending.residual <= ending.stop_residual == 0.9
    assert f"ended after 15 of at most 40 steps: {ending.residual:.1%} of the concept is left" in answer.out
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 15
    assert lines[-1]["residual"] == pytest.approx(ending.residual)


def test_a_training_that_runs_out_of_steps_warns_in_its_last_line(tmp_path, cli):
    words = ["--method", "ovw", "--steps", "2", "--stop-residual", "0.001"]
    words += ["--trajectories", "1", "--trajectory-steps", "2"]
    answer = cli("train", "--forget", "star", *words, "--evaluation-prompts", "none", "--output", tmp_path / "run")
    assert answer.out.strip().splitlines()[-1].startswith("warning: the concept may not be gone: after all 2 steps")


@pytest.mark.parametrize(
    ("method", "scheduler", "bound", "rates"),
    [
        ("ovw", "linear", 40, [*(1 - n / 40 for n in range(10)), *(0.75 * (1 - n / 5) for n in range(5))]),
        ("ovw", "linear", 12, [*(1 - n / 12 for n in range(10)), *(2 / 12 * (1 - n / 2) for n in range(2))]),
        ("ovw", "constant", 40, None),
        ("esd", "linear", 40, [1 - n / 40 for n in range(20)]),
    ],
)
def test_once_it_is_met_a_falling_rate_gets_to_0(tmp_path, monkeypatch, method, scheduler, bound, rates):
    """Met at step 10: over five more steps, or those that the bound leaves.

    A constant rate ends at once, and so does a method that holds nothing; ESD's steps are small, so it looks at 20.
    """
    seen = []
    monkeypatch.setattr(TorchEngine, "scale_learning_rate", lambda engine, factor: seen.append(factor))
    settings = {"steps": bound, "stop_residual": 0.9, "lr_scheduler": scheduler, "learning_rate": 1e-3}
    settings |= {"method": method}
    ending = unlearn(config(tmp_path, **settings)).record.ending
    assert ending.steps == len(rates or range(10))
    assert seen == pytest.approx(rates or [])


def test_a_run_that_was_stopped_ends_where_it_would_have(tmp_path, monkeypatch):
    """Stopped at every checkpoint before the end, and behind it."""
    settings = {"steps": 40, "stop_residual": 0.9, "checkpoint_every": 4}
    whole = unlearn(config(tmp_path, "whole", **settings))

    class Stop(Exception):
        pass

    saved = Trainer.save

    def stopping(self):
        saved(self)
        raise Stop

    for name, stops in (("once", 1), ("twice", 2), ("while the rate falls", 3), ("behind", 4)):
        for turn in range(stops):
            monkeypatch.setattr(Trainer, "save", stopping)
            with pytest.raises(Stop):
                unlearn(config(tmp_path, name, **settings, resume=turn > 0))
        monkeypatch.setattr(Trainer, "save", saved)
        resumed = unlearn(config(tmp_path, name, **settings, resume=True))
        assert resumed.record.ending == whole.record.ending, name
        for key, value in weights(tmp_path / "whole").items():
            assert torch.equal(weights(tmp_path / name)[key], value), (name, key)


@pytest.mark.parametrize("method", ["neggrad", "placebo", "identity", "uce"])
def test_what_has_no_target_ends_by_its_steps(method, tmp_path):
    _, plan = planned(tmp_path, method=method, steps=None)
    assert plan.evidence is None
    assert not any(line.startswith("ends") for line in plan_lines(plan))


def test_saddles_residual_is_its_way_to_the_margin():
    saddle = Saddle(kappa=3.0)
    state = {"margin": torch.tensor(3.0)}
    assert [saddle.residual(error, 1.0, state) for error in (1.0, 2.0, 3.0, 9.0)] == [1.0, 0.5, 0.0, 0.0]
    saddle, state = Saddle(kappa=0.2), {"margin": torch.tensor(0.2)}
    left = [saddle.residual(error, 1.0, state) for error in (1.0, 0.6, 0.2, 0.1)]
    assert left == pytest.approx([1.0, 0.5, 0.0, 0.0], abs=1e-6)


def test_it_costs_at_most_a_tenth_of_the_training(tmp_path):
    for method, batch in (("ovw", 16), ("esd", 1), ("saddle", 4)):
        _, plan = planned(tmp_path, method=method, stop_residual=0.1, micro_batch_size=batch, steps=500)
        a_step = plan.loop_evaluations / 500
        assert plan.evidence.rows <= 0.1 * a_step * plan.evidence.every or plan.evidence.every == 10, method


def test_on_a_users_model_it_is_measured_where_people_would_name_it(tmp_path, pipeline_copy):
    settings = {"method": "esd", "stop_residual": 0.2, "forget": "star", "model": str(pipeline_copy)}
    model = load_model(str(pipeline_copy), "cpu")
    plan = plan_training(config(tmp_path, **settings), get_method("esd"), model)
    conditions = {row.condition for row in plan.evidence.recipe.rows}
    assert len(conditions) > 1
    assert all("star" in condition for condition in conditions)


def test_retain_prompts_are_proposed_where_the_user_has_none(tmp_path):
    """For a concept of the table its neighbors too; never the concept itself; and the empty prompt."""
    kept = {}
    for word in ("Van Gogh", "zebra finch"):
        concept = make_concept(config(tmp_path, forget=word, retain_prompts="auto"), get_method("ovw"), NoWorld(), None)
        kept[word] = concept.retain_prompts
        assert not concept.is_guided
        assert concept.retain_prompts[-1] == ""
        assert len(concept.retain_prompts) >= 10
        assert not any(word.lower() in prompt.lower() for prompt in concept.retain_prompts)
    assert any("Monet" in prompt for prompt in kept["Van Gogh"])
    model = load_model("shapes", "cpu")
    own = make_concept(config(tmp_path), get_method("ovw"), model, None).retain_prompts
    assert make_concept(config(tmp_path, retain_prompts="auto"), get_method("ovw"), model, None).retain_prompts == (
        *own,
        "",
    )


class NoWorld:
    """As much of a user's model as the choice of prompts asks for."""

    world = None
    max_tokens = 75
    is_guided = False

    def count_tokens(self, prompt):
        return len(prompt.split())


def test_a_retain_weight_is_found_while_training(tmp_path, cli):
    """The price of forgetting rises while more than the bound is left, and falls while less is; no step is left out."""
    words = [
        "--method",
        "ovw",
        "--steps",
        "40",
        "--stop-residual",
        "0.5",
        "--retain-weight",
        "auto",
        "--log-every",
        "1",
    ]
    words += ["--trajectories", "4", "--trajectory-steps", "4", "--micro-batch-size", "8"]
    answer = cli("train", "--forget", "star", *words, "--evaluation-prompts", "none", "--output", tmp_path / "run")
    assert answer.status == 0, answer.err
    assert "as little deviation as possible with 50% of the concept left" in " ".join(answer.out.split())
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 40
    model, plan = planned(tmp_path, trajectories=4, trajectory_steps=4, retain_weight="auto", stop_residual=0.5)
    bound = 0.5 * build_bank(model, plan.recipe, plan.bank).way_to_go()
    rose = [after["price"] > before["price"] for before, after in itertools.pairwise(steps)]
    assert rose == [step["forget_loss"] > bound for step in steps[:-1]]
    assert rose[0]
    assert not all(rose)
    ending = RunRecord.read(tmp_path / "run" / "run.json").ending
    assert steps[-1]["price"] * ending.retain_weight == pytest.approx(1.0, rel=0.06), "one step later"
    assert "retain_weight: auto" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("uce", "trains nothing"),
        ("esd", "has no retain rows"),
        ("saddle", "weighs by a rule of its own"),
        ("neggrad", "has no target"),
        ("placebo", "has no target"),
    ],
)
def test_a_method_without_a_trade_has_no_weight_to_find(method, words, tmp_path):
    with pytest.raises(UserError, match=rf"`--retain-weight auto`: the method {method} {words}"):
        planned(tmp_path, method, retain_weight="auto")


def test_a_retain_weight_is_a_number_or_auto(tmp_path, cli):
    answer = cli("train", "--forget", "star", "--retain-weight", "much", "--output", tmp_path / "run")
    assert answer.status == 2
    assert "wants a number or auto, got 'much'" in answer.err
    with pytest.raises(UserError, match="above 0"):
        planned(tmp_path, retain_weight="auto", stop_residual=0.0)


def test_nothing_is_said_where_nothing_was_measured():
    assert how_it_ended(Ending(steps=3, steps_bound=3)) == ""
