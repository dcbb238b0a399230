"""Which image of one folder belongs to which of another, and whose prompt it is of."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from ..files.images import find_images
from ..files.prompt_files import read_prompt_file
from ..prompts import is_forget


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two files of one name; ``prompt`` is the name where no prompt file says more."""

    name: str
    original: Path
    unlearned: Path
    prompt: str
    group: str

    @property
    def is_to_forget(self) -> bool:
        return is_forget(self.group)


def find_pairs(original: Path, unlearned: Path, prompts: str | None = None) -> list[Pair]:
    """All pairs, sorted by name.  ``prompts``: a CSV with the columns file, prompt and perhaps group.

    Raises UserError where an image has no partner, and where the prompt file does not list every image once or has
    none to keep.
    """
    before, after = find_images(original.expanduser()), find_images(unlearned.expanduser())
    unpaired = {
        "the unlearned": sorted(before.keys() - after.keys()),
        "the original": sorted(after.keys() - before.keys()),
    }
    missing = [f"{len(names)} in {side} folder ({_some(names)})" for side, names in unpaired.items() if names]
    if missing:
        raise UserError(
            f"partners are missing: {' and '.join(missing)}. Images are paired by their name without suffix; "
            "add the missing ones or remove their partners."
        )
    if len(before) < 2:
        raise UserError("an interval needs at least 2 pairs of images, got 1.")
    said = _read_prompts(Path(prompts).expanduser(), before) if prompts is not None else {}
    pairs = [Pair(name, path, after[name], *said.get(name, (name, "retain"))) for name, path in before.items()]
    if all(pair.is_to_forget for pair in pairs):
        raise UserError("all images are of a forget group: integrity is measured on prompts to keep. Add some.")
    return pairs


def _read_prompts(path: Path, images: dict[str, Path]) -> dict[str, tuple[str, str]]:
    """Prompt and group of every image."""
    table = read_prompt_file(path)
    if any(row.file is None for row in table.rows):
        raise UserError(f"the prompt file {path} has no column named `file`, which says whose prompt each is.")
    by_file = {_inside(image, name): name for name, image in images.items()}
    result: dict[str, tuple[str, str]] = {}
    unknown, twice = [], []
    for row in table.rows:
        file = (row.file or "").removeprefix("./")
        name = file if file in images else by_file.get(file)
        if name is None:
            unknown.append(file)
        elif name in result:
            twice.append(file)
        else:
            result[name] = (row.prompt.strip(), row.group or "retain")
    for names, what in (
        (unknown, "name no image of the folders"),
        (twice, "are there twice"),
        (sorted(images.keys() - result.keys()), "are missing in it"),
    ):
        if names:
            raise UserError(f"the prompt file {path} does not fit the folders: {len(names)} {what} ({_some(names)}).")
    return result


def _inside(image: Path, name: str) -> str:
    """The image's path in its folder, suffix included."""
    return name + image.suffix


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
