"""What :func:`~fastunlearn.unlearn` returns."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..models.adapter_files import is_adapter_run
from ..models.loading import load_model
from ..schema import RunRecord
from .export import apply_delta


@dataclasses.dataclass(frozen=True)
class UnlearnResult:
    """A finished run.

    ``folder``: the run's.  ``model``: in it, the folder of the unlearned pipeline or the file of its delta or adapter;
    None after a dry run.  ``record``: the content of run.json; None after a dry run and in processes other than the
    first.
    ``original``: the folder that a delta belongs to.  ``prompts``: all that took part: what to forget, what becomes of
    it, what to keep, and the empty prompt.
    """

    folder: Path
    model: Path | None
    record: RunRecord | None = dataclasses.field(repr=False)
    original: str | None = None
    prompts: frozenset[str] = dataclasses.field(default=frozenset(), repr=False)

    @functools.cached_property
    def pipeline(self) -> Any:
        """The unlearned diffusers pipeline, float32, on the run's kind of device.  Loaded when first asked for."""
        if self.model is None:
            raise UserError("a dry run makes no model.")
        device = self.record.device if self.record else "auto"
        if self.model.suffix != ".safetensors":
            return load_model(str(self.model), device).pipeline
        if is_adapter_run(self.folder):
            return load_model(str(self.folder), device).pipeline
        with tempfile.TemporaryDirectory() as folder:
            apply_delta(Path(str(self.original)), self.model, Path(folder))
            return load_model(folder, device).pipeline
