"""Reads files of concepts to forget: CSV, TSV, JSON, JSON lines or text, with or without what each becomes.

Columns, in any case: ``concept`` and, if wanted, ``anchor``.  A text has one concept a line; JSON is a list of texts or
of objects, or one object that maps concepts to anchors.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError, one_line
from .prompt_files import cells, read_text

#: A concept that ends in one of these is a file.
SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".txt")


def read_concept_file(path: Path) -> list[tuple[str, str | None]]:
    """(concept, anchor) of every row that names one; None where the row names no anchor.

    Raises UserError, naming the row, for what cannot be read without guessing.
    """
    try:
        rows = list(_rows(path, read_text(path)))
    except UserError as error:
        raise UserError(str(error).replace("prompt file", "concept file", 1)) from error
    return [(concept.strip(), anchor) for concept, anchor in rows if concept.strip()]


def _rows(path: Path, text: str) -> Iterable[tuple[str, str | None]]:
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return _from_table(path, text)
    if suffix == ".json":
        return _from_values(path, _parsed(path, text))
    if suffix in (".jsonl", ".ndjson"):
        return _from_values(path, [_parsed(path, line) for line in text.split("\n") if line.strip()])
    return ((line, None) for line in text.split("\n"))


def _from_table(path: Path, text: str) -> Iterator[tuple[str, str | None]]:
    candidates = "\t,;" if path.suffix.lower() == ".tsv" else ",\t;"
    first = text.lstrip("\r\n").partition("\n")[0]
    lines = cells(path, text, next((sign for sign in candidates if sign in first), candidates[0]))
    header = [name.strip().lower() for name in next(lines, (0, []))[1]]
    if header.count("concept") != 1 or header.count("anchor") > 1:
        raise UserError(
            f"the concept file {path} must have one column `concept` and at most one `anchor`, its header is {header}."
        )
    for number, row in lines:
        if len(row) > len(header):
            raise UserError(
                f"the concept file {path} has {len(row)} cells in line {number} and {len(header)} columns: put quotes "
                "around a text with the separator in it."
            )
        cell = dict(zip(header, row, strict=False))
        yield cell.get("concept", ""), cell.get("anchor", "").strip() or None


def _parsed(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"the concept file {path} is no JSON: {one_line(error)}.") from error


def _from_values(path: Path, values: Any) -> Iterator[tuple[str, str | None]]:
    if isinstance(values, dict) and "concept" not in values:
        values = [{"concept": concept, "anchor": anchor} for concept, anchor in values.items()]
    if not isinstance(values, list):
        raise UserError(f"the concept file {path} must hold a list of concepts, or map concepts to anchors.")
    yield from (_from_value(path, number, value) for number, value in enumerate(values, 1))


def _from_value(path: Path, number: int, value: Any) -> tuple[str, str | None]:
    record = {"concept": value} if isinstance(value, str) else value
    concept, anchor = (record.get("concept"), record.get("anchor")) if isinstance(record, dict) else (None, None)
    if not isinstance(concept, str) or not isinstance(anchor, str | None):
        raise UserError(
            f"the concept file {path}: entry {number} must be a text, or an object with the text `concept` and perhaps "
            "the text `anchor`."
        )
    return concept, (anchor or "").strip() or None
