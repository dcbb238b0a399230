"""From trained elements to files: the original pipeline with them laid over it, or a delta that holds them alone.

A delta is one safetensors file.  For every tensor NAME of the denoiser that changed it holds ``NAME.values`` (k,), in
the type that the original's file has, and which elements of the flattened tensor they replace: ``NAME.indices`` (k,)
int32, or int64 in a tensor of 2^31 elements, or ``NAME.bits``, where that is shorter: element i is bit i % 8 of byte
i // 8.
The metadata (see ``files/tensors.py``) has the original's hash, the folder of the denoiser, the variant of its weights
that was read, where it was not the usual one, and the tensors' shapes.

Of the folder of the denoiser only the files that were read are written: whatever lies beside them, in another precision
or without the moving average, still holds what was unlearned.
"""

from __future__ import annotations

import shutil
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from fastunlearn_kernels import pack_bits, unpack_bits

from ..errors import UserError
from ..files.atomic import whole_folder
from ..files.run_folder import check_output, claimed, files_below, own
from ..files.tensors import load_tensors, refused, save_tensors
from ..files.weights import (
    dtypes_of,
    hash_pipeline,
    open_header,
    part_names,
    pipeline_files,
    read_tensors,
    shard_names,
    weight_files,
)
from ..models.adapter_files import FILE, save_adapter
from ..models.base import Model
from ..models.loading import resolve_source
from .config import ApplyConfig, TrainConfig
from .selection import Selection

DELTA_FORMAT = "fastunlearn-delta-2"
_AS_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Values = Mapping[str, torch.Tensor]  # parameter -> (k,) float32, the elements that its mask selects, or all
Bits = Mapping[str, torch.Tensor]  # parameter -> packed mask; a parameter without one is changed whole
Save = Literal["model", "delta"]


def check_export(model: Model, selection: Selection) -> None:
    """UserError for a model whose files cannot take new values of what is selected.  Reads names and shapes only.

    To be called before any work: what it refuses would be lost at the end.
    """
    folder = model.source / model.denoiser_folder
    found: dict[str, Path] = {}
    for path, name, shape in _stored(read_files(folder, model.variant), selection.shapes):
        found[name] = path
        if shape != tuple(selection.shapes[name]):
            raise UserError(
                f"{path} has {name} of the shape {shape}, the model as it is loaded has "
                f"{tuple(selection.shapes[name])}: a result cannot be written back into it."
            )
    _check_found(folder, dict.fromkeys(selection.shapes), found)


def exported_to(config: TrainConfig, folder: Path) -> Path:
    """Where a run writes what it made: the folder of a pipeline, or the file of a delta or of an adapter."""
    if config.is_adapted:
        return folder / FILE
    return folder / ("delta.safetensors" if config.save == "delta" else "model")


def _stored(files: Iterable[Path], names: Container[str]) -> Iterator[tuple[Path, str, tuple[int, ...]]]:
    """File, name and shape of each of these tensors in the files; no values are read."""
    for path in files:
        with open_header(path) as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                if name in names:
                    yield path, name, tuple(file.get_slice(name).get_shape())


def export(model: Model, path: Path, save: Save, values: Values, selection: Selection) -> dict[str, torch.dtype]:
    """Write the pipeline (a folder), or the delta (a file), of the model's files with ``values`` laid over them.

    A tensor keeps the type that it has in the original's file; returns these types.  Of a model that carries an adapter
    the adapter is written, whatever ``save`` says.
    """
    parts = (model.source, model.denoiser_folder)
    if model.adapter is not None:
        return export_adapter(model, path, values)
    if save == "delta":
        return export_delta(*parts, path, values, selection.bits, model.variant)
    with whole_folder(path) as unfinished:
        return export_model(*parts, unfinished, values, selection.bits, model.variant)


def apply(config: ApplyConfig) -> Path:
    """Rebuild an unlearned pipeline from its original and a delta; returns its folder."""
    folder = Path(config.output).expanduser().resolve()
    source = resolve_source(config.model, config)
    if folder == source:
        raise UserError(f"`--output` {folder} is the original itself. Name another folder.")
    check_output(folder, "apply", overwrite=config.overwrite)
    with claimed(folder), whole_folder(folder) as unfinished:
        apply_delta(source, Path(config.delta).expanduser(), unfinished)
        own(unfinished, "apply", files_below(unfinished))
    return folder


def export_model(
    source: Path, part: str, folder: Path, values: Values, bits: Bits, variant: str | None = None
) -> dict[str, torch.dtype]:
    """Write the pipeline ``source`` into an empty folder, with ``values`` in ``part``; other bytes are the original's.

    ``variant``: which weights of ``part`` were read.  Returns the type in which each tensor is stored.
    """
    copy_pipeline(source, folder, left_out=unread_files(source / part, variant))
    return overlay(folder / part, values, bits)


def export_delta(
    source: Path, part: str, path: Path, values: Values, bits: Bits, variant: str | None = None
) -> dict[str, torch.dtype]:
    """Write the delta between ``source`` and what :func:`export_model` would write; returns the types likewise."""
    tensors: dict[str, torch.Tensor] = {}
    shapes: dict[str, list[int]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for file in read_files(source / part, variant):
        for name, original in read_tensors(file, values)[0].items():
            dtypes[name] = original.dtype
            trained = _replaced(name, original, values[name], bits.get(name))
            changed = (_integers(trained) != _integers(original)).view(-1)
            if not changed.any():
                continue
            shapes[name] = list(original.shape)
            tensors[f"{name}.values"] = trained.view(-1)[changed]
            indices = changed.nonzero()[:, 0].to(torch.int32 if changed.numel() < 2**31 else torch.int64)
            if changed.numel() / 8 < indices.nbytes:
                tensors[f"{name}.bits"] = pack_bits(changed)
            else:
                tensors[f"{name}.indices"] = indices
    _check_found(source / part, values, dtypes)
    content = {"original": hash_pipeline(source), "part": part, "shapes": shapes}
    save_tensors(path, tensors, DELTA_FORMAT, content | ({"variant": variant} if variant else {}))
    return dtypes


def export_adapter(model: Model, path: Path, values: Values) -> dict[str, torch.dtype]:
    """Write the adapter that the model carries, each tensor in the type of the weight that it adds to; the types."""
    assert model.adapter is not None
    stored: dict[str, torch.dtype] = {}
    for file in read_files(model.source / model.denoiser_folder, model.variant):
        stored |= dtypes_of(file, model.adapter.weights)
    tensors, dtypes = {}, {}
    for name, plain, shape in model.adapter.parameters():
        dtypes[name] = stored[f"{name.rsplit('.', 3)[0]}.weight"]
        tensors[plain] = finite(name, values[name].detach().cpu().to(dtypes[name])).reshape(shape)
    save_adapter(path, model.denoiser_folder, model.adapter, tensors)
    return dtypes


def apply_delta(source: Path, delta: Path, folder: Path) -> None:
    """Rebuild from the pipeline ``source`` and a delta, bit for bit, what :func:`export_model` writes.

    UserError if the file is no delta, damaged, or made from another pipeline.
    """
    if not delta.is_file():
        raise UserError(f"the delta {delta} does not exist. Train with `--save delta` to make one.")
    what = "delta of fastunlearn"
    tensors, content = load_tensors(delta, DELTA_FORMAT, what)
    with refused(delta, what):
        part, original = str(content["part"]), str(content["original"])
        shapes = {name: [int(size) for size in shape] for name, shape in content["shapes"].items()}
        variant = str(content["variant"]) if "variant" in content else None
    if (ours := hash_pipeline(source)) != original:
        raise UserError(
            f"the delta {delta} belongs to another original: its hash is {original[:12]}, that of {source} "
            f"is {ours[:12]}. Give `--model` the model that the run started from."
        )
    if part not in part_names(source):
        raise UserError(f"the delta {delta} is for the part {part!r}, which {source} does not have.")
    found: set[str] = set()
    for _, name, shape in _stored(read_files(source / part, variant), shapes):
        found.add(name)
        if list(shape) != shapes[name]:
            raise UserError(f"the delta {delta} says that {name} is {shapes[name]}; it is {list(shape)}.")
    if missing := sorted(shapes.keys() - found):
        raise UserError(f"the delta {delta} changes {missing[0]!r}, which {source / part} does not have.")
    with refused(delta, what):  # only now: a shape that is not the original's could ask for any amount of memory
        values = {name: tensors[f"{name}.values"] for name in shapes}
        bits = {name: _bits_of(tensors, name, shape) for name, shape in shapes.items()}
        for name, replaced in values.items():
            if not torch.isfinite(replaced).all():
                raise ValueError(f"{name} has values that are no numbers")
    export_model(source, part, folder, values, bits, variant)


def _bits_of(tensors: Mapping[str, torch.Tensor], name: str, shape: list[int]) -> torch.Tensor:
    """The packed mask of a delta's tensor."""
    if f"{name}.bits" in tensors:
        mask = unpack_bits(tensors[f"{name}.bits"], shape).view(-1)
    else:
        mask = torch.zeros(torch.Size(shape).numel(), dtype=torch.bool)
        mask[tensors[f"{name}.indices"].long()] = True
    if int(mask.sum()) != len(tensors[f"{name}.values"]):
        raise ValueError(f"{name} has {len(tensors[f'{name}.values'])} values for {int(mask.sum())} elements")
    return pack_bits(mask)


def overlay(folder: Path, values: Values, bits: Bits | None = None) -> dict[str, torch.dtype]:
    """Lay ``values`` over the tensors of the folder's safetensors files; all other elements keep their bits.

    Returns the type of each tensor in the files, to which its values are rounded.
    """
    from safetensors.torch import save_file

    dtypes: dict[str, torch.dtype] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors, metadata = read_tensors(path)
        changed = set(values) & set(tensors)
        for name in changed:
            dtypes[name] = tensors[name].dtype
            tensors[name] = _replaced(name, tensors[name], values[name], (bits or {}).get(name))
        if changed:
            save_file(tensors, path, metadata=metadata)
    _check_found(folder, values, dtypes)
    return dtypes


def _replaced(name: str, original: torch.Tensor, values: torch.Tensor, bits: torch.Tensor | None) -> torch.Tensor:
    """``original`` with ``values`` at the elements of the mask."""
    stored = finite(name, values.detach().cpu().to(original.dtype))
    if bits is None:
        return stored.reshape(original.shape).contiguous()
    result = original.contiguous().clone()
    result.view(-1)[unpack_bits(bits.cpu(), original.numel())] = stored
    return result


def finite(name: str, stored: torch.Tensor) -> torch.Tensor:
    """The tensor, as it is to be written.  UserError where it is not finite in its type."""
    if not torch.isfinite(stored).all():
        raise UserError(
            f"{name} has grown past what the original's {stored.dtype} holds. Use a smaller `--learning-rate`, or "
            "other options of the method."
        )
    return stored


def _check_found(folder: Path, wanted: Mapping[str, object], result: Mapping[str, object]) -> None:
    if missing := set(wanted) - set(result):
        raise UserError(f"{folder} has no tensor {min(missing)!r}: the pipeline's weights are not in the usual form.")


def _integers(tensor: torch.Tensor) -> torch.Tensor:
    """The same bits: what is compared so differs where any bit does, also in the sign of a zero."""
    return tensor.contiguous().view(_AS_INTEGERS[tensor.element_size()])


def read_files(folder: Path, variant: str | None) -> list[Path]:
    """The files of a part that are read: of the variant, or the usual ones where the part has none of it."""
    return weight_files(folder, variant) or weight_files(folder)


def unread_files(folder: Path, variant: str | None) -> list[Path]:
    """The files of a part, and their indices, that hold its weights a second time and are not read."""
    read = read_files(folder, variant)
    named = {path.name for path in read}
    kept = {*read, *(path for path in folder.glob("*.index*.json") if named & set(shard_names(path)))}
    beside = [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index*.json")]
    return sorted(path for path in beside if path not in kept)


def copy_pipeline(source: Path, target: Path, left_out: Container[Path] = ()) -> None:
    """Copy the pipeline's parts: bytes alone, neither links nor modes, which may be read-only."""
    for path in pipeline_files(source):
        if path in left_out:
            continue
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
