"""`fastunlearn export`: what a run made, in the form that another program reads."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import UserError
from ..files.atomic import whole_file, whole_folder
from ..files.run_folder import check_output, claimed, claimed_file, files_below, own
from ..files.weights import find_variant, read_index
from ..models.adapter_files import FILE, base_of, is_adapter_run, read_adapter
from ..models.families import family_of
from ..models.kohya import kohya_tensors
from ..models.loading import resolve_source
from ..models.options import SourceOptions
from ..models.original_layout import original_tensors
from ..models.runtime import import_diffusers
from .config import ExportConfig
from .export import copy_pipeline
from .run_models import is_run, pipeline_of_run


def export_run(config: ExportConfig) -> Path:
    """Write a run's model, or its adapter, to ``config.output`` and return where.

    Raises UserError for a form that the run or its family has not, and for an output that is in use.
    """
    run, output = Path(config.run).expanduser(), Path(config.output).expanduser()
    if not run.is_dir():
        raise UserError(f"`--run` {run} is no folder. Name the folder of a run.")
    if config.format == "diffusers":
        return _folder(config, run, output.resolve())
    if output.suffix != ".safetensors":
        raise UserError(f"`--output` {output} must end in .safetensors, by which programs know the file.")
    if output.is_dir() or (output.exists() and not config.overwrite):
        kind = "is a folder. Name a file" if output.is_dir() else "exists. Use another name or `--overwrite`"
        raise UserError(f"`--output` {output} {kind}.")
    if not output.parent.is_dir():
        raise UserError(f"`--output` {output}: the folder {output.parent} does not exist. Make it first.")
    if run.resolve() == output.parent.resolve():
        raise UserError(f"`--output` {output} is in the run's own folder. Name another.")
    with claimed_file(output):
        if config.format == "single-file":
            _single_file(config, run, output)
        else:
            _adapter(run, output, config.format)
    return output


def _folder(config: ExportConfig, run: Path, output: Path) -> Path:
    """The pipeline as diffusers reads it, an adapter merged."""
    if output.is_relative_to(run.resolve()) or run.resolve().is_relative_to(output):
        raise UserError(f"`--output` {output} and the run's folder lie in one another. Name another.")
    check_output(output, "export", overwrite=config.overwrite)
    with claimed(output), pipeline_of_run(run, config.lora) as source, whole_folder(output) as unfinished:
        copy_pipeline(source, unfinished)
        own(unfinished, "export", files_below(unfinished))
    return output


def _single_file(config: ExportConfig, run: Path, output: Path) -> None:
    """One file of all weights, in the layout of the model's authors."""
    from safetensors.torch import save_file

    with pipeline_of_run(run, config.lora) as source:
        index = read_index(source)
        family = family_of(str(index.get("_class_name")), repr(str(run)))
        if not family.original_encoders:
            raise UserError(
                f"there is no single-file layout of all parts for {family.family}: one is written for Stable Diffusion "
                "1, 2 and XL. Use `--format diffusers`."
            )
        variant = find_variant(source, [family.denoiser_folder, "vae", *family.original_encoders])
        tensors = original_tensors(source, family.original_encoders, variant)
        with whole_file(output) as unfinished:
            save_file(tensors, unfinished, metadata={"format": "pt"})


def _adapter(run: Path, output: Path, form: str) -> None:
    """The run's adapter, under diffusers' names or kohya's."""
    from safetensors.torch import save_file

    if not is_run(run):
        raise UserError(f"{run} is no run of `fastunlearn train --adapter lora`. Name such a one.")
    if not is_adapter_run(run):
        raise UserError(
            f"{run} changed whole weights, which no LoRA file holds. Train with `--adapter lora` to get one."
        )
    file = read_adapter(run / FILE)
    base, options = base_of(run)
    pipeline = str(read_index(resolve_source(base, SourceOptions(**options))).get("_class_name"))
    if not hasattr(getattr(import_diffusers(), pipeline, None), "load_lora_weights"):
        raise UserError(f"diffusers reads no LoRA file for {pipeline}. Use `--format diffusers`, the merged model.")
    if form == "lora":
        content = file.path.read_bytes()
        with whole_file(output) as unfinished:
            unfinished.write_bytes(content)
        return
    about = json.dumps({**file.made, "rank": file.rank, "alpha": file.alpha}, sort_keys=True)
    with whole_file(output) as unfinished:
        save_file(kohya_tensors(file, pipeline), unfinished, metadata={"fastunlearn": about})
