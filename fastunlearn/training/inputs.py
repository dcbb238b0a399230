"""From what a caller of :func:`~fastunlearn.unlearn` gives to settings and to a folder of weights."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..methods import get_method
from ..models.loading import resolve_source
from .config import TrainConfig
from .run_models import is_kept, is_run, pipeline_of_run


def config_of(
    model: Any, concept: str | None, method: str, output: str | Path, settings: Mapping[str, Any]
) -> TrainConfig:
    """The settings of a call.  Names that are none of :class:`TrainConfig`'s are the method's own options."""
    if concept is None:
        raise UserError("`concept` is missing: name what to forget.")
    common = {field.name for field in dataclasses.fields(TrainConfig)} - {"model", "forget", "method", "output"}
    kind = get_method(method).options
    options = [field.name for field in dataclasses.fields(kind)] if kind else []
    if unknown := [name for name in settings if name not in common and name not in options]:
        further = f", and of the method {method}: {', '.join(options)}" if options else ""
        raise UserError(f"unknown setting {unknown[0]!r}. There are: {', '.join(sorted(common))}{further}.")
    values = {name: value for name, value in settings.items() if name in common}
    given = values.pop("options", {})
    own = {name: settings[name] for name in settings if name not in common}
    given = {**given, **own} if isinstance(given, Mapping) else given  # what is no map, the config refuses
    name = str(model) if isinstance(model, str | Path) else _name(model)
    return TrainConfig(model=name, forget=concept, method=method, output=str(output), options=given, **values)


@contextlib.contextmanager
def kept_folder() -> Iterator[Path]:
    """A temporary folder that stays, unless it ends empty."""
    folder = Path(tempfile.mkdtemp(prefix="fastunlearn-"))
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextlib.contextmanager
def named_source(model: Any, config: TrainConfig) -> Iterator[tuple[str, str]]:
    """(what to load, what to call it).

    The folder of a run stands for the pipeline that it made, and with a LoRA it is another.  A loaded pipeline is
    written to a folder of its own, so that what follows reads and hashes files as ever, and the caller's pipeline keeps
    its weights.  The folder goes at the end, but for a delta or an adapter, which belong to it.
    """
    if isinstance(model, str | Path | TrainConfig):
        with _named_folder(config) as name:
            yield name, config.model
        return
    if config.lora is not None:
        raise UserError("`lora` is for a model by name: load it into the pipeline and call `fuse_lora()`.")
    if not hasattr(model, "save_pretrained") or not hasattr(model, "components"):
        raise UserError(
            "`model` must be a name, a folder, a loaded diffusers pipeline or a TrainConfig, got "
            f"{type(model).__name__}."
        )
    with contextlib.ExitStack() as stack:
        if config.save == "delta" or config.is_adapted:
            folder = tempfile.mkdtemp(prefix="fastunlearn-original-")
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fastunlearn-original-"))
        model.save_pretrained(folder, safe_serialization=True)
        yield folder, config.model


@contextlib.contextmanager
def _named_folder(config: TrainConfig) -> Iterator[str]:
    """What ``--model`` names, as a name for ``load_model``: it lies on the disk, if only while this lasts."""
    run = Path(config.model).expanduser()
    if not is_run(run) and config.lora is None:
        yield config.model
        return
    is_made = config.lora is not None or not is_kept(run)
    if is_made and (config.save == "delta" or config.is_adapted):
        flag = "--adapter" if config.is_adapted else "--save delta"
        what = f"{run} with its LoRA" if config.lora else f"the model of the run {run}"
        lora = " --lora FILE" if config.lora else ""
        raise UserError(
            f"`{flag}` saves what belongs to a model on the disk, and {what} is none. Make it with `fastunlearn export "
            f"--run {config.model}{lora} --format diffusers` and train on that, or leave `{flag}` out."
        )
    source = run if is_run(run) else resolve_source(config.model, config)
    with pipeline_of_run(source, config.lora, config.variant) as folder:
        yield str(folder)


def _name(pipeline: Any) -> str:
    """What a loaded pipeline is called: where it was loaded from, else its class."""
    return str(getattr(pipeline, "name_or_path", None) or type(pipeline).__name__)
