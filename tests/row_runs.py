"""Small trainings of the methods that are rows, and what they are compared with."""

from pathlib import Path

import torch
from plain import Plain

from fastunlearn.methods import get_method
from fastunlearn.models.loading import load_model
from fastunlearn.training import adversary, fit
from fastunlearn.training.bank import BankBudget, build_bank
from fastunlearn.training.config import TrainConfig
from fastunlearn.training.engine import TorchEngine
from fastunlearn.training.plan import plan_training
from fastunlearn.training.trainer import Schedule, Trainer

STEPS, BATCH = 3, 4
FORGET, RETAIN = "a red star;a blue star", "a red ring;a green heart"
ROW_METHODS = ("concept-ablation", "ace", "erasediff", "scissorhands", "selective-amnesia", "instance", "advanchor")
ROW_METHODS = (*ROW_METHODS, "race", "advunlearn", "spm", "holdfast", "placebo-noise")


def own_options(method, folders):
    if method == "instance":
        return {"picture_folder": str(folders / "images"), "surrogate_folder": str(folders / "surrogates")}
    return {
        "race": {"attack_steps": 2, "attack_warm_up": 0.0},
        "advunlearn": {"attack_steps": 2, "attack_warm_up": 0.0},
    }.get(method, {"advanchor": {"search_steps": 2, "search_rate": 0.01}}.get(method, {}))


def planned(model, method, options=(), **settings):
    given = {"forget_prompts": FORGET, "retain_prompts": RETAIN, "trajectories": 2, "trajectory_steps": STEPS}
    given |= {"anchor": "circle"} if get_method(method).anchor == "needed" else {}
    given |= {"micro_batch_size": BATCH, "trainable": "attn2.to_k,attn2.to_v,conv_out"} | settings
    config = TrainConfig(forget="star", output="never", method=method, options=dict(options), **given)
    return config, plan_training(config, get_method(method), model)


class Run:
    """A trainer whose student has moved away from the teacher, and the gradients of its first step."""

    def __init__(self, folder, method, options=(), moved=0.3, **settings):
        self.model = load_model(folder, "cpu")
        self.config, self.plan = planned(self.model, method, options, **settings)
        self.recipe = self.plan.recipe
        if self.recipe.searches:
            budget = BankBudget(1, STEPS, 3.0, BATCH, 0)
            self.recipe = adversary.with_found(self.model, self.recipe, budget)
        self.bank = build_bank(self.model, self.recipe, self.plan.bank)
        self.plain = Plain(self.model, STEPS)
        self.names = self.plan.selection.names
        curvature = fit._curvature(self.model, self.plan, self.bank, self.plan.selection, self.config)
        self.engine = TorchEngine(self.model.denoiser, self.plan.selection, learning_rate=1e-3)
        if curvature:
            self.engine.hold(curvature)
        self.move(moved)
        self.seen = []
        self.engine.optimizer.step = self._look
        schedule = Schedule(1, BATCH, 0, 1, 0)
        self.trainer = Trainer(
            self.model,
            self.bank,
            self.recipe.rule,
            self.engine,
            schedule,
            Path(),
            None,
            self.recipe.inner,
            self.recipe.pursuit,
        )

    def move(self, amount):
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.engine.parameters.values():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += amount * parameter.std(correction=0) * noise
        self.plain.student.load_state_dict(self.model.denoiser.state_dict())
        self.plain.student.requires_grad_(True)

    def _look(self, grad_scale, other_grads=None, other_coefficient=0.0):
        gradient = torch.cat([p.grad.flatten() for p in self.engine.parameters.values()])
        if other_grads is not None:
            others = [other_grads[p].flatten() for p in self.engine.parameters.values()]
            gradient = gradient + other_coefficient * torch.cat(others)
        self.seen.append(gradient)

    def step(self):
        """The gradient of each update of a step."""
        self.trainer._train_step()
        return self.seen

    def rows(self, roles=("forget", "retain")):
        """The rows of the first step: (row, which trajectory, which point), by role."""
        size, rest = divmod(BATCH, len(roles))
        result = {}
        for number, role in enumerate(roles):
            batch = self.bank.batch([(role, size + (number < rest))], 0, 0)
            places = [divmod(index, STEPS) for index in batch.row_index.tolist()]
            result[role] = [(*self.plan.bank.assignments[trajectory], point) for trajectory, point in places]
        return result

    def mean(self, rows, error):
        """The mean over rows of the weighted squared error that ``error(row, number, point)`` gives as (weight, e)."""
        parts = [error(*row) for row in rows]
        return sum(weight * e.square().mean() for weight, e in parts) / len(parts)


def close(ours, plain, relative=1e-5):
    difference = ((ours.double() - plain).norm() / plain.norm()).item()
    assert difference <= relative, difference
