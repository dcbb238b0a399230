"""The files of a model's folder: which there are, what they hold, and a hash of all that is read from them.

Only files that truly lie in the folder count.  A link may point to another file of the folder, or, in the cache of the
Hugging Face hub, to one of the same repository; any other is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, one_line

if TYPE_CHECKING:
    import torch
    from torch import nn

INDEX = "model_index.json"
_WEIGHTS = ("diffusion_pytorch_model", "model")  # as diffusers and transformers call them
#: Weights in forms that are never read here; beside safetensors they are left alone.
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".pb", ".onnx_data")


def pipeline_in(folder: Path) -> Path:
    """The pipeline that a run's folder holds; the folder itself where it holds none."""
    return folder / "model" if (folder / "model" / INDEX).is_file() else folder


def read_index(source: Path) -> dict[str, object]:
    """The pipeline's model_index.json.  Raises UserError for a damaged one and for a part that is no plain name."""
    path = source / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(index, dict):
            raise ValueError("it must hold an object")
    except ValueError as error:
        raise UserError(f"{path} is damaged: {one_line(error)}.") from error
    for name in index:
        if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise UserError(f"{path} names the part {name!r}, which is no name of a folder in it.")
    return index


def snapshot_of(folder: Path) -> Path:
    """A model's folder of the hub's cache: of its root, the snapshot that ``refs/main`` names, else the only one.

    Any other folder is its own.  Raises UserError where it is not clear which snapshot.
    """
    snapshots = folder / "snapshots"
    if not folder.name.startswith("models--") or not snapshots.is_dir():
        return folder
    found = sorted(path.name for path in snapshots.iterdir() if path.is_dir())
    main = folder / "refs" / "main"
    if main.is_file():
        named = main.read_text(encoding="utf-8", errors="replace").strip()
        if named not in found:
            raise UserError(
                f"{main} names the snapshot {named[:60]!r}, which {snapshots} does not have. Fetch it again."
            )
        return snapshots / named
    if len(found) != 1:
        held = f"{len(found)} snapshots and no refs/main to choose" if found else "no snapshot"
        raise UserError(f"{folder} holds {held}. Pass the folder of a snapshot itself.")
    return snapshots / found[0]


def part_names(source: Path) -> list[str]:
    """The parts of a pipeline that have a folder, sorted."""
    return sorted(name for name in read_index(source) if not name.startswith("_") and (source / name).is_dir())


def files_of(folder: Path, root: Path | None = None) -> list[Path]:
    """Every file in ``folder`` and below it, sorted.  ``root``: the model's folder, in which links must end.

    Raises UserError for a link that leads out of it.
    """
    limits = [place.resolve() for place in _limits(root or folder)]
    found: list[Path] = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or folder.is_symlink():
            target = path.resolve()
            if not any(target.is_relative_to(limit) for limit in limits):
                raise UserError(f"{path} is a link to {target}, outside the model's folder. Put a copy in its place.")
        if path.is_file():
            found.append(path)
    return found


def pipeline_files(source: Path) -> list[Path]:
    """The files of a pipeline that belong to it: its index and its parts, without pickles beside safetensors."""
    files = [source / INDEX]
    for part in part_names(source):
        own = files_of(source / part, source)
        has_safetensors = any(path.suffix == ".safetensors" for path in own)
        files += [path for path in own if not (has_safetensors and path.suffix in PICKLES)]
    return files


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files that are read of a part: one, or the shards that its index names; none if it has none.

    ``variant``: ``fp16`` of ``model.fp16.safetensors``.  Raises UserError for an index that names a file which is no
    safetensors file in the same folder, or is missing.
    """
    mark = f".{variant}" if variant else ""
    # Where there are both, diffusers reads the shards, transformers the whole file.
    networks, texts = _WEIGHTS
    names = [f"{networks}.safetensors.index{mark}.json", f"{networks}{mark}.safetensors"]
    names += [f"{texts}{mark}.safetensors", f"{texts}.safetensors.index{mark}.json"]
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        return []
    return _shards(path) if path.suffix == ".json" else [path]


def find_variant(source: Path, parts: Iterable[str]) -> str | None:
    """The variant of a pipeline's weights that must be read; None where every part has the usual ones.

    Raises UserError where it is not clear which.
    """
    lacking = [part for part in parts if not weight_files(source / part)]
    found = [variants for part in lacking if (variants := _variants(source / part))]
    common = set.intersection(*found) if found else set()
    if len(common) > 1:
        raise UserError(
            f"{source} holds its weights only as variants: {', '.join(sorted(common))}. Say which one by `--variant`."
        )
    return common.pop() if common else None


def _variants(folder: Path) -> set[str]:
    pattern = re.compile(rf"(?:{'|'.join(_WEIGHTS)})\.([^.]+?)(?:-\d+-of-\d+)?\.safetensors")
    return {match[1] for path in folder.glob("*.safetensors") if (match := pattern.fullmatch(path.name))}


def shard_names(index: Path) -> list[str]:
    """The files that an index of shards names, sorted.  Raises UserError for a damaged one."""
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is damaged: {one_line(error)}. Fetch it again.") from error


def _shards(index: Path) -> list[Path]:
    names = shard_names(index)
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index} names the file {name!r}, which is no safetensors file in its folder. Not read.")
        if not (index.parent / name).is_file():
            raise UserError(f"{index} names the file {name!r}, which is missing. Fetch it again.")
    return [index.parent / name for name in names]


def hash_files(files: Iterable[Path], root: Path) -> str:
    """SHA-256 over the names, relative to ``root``, and the bytes of files."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def hash_pipeline(source: Path) -> str:
    """SHA-256 over every file of a pipeline that may be read."""
    return hash_files(pipeline_files(source), source)


def hash_adapted(base: str, adapters: Iterable[Path]) -> str:
    """The hash of a pipeline, ``base``, with adapters on it, in order; without any it is the pipeline's own."""
    files = list(adapters)
    if not files:
        return base
    digest = hashlib.sha256(base.encode())
    for path in files:
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def hash_part(source: Path, part: str) -> str:
    """SHA-256 over the files of one part of a pipeline."""
    return hash_files((path for path in files_of(source / part, source) if path.suffix not in PICKLES), source)


def hash_module(module: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of a module's parameters and buffers."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_tensors(
    path: Path, names: Collection[str] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, str] | None]:
    """The tensors of a safetensors file, all or those of ``names`` that it has, and its metadata, if it has any."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        found = [name for name in file.keys() if names is None or name in names]  # noqa: SIM118 - no mapping
        return {name: file.get_tensor(name) for name in found}, file.metadata()


def open_header(path: Path) -> Any:
    """A safetensors file, opened for the names, shapes and types of its tensors, as a context.

    It may be larger than the memory: torch would map it as memory that can be written, which the system may refuse.
    """
    from safetensors import safe_open

    return safe_open(path, "np")


def names_in(path: Path) -> list[str]:
    """The names of a safetensors file's tensors."""
    with open_header(path) as file:
        return list(file.keys())


def dtypes_of(path: Path, names: Collection[str]) -> dict[str, torch.dtype]:
    """The types of those of the tensors ``names`` that a safetensors file has; no values are read."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        found = [name for name in file.keys() if name in names]  # noqa: SIM118 - no mapping
        return {name: file.get_slice(name)[:0].dtype for name in found}


def stored_types(files: Iterable[Path]) -> set[str]:
    """The types of the tensors in safetensors files, as these call them: F32, F16, BF16.  Reads headers alone."""
    found: set[str] = set()
    for path in files:
        with open_header(path) as file:
            found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - no mapping
    return found


def _limits(root: Path) -> list[Path]:
    """Where links of a model's folder may end: in it, or in the repository of the hub's cache that it is a part of."""
    real = root.resolve()
    if real.parent.name == "snapshots" and real.parent.parent.name.startswith("models--"):
        return [real, real.parent.parent / "blobs"]
    return [real]
