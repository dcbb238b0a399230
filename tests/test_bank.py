"""The bank: what it holds is what a fresh computation gives, at the promised number of UNet evaluations."""

import copy
import dataclasses
import itertools

import pytest
import torch

from fastunlearn.errors import UserError
from fastunlearn.methods.recipe import EMPTY, NOISE, UNCONDITIONAL, Recipe, Row
from fastunlearn.methods.rules import Alternate, Sum
from fastunlearn.models.runtime import import_diffusers
from fastunlearn.models.sampling import initial_noise, sample
from fastunlearn.training.bank import build_bank, plan_bank

FORGET, ANCHOR, RETAIN = "a red star", "a red circle", "a blue ring"
RECIPE = Recipe(
    [
        Row("forget", FORGET, FORGET, {FORGET: -1.0, UNCONDITIONAL: 2.0}),
        Row("forget", "star", "star", {ANCHOR: 1.0}),
        Row("retain", RETAIN, RETAIN, {RETAIN: 1.0}),
    ],
    Alternate(),
)


def plan(model, trajectories=2, steps=3, recipe=RECIPE, seed=0):
    return plan_bank(model, recipe, trajectories=trajectories, num_inference_steps=steps, guidance_scale=3.0, seed=seed)


@pytest.fixture(scope="module")
def bank(bundled):
    return build_bank(bundled, RECIPE, plan(bundled))


def test_the_plan_counts_the_evaluations_that_are_made(bundled):
    rows = []
    hook = bundled.denoiser.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    try:
        planned = plan(bundled, trajectories=4)
        build_bank(bundled, RECIPE, planned, micro_batch_size=2)
    finally:
        hook.remove()
    assert sum(rows) == planned.unet_evaluations
    assert planned.rows == 2 * 4 * 3
    # forget: 2 trajectories with 2 branches, 2 with 3 (the anchor); retain: 4 with 2; each of 3 steps
    assert planned.unet_evaluations == 3 * (2 * 2 + 2 * 3 + 4 * 2)


def test_a_bank_in_bfloat16_is_what_autocast_gives_and_kept_in_float32(bundled, bank):
    made = build_bank(bundled, RECIPE, dataclasses.replace(plan(bundled), precision="bf16"))
    row, number = plan(bundled).assignments[0]
    conditions = bundled.encode([UNCONDITIONAL, row.trajectory])
    noise = initial_noise([row.trajectory], [number], bundled.latent_shape, "training")
    branches = [conditions.of([UNCONDITIONAL]), conditions.of([row.trajectory])]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        points = list(sample(bundled, noise, branches, num_inference_steps=3, guidance_scale=3.0))
    fresh = torch.stack([point.predictions[:, 0].float() for point in points], 1)
    torch.testing.assert_close(made.teacher_preds[:2, :3], fresh, atol=0.1, rtol=0.05)
    for name in ("latents", "timesteps", "teacher_preds", "coefficients"):
        assert getattr(made, name).dtype == torch.float32
    far = (made.teacher_preds - bank.teacher_preds).norm() / bank.teacher_preds.norm()
    assert 1e-4 < far < 0.1
    for name, values in made.conditions.tensors.items():
        assert torch.equal(values, bank.conditions.tensors[name]), "texts are encoded in float32"


def test_cached_rows_equal_a_fresh_trajectory(bundled, bank):
    planned = plan(bundled)
    for index, (row, number) in enumerate(planned.assignments):
        conditions = bundled.encode([UNCONDITIONAL, row.trajectory])
        branches = [conditions.of([UNCONDITIONAL]), conditions.of([row.trajectory])]
        noise = initial_noise([row.trajectory], [number], bundled.latent_shape, "training")
        points = list(sample(bundled, noise, branches, num_inference_steps=3, guidance_scale=3.0))
        rows = torch.arange(3 * index, 3 * index + 3)
        torch.testing.assert_close(bank.latents[rows], torch.cat([p.latents for p in points]), atol=1e-4, rtol=1e-4)
        assert bank.timesteps[rows].tolist() == [int(p.timestep) for p in points]
        for branch in (0, 1):
            fresh = torch.cat([p.predictions[branch] for p in points])
            torch.testing.assert_close(bank.teacher_preds[branch, rows], fresh, atol=1e-4, rtol=1e-4)


def test_coefficients_compose_each_rows_target(bundled, bank):
    for index, (row, _) in enumerate(plan(bundled).assignments):
        where = 3 * index
        target = torch.einsum("k,kchw->chw", bank.coefficients[where], bank.teacher_preds[:, where])
        fresh = torch.zeros_like(target)
        for prompt, coefficient in row.target.items():
            conditions = bundled.encode([prompt]).rows([0])
            with torch.no_grad():
                prediction = bundled.predict(bank.latents[where : where + 1], bank.timesteps[where], conditions)
            fresh += coefficient * prediction[0]
        torch.testing.assert_close(target, fresh, atol=1e-4, rtol=1e-4)
        assert bank.conditions.prompts[bank.condition[where]] == row.condition


def test_batched_and_single_trajectories_agree(bundled, bank):
    single = build_bank(bundled, RECIPE, plan(bundled), micro_batch_size=1)
    torch.testing.assert_close(single.latents, bank.latents, atol=1e-4, rtol=1e-4)
    assert torch.equal(single.coefficients, bank.coefficients)


def test_a_bank_is_a_function_of_its_seed(bundled, bank):
    again = build_bank(bundled, RECIPE, plan(bundled))
    assert torch.equal(again.latents, bank.latents)
    assert torch.equal(again.teacher_preds, bank.teacher_preds)
    assert not torch.equal(build_bank(bundled, RECIPE, plan(bundled, seed=1)).latents, bank.latents)


def test_an_unconditional_trajectory_counts_its_prediction_once(bundled):
    recipe = Recipe([Row("retain", UNCONDITIONAL, UNCONDITIONAL, {UNCONDITIONAL: 1.0})], Alternate())
    small = build_bank(bundled, recipe, plan(bundled, trajectories=1, recipe=recipe))
    target = torch.einsum("nk,knchw->nchw", small.coefficients, small.teacher_preds)
    assert torch.equal(target, small.teacher_preds[0])


def test_the_empty_prompt_is_a_prompt_like_any_other(bundled):
    recipe = Recipe([Row("retain", EMPTY, EMPTY, {EMPTY: 1.0})], Alternate())
    small = build_bank(bundled, recipe, plan(bundled, trajectories=1, recipe=recipe))
    target = torch.einsum("nk,knchw->nchw", small.coefficients, small.teacher_preds)
    assert torch.equal(target, small.teacher_preds[1])
    assert [small.conditions.prompts[i] for i in small.condition] == [EMPTY] * len(small)


def test_no_trajectory_starts_from_the_noise_of_an_evaluation(bundled, bank):
    starts = [bank.latents[3 * index] for index in range(len(plan(bundled).assignments))]
    prompts = [row.trajectory for row, _ in plan(bundled).assignments]
    for seed in range(4):
        evaluated = initial_noise(prompts, [seed] * len(prompts), bundled.latent_shape)
        assert all(not (one == two).any() for one, two in zip(starts, evaluated, strict=True))


def test_batches_pass_through_an_epoch_without_repeats_and_differ(bank):
    size = len(bank.role_rows["forget"])
    seen = torch.cat([bank.batch([("forget", 2)], step, 0).row_index for step in range(size // 2)])
    assert sorted(seen.tolist()) == sorted(bank.role_rows["forget"].tolist())
    following = torch.cat([bank.batch([("forget", 2)], step, 0).row_index for step in range(size // 2, size)])
    assert sorted(following.tolist()) == sorted(seen.tolist())
    assert following.tolist() != seen.tolist()


def test_a_batch_depends_on_nothing_but_its_step(bank):
    one = bank.batch([("forget", 2), ("retain", 3)], 17, 5)
    two = bank.batch([("forget", 2), ("retain", 3)], 17, 5)
    assert torch.equal(one.row_index, two.row_index)
    assert set(one.row_index[:2].tolist()) <= set(bank.role_rows["forget"].tolist())
    assert set(one.row_index[2:].tolist()) <= set(bank.role_rows["retain"].tolist())


def test_a_batch_larger_than_the_bank_repeats_rows(bank):
    size = len(bank.role_rows["retain"])
    index = bank.batch([("retain", 2 * size + 1)], 0, 0).row_index
    assert len(index) == 2 * size + 1
    assert set(index.tolist()) == set(bank.role_rows["retain"].tolist())


def test_trajectories_are_dealt_to_all_kinds_of_row(bundled):
    prompts = [row.trajectory for row, _ in plan(bundled, trajectories=6).assignments if row.role == "forget"]
    assert {prompt: prompts.count(prompt) for prompt in prompts} == {FORGET: 3, "star": 3}


def test_noise_rows_are_the_last_latents_under_noise_and_their_target_is_the_noise(bundled):
    recipe = Recipe([Row("retain", RETAIN, RETAIN, {NOISE: 1.0}), Row("forget", "star", "star", {ANCHOR: 1.0})], Sum())
    bank = build_bank(bundled, recipe, plan(bundled, trajectories=1, recipe=recipe))
    rows = bank.role_rows["retain"]
    branches = [bundled.encode([""]).of([""]), bundled.encode([RETAIN]).of([RETAIN])]
    noise = initial_noise([RETAIN], [0], bundled.latent_shape, "training")
    points = list(sample(bundled, noise, branches, num_inference_steps=3, guidance_scale=3.0))
    alphas = bundled.pipeline.scheduler.alphas_cumprod[bank.timesteps[rows].long()].view(-1, 1, 1, 1)
    target = (bank.coefficients[rows].T[:, :, None, None, None] * bank.teacher_preds[:, rows]).sum(0)
    clean = (bank.latents[rows] - (1 - alphas).sqrt() * target) / alphas.sqrt()
    torch.testing.assert_close(clean, points[-1].next_latents.expand_as(clean), atol=1e-3, rtol=1e-3)
    assert 0.8 < target.std() < 1.2
    assert not torch.equal(target[0], target[1]), "every point has noise of its own"


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_parts_of_a_batch_are_its_rows_each_once(bank, parts):
    roles = [("forget", 3), ("retain", 2)]
    whole = bank.batch(roles, 1, 0)
    dealt = [bank.batch(roles, 1, 0, part=part, parts=parts) for part in range(parts)]
    assert sorted(torch.cat([batch.row_index for batch in dealt]).tolist()) == sorted(whole.row_index.tolist())
    for batch in dealt:
        assert len(batch.timesteps) == sum(count for _, count in batch.roles) > 0
        expected = [role for role, count in batch.roles for _ in range(count)]
        assert [next(r for r, rows in bank.role_rows.items() if i in rows) for i in batch.row_index] == expected


def test_a_sampler_may_have_more_points_than_steps(bundled):
    diffusers = import_diffusers()
    pipeline = copy.copy(bundled.pipeline)
    pipeline.scheduler = diffusers.PNDMScheduler.from_config(pipeline.scheduler.config, skip_prk_steps=True)
    model = type(bundled)(pipeline, bundled.source, bundled.name, bundled.device)
    planned = plan(model)
    bank = build_bank(model, RECIPE, planned)
    assert planned.points == 4
    assert len(bank) == planned.rows == 4 * 4
    assert bank.timesteps.view(4, 4).tolist() == [model.new_scheduler(3).timesteps.tolist()] * 4


# ---- weights, windows and embeddings of rows -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "points", "expected"),
    [
        (None, 7, range(7)),
        ((0.0, 1.0), 7, range(7)),
        ((0.0, 0.5), 4, range(2)),
        ((0.5, 1.0), 4, range(2, 4)),
        ((0.0, 0.5), 5, range(3)),  # a point in the middle is in the first half alone
        ((0.5, 1.0), 5, range(3, 5)),
        ((0.2, 0.6), 10, range(2, 6)),
        ((0.1, 0.3), 50, range(5, 15)),
    ],
)
def test_a_window_is_a_share_of_the_points_in_the_samplers_order(window, points, expected):
    assert Row("forget", "a", "a", {"a": 1.0}, timesteps=window).window(points) == expected


def test_windows_side_by_side_hold_every_point_once():
    edges = [0, 0.07, 0.33, 0.5, 0.51, 0.9, 1]
    for points in (100, 313, 1000):
        rows = [Row("forget", "a", "a", {"a": 1.0}, timesteps=pair) for pair in itertools.pairwise(edges)]
        assert [n for row in rows for n in range(points) if n in row.window(points)] == list(range(points))


@pytest.mark.parametrize("window", [(0.5, 0.5), (0.6, 0.2), (-0.1, 0.5), (0.5, 1.1), (float("nan"), 1.0)])
def test_a_window_that_is_none_is_refused(window):
    with pytest.raises(ValueError, match=r"a window \(first, last\) within 0 and 1"):
        Row("forget", "a", "a", {"a": 1.0}, timesteps=window)


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_refused(weight):
    with pytest.raises(ValueError, match="a row's weight must be a finite number"):
        Row("forget", "a", "a", {"a": 1.0}, weight=weight)


def test_rows_are_trained_on_within_their_window_with_their_weight(bundled):
    recipe = Recipe(
        [
            Row("forget", FORGET, FORGET, {FORGET: 1.0}, weight=2.5, timesteps=(0.0, 0.5)),
            Row("retain", RETAIN, RETAIN, {RETAIN: 1.0}),
        ],
        Sum(),
    )
    planned = plan(bundled, trajectories=2, steps=4, recipe=recipe)
    assert (planned.rows, planned.trained_rows) == (16, 12)
    bank = build_bank(bundled, recipe, planned)
    timesteps = bundled.new_scheduler(4).timesteps
    forget = bank.role_rows["forget"]
    assert bank.timesteps[forget].tolist() == [*timesteps[:2].tolist()] * 2, "the noisy half of each trajectory"
    assert len(bank.role_rows["retain"]) == 8
    batch = bank.batch([("forget", 9), ("retain", 5)], 3, 0)
    assert batch.weights.tolist() == [2.5] * 9 + [1.0] * 5
    assert set(batch.row_index[:9].tolist()) <= set(forget.tolist())


def test_a_window_without_a_point_is_refused_by_the_plan(bundled):
    recipe = Recipe([Row("forget", FORGET, FORGET, {FORGET: 1.0}, timesteps=(0.9, 0.95))], Sum())
    with pytest.raises(UserError, match=r"\(0\.9, 0\.95\) holds none of a trajectory's 3 points.*--trajectory-steps"):
        plan(bundled, recipe=recipe)


def test_a_named_embedding_stands_where_a_prompt_could(bundled):
    """An embedding equal to a prompt's encoding gives the rows of the prompt; as a trajectory it has its own noise."""
    states = {key: values[0] for key, values in bundled.encode([ANCHOR]).tensors.items()}
    mixed = {key: (values[0] + states[key]) / 2 for key, values in bundled.encode([FORGET]).tensors.items()}

    def rows(anchor, condition):
        return [Row("forget", FORGET, condition, {anchor: 2.0, UNCONDITIONAL: -1.0})]

    plain = Recipe(rows(ANCHOR, FORGET), Sum())
    named = Recipe(rows("as the anchor", "between"), Sum(), {"as the anchor": states, "between": mixed})
    assert named.prompts() == [UNCONDITIONAL, FORGET]
    banks = [build_bank(bundled, recipe, plan(bundled, recipe=recipe)) for recipe in (plain, named)]
    torch.testing.assert_close(banks[0].teacher_preds, banks[1].teacher_preds, atol=1e-5, rtol=1e-4)
    assert torch.equal(banks[0].coefficients, banks[1].coefficients)
    conditions = banks[1].batch([("forget", 2)], 0, 0).conditions
    for key, values in mixed.items():
        assert torch.equal(conditions[key], torch.stack([values, values]))
    own = Recipe([Row("retain", "between", "between", {"between": 1.0})], Sum(), {"between": mixed})
    bank = build_bank(bundled, own, plan(bundled, recipe=own, trajectories=1))
    prediction = bundled.predict(bank.latents[:1], bank.timesteps[:1], {key: v[None] for key, v in mixed.items()})
    torch.testing.assert_close(bank.teacher_preds[1, :1], prediction, atol=1e-4, rtol=1e-4)


def test_an_embedding_that_lacks_a_part_is_named(bundled):
    recipe = Recipe([Row("forget", "e", "e", {"e": 1.0})], Sum(), {"e": {"pooled": torch.zeros(3)}})
    with pytest.raises(ValueError, match=r"the embedding 'e' must have \['encoder_hidden_states'\], got \['pooled'\]"):
        build_bank(bundled, recipe, plan(bundled, recipe=recipe))
