"""Model cards: finds the records of a run, of its evaluation and its attacks, and writes README.md into its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

from .. import __version__
from ..errors import UserError
from ..files.atomic import write_text
from ..files.run_folder import RECORD, claimed, own
from ..models.adapter_files import is_adapter_run
from ..record import read_json
from ..schema import AttackRecord, Evaluation, RunRecord
from .config import CardConfig, is_hub_name

CARD = "README.md"
_Result = TypeVar("_Result", Evaluation, AttackRecord)


def card(config: CardConfig) -> Path:
    """Write the card of a run anew and return where.

    Raises UserError for what is no run, for results of another model, and for a README.md that is not ours or was
    changed by hand.
    """
    folder = Path(config.run).expanduser()
    if not (folder / RECORD).is_file() or not (folder / "run.json").is_file():
        raise UserError(f"`--run` {folder} is no folder of a finished `fastunlearn train`. Name such a one.")
    content = read_json(folder / "run.json", RunRecord.command)
    run = RunRecord.from_dict(content, str(folder / "run.json"))
    with claimed(folder):
        _check_replaceable(folder / CARD, config.overwrite)
        evaluation: Evaluation | None = None
        if config.evaluation is not None:
            evaluation = _of_run(run, Path(config.evaluation), Evaluation, "evaluation")
        elif (path := folder / "evaluation.json").is_file():
            evaluation = Evaluation.read(path)
            if _hash(evaluation) != run.hashes["unlearned"]:
                raise UserError(f"{path} is of another model. Name an evaluation of this one with `--evaluation`.")
        attack = _of_run(run, Path(config.attack), AttackRecord, "attack") if config.attack is not None else None
        own(folder, "train")
        return _write(folder, run, str(content["fastunlearn"]), evaluation, attack, config.base_model)


def write_card(folder: Path, run: RunRecord, evaluation: Evaluation | None) -> None:
    """Write the card of a run that has just ended.  One that was changed by hand stays as it is."""
    from ..reports.card import is_untouched

    path = folder / CARD
    if not path.exists() or is_untouched(_read(path)):
        _write(folder, run, __version__, evaluation)


def _write(
    folder: Path,
    run: RunRecord,
    version: str,
    evaluation: Evaluation | None,
    attack: AttackRecord | None = None,
    base_model: str | None = None,
) -> Path:
    from ..reports.card import Card

    settings = json.loads((folder / "run-key.json").read_text(encoding="utf-8"))["settings"]
    settings.pop("forget", None)  # the card names the concepts, and this may be the name of a file
    form = "adapter" if is_adapter_run(folder) else "delta" if (folder / "delta.safetensors").is_file() else "model"
    if base_model is None and is_hub_name(run.model) and not Path(run.model).exists():
        base_model = run.model
    one = Card(run, form, settings, base_model, evaluation, attack)
    write_text(folder / CARD, one.text(version))
    return folder / CARD


def _of_run(run: RunRecord, folder: Path, kind: type[_Result], name: str) -> _Result:
    """The result of the run's model in ``folder``, or, where several models were evaluated together, below it."""
    paths = [path for path in (folder / f"{name}.json", *sorted(folder.glob(f"*/{name}.json"))) if path.is_file()]
    if not paths:
        raise UserError(f"`--{name}`: {folder} holds no {name}.json. Name the folder of `fastunlearn {kind.command}`.")
    for record in map(kind.read, paths):
        if _hash(record) == run.hashes["unlearned"]:
            return record
    raise UserError(f"`--{name}`: what {folder} holds is of another model. Name the folder of one of this run's.")


def _hash(record: Evaluation | AttackRecord) -> str:
    """Of the unlearned model's files; the record has it, or could not have been read."""
    return str(record.spec["hashes"]["unlearned"])


def _check_replaceable(path: Path, overwrite: bool) -> None:
    """UserError where README.md is not the program's, or was changed by hand and is not to be replaced."""
    from ..reports.card import is_ours, is_untouched

    if not path.exists():
        return
    text = _read(path)
    if not is_ours(text):
        raise UserError(f"{path} is no card of fastunlearn. Move it away.")
    if not is_untouched(text) and not overwrite:
        raise UserError(f"{path} was changed by hand. Move it away, or use `--overwrite`.")


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
