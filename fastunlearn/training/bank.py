"""Training rows made in advance: points of the frozen teacher's trajectories with all its predictions that rows need.

Training then runs neither the teacher nor the sampler.  The price is that the points of one trajectory are correlated;
`trajectories` is the knob, and `benchmarks/bench_bank.py` shows what it costs.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import torch

from ..errors import UserError
from ..methods.recipe import NOISE, ROLES, Defaults, Recipe, Role, Row, picture
from ..methods.rules import Sum
from ..models.base import Conditions, Model
from ..models.sampling import initial_noise, sample
from ..progress import OnProgress, untold
from .config import MaskConfig, TrainConfig
from .pictures import encode_pictures, noise_share, prediction_towards

BATCH_SIZE = 64  # trajectories
_PURPOSE = "training"  # of the noise: what a model is evaluated on, it was not trained on


@dataclasses.dataclass
class Batch:
    """Rows for one student forward; all of length B but ``teacher_preds`` (K, P, C, H, W), the bank's own storage.

    ``weights``: (B,) float32, of the rows' squared errors.  ``own``: (B,) int64, which of the K predictions is that of
    the prompt of the row's trajectory.
    """

    latents: torch.Tensor
    timesteps: torch.Tensor
    conditions: dict[str, torch.Tensor]
    teacher_preds: torch.Tensor
    row_index: torch.Tensor
    coefficients: torch.Tensor
    weights: torch.Tensor
    own: torch.Tensor
    roles: tuple[tuple[Role, int], ...]

    @property
    def forget_rows(self) -> int:
        """How many forget rows there are; they stand first."""
        return dict(self.roles).get("forget", 0)


@dataclasses.dataclass
class Bank:
    """P rows.  ``latents``: (P, C, H, W), ``timesteps``: (P,), ``teacher_preds``: (K, P, C, H, W), all on the device.

    All are float32, timesteps too: many samplers ask at fractions, and there the teacher answered.
    ``coefficients``: (P, K) mixes the K predictions into the row's target.  ``condition``: (P,) indexes ``conditions``.
    ``weights``: (P,), of each row's squared error.  ``own``: (P,) int64, which of the K predictions is that of the
    trajectory's prompt; -1 where it is not kept.  ``role_rows`` lists, for
    each role, the rows that are trained on: those within their kind's window of timesteps.
    """

    latents: torch.Tensor
    timesteps: torch.Tensor
    teacher_preds: torch.Tensor
    coefficients: torch.Tensor
    weights: torch.Tensor
    own: torch.Tensor
    condition: torch.Tensor
    conditions: Conditions
    role_rows: dict[Role, torch.Tensor]

    def __len__(self) -> int:
        return len(self.timesteps)

    def batch(self, roles: Sequence[tuple[Role, int]], step: int, seed: int, *, part: int = 0, parts: int = 1) -> Batch:
        """The rows of training step ``step``: for each (role, count), the next ones of that role's shuffled epochs.

        A function of its arguments alone, so a resumed run sees the same rows.  ``part`` of ``parts`` is every
        parts-th of them: whoever takes them, and in how many parts, the rows of a step are the same.
        """
        index = torch.cat([self._rows_of(role, count, step, seed) for role, count in roles])
        index = index[part::parts].to(self.latents.device)
        ends = itertools.accumulate(count for _, count in roles)
        taken = [len(range(part, end, parts)) for end in ends]  # rows of this part among the first `end`
        before = [0, *taken[:-1]]
        roles = [(role, n - m) for (role, _), n, m in zip(roles, taken, before, strict=True) if n > m]
        return Batch(
            latents=self.latents[index],
            timesteps=self.timesteps[index],
            conditions=self.conditions.rows(self.condition[index]),
            teacher_preds=self.teacher_preds,
            row_index=index,
            coefficients=self.coefficients[index],
            weights=self.weights[index],
            own=self.own[index],
            roles=tuple(roles),
        )

    def _rows_of(self, role: Role, count: int, step: int, seed: int) -> torch.Tensor:
        rows = self.role_rows[role]
        picked: list[torch.Tensor] = []
        position, missing = step * count, count
        while missing:
            epoch, offset = divmod(position, len(rows))
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch * 2 + ROLES.index(role))
            part = torch.randperm(len(rows), generator=generator)[offset : offset + missing]
            picked.append(rows[part])
            position, missing = position + len(part), missing - len(part)
        return torch.cat(picked)

    def way_to_go(self) -> float:
        """Mean over forget rows of ``weight * (teacher(concept) - target)^2``: the forget loss before training.

        ValueError for rows whose trajectory is no prompt's own.
        """
        rows = self.role_rows["forget"].to(self.latents.device)
        concept = self.own[rows]
        if concept.min() < 0:
            raise ValueError("the way to a target starts at the concept's own prediction, which these rows have not")
        coefficients = self.coefficients[rows].T[..., None, None, None]
        errors = self.teacher_preds[concept, rows] - (self.teacher_preds[:, rows] * coefficients).sum(0)
        return (errors.square().mean((1, 2, 3)) * self.weights[rows]).mean().item()


@dataclasses.dataclass(frozen=True)
class BankPlan:
    """What a bank will hold and cost, known before anything is computed.

    ``assignments``: (row kind, trajectory number) for each trajectory.  ``points``: of a trajectory, one per forward;
    some samplers (PNDM, Heun) have more of them than steps.  ``guided_from``: see ``Model.guided_from``.
    ``precision``: "no", or "bf16" to run the denoiser in bfloat16.  ``unet_evaluations``: forwards of one sample.
    """

    assignments: tuple[tuple[Row, int], ...]
    branches: int
    num_inference_steps: int
    points: int
    guidance_scale: float
    guided_from: tuple[str, ...]
    seed: int
    precision: str = "no"

    @property
    def rows(self) -> int:
        return len(self.assignments) * self.points

    @property
    def trained_rows(self) -> int:
        """The rows that are trained on: those within their row's window of timesteps."""
        return sum(len(row.window(self.points)) for row, _ in self.assignments)

    @property
    def unet_evaluations(self) -> int:
        names = (name for row, _ in self.assignments for name in self.branch_prompts(row))
        return self.points * sum(name != NOISE and not name.startswith(picture("")) for name in names)

    def branch_prompts(self, row: Row) -> list[str]:
        """Whose predictions a row's trajectory is sampled with: those that guide it, then the others in its target.

        Of a row of a picture, which nothing guides: those in its target, the noise and pictures among them.
        """
        if row.trajectory.startswith(picture("")):
            return list(row.target)
        guiding = (*self.guided_from, row.trajectory)
        return [*guiding, *(key for key in row.target if key not in (*guiding, NOISE))]


def plan_bank(
    model: Model,
    recipe: Recipe,
    *,
    trajectories: int,
    num_inference_steps: int,
    guidance_scale: float,
    seed: int,
    precision: str = "no",
) -> BankPlan:
    """Deal ``trajectories`` trajectories to each role, its kinds of row taking turns in a seeded order.

    Where a role has more kinds of row than trajectories, some have none.  Raises UserError for more steps than the
    model's sampler has, and for a window of timesteps that holds no point.
    """
    points = len(model.new_scheduler(num_inference_steps).timesteps)
    assignments: list[tuple[Row, int]] = []
    generator = torch.Generator().manual_seed(seed)
    for role in ROLES:
        kinds = [row for row in recipe.rows if row.role == role]
        order = torch.randperm(len(kinds), generator=generator).tolist()
        assignments += [(kinds[order[n % len(kinds)]], n) for n in range(trajectories if kinds else 0)]
    for row, _ in assignments:
        row.window(points)  # holds a point, or says so
    guided_from = model.guided_from(guidance_scale)
    plan = BankPlan(tuple(assignments), 1, num_inference_steps, points, guidance_scale, guided_from, seed, precision)
    branches = max((len(plan.branch_prompts(row)) for row, _ in assignments), default=1)
    return dataclasses.replace(plan, branches=branches)


@dataclasses.dataclass(frozen=True)
class BankBudget:
    """What a bank beside the one of training may cost: of a search, a gradient, a training within an edit.

    ``trajectories`` of so many steps with this guidance, from ``seed``.  ``bank_batch_size`` of them run at once, as
    :func:`build_bank` takes it.  What reads the bank takes ``micro_batch_size`` rows per forward, in bfloat16 where
    ``mixed_precision`` is "bf16".
    """

    trajectories: int
    num_inference_steps: int
    guidance_scale: float
    micro_batch_size: int
    seed: int
    bank_batch_size: int | None = None
    mixed_precision: str = "no"

    @classmethod
    def of(cls, config: TrainConfig | MaskConfig, settings: Defaults) -> BankBudget:
        """By a run's settings, where the user chose none those of its method."""
        return cls(
            trajectories=settings.trajectories,
            num_inference_steps=settings.trajectory_steps,
            guidance_scale=config.trajectory_guidance_scale,
            micro_batch_size=settings.micro_batch_size,
            seed=config.seed,
            bank_batch_size=config.bank_batch_size,
            mixed_precision=config.mixed_precision,
        )

    def plan(self, model: Model, recipe: Recipe) -> BankPlan:
        return plan_bank(
            model,
            recipe,
            trajectories=self.trajectories,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            seed=self.seed,
        )


def images_of(prompts: Iterable[str]) -> Recipe:
    """The rows of the teacher's own images of these prompts, with noise, whose target the noise is."""
    return Recipe([Row("forget", prompt, prompt, {NOISE: 1.0}) for prompt in prompts], Sum())


@torch.no_grad()
def build_bank(
    model: Model,
    recipe: Recipe,
    plan: BankPlan,
    *,
    micro_batch_size: int | None = None,
    purpose: str = _PURPOSE,
    on_progress: OnProgress = untold,
) -> Bank:
    """Sample every trajectory of the plan, batched, and keep each point with its predictions.

    A trajectory's predictions are those of ``plan.branch_prompts``.  ``micro_batch_size`` trajectories run at once, and
    as many prompts are encoded: 64 of both, if nothing is said; another number may change the last bit.  No evaluation
    shares their noise, nor does another ``purpose``.  Rows of a picture need no sampler.  ``on_progress`` counts rows.
    Raises UserError for predictions that are no numbers, and for pictures that cannot be read or have another size.
    """
    pictures = {picture(name): latents for name, latents in encode_pictures(model, recipe.pictures).items()}
    conditions = _encoded(model, recipe, plan.guided_from, micro_batch_size)
    # What a denoiser takes of the guidance, the student is told as the teacher was.
    guided = model.with_guidance(conditions.tensors, plan.guidance_scale)
    conditions = dataclasses.replace(conditions, tensors=guided)
    shape = model.latent_shape
    points, total = plan.points, plan.rows
    latents = torch.empty(total, *shape, device=model.device)
    timesteps = torch.empty(total, device=model.device)
    teacher_preds = torch.zeros(plan.branches, total, *shape, device=model.device)
    coefficients = torch.zeros(total, plan.branches, device=model.device)
    weights = torch.ones(total, device=model.device)
    own = torch.full((total,), -1, device=model.device)
    condition = torch.empty(total, dtype=torch.int64, device=model.device)
    role_rows: dict[Role, list[torch.Tensor]] = {}
    lower = torch.autocast(model.device.type, torch.bfloat16, enabled=plan.precision == "bf16")

    for first, group in _groups(plan, micro_batch_size or BATCH_SIZE):
        kinds = [row for row, _ in group]
        seeds = [plan.seed * 1_000_003 + number for _, number in group]
        branches = [plan.branch_prompts(row) for row in kinds]
        rows = torch.arange(first * points, (first + len(group)) * points, device=model.device).view(len(group), points)
        ends: torch.Tensor | list[None] = [None] * len(group)
        if kinds[0].trajectory not in pictures:
            noise = initial_noise([row.trajectory for row in kinds], seeds, shape, purpose)
            asked = [conditions.of(branch) for branch in zip(*branches, strict=True)]
            steps = plan.num_inference_steps
            trajectory = sample(model, noise, asked, num_inference_steps=steps, guidance_scale=plan.guidance_scale)
            with lower:
                for number, point in enumerate(trajectory):
                    latents[rows[:, number]] = point.latents
                    timesteps[rows[:, number]] = point.timestep.float()
                    teacher_preds[: len(asked), rows[:, number]] = point.predictions
                    on_progress(first * points + (number + 1) * len(group), total)
            ends = point.next_latents
        for row, branch, where, seed, end in zip(kinds, branches, rows, seeds, ends, strict=True):
            if row.trajectory in pictures or NOISE in row.target:
                if row.trajectory in pictures:
                    timesteps[where] = model.new_scheduler(plan.num_inference_steps).timesteps.float()
                names = [f"{row.trajectory}{NOISE}{number}" for number in range(points)]
                noise = initial_noise(names, [seed] * points, shape, purpose).to(model.device)
                clean = pictures.get(row.trajectory, end)
                latents[where], truth = model.noised(clean, noise, timesteps[where])
                if NOISE in row.target:  # stands where the first prediction does in other rows
                    teacher_preds[0, where] = truth
            if row.trajectory in pictures:
                x, t = latents[where], timesteps[where]
                for number, name in enumerate(branch):
                    if name in pictures:
                        teacher_preds[number, where] = prediction_towards(model, pictures[name], x, t)
                    elif name != NOISE:
                        with lower:
                            teacher_preds[number, where] = model.predict(x, t, conditions.of([name] * points))
            condition[where] = conditions.prompts.index(row.condition)
            coefficients[where, : len(branch)] = torch.tensor(_coefficients(row, branch), device=model.device)
            own[where] = branch.index(row.trajectory) if row.trajectory in branch else -1
            weights[where] = row.weight
            if row.noise_power:
                weights[where] *= noise_share(model, timesteps[where]) ** row.noise_power
            window = row.window(points)
            role_rows.setdefault(row.role, []).append(where[window.start : window.stop].cpu())
        on_progress((first + len(group)) * points, total)
    if not (latents.isfinite().all() and teacher_preds.isfinite().all()):
        raise UserError(
            f"{model.name}'s {type(model.pipeline.scheduler).__name__} leads to latents that are no finite numbers: "
            "its settings (`prediction_type`, `rescale_betas_zero_snr`) do not fit the model. Mend its scheduler."
        )
    indexed = {role: torch.cat(rows) for role, rows in role_rows.items()}
    return Bank(latents, timesteps, teacher_preds, coefficients, weights, own, condition, conditions, indexed)


def _encoded(model: Model, recipe: Recipe, guided_from: Sequence[str], batch_size: int | None) -> Conditions:
    """The recipe's prompts, encoded, with what guides beside them, and its named embeddings behind them."""
    conditions = model.encode([*recipe.prompts(), *guided_from], batch_size)
    for name, embedding in recipe.embeddings.items():
        if embedding.keys() != conditions.tensors.keys():
            raise ValueError(f"the embedding {name!r} must have {sorted(conditions.tensors)}, got {sorted(embedding)}.")
    tensors = {
        key: torch.cat([values, *(given[key][None].to(values) for given in recipe.embeddings.values())])
        for key, values in conditions.tensors.items()
    }
    return Conditions((*conditions.prompts, *recipe.embeddings), tensors)


def _coefficients(row: Row, names: list[str]) -> list[float]:
    if NOISE in row.target:  # stands where the first prediction does in other rows
        return [1.0, *[0.0] * (len(names) - 1)]
    # Two branches may be the same prediction, where a trajectory is the unconditional's own: count it once.
    return [row.target.get(name, 0.0) if name not in names[:place] else 0.0 for place, name in enumerate(names)]


def _groups(plan: BankPlan, size: int) -> list[tuple[int, Sequence[tuple[Row, int]]]]:
    """Runs of at most ``size`` trajectories that are made alike, each with its first trajectory's place."""

    def kind(place: int) -> tuple[bool, int]:
        row = assignments[place][0]
        return row.trajectory.startswith(picture("")), len(plan.branch_prompts(row))

    groups: list[tuple[int, Sequence[tuple[Row, int]]]] = []
    assignments, start = plan.assignments, 0
    while start < len(assignments):
        end = start
        while end < min(start + size, len(assignments)) and kind(end) == kind(start):
            end += 1
        groups.append((start, assignments[start:end]))
        start = end
    return groups
