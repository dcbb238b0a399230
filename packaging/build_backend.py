"""setuptools, but in a clone `pip install .` finds the kernels that lie beside it.

Wheels and sdists require ``fastunlearn-kernels==VERSION``, wherever they are made. Before pip builds a wheel it asks
for the metadata alone, and resolves by it: in a clone that names the folder of the kernels. It is thrown away
afterwards, so that no path gets into a wheel. An editable install names both: `pip install -e packaging/kernels -e .`.

To release: `python -m build packaging/kernels` and `python -m build`, then upload what is in both `dist` folders.
"""

import re
import shutil
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

ROOT = Path(__file__).resolve().parent.parent


def with_local_kernels(metadata: str, kernels: Path) -> str:
    """The metadata, with the folder ``kernels`` in place of a version of fastunlearn-kernels; as it was if absent."""
    if not (kernels / "pyproject.toml").is_file() or (kernels.parent.parent / "PKG-INFO").is_file():
        return metadata  # of an sdist, which is of a release: its kernels were released too
    local = f"Requires-Dist: fastunlearn-kernels @ {kernels.as_uri()}"
    return re.sub(r"^Requires-Dist: fastunlearn-kernels==\S+$", lambda _: local, metadata, flags=re.MULTILINE)


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Any = None) -> str:
    name: str = build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)
    file = Path(metadata_directory) / name / "METADATA"
    file.write_text(with_local_kernels(file.read_text(encoding="utf-8"), ROOT / "packaging/kernels"), encoding="utf-8")
    return name


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """A wheel of metadata of its own: ``metadata_directory`` may name the folder of the kernels."""
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)  # or setuptools ships what an older build left there
    name: str = build_meta.build_wheel(wheel_directory, config_settings, None)
    return name
