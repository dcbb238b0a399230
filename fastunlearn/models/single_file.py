"""A model in one .safetensors file, in the key names of its makers: turned into a diffusers folder, by diffusers.

Such a file holds weights alone.  Settings and tokenizers, and whichever parts it lacks, come from a diffusers folder of
the same base: the one that the user names, else the usual settings, else what the hub's cache has.  Nothing is fetched.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import importlib
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UserError, is_disk_full, is_out_of_memory, one_line
from ..files.weights import INDEX, files_of, find_variant, part_names, read_index, snapshot_of, weight_files
from .families import family_of
from .foreign_files import foreign, headers
from .options import SourceOptions
from .runtime import import_diffusers
from .usual_settings import has_settings, write_settings

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the makers of a family name its tensors.  ``marks``: beginnings of names that only it has.

    ``parts``: a part of the pipeline -> the beginnings, any of which the part's tensors have.
    """

    pipeline: str
    marks: tuple[str, ...]
    parts: Mapping[str, tuple[str, ...]]


_NET, _VAE = "model.diffusion_model.", ("first_stage_model.", "vae.")
LAYOUTS = (
    Layout(
        "StableDiffusion3Pipeline",
        (f"{_NET}joint_blocks.", "joint_blocks."),
        {
            "transformer": (f"{_NET}joint_blocks.", "joint_blocks."),
            "vae": _VAE,
            "text_encoder": ("text_encoders.clip_l.",),
            "text_encoder_2": ("text_encoders.clip_g.",),
            "text_encoder_3": ("text_encoders.t5xxl.",),
        },
    ),
    Layout(
        "FluxPipeline",
        (f"{_NET}double_blocks.", "double_blocks."),
        {
            "transformer": (f"{_NET}double_blocks.", "double_blocks."),
            "vae": _VAE,
            "text_encoder": ("text_encoders.clip_l.",),
            "text_encoder_2": ("text_encoders.t5xxl.",),
        },
    ),
    Layout(
        "StableDiffusionXLPipeline",
        ("conditioner.embedders.", f"{_NET}label_emb."),
        {
            "unet": (_NET,),
            "vae": _VAE,
            "text_encoder": ("conditioner.embedders.0.transformer.",),
            "text_encoder_2": ("conditioner.embedders.1.",),
        },
    ),
    Layout(
        "StableDiffusionPipeline",
        (f"{_NET}input_blocks.",),
        {"unet": (_NET,), "vae": _VAE, "text_encoder": ("cond_stage_model.",)},
    ),
)


def folder_of_file(path: Path, options: SourceOptions) -> Path:
    """The diffusers folder that a single file makes, in the file's own precision; it lives as long as the process.

    Raises UserError, in one line, for a file of another kind, and for parts that nothing has.
    """
    path = path.resolve()
    status = path.stat()
    if options.variant is not None:
        raise UserError(f"`--variant` chooses among the files of a folder, and {path.name} is a file. Leave it out.")
    return _folder(path, status.st_mtime_ns, status.st_size, options.parts)


@functools.cache
def _folder(path: Path, changed_ns: int, size: int, parts: str | None) -> Path:
    tensors, metadata = headers(path)
    layout = next((one for one in LAYOUTS if any(name.startswith(one.marks) for name in tensors)), None)
    if (what := foreign(tensors, metadata)) is not None or layout is None:
        raise UserError(f"{path} is {what or 'no text-to-image model whose layout is known'}.")
    folder = Path(tempfile.mkdtemp(prefix="fastunlearn-file-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        with tempfile.TemporaryDirectory(prefix="fastunlearn-settings-") as settings:
            base = _base(path, layout, tensors, parts, Path(settings))
            _convert(path, layout, tensors, base, parts).save_pretrained(folder, safe_serialization=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _base(path: Path, layout: Layout, tensors: Mapping[str, Any], parts: str | None, empty: Path) -> Path:
    """The diffusers folder of the same base, written into ``empty`` where its settings are known here.

    UserError where there is none, and for one of another family.
    """
    what = f"{path.name} holds the weights of a {layout.pipeline} alone"
    if parts is not None:
        folder = snapshot_of(Path(parts).resolve())
        if not (folder / INDEX).is_file():
            raise UserError(f"`--parts` {parts} is no diffusers folder: it has no {INDEX}.")
        if (named := read_index(folder).get("_class_name")) != layout.pipeline:
            raise UserError(f"{what}, and `--parts` {parts} is a {named}. Name a folder of the same base.")
        for part in part_names(folder):
            files_of(folder / part, folder)  # refuses links that lead out of it
        return folder
    if has_settings(layout.pipeline, tensors):
        write_settings(empty, layout.pipeline, tensors)
        return empty
    repository = _repository(tensors)
    try:
        hub = importlib.import_module("huggingface_hub")
        patterns = ["*.json", "*.txt", "*.model"]
        folder = Path(hub.snapshot_download(repository, local_files_only=True, allow_patterns=patterns))
        if (folder / INDEX).is_file():
            return folder
    except Exception as error:
        if is_out_of_memory(error):
            raise
    raise UserError(
        f"{what}: its settings and tokenizers are those of {repository}, which is not in the hub's cache. Name a "
        "diffusers folder of the same base by `--parts`."
    )


def _repository(tensors: Mapping[str, Any]) -> str:
    """The repository on the hub whose settings diffusers takes for such a file."""
    import_diffusers()
    utils = importlib.import_module("diffusers.loaders.single_file_utils")
    shapes = {name: torch.empty(entry["shape"], device="meta") for name, entry in tensors.items()}
    return str(utils.fetch_diffusers_config(shapes)["pretrained_model_name_or_path"])


def _convert(path: Path, layout: Layout, tensors: Mapping[str, Any], base: Path, parts: str | None) -> Any:
    """The pipeline: the file's parts by diffusers' converters, all others from ``base``; the user named ``parts``."""
    diffusers = import_diffusers()
    family = family_of(layout.pipeline, str(path))
    kinds = {str(entry["dtype"]) for entry in tensors.values()} - {"I64", "I32", "BOOL"}
    if strange := sorted(kinds - {*_DTYPES, "F64"}):
        raise UserError(
            f"{path} has weights in {strange[0]}, which is not served. Use one in float16, bfloat16 or float32."
        )
    dtype = _DTYPES.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32
    given: dict[str, Any] = dict(family.load_options)
    for part, what in read_index(base).items():
        if not isinstance(what, list) or not all(what) or part in given or part not in layout.parts:
            continue
        if any(name.startswith(layout.parts[part]) for name in tensors):
            continue
        variant = find_variant(base, [part])
        if not weight_files(base / part, variant):
            beside = f", and {parts} has no safetensors of it either" if parts is not None else ""
            raise UserError(f"{path} has no {part} ({what[1]}){beside}. Name a diffusers folder that has by `--parts`.")
        given[part] = _read_part(base / part, str(what[0]), str(what[1]), dtype, variant)
    try:
        pipeline = getattr(diffusers, layout.pipeline).from_single_file(
            str(path), config=str(base), local_files_only=True, torch_dtype=dtype, **given
        )
    except Exception as error:
        if is_out_of_memory(error) or is_disk_full(error):
            raise
        raise UserError(
            f"cannot read {path} as a {layout.pipeline} with the settings of {parts or 'its base'}: "
            f"{one_line(error)[:300]} Name a diffusers folder of the same base by `--parts`."
        ) from error
    for part, module in pipeline.components.items():
        if isinstance(module, nn.Module) and (gone := [name for name, p in module.named_parameters() if p.is_meta]):
            raise UserError(f"{path} is incomplete: its {part} has no {gone[0]}. Fetch it again.")
    return pipeline


def _read_part(folder: Path, library: str, kind: str, dtype: torch.dtype, variant: str | None) -> Any:
    options = {"use_safetensors": True, "local_files_only": True, "torch_dtype": dtype, "variant": variant}
    try:
        return getattr(importlib.import_module(library), kind).from_pretrained(folder, **options)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"cannot read the part {folder}: {one_line(error)}") from error
