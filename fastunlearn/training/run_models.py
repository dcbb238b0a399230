"""The model that a run made, as the folder of a pipeline, whatever form the run left it in."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..config import from_yaml
from ..errors import UserError
from ..files.weights import INDEX, names_in, pipeline_in
from ..models.adapter_files import is_adapter_run
from ..models.base import Model
from ..models.loading import load_model, resolve_source
from .config import TrainConfig
from .export import apply_delta, copy_pipeline, overlay, unread_files

_DELTA = "delta.safetensors"


def is_run(folder: Path) -> bool:
    """Whether the folder is no pipeline and holds what a run made."""
    if (folder / INDEX).is_file():
        return False
    return is_kept(folder) or is_adapter_run(folder) or (folder / _DELTA).is_file()


def is_kept(folder: Path) -> bool:
    """Whether the run's model lies in its folder, as a pipeline."""
    return pipeline_in(folder) != folder


@contextlib.contextmanager
def pipeline_of_run(run: Path, lora: str | None = None, variant: str | None = None) -> Iterator[Path]:
    """The folder of the run's pipeline: the one that it holds, else a temporary one, made of base and delta or adapter.

    The folder of a pipeline stands for itself; with ``lora``, a file, it is one with that merged.  Raises UserError for
    any other folder, and for a base that is gone or has changed.
    """
    if lora is not None:
        with pipeline_of_run(run) as whole, tempfile.TemporaryDirectory(prefix="fastunlearn-model-") as folder:
            write_merged(load_model(str(whole), "cpu", variant=variant, lora=lora), Path(folder))
            yield Path(folder)
    elif (run / INDEX).is_file():
        yield run
    elif is_kept(run):
        yield pipeline_in(run)
    elif is_run(run):
        with tempfile.TemporaryDirectory(prefix="fastunlearn-model-") as folder:
            write_pipeline(run, Path(folder))
            yield Path(folder)
    else:
        raise UserError(
            f"{run} is no run of `fastunlearn train`: it holds no model, delta or adapter. Name such a one."
        )


def write_pipeline(run: Path, folder: Path) -> None:
    """Write the pipeline of a run that left a delta or an adapter into an empty folder.

    Tensors keep the types that they have in the base's files.
    """
    if not is_adapter_run(run):
        config = from_yaml(run / "config.yaml", TrainConfig)
        apply_delta(resolve_source(config.model, config), run / _DELTA, folder)
        return
    write_merged(load_model(str(run), "cpu"), folder)


def write_merged(model: Model, folder: Path) -> None:
    """Write the model's pipeline into an empty folder, with what has been merged into it."""
    unread = {path for part in model.merged for path in unread_files(model.source / part, model.variant)}
    copy_pipeline(model.source, folder, left_out=unread)
    for part, names in model.merged.items():
        stored = {name for path in (folder / part).glob("*.safetensors") for name in names_in(path)}
        parameters = dict(getattr(model.pipeline, part).named_parameters())
        # Some versions of transformers write a text encoder's names so.
        files = {name: name if name in stored else f"text_model.{name}" for name in names}
        overlay(folder / part, {files[name]: parameters[name] for name in names})
