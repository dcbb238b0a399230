"""The runs that a model is the result of, so that a run on a run remembers where it comes from."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from ..files.run_folder import RECORD
from ..schema import Ancestor, RunRecord


def ancestors_of(source: Path, content: str) -> tuple[Ancestor, ...]:
    """The runs behind the pipeline in ``source``, the first one first; none where it is no run's.

    ``content``: the hash of its files.  Raises UserError where they are not what the run wrote: what such a model has
    forgotten is not known.
    """
    folder = source.parent
    if source.name != "model" or not (folder / RECORD).is_file() or not (folder / "run.json").is_file():
        return ()
    run = RunRecord.read(folder / "run.json")
    if run.hashes["unlearned"] != content:
        raise UserError(
            f"the model in {source} has changed since its run wrote it: its hash is {content[:12]}, and run.json says "
            f"{run.hashes['unlearned'][:12]}. Train it again, or start from a copy outside the run."
        )
    return (*run.ancestors, Ancestor(method=run.method, concepts=run.forgotten, hashes=dict(run.hashes)))
