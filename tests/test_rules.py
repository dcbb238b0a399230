"""Rules: each says its updates; gradient surgery is what the formula says; a rule's state is the trainer's to keep."""

import dataclasses
import json
import math

import pytest
import torch
from fastunlearn_kernels import pack_bits

from fastunlearn.errors import UserError
from fastunlearn.methods import Method, get_method
from fastunlearn.methods.recipe import Defaults, Recipe, Row
from fastunlearn.methods.rules import Alternate, Constrained, Project, Rule, Saddle, Sum, Update
from fastunlearn.models.loading import load_model
from fastunlearn.training.bank import build_bank
from fastunlearn.training.config import TrainConfig
from fastunlearn.training.engine import Engine, TorchEngine
from fastunlearn.training.engine_deepspeed import DeepSpeedEngine
from fastunlearn.training.plan import plan_training
from fastunlearn.training.plan_words import plan_lines
from fastunlearn.training.selection import Selection
from fastunlearn.training.trainer import Schedule, Trainer


def gathered(concept, rule):
    rows = [Row("forget", c, c, {"": 1.0}) for c in concept.forget_prompts]
    return Recipe(rows + [Row("retain", r, r, {"": 1.0}) for r in concept.retain_prompts], rule)


def surgeon(rule):
    defaults = {"stable-diffusion": Defaults(2, 1e-3, 4, 1, "cross-attention-kv")}
    return Method("surgeon", "-", "-", "projects", lambda concept: gathered(concept, rule), defaults)


def trainer_of(tmp_path, rule, steps=1, **settings):
    model = load_model("shapes", "cpu")
    config = TrainConfig(forget="star", output=str(tmp_path / "run"), trajectories=1, trajectory_steps=3)
    plan = plan_training(config, surgeon(rule), model)
    bank = build_bank(model, plan.recipe, plan.bank)
    engine = TorchEngine(model.denoiser, plan.selection, **{"learning_rate": 1e-3, **settings})
    return Trainer(model, bank, rule, engine, Schedule(steps, 4, 0, 1, 0), tmp_path)


# ---- what each rule says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "updates"),
    [
        (Sum(3.0, -1.0), [Update({"forget": -1.0, "retain": 3.0})]),
        (Alternate(2.0), [Update({"forget": 1.0}), Update({"retain": 2.0})]),
        (Project(0.5), [Update({"forget": 1.0}, against={"retain": 1.0}, along=0.5)]),
    ],
)
def test_a_rule_says_its_updates(rule, updates):
    assert rule.updates({}) == updates
    assert rule.passes == sum(1 + bool(update.against) for update in updates)
    assert rule.projects == any(update.against for update in updates)


def test_saddle_ascends_in_its_state():
    rule = Saddle(kappa=2.0, dual_rate=0.5, lambda_start=0.25, lambda_max=0.6)
    start = rule.start(type("Rows", (), {"way_to_go": lambda self: 3.0})())
    assert start == {"dual": 0.25, "margin": 6.0}
    state = {name: torch.tensor(value) for name, value in start.items()}
    seen = []
    for forget_loss in (3.0, 0.0, 60.0):
        assert rule.updates(state)[0].weights["forget"] == -state["dual"]
        metrics = {"forget_loss": torch.tensor(forget_loss)}
        rule.after_step(metrics, state)
        seen.append((metrics["dual"].item(), state["dual"].item()))
    assert sum(seen, ()) == pytest.approx((0.25, 0.5, 0.5, 0.6, 0.6, 0.0))


def test_saddle_descends_to_a_margin_below_the_start():
    rule = Saddle(kappa=0.5, dual_rate=0.2, lambda_start=0.25, lambda_max=0.6)
    state = {name: torch.tensor(value) for name, value in {"dual": 0.25, "margin": 1.5}.items()}
    seen = []
    for forget_loss in (3.0, 30.0, 1.5, 0.75, 0.0):
        assert rule.updates(state)[0] == Update({"forget": state["dual"], "retain": 1.0})
        rule.after_step({"forget_loss": torch.tensor(forget_loss)}, state)
        seen.append(state["dual"].item())
    assert seen == pytest.approx([0.45, 0.6, 0.6, 0.5, 0.3]), "it rises while the margin is missed, else it falls"


def test_the_price_rises_while_too_much_is_left_and_falls_while_less_is():
    rule = Constrained(bound=0.2, price_rate=0.1)
    start = rule.start(type("Rows", (), {"way_to_go": lambda self: 3.0})())
    assert start == {"price": 1.0, "way": 3.0}
    state = {name: torch.tensor(value) for name, value in start.items()}
    seen = []
    for residual in (1.0, 0.3, 0.2, 0.1, 0.0):
        (update,) = rule.updates(state)
        price = state["price"].item()
        weights = {role: weight.item() for role, weight in update.weights.items()}
        assert weights == pytest.approx({"forget": price / (1 + price), "retain": 1 / (1 + price)})
        metrics = {"forget_loss": torch.tensor(3.0 * residual)}
        rule.after_step(metrics, state)
        assert metrics["price"].item() == pytest.approx(price)
        seen.append(math.log(state["price"].item()))
    assert seen == pytest.approx([0.1, 0.15, 0.15, 0.1, 0.0], abs=1e-5)


def test_a_bound_of_the_deviation_lowers_the_price_while_it_is_passed():
    rule = Constrained(bound=0.1, bounded="retain", price_rate=0.1)
    state, seen = {"price": torch.tensor(1.0), "way": torch.tensor(2.0)}, []
    for deviation in (0.15, 0.9, 0.1, 0.05, 0.0):
        rule.after_step({"forget_loss": torch.tensor(9.0), "retain_loss": torch.tensor(2.0 * deviation)}, state)
        seen.append(math.log(state["price"].item()))
    assert seen == pytest.approx([-0.05, -0.15, -0.15, -0.1, 0.0], abs=1e-5)


def test_a_price_stays_within_its_bounds():
    rule, metrics = Constrained(bound=0.5, price_rate=9.0), {"forget_loss": torch.tensor(5.0)}
    state = {"price": torch.tensor(1.0), "way": torch.tensor(1.0)}
    rule.after_step(metrics, state)
    assert state["price"].item() == 1e3
    for _ in range(2):
        rule.after_step({"forget_loss": torch.tensor(0.0)}, state)
    assert state["price"].item() == pytest.approx(1e-3)


def test_a_rule_must_say_its_updates():
    @dataclasses.dataclass(frozen=True)
    class Silent(Rule):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Silent()


def test_an_engine_must_have_every_verb():
    with pytest.raises(TypeError, match="abstract"):
        Engine()


# ---- gradient surgery ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("along", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("conflict", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_the_projected_step_is_that_of_the_formula(along, conflict, masked):
    """Against AdamW of torch on the gradient computed with plain tensors."""
    torch.manual_seed(1)
    module = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    twin = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    twin.load_state_dict(module.state_dict())
    named = dict(module.named_parameters())
    keep = {n: torch.rand(p.shape) < 0.6 if masked else torch.ones_like(p, dtype=torch.bool) for n, p in named.items()}
    bits = {name: pack_bits(mask) for name, mask in keep.items()} if masked else None
    engine = TorchEngine(
        module, Selection.of(module, list(named), bits), learning_rate=0.1, max_grad_norm=0.2, weight_decay=0.01
    )
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.1, weight_decay=0.01)
    for step in range(3):
        x = torch.randn(4, 5)
        target = torch.randn(4, 3)
        losses = [lambda m, x=x, t=target: (m(x) - t).square().mean()]
        losses.append(lambda m, x=x, t=target: (-1 if conflict else 1) * (m(x) - t).square().mean() + m(x).mean())
        engine.backward(losses[1](module))
        engine.set_aside(along)
        engine.backward(losses[0](module))
        norm = engine.step()
        gradients = [torch.autograd.grad(loss(twin), list(twin.parameters())) for loss in losses]
        flat = [torch.cat([(g * keep[n]).flatten() for g, n in zip(gs, named, strict=True)]) for gs in gradients]
        dot = flat[0] @ flat[1]
        assert bool(dot < 0) == conflict or step > 0, "the case is what it is called"
        projected = flat[0] - dot.clamp(max=0) / (flat[1] @ flat[1]) * flat[1] + along * flat[1]
        assert projected @ flat[1] >= -1e-5, "it does not point against the other"
        torch.testing.assert_close(norm, projected.norm(), rtol=1e-4, atol=1e-6)
        projected *= (0.2 / (projected.norm() + 1e-6)).clamp(max=1)
        before = [p.detach().clone() for p in twin.parameters()]
        for p, part in zip(twin.parameters(), projected.split([p.numel() for p in named.values()]), strict=True):
            p.grad = part.view_as(p).clone()
        optimizer.step()
        for (name, p), old in zip(twin.named_parameters(), before, strict=True):
            p.data.copy_(torch.where(keep[name], p.data, old))
        for name, p in twin.named_parameters():
            torch.testing.assert_close(named[name], p, rtol=1e-4, atol=2e-4)


def test_the_next_step_is_not_projected_any_more():
    module = torch.nn.Linear(3, 2)
    engine = TorchEngine(module, Selection.of(module, ["weight"]), learning_rate=0.1)
    engine.backward(module(torch.ones(1, 3)).sum())
    engine.set_aside(0.0)
    engine.backward(-module(torch.ones(1, 3)).sum())
    assert engine.step() == pytest.approx(0.0, abs=1e-6), "all of it points against the other"
    engine.backward(-module(torch.ones(1, 3)).sum())
    assert engine.step() == pytest.approx(6**0.5)


def test_a_projecting_rule_trains_and_its_loss_is_told(tmp_path):
    run = trainer_of(tmp_path, Project(2.0))
    seen = {}
    run.run(lambda step, metrics: seen.update(metrics))
    assert seen["loss"] == pytest.approx(seen["forget_loss"] + 2.0 * seen["retain_loss"], rel=1e-5)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_projected_step_of_the_trainer_keeps_the_retain_loss_to_first_order(tmp_path, micro_batches):
    """The step's gradient, read before the optimizer takes it, is orthogonal to the retain gradient or along it."""
    run = trainer_of(tmp_path, Project(0.0), accumulation=micro_batches)
    found = {}
    genuine = run.engine.optimizer.step

    def step(*, grad_scale, other_grads, other_coefficient):
        found["dot"] = sum(
            ((p.grad + other_coefficient * g) * g).sum() for p, g in other_grads.items() if p.grad is not None
        )
        found["scale"] = sum(g.square().sum() for g in other_grads.values())
        return genuine(grad_scale=grad_scale, other_grads=other_grads, other_coefficient=other_coefficient)

    run.engine.optimizer.step = step
    run.run()
    assert found["dot"] > -1e-4 * found["scale"]


def test_deepspeed_is_refused_a_projecting_rule_before_anything(tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    assert not DeepSpeedEngine.can_project
    (tmp_path / "ds.json").write_text("{}")
    config = TrainConfig(forget="star", output=str(tmp_path / "run"), deepspeed=str(tmp_path / "ds.json"))
    with pytest.raises(UserError, match=r"the method surgeon projects gradients .*Leave `--deepspeed` out"):
        plan_training(config, surgeon(Project()), load_model("shapes", "cpu"))


# ---- the trainer and any rule ----------------------------------------------------------------------------------------


def test_the_plan_counts_a_rules_passes(bundled, tmp_path):
    config = TrainConfig(forget="star", output=str(tmp_path / "run"), steps=5, trajectories=1, trajectory_steps=2)
    forwards = {rule: plan_training(config, surgeon(rule), bundled).loop_forwards for rule in (Sum(), Project())}
    assert forwards == {Sum(): 5 * 4, Project(): 5 * 2 * 4}
    assert any(
        "loop        5 steps, 120 UNet" in line
        for line in plan_lines(plan_training(config, surgeon(Project()), bundled))
    )


def test_a_checkpoint_of_another_rule_is_refused(tmp_path):
    run = trainer_of(tmp_path, Saddle(kappa=1.0))
    run.run()
    state = json.loads((tmp_path / "checkpoints" / "step-1" / "state.json").read_text())["trainer"]["state"]
    assert state["rule"] == {name: value.item() for name, value in run.state.items()}
    with pytest.raises(UserError, match="another rule"):
        trainer_of(tmp_path, Sum()).resume()


def test_a_role_without_rows_is_passed_over(tmp_path):
    """The placebo has no forget rows: of the sum, the alternation or the projection only the retain loss is left."""
    for rule in (Sum(), Alternate(), Project(1.0)):
        run = trainer_of(tmp_path / type(rule).__name__, rule)
        run.checkpoints.parent.mkdir(parents=True, exist_ok=True)
        del run.bank.role_rows["forget" if not rule.projects else "retain"]
        seen = {}
        run.run(lambda step, metrics, seen=seen: seen.update(metrics))
        assert ("forget_loss" in seen) == rule.projects
        assert ("retain_loss" in seen) != rule.projects


def test_the_methods_rules_are_these():
    from test_methods import concept

    rules = {name: type(get_method(name).recipe(concept(name)).rule) for name in ("esd", "ovw", "saddle", "salun")}
    assert rules == {"esd": Sum, "ovw": Alternate, "saddle": Saddle, "salun": Sum}
