"""Tensor files of our own: masks and deltas.  safetensors, the same bytes for the same content, and checked when read.

The metadata has one key, since safetensors writes several in any order: ``fastunlearn``, a JSON object with the
``format``, a ``sha256`` over the tensors and the rest, and what the caller adds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, is_out_of_memory, one_line
from .atomic import whole_file

if TYPE_CHECKING:
    import torch

_KEY = "fastunlearn"


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], form: str, content: Mapping[str, Any]) -> None:
    """Write ``tensors`` and ``content`` (JSON values) as a file of the format ``form``; whole or not at all."""
    from safetensors.torch import save_file

    tensors = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    header = {"format": form, **content}
    header["sha256"] = checksum(tensors, header)
    with whole_file(path) as unfinished:
        save_file(tensors, unfinished, metadata={_KEY: json.dumps(header, sort_keys=True)})


def load_tensors(path: Path, form: str, what: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What :func:`save_tensors` wrote: tensors and content.  ``what``: "mask of `fastunlearn mask`", for the error.

    Raises UserError for a file of another format and for one in which any bit has changed.
    """
    from safetensors import safe_open

    with refused(path, what):
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            header = json.loads((file.metadata() or {}).get(_KEY, "{}"))
        if not isinstance(header, dict) or header.get("format") != form:
            found = header.get("format") if isinstance(header, dict) else None
            raise ValueError(f"its format is {found!r}, not {form!r}")
        if header.pop("sha256", None) != checksum(tensors, header):
            raise ValueError("its content has changed since it was written. Make it again")
    del header["format"]
    return tensors, header


@contextlib.contextmanager
def refused(path: Path, what: str) -> Iterator[None]:
    """Whatever fails while the content of ``path`` is read is the file's fault: whoever wrote it can write anything."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        words = one_line(error).rstrip(".") if str(error).strip() else type(error).__name__
        if isinstance(error, KeyError):
            words = f"it has no {words}"
        raise UserError(f"{path} is no {what}: {words}.") from error


def checksum(tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]) -> str:
    """SHA-256 over a header and the names, types, shapes and bytes of tensors."""
    import torch

    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
