"""noise_pred_loss against its formula in float64: value, per-row values and gradient."""

import pytest
import torch
from fastunlearn_kernels import launch, noise_pred_loss
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

UPSTREAM = -1.75
# bfloat16 gradients are rounded twice, in forward and by the upstream gradient, and the interpreter truncates
RELATIVE = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-6}
DTYPES = list(RELATIVE)
SHAPES = [(1, 1, 1, 1), (2, 7, 3, 3), (3, 10, 10, 10), (2, 4, 20, 20), (1, 4, 33, 17)]  # 1, 63, 1000, 1600, 2244 a row
HYPOTHESIS = settings(
    deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

pytestmark = pytest.mark.usefixtures("took")  # on each backend


def make_inputs(shape=(3, 4, 6, 5), num_teachers=2, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    batch = shape[0]
    return {
        "noise_pred": torch.randn(shape, generator=g).to(dtype),
        "teacher_preds": torch.randn((num_teachers, *shape), generator=g).to(dtype),
        "coefficients": torch.randn(batch, num_teachers, generator=g),
        "weights": torch.randn(batch, generator=g),
    }


def add_noise(inputs, prediction_type="epsilon", seed=1):
    g = torch.Generator().manual_seed(seed)
    like = inputs["noise_pred"]
    inputs["noise"] = torch.randn(like.shape, generator=g).to(like.dtype)
    inputs["noise_coefficients"] = torch.randn(like.shape[0], generator=g)
    inputs["prediction_type"] = prediction_type
    if prediction_type != "epsilon":
        inputs["latents"] = torch.randn(like.shape, generator=g).to(like.dtype)
    if prediction_type == "v_prediction":
        inputs["snr"] = torch.rand(like.shape[0], generator=g) * 8
    return inputs


def oracle(
    noise_pred,
    teacher_preds,
    coefficients,
    weights,
    noise=None,
    noise_coefficients=None,
    latents=None,
    snr=None,
    spatial_mask=None,
    row_index=None,
    snr_gamma=None,
    huber_delta=None,
    prediction_type="epsilon",
):
    """Loss, per-row loss and gradient for UPSTREAM, in float64, a row at a time."""
    x = noise_pred.detach().double().requires_grad_(True)
    per_row, total = [], x.sum() * 0
    for i in range(x.shape[0]):
        target = torch.zeros_like(x[i])
        for k in range(0 if teacher_preds is None else teacher_preds.shape[0]):
            row = i if row_index is None else int(row_index[i])
            if coefficients[i, k] != 0:
                target = target + coefficients[i, k].double() * teacher_preds[k, row].double()
        if noise is not None and noise_coefficients[i] != 0:
            alpha, sigma = {"epsilon": (1, 0), "flow_prediction": (1, 1), "v_prediction": (None, None)}[prediction_type]
            if prediction_type == "v_prediction":
                ratio = snr[i].double()
                alpha, sigma = (ratio / (1 + ratio)).sqrt(), (1 / (1 + ratio)).sqrt()
            truth = alpha * noise[i].double()
            if latents is not None:
                truth = truth - sigma * latents[i].double()
            target = target + noise_coefficients[i].double() * truth
        error = x[i] - target
        if spatial_mask is not None:
            mask = spatial_mask.expand_as(noise_pred)[i].double()
            error = torch.where(mask != 0, error, 0.0)
        if huber_delta is None:
            value = error**2
        else:
            value = 2 * torch.nn.functional.huber_loss(
                error, torch.zeros_like(error), reduction="none", delta=huber_delta
            )
        if spatial_mask is not None:
            value = value * mask
        per_row.append(value.mean())
        weight = weights[i].double()
        if snr_gamma is not None:
            # the weight of the error of the clean latents is min(snr, gamma); that error is this factor times ours
            s = snr[i].double()
            t = 1 / (1 + s.sqrt())
            weight = (
                weight
                * s.clamp(max=snr_gamma)
                * {
                    "epsilon": 1 / s,
                    "v_prediction": 1 / (1 + s),
                    "flow_prediction": t**2,
                }[prediction_type]
            )
        if weight != 0:
            total = total + weight * per_row[-1] / x.shape[0]
    total.backward(torch.tensor(UPSTREAM, dtype=torch.float64))
    return total.detach(), torch.stack(per_row).detach(), x.grad


def run(inputs, upstream=UPSTREAM):
    inputs = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
    noise_pred = inputs.pop("noise_pred").requires_grad_(True)
    leading = [inputs.pop(key) for key in ("teacher_preds", "coefficients", "weights")]
    loss, per_row = noise_pred_loss(noise_pred, *leading, **inputs)
    (loss * upstream).backward()
    return loss.detach(), per_row, noise_pred.grad


def check(inputs):
    loss, per_row, gradient = run(inputs)
    expected_loss, expected_per_row, expected_gradient = oracle(**inputs)
    assert loss.dtype == per_row.dtype == torch.float32
    assert gradient.dtype == inputs["noise_pred"].dtype
    assert gradient.shape == inputs["noise_pred"].shape
    torch.testing.assert_close(per_row.double(), expected_per_row, rtol=1e-5, atol=1e-9)
    scale = float((inputs["weights"].abs() * expected_per_row).mean()) + 1e-9  # signs differ: the sum may cancel
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-5, atol=1e-5 * scale)
    tolerance = RELATIVE[gradient.dtype]
    size = float(expected_gradient.abs().max())
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=tolerance, atol=max(1e-5 * size, 6e-8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient(shape, dtype, took):
    check(make_inputs(shape, dtype=dtype))
    took("_noise_pred_loss_kernel", "noise_pred_loss")
    took("_reduce_rows_kernel", "noise_pred_loss")
    took("_scale_kernel", "noise_pred_loss")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow_prediction"])
@pytest.mark.parametrize("num_teachers", [0, 1, 3])
def test_ground_truth_of_every_kind_of_model(num_teachers, prediction_type):
    inputs = add_noise(make_inputs(num_teachers=num_teachers), prediction_type)
    check(inputs)
    if num_teachers == 0:
        inputs["teacher_preds"] = inputs["coefficients"] = None
        check(inputs)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow_prediction"])
def test_min_snr_weights(prediction_type):
    check(
        {**make_inputs(), "snr": torch.tensor([0.01, 3.0, 40.0]), "snr_gamma": 5.0, "prediction_type": prediction_type}
    )


def test_min_snr_weights_at_the_ends_of_a_schedule():
    for prediction_type, ends in (("epsilon", (1, 0)), ("v_prediction", (0, 0)), ("flow_prediction", (0, 0))):
        inputs = {**make_inputs((2, 4, 3, 3)), "snr": torch.tensor([0.0, float("inf")]), "weights": torch.ones(2)}
        loss, per_row, _ = run({**inputs, "snr_gamma": 5.0, "prediction_type": prediction_type})
        torch.testing.assert_close(loss, (per_row * torch.tensor(ends)).mean(), msg=prediction_type)


@pytest.mark.parametrize("mask_shape", [(3, 1, 6, 5), (3, 4, 6, 5), (1, 1, 6, 5), (1, 4, 6, 5)], ids=str)
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32, torch.bfloat16], ids=str)
def test_spatial_mask(mask_shape, mask_dtype):
    mask = torch.rand(mask_shape, generator=torch.Generator().manual_seed(3))
    mask = (mask > 0.5).to(mask_dtype) if mask_dtype != torch.float32 else mask * (mask > 0.3)
    check({**make_inputs(), "spatial_mask": mask})


@pytest.mark.parametrize("huber_delta", [0.01, 0.7, 100.0])
def test_huber(huber_delta):
    check({**make_inputs(), "huber_delta": huber_delta})
    check(
        {
            **make_inputs(),
            "huber_delta": huber_delta,
            "spatial_mask": torch.tensor([0.0, 0.5, 2, 1, 0]).expand(3, 1, 6, 5),
        }
    )


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_rows_of_a_bank(index_dtype):
    inputs = make_inputs()
    bank = torch.randn(7, 2, 4, 6, 5, generator=torch.Generator().manual_seed(5)).transpose(0, 1)  # stored row by row
    check({**inputs, "teacher_preds": bank, "row_index": torch.tensor([6, 0, 6], dtype=index_dtype)})


def test_a_row_outside_the_bank_is_loud():
    inputs = {**make_inputs(), "row_index": torch.tensor([0, 3, -1])}
    if not launch.INTERPRETED:
        with pytest.raises(IndexError):
            run(inputs)
        return
    loss, per_row, gradient = run(inputs)
    assert loss.isnan()
    assert per_row.isnan().tolist() == [False, True, True]
    assert gradient[1:].isnan().all()


def test_predictions_may_have_other_dtypes_than_the_student():
    inputs = add_noise(make_inputs())
    inputs["teacher_preds"], inputs["noise"] = inputs["teacher_preds"].bfloat16(), inputs["noise"].half()
    check(inputs)


def test_layouts():
    inputs = add_noise(make_inputs(), "flow_prediction")
    expected = run(inputs)
    changed = {
        **inputs,
        "noise_pred": inputs["noise_pred"].to(memory_format=torch.channels_last),
        "teacher_preds": inputs["teacher_preds"].permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2),
        "noise": inputs["noise"].transpose(2, 3).contiguous().transpose(2, 3),
        "coefficients": torch.stack([inputs["coefficients"]] * 2, dim=2)[..., 0],
        "weights": torch.stack([inputs["weights"]] * 2, dim=1)[:, 0],
    }
    for result, value in zip(run(changed), expected, strict=True):
        assert torch.equal(result, value)


@pytest.mark.parametrize("shape", [(0, 4, 6, 5), (2, 4, 0, 5)], ids=str)
def test_nothing_is_zero(shape):
    loss, per_row, gradient = run(make_inputs(shape))
    assert loss == 0
    assert per_row.shape == shape[:1]
    assert gradient.shape == shape


def test_nothing_selected_is_zero_whatever_is_there():
    inputs = make_inputs()
    inputs["noise_pred"].fill_(float("nan"))
    loss, per_row, gradient = run({**inputs, "spatial_mask": torch.zeros(3, 1, 6, 5)})
    assert loss == 0
    assert torch.equal(per_row, torch.zeros(3))
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_nan_in_masked_out_positions_reaches_nothing():
    inputs = add_noise(make_inputs(), "flow_prediction")
    mask = torch.rand(3, 1, 6, 5, generator=torch.Generator().manual_seed(3)) > 0.5
    clean = run({**inputs, "spatial_mask": mask})
    for key in ("noise_pred", "teacher_preds", "noise", "latents"):
        inputs[key] = torch.where(mask, inputs[key], float("nan"))
    for result, value in zip(run({**inputs, "spatial_mask": mask}), clean, strict=True):
        assert torch.equal(result, value)


def test_unused_slots_and_rows_of_weight_zero_reach_nothing():
    inputs = add_noise(make_inputs())
    inputs["coefficients"][0, 1] = inputs["noise_coefficients"][1] = inputs["weights"][2] = 0
    inputs["teacher_preds"][1, 0] = inputs["noise"][1] = inputs["noise_pred"][2] = float("nan")
    loss, per_row, gradient = run(inputs)
    clean = {
        **inputs,
        "noise_pred": inputs["noise_pred"].nan_to_num(),
        "teacher_preds": inputs["teacher_preds"].nan_to_num(),
    }
    expected_loss, expected_per_row, expected_gradient = oracle(**{**clean, "noise": inputs["noise"].nan_to_num()})
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(per_row[:2].double(), expected_per_row[:2], rtol=1e-5, atol=0)
    assert per_row[2].isnan()
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-8)
    assert torch.equal(gradient[2], torch.zeros_like(gradient[2]))


def test_nan_that_is_meant_stays():
    for option in ({}, {"huber_delta": 0.5}):
        inputs = make_inputs()
        inputs["noise_pred"][1, 2, 3, 4] = float("nan")
        loss, per_row, gradient = run({**inputs, **option})
        assert loss.isnan()
        assert per_row.isnan().tolist() == [False, True, False]
        assert gradient[1, 2, 3, 4].isnan()


def test_inputs_stay_and_runs_repeat():
    inputs = add_noise(make_inputs((3, 4, 33, 17), dtype=torch.bfloat16), "v_prediction")
    before = {key: value.clone() for key, value in inputs.items() if isinstance(value, torch.Tensor)}
    first, second = run(inputs), run(inputs)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    for key, value in before.items():
        assert torch.equal(inputs[key], value)


def test_half_precision_gradients_do_not_underflow_before_the_loss_scale():
    inputs = make_inputs((16, 4, 32, 32), dtype=torch.float16)
    _, _, gradient = run(inputs, upstream=65536.0)
    expected = oracle(**inputs)[2] / UPSTREAM * 65536
    assert float((expected / 65536).abs().median()) < 2e-5  # in float16 below the normal numbers: digits would be lost
    torch.testing.assert_close(gradient.double(), expected, rtol=2**-10, atol=1e-4)


def test_no_gradient_is_made_where_none_is_wanted():
    inputs = make_inputs()
    with torch.no_grad():
        loss, per_row = noise_pred_loss(inputs["noise_pred"].requires_grad_(True), *list(inputs.values())[1:])
    assert not loss.requires_grad
    loss, per_row = noise_pred_loss(inputs["noise_pred"], *list(inputs.values())[1:])
    assert loss.requires_grad
    assert not per_row.requires_grad


def test_a_second_backward_is_refused():
    inputs = make_inputs()
    loss, _ = noise_pred_loss(inputs["noise_pred"].requires_grad_(True), *list(inputs.values())[1:])
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="Call noise_pred_loss once for each backward"):
        loss.backward()


inputs_of_any_kind = {
    "shape": st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 19), st.integers(1, 19)),
    "num_teachers": st.integers(1, 4),
    "dtype": st.sampled_from(DTYPES),
    "prediction_type": st.sampled_from([None, "epsilon", "v_prediction", "flow_prediction"]),
    "with_mask": st.booleans(),
    "huber_delta": st.sampled_from([None, 0.5]),
    "snr_gamma": st.sampled_from([None, 5.0]),
    "seed": st.integers(0, 10**6),
}


def check_any(shape, num_teachers, dtype, prediction_type, with_mask, huber_delta, snr_gamma, seed):
    inputs = make_inputs(shape, num_teachers, dtype, seed)
    g = torch.Generator().manual_seed(seed)
    if prediction_type is not None:
        inputs = add_noise(inputs, prediction_type, seed + 1)
    if snr_gamma is not None:
        inputs = {**inputs, "snr": torch.rand(shape[0], generator=g) * 9 + 0.01, "snr_gamma": snr_gamma}
    if with_mask:
        inputs["spatial_mask"] = torch.rand(shape[0], 1, *shape[2:], generator=g) > 0.4
    check({**inputs, "huber_delta": huber_delta})


@settings(HYPOTHESIS, max_examples=40)
@given(**inputs_of_any_kind)
def test_any_inputs(**inputs):
    check_any(**inputs)


@pytest.mark.slow
@settings(HYPOTHESIS, max_examples=400)
@given(**inputs_of_any_kind)
def test_many_inputs(**inputs):
    check_any(**inputs)
