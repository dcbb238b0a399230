"""Prints the lowest versions that pyproject.toml allows, as constraints for pip: `NAME==VERSION`, a line each.

    python tools/lowest.py [EXTRA ...] > lowest.txt

Of the engine, and of the extras that are named.  Upper bounds and names without a version are left out.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def lowest(requirements: Iterable[str]) -> list[str]:
    """``NAME==VERSION`` of each requirement that has a lower bound."""
    found = (re.match(r"([\w.-]+)(?:\[[^\]]*\])?\s*>=\s*([\w.]+)", one) for one in requirements)
    return [f"{one[1]}=={one[2]}" for one in found if one]


def main(extras: Sequence[str]) -> None:
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *(one for name in extras for one in project["optional-dependencies"][name])]
    print("\n".join(lowest(asked)))


if __name__ == "__main__":
    main(sys.argv[1:])
