"""The runs that a model is the result of, so that a run on a run remembers where it comes from."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from ..files.run_folder import RECORD
from ..files.weights import hash_pipeline
from ..models.base import Model
from ..schema import Ancestor, RunRecord


def ancestors_of(model: Model, content: str) -> tuple[Ancestor, ...]:
    """The runs behind a model, the first one first; none where it is no run's.  ``content``: the hash of its files.

    Raises UserError where a pipeline's files are not what the run wrote: what such a model has forgotten is not known.
    An adapter's file has been held against its own checksum when it was read.
    """
    for file in model.adapter_files:
        if _is_run(file.parent):
            return _with(RunRecord.read(file.parent / "run.json"))
    source, folder = model.source, model.source.parent
    if source.name != "model" or not _is_run(folder):
        return ()
    run = RunRecord.read(folder / "run.json")
    if model.adapter_files:  # of no run: the hash is of more than the pipeline
        content = hash_pipeline(source)
    if run.hashes["unlearned"] != content:
        raise UserError(
            f"the model in {source} has changed since its run wrote it: its hash is {content[:12]}, and run.json says "
            f"{run.hashes['unlearned'][:12]}. Train it again, or start from a copy outside the run."
        )
    return _with(run)


def _is_run(folder: Path) -> bool:
    return (folder / RECORD).is_file() and (folder / "run.json").is_file()


def _with(run: RunRecord) -> tuple[Ancestor, ...]:
    return (*run.ancestors, Ancestor(method=run.method, concepts=run.forgotten, hashes=dict(run.hashes)))
