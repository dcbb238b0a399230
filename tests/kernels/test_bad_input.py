"""What a caller can get wrong is refused in words, before anything is computed or changed."""

import pytest
import torch
from fastunlearn_kernels import (
    MaskedAdamW,
    accumulate_saliency_,
    gradient_dots,
    lpips_distance,
    noise_pred_loss,
    pack_bits,
    projection_coefficient,
    saliency_mask,
    unpack_bits,
)

pytestmark = pytest.mark.usefixtures("took")  # on each backend

SHAPE = (2, 4, 5, 3)
META = torch.device("meta")


def loss(**changes):
    arguments = {
        "noise_pred": torch.randn(SHAPE),
        "teacher_preds": torch.randn(2, *SHAPE),
        "coefficients": torch.randn(2, 2),
        "weights": torch.ones(2),
        **changes,
    }
    leading = [arguments.pop(name) for name in ("noise_pred", "teacher_preds", "coefficients", "weights")]
    return noise_pred_loss(*leading, **arguments)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        # mismatched shapes
        ({"noise_pred": torch.randn(2, 4, 15)}, ValueError, "`noise_pred` must have shape"),
        ({"teacher_preds": torch.randn(2, 2, 4, 5, 4)}, ValueError, "`teacher_preds` must have shape"),
        ({"teacher_preds": torch.randn(SHAPE)}, ValueError, "`teacher_preds` must have shape"),
        (
            {"noise": torch.randn(2, 4, 5, 4), "noise_coefficients": torch.ones(2)},
            ValueError,
            "`noise` must have shape",
        ),
        ({"weights": torch.ones(3)}, ValueError, "`weights` must have shape"),
        ({"row_index": torch.tensor([0, 1, 1])}, ValueError, "`row_index` must have shape"),
        (
            {"row_index": torch.tensor([0, 1]), "teacher_preds": torch.randn(2, 9, 3, 5, 4).transpose(2, 4)},
            ValueError,
            "densely",
        ),
        # mismatched dtypes
        ({"row_index": torch.ones(2)}, TypeError, "`row_index` must be of dtype int32, int64"),
        ({"weights": torch.ones(2).half()}, TypeError, "`weights` must be of dtype float32"),
        ({"coefficients": torch.ones(2, 2).double()}, TypeError, "`coefficients` must be of dtype float32"),
        # mismatched devices
        ({"teacher_preds": torch.randn(2, *SHAPE, device=META)}, ValueError, "`teacher_preds` must be on cpu"),
        ({"weights": torch.ones(2, device=META)}, ValueError, "`weights` must be on cpu"),
        # K = 0
        ({"teacher_preds": None, "coefficients": None}, ValueError, "no target"),
        ({"teacher_preds": torch.randn(0, *SHAPE), "coefficients": torch.randn(2, 0)}, ValueError, "no target"),
        ({"teacher_preds": None}, ValueError, "need `teacher_preds`"),
        # coefficients of the wrong length
        ({"coefficients": torch.randn(2, 3)}, ValueError, "`coefficients` must have shape"),
        (
            {"noise": torch.randn(SHAPE), "noise_coefficients": torch.ones(3)},
            ValueError,
            "`noise_coefficients` must have",
        ),
        # a mask of another size
        ({"spatial_mask": torch.ones(2, 1, 5, 4)}, ValueError, "`spatial_mask` must broadcast"),
        ({"spatial_mask": torch.ones(2, 1, 1, 3)}, ValueError, "`spatial_mask` must broadcast"),
        ({"spatial_mask": torch.ones(5, 3)}, ValueError, "`spatial_mask` must broadcast"),
        # non-floating or complex tensors
        ({"noise_pred": torch.ones(SHAPE, dtype=torch.int64)}, TypeError, "`noise_pred` must be of dtype float16"),
        ({"noise_pred": torch.ones(SHAPE, dtype=torch.complex64)}, TypeError, "got complex64"),
        ({"noise_pred": torch.ones(SHAPE, dtype=torch.float64)}, TypeError, "got float64"),
        ({"noise_pred": None}, TypeError, "must be a torch.Tensor"),
        # requires_grad on the teacher
        ({"teacher_preds": torch.randn(2, *SHAPE, requires_grad=True)}, ValueError, "Pass `teacher_preds.detach"),
        ({"weights": torch.ones(2, requires_grad=True)}, ValueError, "Pass `weights.detach"),
        # options that do not fit together
        ({"noise": torch.randn(SHAPE)}, ValueError, "given together"),
        ({"prediction_type": "sample"}, ValueError, "must be one of epsilon, v_prediction, flow_prediction"),
        ({"latents": torch.randn(SHAPE)}, ValueError, "`latents` must be given with"),
        ({"snr": torch.ones(2)}, ValueError, "`snr` must be given with"),
        ({"snr_gamma": 5.0}, ValueError, "`snr` must be given with"),
        ({"snr_gamma": -1.0, "snr": torch.ones(2)}, ValueError, "`snr_gamma` must be greater than 0"),
        ({"huber_delta": 0.0}, ValueError, "`huber_delta` must be greater than 0"),
    ],
)
def test_noise_pred_loss(changes, error, match):
    with pytest.raises(error, match=match):
        loss(**changes)


def test_zero_size_batch_is_no_error():
    noise_pred = torch.randn(0, 4, 5, 3, requires_grad=True)
    value, per_row = noise_pred_loss(noise_pred, torch.randn(1, 0, 4, 5, 3), torch.randn(0, 1), torch.ones(0))
    value.backward()
    assert value == 0
    assert per_row.shape == (0,)
    assert noise_pred.grad.shape == (0, 4, 5, 3)


def test_rows_beyond_2_to_the_31_are_refused():
    big = torch.empty(1, device=META).expand(1, 2**16, 2**8, 2**7)
    with pytest.raises(ValueError, match="fewer than 2\\^31"):
        noise_pred_loss(big, big.unsqueeze(0), torch.ones(1, 1, device=META), torch.ones(1, device=META))


@pytest.mark.parametrize(
    ("features0", "features1", "weights", "error", "match"),
    [
        (
            [torch.rand(2, 3, 4, 4)],
            [torch.rand(2, 3, 4, 5)],
            [torch.rand(3)],
            ValueError,
            "`features1\\[0\\]` must have",
        ),
        (
            [torch.rand(2, 3, 4, 4)],
            [torch.rand(1, 3, 4, 4)],
            [torch.rand(3)],
            ValueError,
            "`features1\\[0\\]` must have",
        ),
        ([torch.rand(2, 3, 4, 4)], [torch.rand(2, 3, 4, 4).half()], [torch.rand(3)], TypeError, "float32, got float16"),
        ([torch.rand(2, 3, 4, 4)], [torch.rand(2, 3, 4, 4)], [torch.rand(4)], ValueError, "`weights\\[0\\]` must have"),
        ([torch.rand(2, 3, 4, 4)], [torch.rand(2, 3, 4, 4)], [], ValueError, "one tensor a layer"),
        ([], [], [], ValueError, "at least one"),
        ([torch.rand(2, 3, 4)], [torch.rand(2, 3, 4)], [torch.rand(3)], ValueError, "\\(2, C, H, W\\)|\\(N, C"),
        ([torch.rand(2, 3, 0, 4)], [torch.rand(2, 3, 0, 4)], [torch.rand(3)], ValueError, "at least one channel"),
        (torch.rand(2, 3, 4, 4), [torch.rand(2, 3, 4, 4)], [torch.rand(3)], TypeError, "list or tuple"),
        (
            [torch.rand(2, 3, 4, 4, device=META)],
            [torch.rand(2, 3, 4, 4)],
            [torch.rand(3)],
            ValueError,
            "must be on meta",
        ),
        ([torch.rand(2, 3, 4, 4).int()], [torch.rand(2, 3, 4, 4).int()], [torch.rand(3)], TypeError, "got int32"),
        ([torch.rand(1, 3, 4, 4, requires_grad=True)], [torch.rand(1, 3, 4, 4)], [torch.rand(3)], ValueError, "detach"),
    ],
)
def test_lpips_distance(features0, features1, weights, error, match):
    with pytest.raises(error, match=match):
        lpips_distance(features0, features1, weights)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"lr": -1.0}, ValueError, "`lr` must be at least 0"),
        ({"lr": torch.ones(2)}, ValueError, "`lr` must have shape"),
        ({"betas": (0.9, 1.0)}, ValueError, "`betas` must be two numbers"),
        ({"eps": -1.0}, ValueError, "`eps` must be at least 0"),
        ({"weight_decay": float("nan")}, ValueError, "`weight_decay` must be at least 0"),
    ],
)
def test_masked_adamw_options(options, error, match):
    with pytest.raises(error, match=match):
        MaskedAdamW([torch.nn.Parameter(torch.ones(3))], **options)


@pytest.mark.parametrize(
    ("param", "error", "match"),
    [
        (torch.ones(3).double(), TypeError, "got float64"),
        (torch.ones(3, dtype=torch.complex64), TypeError, "got complex64"),
        (torch.ones(6)[::2], ValueError, "must be dense"),
    ],
)
def test_masked_adamw_parameters(param, error, match):
    with pytest.raises(error, match=match):
        MaskedAdamW([param.requires_grad_(True)])


@pytest.mark.parametrize(
    ("bits", "error", "match"),
    [
        (torch.ones(11, dtype=torch.bool), TypeError, "uint8"),
        (torch.ones(3, dtype=torch.uint8), ValueError, "`bits` must have shape \\(2,\\)"),
        (torch.ones(2, dtype=torch.uint8, device=META), ValueError, "must be on cpu"),
        (torch.tensor([0, 8], dtype=torch.uint8), ValueError, "beyond the 11"),
    ],
)
def test_masked_adamw_masks(bits, error, match):
    param = torch.nn.Parameter(torch.ones(11))
    with pytest.raises(error, match=match):
        MaskedAdamW([param], grad_masks={param: bits})


def test_masked_adamw_masks_of_compact_states_are_fixed():
    param = torch.nn.Parameter(torch.ones(8))
    bits = pack_bits(torch.ones(8, dtype=torch.bool))
    optimizer = MaskedAdamW([param], grad_masks={param: bits}, compact=True)
    param.grad = torch.ones(8)
    optimizer.step()
    with pytest.raises(ValueError, match="before the first step"):
        optimizer.set_grad_mask(param, bits)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"grad_scale": 0.5}, TypeError, "`grad_scale` must be a torch.Tensor"),
        ({"grad_scale": torch.ones(1)}, ValueError, "`grad_scale` must have shape \\(\\)"),
        ({"other_coefficient": torch.ones(())}, ValueError, "given together"),
        (
            {"other_grads": {}, "other_coefficient": torch.ones(())},
            ValueError,
            "The other gradient must have the shape",
        ),
    ],
)
def test_masked_adamw_steps(arguments, error, match):
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = MaskedAdamW([param])
    param.grad = torch.ones(3)
    with pytest.raises(error, match=match):
        optimizer.step(**arguments)
    assert torch.equal(param, torch.ones(3))


def test_masked_adamw_sparse_gradients():
    table = torch.nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        MaskedAdamW(table.parameters()).step()


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((torch.ones(3), 1.5), ValueError, "`density` must be between 0 and 1"),
        ((torch.ones(3), float("nan")), ValueError, "`density` must be between 0 and 1"),
        ((torch.ones(3).half(), 0.5), TypeError, "float32"),
        (([torch.ones(3), torch.ones(3, device=META)], 0.5), ValueError, "must be on cpu"),
        (("saliency", 0.5), TypeError, "list or tuple"),
    ],
)
def test_saliency_mask(arguments, error, match):
    with pytest.raises(error, match=match):
        saliency_mask(*arguments)


def test_saliency_mask_granularity():
    with pytest.raises(ValueError, match="element, sector, row"):
        saliency_mask(torch.ones(3), 0.5, granularity="block")


@pytest.mark.parametrize(
    ("saliency", "gradients", "mode", "error", "match"),
    [
        ([torch.zeros(3)], [torch.ones(4)], "absolute", ValueError, "`gradients\\[0\\]` must have shape"),
        ([torch.zeros(3)], [], "absolute", ValueError, "`gradients` must have 1 tensors"),
        ([torch.zeros(3).half()], [torch.ones(3)], "absolute", TypeError, "float32"),
        ([torch.zeros(6)[::2]], [torch.ones(3)], "absolute", ValueError, "must be contiguous"),
        ([torch.zeros(3)], [torch.ones(3)], "cubed", ValueError, "absolute, signed, squared"),
    ],
)
def test_accumulate_saliency(saliency, gradients, mode, error, match):
    with pytest.raises(error, match=match):
        accumulate_saliency_(saliency, gradients, mode=mode)


@pytest.mark.parametrize(
    ("gradients0", "gradients1", "masks", "error", "match"),
    [
        ([], None, None, ValueError, "at least one"),
        ([torch.ones(3)], [torch.ones(4)], None, ValueError, "`gradients1\\[0\\]` must have shape"),
        ([torch.ones(3)], [], None, ValueError, "1 tensors"),
        ([torch.ones(3).int()], None, None, TypeError, "got int32"),
        ([torch.ones(3), torch.ones(3, device=META)], None, None, ValueError, "must be on cpu"),
        ([torch.ones(3)], None, [], ValueError, "1 entries"),
        ([torch.ones(9)], None, [torch.ones(1, dtype=torch.uint8)], ValueError, "`grad_masks\\[0\\]` must have shape"),
    ],
)
def test_gradient_dots(gradients0, gradients1, masks, error, match):
    with pytest.raises(error, match=match):
        gradient_dots(gradients0, gradients1, grad_masks=masks)


def test_projection_coefficient():
    with pytest.raises(ValueError, match="`dots` must have shape"):
        projection_coefficient(torch.ones(2))


def test_bits():
    with pytest.raises(TypeError, match="bool"):
        pack_bits(torch.ones(3))
    with pytest.raises(TypeError, match="uint8"):
        unpack_bits(torch.ones(1), 3)
    with pytest.raises(ValueError, match="`bits` must have shape \\(1,\\)"):
        unpack_bits(torch.ones(2, dtype=torch.uint8), 3)
