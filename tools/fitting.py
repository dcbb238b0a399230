"""A training loop that can be stopped and continued: Muon and AdamW, a trapezoid rate, an average of the weights.

Muon (Jordan et al. 2024) turns each hidden matrix's momentum into the nearest orthogonal one before it is applied.  Of
small networks in few steps it makes markedly better ones than AdamW, which keeps all other parameters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

CHECKPOINT_EVERY = 100


def _orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """(N, rows, columns) float to about the nearest orthogonal matrices, by five Newton-Schulz steps in bfloat16."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = (matrices if wide else matrices.mT).bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x if wide else x.mT).float()


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal.  A convolution's weight counts as a matrix of a row per output channel."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            alike: dict[tuple[int, int], list[tuple[nn.Parameter, torch.Tensor]]] = {}
            for parameter in group["params"]:
                state = self.state[parameter]
                moving = state.setdefault("momentum", torch.zeros_like(parameter))
                moving.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(moving, group["momentum"]).flatten(1)
                alike.setdefault(tuple(update.shape), []).append((parameter, update))
            for (rows, columns), pairs in alike.items():
                rate = group["lr"] * max(1.0, rows / columns) ** 0.5
                updates = _orthogonal(torch.stack([update for _, update in pairs]))
                for (parameter, _), update in zip(pairs, updates, strict=True):
                    parameter.add_(update.view_as(parameter), alpha=-rate)


class Fit:
    """The state of a training: modules, optimizers, the average of the weights, and the step.

    ``modules``: what is trained, by name.  ``outer``: parts of parameters' names that AdamW keeps beside all
    vectors, such as embeddings and the first and last layer.  ``lr``: of Muon; ``outer_lr``: of AdamW.
    """

    def __init__(self, modules: Mapping[str, nn.Module], outer: tuple[str, ...], lr: float, outer_lr: float) -> None:
        self.modules = nn.ModuleDict(modules)
        named = list(self.modules.named_parameters())
        inner = [p for name, p in named if p.ndim >= 2 and not any(part in name for part in outer)]
        chosen = set(map(id, inner))
        rest = [p for _, p in named if id(p) not in chosen]
        self.optimizers = [
            Muon(inner, lr),
            torch.optim.AdamW(rest, outer_lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.rates = [lr, outer_lr]
        self.live = [p for _, p in named]
        self.mean = [p.detach().clone() for p in self.live]
        self.step = 0

    def load(self, path: Path) -> None:
        """Continue from a checkpoint."""
        state = torch.load(path, weights_only=True, mmap=False)
        self.modules.load_state_dict(state["modules"])
        for optimizer, values in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        for mean, values in zip(self.mean, state["mean"], strict=True):
            mean.copy_(values)
        self.step = state["step"]

    def save(self, path: Path) -> None:
        unfinished = path.with_suffix(".tmp")
        state = {
            "modules": self.modules.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "mean": self.mean,
            "step": self.step,
        }
        torch.save(state, unfinished)
        unfinished.rename(path)

    def use_mean(self) -> None:
        """Put the averaged weights into the modules.  Nothing trains on after that."""
        for live, mean in zip(self.live, self.mean, strict=True):
            live.data.copy_(mean)

    def train_step(self, loss: torch.Tensor, share: float, decay: float) -> None:
        """One step at ``share`` of the full rate; ``decay``: of the average, at most."""
        self.modules.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in self.optimizers[1].param_groups for p in group["params"]], 1.0)
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * share
            optimizer.step()
        self.step += 1
        weight = 1 - min(decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.mean, [p.detach() for p in self.live], weight)


def run(
    name: str,
    fit: Fit,
    loss_at: Callable[[int], torch.Tensor],
    steps: int,
    cooldown: int,
    checkpoint: Path,
    trunk: Path | None = None,
    decay: float = 0.998,
) -> None:
    """Train up to ``steps``; the rate rises over 50 steps, stays, and falls to nothing in the last ``cooldown``.

    ``loss_at``: the loss of a step, which is a function of the step alone, so that a training continues as if it had
    not stopped.  ``checkpoint``: written every so often and at the end; a training that finds it continues there.
    ``trunk``: a copy of the state where the cooling begins, from which a longer training can continue.
    """
    if checkpoint.exists():
        fit.load(checkpoint)
    started, first, mean_loss = time.monotonic(), fit.step, None
    while fit.step < steps:
        if trunk is not None and fit.step == steps - cooldown:
            fit.save(trunk)
        share = min(1.0, (fit.step + 1) / 50, (steps - fit.step) / max(cooldown, 1))
        loss = loss_at(fit.step)
        fit.train_step(loss, share, decay)
        value = loss.item()
        mean_loss = value if mean_loss is None else 0.98 * mean_loss + 0.02 * value
        if fit.step % 50 == 0:
            speed = (fit.step - first) / (time.monotonic() - started)
            print(f"{name}: step {fit.step}/{steps}  loss {mean_loss:.5f}  {speed:.2f} steps/s", flush=True)
        if fit.step % CHECKPOINT_EVERY == 0 or fit.step == steps:
            fit.save(checkpoint)
    fit.use_mean()
