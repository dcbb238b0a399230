"""Reads files of prompts, as people write them and as the field publishes them, into rows.

Text (a prompt per line), CSV, TSV (separated by commas, tabs or semicolons), JSON (texts, objects, or lists by group)
and JSON lines.  Columns are known by their names, in any case: prompt, group, seed, kind, file, and what public files
call them.  Nothing is guessed: a row with cells too many, an open quote or a kind that is not read is refused.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError, one_line

#: What a column means, by the names that public files give it; the first that is there counts.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "prompt": ("prompt", "prompts", "text", "caption"),
    "group": ("group", "type"),
    "seed": ("seed", "evaluation_seed", "sd_seed"),
    "kind": ("kind",),
    "file": ("file", "filename", "file_name", "image"),
}
#: What public files call the two kinds of prompts in their column ``type``.
TYPES = {"erased": "forget", "erase": "forget", "target": "forget", "others": "retain", "other": "retain"}
#: EMMA's kinds of prompts, by which its files are called: to forget, and to keep.
FORGET_KINDS, RETAIN_KINDS = ("name", "prefix", "variant", "short", "long"), ("random", "hard")

_TABLES = (".csv", ".tsv")
_JSON = (".json",)
_JSON_LINES = (".jsonl", ".ndjson")
_TEXT = (".txt", ".lst", ".list", ".prompts", "")
_OTHERS = (
    *(".parquet", ".arrow", ".feather", ".xlsx", ".xls", ".ods", ".pdf", ".docx", ".zip", ".gz", ".xml", ".html"),
    *(".yaml", ".yml", ".toml", ".md", ".py", ".pkl", ".pt", ".npy", ".npz", ".safetensors", ".png", ".jpg"),
)
#: Suffixes that a file of prompts could have: a text that ends in one is a path.
SUFFIXES = (*_TABLES, *_JSON, *_JSON_LINES, *_TEXT[:-1], *_OTHERS)
_MAX_SEED = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class PromptRow:
    """One row: texts but the prompt are empty and ``seed`` and ``file`` are None where the file does not say.

    ``concept``: whose erasing the prompt is to test, in a file for many concepts.
    """

    prompt: str
    group: str = ""
    seed: int | None = None
    file: str | None = None
    kind: str = ""
    concept: str = ""


@dataclasses.dataclass(frozen=True)
class PromptTable:
    """The rows of a file, and ``notes``: what of it was read how, where that is not plain, or not read at all."""

    rows: list[PromptRow]
    notes: list[str]


def is_forget(group: str) -> bool:
    """Groups named ``forget...`` ask for the concept; all others are to be kept."""
    return group.lower().startswith("forget")


def read_prompt_file(path: Path) -> PromptTable:
    """Every row of a file.  Raises UserError, naming the row, for what cannot be read without guessing."""
    suffix = path.suffix.lower()
    if suffix in _OTHERS:
        raise UserError(
            f"the prompt file {path} is of a kind that is not read ({suffix}). Give text, CSV, TSV, JSON or JSON lines."
        )
    text = read_text(path)
    if suffix in _TABLES:
        return _from_table(path, text)
    if suffix in _JSON:
        return _from_json(path, text)
    if suffix in _JSON_LINES:
        return _from_json_lines(path, text)
    # Only at line feeds, and not at what else Unicode calls the end of a line.
    return PromptTable([PromptRow(line) for line in text.split("\n")], [])


def read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the prompt file {path}: {error.strerror}.") from error
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt file {path} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    if "\0" in text:
        raise UserError(f"the prompt file {path} holds binary data. Give text, CSV, TSV, JSON or JSON lines.")
    return text


def _from_table(path: Path, text: str) -> PromptTable:
    records: list[tuple[int, dict[str, Any]]] = []
    lines = cells(path, text, _delimiter(path, text))
    header = [name.strip() for name in next(lines, (0, []))[1]]
    for number, row in lines:
        if not any(cell.strip() for cell in row):
            continue
        if len(row) > len(header):
            raise UserError(
                f"the prompt file {path} has {len(row)} cells in line {number} and {len(header)} columns: "
                "put quotes around a text with the separator in it."
            )
        records.append((number, dict(zip(header, row, strict=False))))
    return _from_records(path, header, records)


def cells(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The records of a table with the line each ends in: the one place where CSV is parsed."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"the prompt file {path} is no proper CSV near line {reader.line_num}: {error}.") from error


def _delimiter(path: Path, text: str) -> str:
    """The separator under which the header has a column of prompts."""
    candidates = "\t,;" if path.suffix.lower() == ".tsv" else ",\t;"
    for delimiter in candidates:
        with contextlib.suppress(UserError):  # Under another separator it may well be a proper header.
            _, names = next(cells(path, text, delimiter), (0, []))
            if _column({name.strip().lower() for name in names}, "prompt"):
                return delimiter
    _, found = next(cells(path, text, candidates[0]), (0, []))
    raise UserError(
        f"the prompt file {path} has no column named `prompt`, but {found}. Separate columns by commas, tabs or "
        "semicolons."
    )


def _from_json(path: Path, text: str) -> PromptTable:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"the prompt file {path} is no JSON: {one_line(error)}.") from error
    if isinstance(content, dict) and _emma_kind(path):
        return _from_emma(path, [content])
    if isinstance(content, dict):
        rows = [PromptRow(prompt, _group(group, False)) for group, prompt in _of_lists(path, content.items())]
        return PromptTable(rows, [f"{path}: its {len(content)} keys are the groups of their prompts."])
    if isinstance(content, list) and content and all(map(_is_of_lists, content)):
        return _from_emma(path, content)
    if not isinstance(content, list):
        raise UserError(f"the prompt file {path} must hold a list of prompts, got {_short(content)}.")
    return _from_values(path, enumerate(content, 1))


def _is_of_lists(value: Any) -> bool:
    return isinstance(value, dict) and len(value) > 0 and all(isinstance(prompts, list) for prompts in value.values())


def _from_emma(path: Path, content: Sequence[Mapping[str, Any]]) -> PromptTable:
    """A list of {concept: prompts}; the file is called after the kind of its prompts, such as 6_random.json.

    A kind that is to be kept holds, under a concept, prompts for others.
    """
    kind = _emma_kind(path)
    group = kind if kind in RETAIN_KINDS else f"forget-{kind}" if kind else "forget"
    pairs = _of_lists(path, [item for one in content for item in one.items()])
    rows = [PromptRow(prompt, group, kind=kind, concept=concept) for concept, prompt in pairs]
    return PromptTable(rows, [f"{path}: its keys are concepts, and the group of all its prompts is {group}."])


def _emma_kind(path: Path) -> str:
    """The kind that a file is called after, 6_random.json; empty where it is called otherwise."""
    number, _, kind = path.stem.lower().partition("_")
    return kind if number.isdecimal() and kind in (*FORGET_KINDS, *RETAIN_KINDS) else ""


def _of_lists(path: Path, lists: Iterable[tuple[str, Any]]) -> list[tuple[str, str]]:
    """(key, prompt) from each key and its prompts."""
    pairs = []
    for key, prompts in lists:
        if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
            raise UserError(f"the prompt file {path}: {key!r} must be a list of prompts, got {_short(prompts)}.")
        pairs += [(key, prompt) for prompt in prompts]
    return pairs


def _from_json_lines(path: Path, text: str) -> PromptTable:
    values = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values.append((number, json.loads(line)))
        except ValueError as error:
            raise UserError(f"the prompt file {path} is no JSON in line {number}: {one_line(error)}.") from error
    return _from_values(path, values)


def _from_values(path: Path, values: Iterable[tuple[int, Any]]) -> PromptTable:
    """Texts, or objects whose keys are columns."""
    values = list(values)
    if all(isinstance(value, str) for _, value in values):
        return PromptTable([PromptRow(value) for _, value in values], [])
    for number, value in values:
        if not isinstance(value, dict):
            raise UserError(f"the prompt file {path}: entry {number} must be an object, got {_short(value)}.")
    header = list(dict.fromkeys(str(key).strip() for _, value in values for key in value))
    records = [(number, {str(key).strip(): cell for key, cell in value.items()}) for number, value in values]
    if not _column({name.lower() for name in header}, "prompt"):
        raise UserError(f"the prompt file {path} has no key named `prompt`, but {header}.")
    return _from_records(path, header, records)


def _from_records(path: Path, header: Sequence[str], records: Sequence[tuple[int, Mapping[str, Any]]]) -> PromptTable:
    lowered = [name.lower() for name in header]
    for name in set(lowered):
        if name and lowered.count(name) > 1:
            raise UserError(f"the prompt file {path} has two columns named `{name}`. Keep one.")
    names = {meaning: _column(set(lowered), meaning) for meaning in COLUMNS}
    actual = {meaning: header[lowered.index(name)] if name else None for meaning, name in names.items()}
    is_typed = names["group"] == "type"
    rows = []
    for number, record in records:
        values = {meaning: record.get(name) if name is not None else None for meaning, name in actual.items()}
        prompt = values["prompt"]
        if prompt is not None and not isinstance(prompt, str):
            raise UserError(f"the prompt file {path}: the prompt of row {number} must be a text, got {_short(prompt)}.")
        rows.append(
            PromptRow(
                prompt or "",
                _group(str(values["group"] or ""), is_typed),
                _seed(path, number, values["seed"]),
                None if values["file"] is None else str(values["file"]).strip(),
                str(values["kind"] or "").strip().lower(),
            )
        )
    return PromptTable(rows, _notes(path, header, {name for name in actual.values() if name}, names, rows))


def _notes(
    path: Path,
    header: Sequence[str],
    used: set[str],
    names: Mapping[str, str | None],
    rows: Sequence[PromptRow],
) -> list[str]:
    said = []
    if names["group"] == "type":
        said.append("`type` is the group (erased: forget, others: retain)")
    if names["seed"] not in (None, "seed"):
        said.append(f"seeds are those of `{names['seed']}`")
    if unused := [name for name in header if name and name not in used]:
        said.append(f"not used: {', '.join(unused)}")
    return [f"{path}: {len(rows)} rows; {'; '.join(said)}."] if said else []


def _column(names: set[str], meaning: str) -> str | None:
    return next((name for name in COLUMNS[meaning] if name in names), None)


def _group(value: str, is_typed: bool) -> str:
    group = value.strip().lower()
    return TYPES.get(group, group) if is_typed else group


def _seed(path: Path, number: int, cell: Any) -> int | None:
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return None
    try:
        seed = int(str(cell).strip().removesuffix(".0"))
        if isinstance(cell, bool) or not 0 <= seed <= _MAX_SEED:
            raise ValueError
    except ValueError:
        raise UserError(
            f"the prompt file {path}: the seed of row {number} must be a whole number from 0 on, got {cell!r}."
        ) from None
    return seed


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
