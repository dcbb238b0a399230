"""The files of a world's models: recognised, and put together where only what differs is shipped."""

from __future__ import annotations

import json
from pathlib import Path


def assembled(weights: Path, base: str, own: str, name: str) -> Path:
    """The folder of a pipeline that has the files of ``weights/own``, and those of ``weights/base`` for the rest.

    It is made once, in the user's cache, under ``name`` and a hash of its files.
    """
    import hashlib
    import os
    import shutil
    import tempfile

    parts = [path for part in (base, own) for path in sorted((weights / part).rglob("*")) if path.is_file()]
    version = hashlib.sha256(b"".join(path.read_bytes() for path in parts)).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastunlearn"
    folder = cache / f"{name}-{version}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            unfinished = Path(scratch) / "pipeline"
            shutil.copytree(weights / base, unfinished)
            shutil.copytree(weights / own, unfinished, dirs_exist_ok=True)
            try:
                unfinished.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster
                    raise
    return folder


def is_same_world(folder: Path, own: Path) -> bool:
    """Whether the pipeline in ``folder`` has the tokenizer and the VAE's settings of the one in ``own``."""
    for part in ("tokenizer/tokenizer.json", "vae/config.json"):
        if not (folder / part).is_file() or _content(folder / part) != _content(own / part):
            return False
    return True


def _content(path: Path) -> dict:
    content = json.loads(path.read_text(encoding="utf-8"))
    return {key: value for key, value in content.items() if not key.startswith("_")}
