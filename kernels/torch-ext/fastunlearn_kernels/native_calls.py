"""The operations as calls of the native library: tensors to addresses, statuses to errors.

Nothing here validates: the public functions do, and call these with CPU tensors that are right. Records are arrays of
64-bit words in the order of the structs of ``native.cpp``.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .native import library

if TYPE_CHECKING:
    from ._noise_loss_kernel import Rows

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
MODES = {"absolute": 0, "signed": 1, "squared": 2}
_OUT_OF_MEMORY, _BAD_ROW = 1, 2


def address_of(words: array[Any]) -> int:
    return words.buffer_info()[0]


def check_status(status: int) -> None:
    if status == _OUT_OF_MEMORY:
        raise MemoryError("The native library could not allocate its buffers.")
    if status == _BAD_ROW:
        raise IndexError("`row_index` holds a row that the bank of `teacher_preds` does not have.")


def _pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def gradient_dots(
    gradients0: Sequence[torch.Tensor],
    gradients1: Sequence[torch.Tensor] | None,
    bits: Sequence[torch.Tensor | None],
) -> torch.Tensor:
    """(3,) fp32: <0, 0>, <0, 1>, <1, 1> of flat tensors, over the elements whose bit is 1."""
    records = array("q")
    for i, gradient0 in enumerate(gradients0):
        gradient1 = None if gradients1 is None else gradients1[i]
        dtype1 = 0 if gradient1 is None else DTYPES[gradient1.dtype]
        records.extend((
            gradient0.data_ptr(), _pointer(gradient1), _pointer(bits[i]),
            gradient0.numel(), DTYPES[gradient0.dtype], dtype1,
        ))  # fmt: skip
    return dots_of(records).float()


def dots_of(records: array[int]) -> torch.Tensor:
    """(3,) fp64 of six words a tensor."""
    dots = torch.empty(3, dtype=torch.float64)
    check_status(library().fu_dots(address_of(records), len(records) // 6, dots.data_ptr(), torch.get_num_threads()))
    return dots


def accumulate_saliency_(saliency: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], mode: str) -> None:
    """Adds |g|, g or g^2 to each flat fp32 tensor."""
    records = array("q")
    for total, gradient in zip(saliency, gradients, strict=True):
        records.extend((total.data_ptr(), gradient.data_ptr(), 0, total.numel(), DTYPES[gradient.dtype]))
    status = library().fu_accumulate(address_of(records), len(saliency), MODES[mode], torch.get_num_threads())
    check_status(status)


def select_largest(scores: Sequence[torch.Tensor], count: int) -> list[torch.Tensor]:
    """Packed masks of the ``count`` >= 1 largest |scores| of flat fp32 tensors."""
    bits = [torch.empty(-(-score.numel() // 8), dtype=torch.uint8) for score in scores]
    records = array("q")
    for score, packed in zip(scores, bits, strict=True):
        records.extend((score.data_ptr(), 0, packed.data_ptr(), score.numel(), 0))
    check_status(library().fu_select(address_of(records), len(scores), count, torch.get_num_threads()))
    return bits


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """A flat dense bool mask at one bit an element."""
    bits = torch.empty(-(-mask.numel() // 8), dtype=torch.uint8)
    library().fu_pack(mask.data_ptr(), bits.data_ptr(), mask.numel(), torch.get_num_threads())
    return bits


def lpips_distance(
    features0: Sequence[torch.Tensor], features1: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]
) -> torch.Tensor:
    """LPIPS heads, (N,) fp32; a map that is not channels_last is copied. No map is empty."""
    features0 = [feature.permute(0, 2, 3, 1).contiguous() for feature in features0]
    features1 = [feature.permute(0, 2, 3, 1).contiguous() for feature in features1]
    weights = [weight.float().contiguous() for weight in weights]
    records = array("q")
    for feature0, feature1, weight in zip(features0, features1, weights, strict=True):
        _, height, width, channels = feature0.shape
        records.extend((feature0.data_ptr(), feature1.data_ptr(), weight.data_ptr(), height * width, channels))
    batch, dtype = features0[0].shape[0], DTYPES[features0[0].dtype]
    distance = torch.empty(batch, dtype=torch.float32)
    check_status(
        library().fu_lpips(
            address_of(records), len(features0), batch, dtype, distance.data_ptr(), torch.get_num_threads()
        )
    )
    return distance


_LOSS = struct.Struct("30q2d")  # `Loss` of native.cpp: 13 addresses, 17 numbers, 2 thresholds
_PREDICTION_TYPES = {"epsilon": 0, "v_prediction": 1, "flow_prediction": 2}


def noise_pred_loss(
    noise_pred: torch.Tensor, rows: Rows, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Loss (), per-row loss (B,) and the gradient, in fp32 where fp16 would underflow. Inputs are dense."""
    batch, channels, height, width = shape = noise_pred.shape
    gradient_dtype = torch.float32 if noise_pred.dtype == torch.float16 else noise_pred.dtype
    gradient = torch.empty(shape, dtype=gradient_dtype) if with_gradient else None
    per_row, loss = torch.empty(batch, dtype=torch.float32), torch.empty((), dtype=torch.float32)
    teacher, mask = rows.teacher_preds, rows.spatial_mask
    teachers = bank_rows = teacher_stride = row_stride = teacher_dtype = mask_row = mask_channel = mask_dtype = 0
    if teacher is not None:
        teachers, bank_rows = teacher.shape[:2]
        teacher_stride, row_stride = teacher.stride()[:2]
        teacher_dtype = DTYPES[teacher.dtype]
    if mask is not None:
        mask_row, mask_channel = mask.expand(batch, channels, height, width).stride()[:2]
        mask_dtype = DTYPES[mask.dtype]
    arguments = _LOSS.pack(
        noise_pred.data_ptr(), _pointer(teacher), _pointer(rows.coefficients), rows.weights.data_ptr(),
        _pointer(rows.noise), _pointer(rows.noise_coefficients), _pointer(rows.latents), _pointer(rows.snr),
        _pointer(mask), _pointer(rows.row_index), _pointer(gradient), per_row.data_ptr(), loss.data_ptr(),
        batch, channels * height * width, teachers, bank_rows, teacher_stride, row_stride, mask_row, mask_channel,
        height * width, DTYPES[noise_pred.dtype], teacher_dtype,
        0 if rows.noise is None else DTYPES[rows.noise.dtype],
        0 if rows.latents is None else DTYPES[rows.latents.dtype],
        mask_dtype, DTYPES[gradient_dtype],
        rows.row_index is not None and rows.row_index.dtype == torch.int64, _PREDICTION_TYPES[rows.prediction_type],
        rows.snr_gamma or 0.0, rows.huber_delta or 0.0,
    )  # fmt: skip
    check_status(library().fu_loss(arguments, torch.get_num_threads()))
    return loss, per_row, gradient
