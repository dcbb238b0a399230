"""Runs the notebook of the examples and keeps its outputs in it:  python tools/notebook.py [FILE] [--check]

With `--check` the file stays as it is, and what a run prints must be what it holds.  Images and times are not compared.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "first_look.ipynb"


def executed(path: Path) -> nbformat.NotebookNode:
    """The notebook after a run in an empty folder, without what differs from run to run."""
    notebook = nbformat.read(path, as_version=4)
    os.environ["PYTHONWARNINGS"] = "ignore"  # of the kernel: warnings name folders of this machine
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}}).execute()
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = nbformat.NotebookNode()
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    )
    return notebook


def said(notebook: nbformat.NotebookNode) -> list[list[Any]]:
    """What each cell of code shows: its texts, and of images that there is one."""
    shown = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            shown.append([_of(output) for output in cell.outputs])
    return shown


def _of(output: Any) -> str:
    if output.output_type == "stream":
        return f"{output.name}: {output.text}"
    if "image/png" in output.data:
        return "an image"
    return str(output.data["text/plain"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", default=NOTEBOOK)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    notebook = executed(args.file)
    if not args.check:
        nbformat.write(notebook, args.file)
        return 0
    held = said(nbformat.read(args.file, as_version=4))
    if said(notebook) != held:
        print(f"{args.file} holds {held}, a run gives {said(notebook)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
