"""Loads a text-to-image pipeline: a bundled model, a diffusers folder, a hub id, a run that left an adapter.

Weights come from safetensors only, never from pickle or remote code.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UserError, is_out_of_memory, one_line
from ..files.weights import (
    PICKLES,
    files_of,
    find_variant,
    hash_module,
    names_in,
    pipeline_in,
    read_index,
    snapshot_of,
    weight_files,
)
from ..worlds import all_worlds, check_installed, world_with_model
from .adapter_files import FILE, adapter_for, base_of, is_adapter_run, read_adapter
from .adapters import merge, put_on, set_values
from .base import Conditions, Model
from .families import family_of
from .foreign_files import foreign, headers
from .loras import add_lora
from .narrow import restore_buffers, stored_dtypes
from .options import ModelOptions, SourceOptions
from .placement import Placement
from .runtime import import_diffusers, mend_torchvision, resolve_device, versions
from .schedulers import sampler_config
from .single_file import folder_of_file

__all__ = [
    "Conditions",
    "Model",
    "content_of",
    "import_diffusers",
    "load_frozen",
    "load_model",
    "mend_torchvision",
    "resolve_device",
    "resolve_source",
    "sampler_config",
    "versions",
    "wrap_pipeline",
]


def load_model(
    name: str,
    device: str | torch.device = "auto",
    options: ModelOptions | None = None,
    *,
    lora: str | Path | None = None,
    placement: Placement = Placement(),  # noqa: B008 - immutable
    **changes: Any,
) -> Model:
    """Load ``shapes`` (the bundled model), ``shapes-gold-star``, ``gallery``, a diffusers folder, file or hub id.

    The folder of a run that left an adapter stands for its base with the adapter merged, in memory alone.

    ``options``, and ``changes``, which are fields of them: how the model is loaded and sampled.  A variant, such as
    ``fp16`` of ``*.fp16.safetensors``, is found out where a folder has but one.
    ``lora``: a file that is merged too, under the names of peft, diffusers or kohya.
    ``placement``: in which type and where the weights are kept; float32 and on the device, if nothing else is said.
    Raises UserError, in one line, for anything that cannot be loaded: unknown name, unsupported family, pickled,
    truncated or missing weights; and for options that the model cannot follow.
    """
    options = dataclasses.replace(options or ModelOptions(), **changes)
    if lora is not None:
        # What is merged into rounded weights would be rounded twice.
        model = load_model(name, device, options, placement=dataclasses.replace(placement, reads_narrow=False))
        add_lora(model, Path(lora).expanduser())
        return model
    if is_adapter_run(run := Path(name).expanduser()):
        return _load_adapted(run, name, device, options, dataclasses.replace(placement, reads_narrow=False))
    device = resolve_device(device)
    source = resolve_source(name, options)
    pipeline_class = _pipeline_class(source, name)
    family = family_of(pipeline_class, repr(name))
    family.check_parts(_named_parts(source), repr(name))
    parts = _loaded_parts(source, family)
    variant = options.variant or find_variant(source, parts)
    _check_weight_files(source, parts, variant)
    diffusers = import_diffusers()
    if not hasattr(diffusers, pipeline_class):
        raise UserError(f"{name!r} is a {pipeline_class}, which the installed diffusers lacks. Install a newer one.")
    reading = dict.fromkeys(_absent_parts(source)) | dict(family.load_options)
    if placement.is_lean and placement.reads_narrow:
        reading |= stored_dtypes(source, parts, variant)
    try:
        pipeline = getattr(diffusers, pipeline_class).from_pretrained(
            source, use_safetensors=True, local_files_only=True, variant=variant, **reading
        )
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"cannot load the model {name!r}: {_first_line(error)}") from error
    _check_complete(pipeline, source, variant)
    if placement.is_lean and placement.reads_narrow:
        restore_buffers(pipeline, source, variant)
    options = dataclasses.replace(options, variant=variant, parts=None)
    return family(pipeline, source, name, device, options, placement)


def load_frozen(name: str, device: str | torch.device, options: ModelOptions | None = None, **more: Any) -> Model:
    """As :func:`load_model`, for use as it is: nothing of it trains."""
    model = load_model(name, device, options, **more)
    model.settle_denoiser()
    return model


def _load_adapted(
    run: Path, name: str, device: str | torch.device, options: ModelOptions, placement: Placement
) -> Model:
    """The base of a run with its adapter merged into it."""
    (base, changes), file = base_of(run), read_adapter(run / FILE)
    if is_adapter_run(Path(base).expanduser()):
        raise UserError(f"the base of {name!r} is said to be {base!r}, which is itself an adapter's run. Not loaded.")
    try:
        model = load_model(base, device, dataclasses.replace(options, **changes), placement=placement)
    except UserError as error:
        raise UserError(f"{name!r} is an adapter for {base!r}, which cannot be loaded: {error}") from error
    adapter = adapter_for(model, file, model.hash_files())
    put_on(model, adapter)
    set_values(model, adapter, file.values)
    merge(model.denoiser)
    model.adapter = None
    model.name, model.adapter_files = name, (file.path,)
    model.merged = {model.denoiser_folder: frozenset(adapter.weights)}
    return model


def _result_of_run(folder: Path) -> Path:
    """A run's folder stands for the pipeline in it."""
    if not (folder / "model").is_dir() and (folder / "delta.safetensors").is_file():
        raise UserError(
            f"{folder} is a run that saved a delta. Rebuild its pipeline with `fastunlearn apply` and use that."
        )
    return pipeline_in(folder)


def wrap_pipeline(pipeline: Any, name: str, options: ModelOptions | None = None) -> Model:
    """A loaded diffusers pipeline as a :class:`Model`, on its device; put in evaluation mode and float32.

    Its attention is set as ``options`` say; it keeps its scheduler.  Which files are read of it is past asking.

    Raises UserError for a family that is not supported.
    """
    family = family_of(type(pipeline).__name__, name)
    return family(pipeline, Path(pipeline.name_or_path or "."), name, pipeline.device, options)


def content_of(pipeline: Any) -> str:
    """SHA-256 over everything in a loaded pipeline that decides its images: weights, settings, tokenizers."""
    digest = hashlib.sha256(repr(sorted(own_settings(pipeline).items())).encode())
    for name, part in sorted(pipeline.components.items()):
        digest.update(f"{name}\n".encode())
        if isinstance(part, nn.Module):
            digest.update(hash_module(part).encode())
        if hasattr(part, "get_vocab"):
            digest.update(json.dumps(part.get_vocab(), sort_keys=True).encode())
        if hasattr(part, "config"):
            config = part.config.to_dict() if hasattr(part.config, "to_dict") else dict(part.config)
            digest.update(repr(sorted((str(key), str(value)) for key, value in config.items())).encode())
    return digest.hexdigest()


def own_settings(pipeline: Any) -> dict[str, str]:
    """The settings of the pipeline itself, not of its parts, such as ``force_zeros_for_empty_prompt``."""
    parts = pipeline.components.keys()
    return {key: str(value) for key, value in pipeline.config.items() if key not in parts and not key.startswith("_")}


def resolve_source(name: str, options: SourceOptions | None = None) -> Path:
    """The folder of a model's files: fetched where it is a hub id, made where it is a single file.

    UserError for an unknown name.
    """
    options = options or SourceOptions()
    folder = Path(name).expanduser()
    if folder.is_file() and folder.suffix == ".safetensors":
        return folder_of_file(folder, options)
    if options.parts is not None:
        raise UserError(f"`--parts` completes a model in a single file, and {name!r} is none. Leave it out.")
    if world := world_with_model(name):
        return world.folder(name)
    if (folder / "run.json").is_file() and not (folder / "model_index.json").is_file():
        folder = _result_of_run(folder)
    if folder.is_dir():
        return snapshot_of(folder.resolve())
    if folder.is_file() and folder.suffix in PICKLES:
        raise UserError(
            f"{folder} is pickled, which can run code when read, so it is not. Convert it to .safetensors and pass "
            "that."
        )
    if folder.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        check_installed(name)
        known = ", ".join(model for world in all_worlds().values() for model in world.models)
        raise UserError(
            f"unknown model {name!r}: it is no folder. Use {known}, a diffusers folder, a .safetensors file or a hub "
            "id."
        )
    diffusers = import_diffusers()
    try:
        return Path(diffusers.DiffusionPipeline.download(name, use_safetensors=True, variant=options.variant))
    except Exception as error:
        raise UserError(
            f"cannot fetch the model {name!r} from the hub: {_first_line(error)} "
            "Check the name and the network, or pass a local diffusers folder."
        ) from error


def _pipeline_class(source: Path, name: str) -> str:
    """The diffusers class that the folder's index names."""
    index = source / "model_index.json"
    if (source / "delta.safetensors").is_file() and not index.is_file():
        raise UserError(
            f"{name!r} is a run saved as a delta. Rebuild its model with `fastunlearn apply` and pass that."
        )
    if not index.is_file():
        files = sorted(source.glob("*.safetensors"))
        what = foreign(*headers(files[0])) if len(files) == 1 else None
        why = f"it holds {what}" if what else "it has no model_index.json. Pass the pipeline's folder"
        raise UserError(f"{name!r} is no diffusers pipeline: {why}.")
    named = read_index(source).get("_class_name")
    if isinstance(named, list):
        raise UserError(f"{name!r} is a custom pipeline, {named}, whose code is not run. Save it as one of diffusers'.")
    if not isinstance(named, str):
        raise UserError(f"{index} is damaged: its `_class_name` is {named!r}. Fetch it again.")
    return named


def _named_parts(source: Path) -> set[str]:
    """The parts that the index names a class for."""
    return {part for part, what in read_index(source).items() if isinstance(what, list) and all(what)}


def _absent_parts(source: Path) -> set[str]:
    """The parts that the index says are missing; some of them diffusers wants to be told so again."""
    return {part for part, what in read_index(source).items() if what == [None, None]}


def _loaded_parts(source: Path, family: type[Model]) -> list[str]:
    """The parts that the index names and that the family loads; whatever lies beside them is not read."""
    return sorted(part for part in _named_parts(source) - set(family.load_options) if (source / part).is_dir())


def _check_weight_files(source: Path, parts: list[str], variant: str | None) -> None:
    for part in parts:
        folder = source / part
        read = weight_files(folder, variant) or weight_files(folder)
        pickled = [path for path in files_of(folder, source) if path.suffix in PICKLES and "_model" in path.stem]
        if pickled and not read:
            raise UserError(
                f"{pickled[0]} is pickled, which can run code when read, so it is not. Save the pipeline with "
                "`save_pretrained(folder, safe_serialization=True)` and pass that folder."
            )
        for path in read:
            try:
                names = names_in(path)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                raise UserError(f"{path} is truncated or damaged: {_first_line(error)} Fetch it again.") from error
            if any(".lora_A." in name or ".lora_B." in name for name in names):
                raise UserError(
                    f"{path} holds LoRA layers beside the weights that they change. Load the pipeline in diffusers, "
                    "call `fuse_lora()` and `unload_lora_weights()`, save it, and pass that folder."
                )


def _check_complete(pipeline: Any, source: Path, variant: str | None) -> None:
    """UserError where a part's files hold fewer tensors than the part: what is missing would be random numbers."""
    for part, module in pipeline.components.items():
        files = weight_files(source / part, variant) or weight_files(source / part)
        if not isinstance(module, nn.Module) or not files:
            continue
        stored: set[str] = set()
        for path in files:
            stored.update(names_in(path))
        # Counted, not compared by name: older files use other names, which diffusers translates.
        wanted = len(list(module.parameters()))
        if len(stored) < wanted:
            raise UserError(f"{source / part} is incomplete: {len(stored)} of {wanted} tensors. Fetch it again.")


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    line = text[0] if text else one_line(error)
    return line if line.endswith(".") else line + "."
