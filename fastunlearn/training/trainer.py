"""The training loop: rows from the bank, one student forward, one loss, one backward, one update."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from fastunlearn_kernels import noise_pred_loss

from ..errors import UserError
from ..files.atomic import remove_folder, remove_temporaries, write_text
from ..methods.recipe import ROLES, Inner, Pursuit, Role
from ..methods.rules import Rule
from ..models.base import Model
from ..schema import Ending
from .adversary import Chase, attacked
from .bank import Bank
from .engine import Engine
from .evidence import Evidence

Metrics = dict[str, float]
_KEPT_CHECKPOINTS = 2
_LANDING = 0.5  # steps in which a falling rate gets to 0 once the evidence is met, by the steps until then


class Interrupted(Exception):
    """The run was asked to stop (Ctrl-C, SIGTERM) and has saved its state."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long and how often.

    ``lr_scheduler``: ``constant``, or ``linear``, which falls to 0 over the steps.  ``lands``: once enough of the
    concept is gone, the rate falls to 0 over half as many steps again as were made; else the training ends then.
    """

    steps: int
    micro_batch_size: int
    seed: int
    log_every: int
    checkpoint_every: int
    lr_scheduler: str = "constant"
    lands: bool = False


class Trainer:
    """Trains ``model.denoiser`` on a bank by a rule.  ``run`` is the loop; the caller builds everything it needs."""

    def __init__(
        self,
        model: Model,
        bank: Bank,
        rule: Rule,
        engine: Engine,
        schedule: Schedule,
        folder: Path,
        evidence: Evidence | None = None,
        inner: Inner | None = None,
        pursuit: Pursuit | None = None,
    ) -> None:
        self.inner = inner
        self.chase = Chase(model, pursuit, bank) if pursuit else None
        self.model, self.bank, self.rule, self.engine, self.schedule = model, bank, rule, engine, schedule
        self.evidence = evidence
        self.checkpoints = folder / "checkpoints"
        self.metrics_path = folder / "metrics.jsonl"
        self.step = 0
        self.met_at: int | None = None  # the step at which the evidence was met first
        self.seconds = 0.0
        device = model.device
        # Stay on the device, so that the loop never waits for it.
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.state = {name: torch.full((), value, device=device) for name, value in rule.start(bank).items()}

    def run(self, on_log: Callable[[int, Metrics], None] = lambda step, metrics: None) -> None:
        """Train to the last step, or until so little of the concept is left as the evidence asks for.

        Where the schedule lands, the rate gets to 0 then, too, in half as many steps again.
        UserError when a loss or a weight is not finite (the last good checkpoint stays), :class:`Interrupted` when
        asked to stop (the state is saved first).
        """
        started = time.monotonic() - self.seconds
        with _stop_requests() as stop:
            while self.step < self._end:
                metrics = self._train_step()
                self.step += 1
                measured = self._measure()
                self.seconds = time.monotonic() - started
                is_last = self.step >= self._end
                if self.step % self.schedule.log_every == 0 or is_last:
                    metrics |= measured
                    self._check_finite()
                    on_log(self.step, self._log(metrics))
                if self.engine.world.any(stop.is_set(), self.model.device):
                    self.save()
                    raise Interrupted(f"stopped at step {self.step} of {self.schedule.steps}")
                if self.schedule.checkpoint_every and self.step % self.schedule.checkpoint_every == 0:
                    self.save()
        if not self.engine.all_finite():
            self._diverged()
        if self.schedule.steps and not self._checkpoint().exists():
            self.save()  # a run stopped during its evaluation resumes behind its training

    def save(self) -> None:
        """Write a checkpoint of this step; older ones but one are deleted."""
        self._check_finite()
        if not self.engine.all_finite():  # the weights are one update ahead of the loss
            self._diverged()
        self.checkpoints.mkdir(exist_ok=True, parents=True)
        rule = {name: value.item() for name, value in self.state.items()}
        state = {"step": self.step, "seconds": self.seconds, "rule": rule, "rows": self._rows_per_step}
        if self.evidence is not None:
            state |= {"residual": self.evidence.last, "met_at": self.met_at}
        if self.chase is not None:
            state["chase"] = self.chase.saved()
        self.engine.save(self._checkpoint(), state)
        if self.engine.world.is_main:
            for path in self._saved()[:-_KEPT_CHECKPOINTS]:
                remove_folder(path)

    def resume(self) -> None:
        """Continue from the newest checkpoint, or from the start where none was saved yet."""
        if saved := self._saved():
            state = self.engine.load(saved[-1])
            if state["rows"] != self._rows_per_step:
                raise UserError(
                    f"`--resume`: the run took {state['rows']} rows per step, now it is {self._rows_per_step} (micro "
                    f"batch x accumulation x processes). Choose a micro batch or accumulation that makes them equal."
                )
            self.step, self.seconds = state["step"], state["seconds"]
            if self.evidence is not None:
                self.evidence.last, self.met_at = state["residual"], state["met_at"]
            if self.chase is not None:
                self.chase.restore(state["chase"])
            if state["rule"].keys() != self.state.keys():
                raise UserError(f"the checkpoint {saved[-1]} is of another run: its method has another rule.")
            for name, value in state["rule"].items():
                self.state[name].fill_(value)
        if self.engine.world.is_main and self.checkpoints.is_dir():
            remove_temporaries(self.checkpoints)
        if self.engine.world.is_main and self.metrics_path.exists():
            lines = self.metrics_path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if (record := _parsed(line)) and record["step"] <= self.step]
            write_text(self.metrics_path, "".join(line + "\n" for line in kept))

    def _train_step(self) -> dict[str, torch.Tensor]:
        metrics: dict[str, torch.Tensor] = {}
        if self.schedule.lr_scheduler == "linear":
            self.engine.scale_learning_rate(self._rate())
        for update in self.rule.updates(self.state):
            passes = []
            if against := self._present(update.against):
                passes.append((update.along, *self._accumulate(against)))
                self.engine.set_aside(update.along, update.rate)
            if not (weights := self._present(update.weights)):
                continue
            passes.append((1.0, *self._accumulate(weights)))
            metrics["grad_norm"] = self.engine.step()
            metrics |= self.engine.measured
            for share, counts, sums in passes:
                loss, *row_sums = self.engine.world.sum(sums)
                metrics["loss"] = metrics.get("loss", 0.0) + share * loss
                for (role, count), row_sum in zip(counts.items(), row_sums, strict=True):
                    metrics[f"{role}_loss"] = row_sum / count
        if self.chase is not None:
            self.chase.advance()
        self.rule.after_step(metrics, self.state)
        self.finite &= torch.isfinite(metrics["loss"]) & torch.isfinite(metrics["grad_norm"])
        return metrics

    def ending(self) -> Ending:
        """How far the training came."""
        evidence = self.evidence
        return Ending(
            steps=self.step,
            steps_bound=self.schedule.steps,
            residual=evidence.last if evidence else None,
            stop_residual=evidence.until if evidence else None,
            retain_weight=self.rule.found_weight(self.state),
        )

    @property
    def _end(self) -> int:
        """The step before which the training ends, as far as is known."""
        bound, met = self.schedule.steps, self.met_at
        if met is None:
            return bound
        return min(bound, met + math.ceil(_LANDING * met)) if self.schedule.lands else met

    def _rate(self) -> float:
        """The next step's rate by the one that the training began with."""
        whole = self.schedule.steps
        if self.met_at is None:
            return 1 - self.step / whole
        return (1 - self.met_at / whole) * (self._end - self.step) / (self._end - self.met_at)

    def _measure(self) -> dict[str, torch.Tensor]:
        """The residual, where it is time to measure it."""
        evidence, world, device = self.evidence, self.engine.world, self.model.device
        if evidence is None or (self.step % evidence.every and self.step != self._end):
            return {}
        with self.engine.autocast():
            residual = evidence.measure(self.engine.module, self.state, self.schedule.micro_batch_size)
        # All processes measure the same rows; where they differ in a bit, the mean decides for all.
        mean = world.sum(torch.tensor([residual], dtype=torch.float32, device=device))[0] / world.size
        evidence.last = float(mean)
        if self.met_at is None and self.rule.ends_early and evidence.is_met:
            self.met_at = self.step
        return {"residual": mean}

    def _accumulate(self, role_weights: dict[Role, torch.Tensor]) -> tuple[dict[Role, int], torch.Tensor]:
        """The gradient of one pass over an update's rows: how many each role has, and what this process summed.

        That is the loss, then of each role the sum of its rows' losses.
        """
        counts = dict(self._counts(list(role_weights)))
        sums = torch.zeros(1 + len(counts), device=self.model.device)
        for micro in range(self.engine.accumulation):
            loss, row_sums = self._backward(micro, role_weights, counts)
            sums += torch.stack([loss / self._parts, *row_sums])
        return counts, sums

    def _present(self, weights: Mapping[Role, float | torch.Tensor]) -> dict[Role, torch.Tensor]:
        """The weights of the roles that have rows, () float32 on the device."""
        one = torch.ones((), device=self.model.device)
        return {role: one * weights[role] for role in ROLES if role in weights and role in self.bank.role_rows}

    def _backward(
        self, micro: int, role_weights: dict[Role, torch.Tensor], counts: dict[Role, int]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Forward and backward on one share of an update's rows: its loss, and the sum of each role's rows."""
        world, parts = self.engine.world, self._parts
        part = micro * world.size + world.rank
        batch = self.bank.batch(list(counts.items()), self.step, self.schedule.seed, part=part, parts=parts)
        conditions = batch.conditions
        if self.inner is not None and self.step >= self.inner.warm_up * self.schedule.steps:
            seeds = (self.schedule.seed, self.step, part, parts)
            conditions = attacked(self.model, self.engine, batch, self.inner, seeds)
        if self.chase is not None:
            conditions = self.chase.moved(batch, part, parts)
        with self.engine.autocast():
            noise_pred = self.model.predict(batch.latents, batch.timesteps, conditions, self.engine.module)
        if self.chase is not None:
            self.chase.look(batch, noise_pred)
        # Each role's loss is a mean over all its rows, whatever its share of this batch; the engine means over parts.
        scale = len(batch.timesteps) * parts
        weights = torch.cat([(role_weights[role] * scale / counts[role]).expand(n) for role, n in batch.roles])
        weights = weights * batch.weights
        loss, row_losses = noise_pred_loss(
            noise_pred, batch.teacher_preds, batch.coefficients, weights, row_index=batch.row_index
        )
        self.engine.backward(loss)
        row_losses = row_losses * batch.weights
        split = dict(zip((role for role, _ in batch.roles), row_losses.split([n for _, n in batch.roles]), strict=True))
        return loss.detach(), [split[role].sum() if role in split else loss.new_zeros(()) for role in counts]

    @property
    def _parts(self) -> int:
        """Into how many student batches an update's rows are dealt."""
        return self.engine.accumulation * self.engine.world.size

    @property
    def _rows_per_step(self) -> int:
        return self.schedule.micro_batch_size * self._parts

    def _counts(self, roles: list[Role]) -> list[tuple[Role, int]]:
        """The batch shared out over the roles, at least one row each."""
        size = max(self._rows_per_step, len(roles))
        share, rest = divmod(size, len(roles))
        return [(role, share + (index < rest)) for index, role in enumerate(roles)]

    def _log(self, metrics: dict[str, torch.Tensor]) -> Metrics:
        record = {"step": self.step} | {name: float(value) for name, value in metrics.items()}
        record |= {"seconds": round(self.seconds, 3), "steps_per_second": round(self.step / self.seconds, 3)}
        if self.engine.world.is_main:
            with self.metrics_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        return record

    def _check_finite(self) -> None:
        if not bool(self.finite):
            self._diverged()

    def _diverged(self) -> None:
        saved = self._saved()
        kept = f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint had been saved"
        raise UserError(
            f"the loss is not a finite number by step {self.step}; {kept}. Use a smaller `--learning-rate`."
        )

    def _checkpoint(self) -> Path:
        return self.checkpoints / f"step-{self.step}"

    def _saved(self) -> list[Path]:
        result = [path for path in self.checkpoints.glob("step-*") if path.is_dir() and path.name[5:].isdecimal()]
        return sorted(result, key=lambda path: int(path.name[5:]))


def _parsed(line: str) -> dict[str, Any] | None:
    """A line of metrics, or None for one cut short by a kill."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


@contextlib.contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets, so that the loop ends between two steps; a second one stops at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def request(number: int, frame: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
