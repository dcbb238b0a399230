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
from .config import TrainConfig


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

    A loaded pipeline is written to a folder of its own, so that what follows reads and hashes files as ever, and the
    caller's pipeline keeps its weights.  The folder goes at the end, but for a delta, which belongs to it.
    """
    if isinstance(model, str | Path | TrainConfig):
        yield config.model, config.model
        return
    if not hasattr(model, "save_pretrained") or not hasattr(model, "components"):
        raise UserError(
            "`model` must be a name, a folder, a loaded diffusers pipeline or a TrainConfig, got "
            f"{type(model).__name__}."
        )
    with contextlib.ExitStack() as stack:
        if config.save == "delta":
            folder = tempfile.mkdtemp(prefix="fastunlearn-original-")
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fastunlearn-original-"))
        model.save_pretrained(folder, safe_serialization=True)
        yield folder, config.model


def _name(pipeline: Any) -> str:
    """What a loaded pipeline is called: where it was loaded from, else its class."""
    return str(getattr(pipeline, "name_or_path", None) or type(pipeline).__name__)
