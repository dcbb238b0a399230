"""Loads the native library, ``native.cpp`` compiled by ``build.py``, and says why if it cannot.

The library is loaded by ctypes, after torch, whose OpenMP threads it then shares. It holds a level for each instruction
set, of which all give the same bits; ``FASTUNLEARN_KERNELS_LEVEL`` names a lower one than the processor's best. A
library that is there and cannot be used is a warning, once: the plain-torch reference serves, more slowly.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from pathlib import Path

import torch

from .build import LIBRARY, SOURCE, find_compiler, source_digest

LEVELS = ("baseline", "avx2", "avx512")  # in the order of the library's numbers
NAMES = {"baseline": "baseline", "avx2": "AVX2", "avx512": "AVX-512"}
REBUILD = "run `python -m fastunlearn_kernels.build`"

_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_FUNCTIONS = {  # name: (result, arguments)
    "fu_source": (ctypes.c_char_p, []),
    "fu_best_level": (_I, []),
    "fu_use_level": (None, [_I]),
    "fu_adamw": (_I, [_P, _P, _P, _L, _F, _F, _I]),
    "fu_dots": (_I, [_P, _L, _P, _I]),
    "fu_accumulate": (_I, [_P, _L, _I, _I]),
    "fu_select": (_I, [_P, _L, _L, _I]),
    "fu_loss": (_I, [_P, _I]),
    "fu_lpips": (_I, [_P, _L, _L, _I, _P, _I]),
    "fu_pack": (None, [_P, _P, _L, _I]),
}


class LibraryError(RuntimeError):
    """Why the library cannot be used, in one line."""


_library: ctypes.CDLL | None = None
_level = ""
_error: str | None = None  # None until a load has failed


def open_library(path: Path) -> ctypes.CDLL:
    """The library at ``path``, its functions declared; LibraryError if it is not one of this source."""
    if not path.is_file():
        absent = "" if find_compiler() else ", and there is no C++ compiler: install g++, then"
        raise LibraryError(f"the native library is not built{absent or ';'} {REBUILD}")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise LibraryError(f"the native library does not load ({error}); {REBUILD}") from error
    for name, (result, arguments) in _FUNCTIONS.items():
        try:
            function = getattr(library, name)
        except AttributeError as error:
            raise LibraryError(f"the native library lacks {name}; {REBUILD}") from error
        function.restype, function.argtypes = result, arguments
    if SOURCE.is_file() and library.fu_source().decode() != source_digest():
        raise LibraryError(f"the native library was built from another native.cpp; {REBUILD}")
    return library


def use_level(library: ctypes.CDLL, wanted: str | None) -> str:
    """Lets the library run ``wanted``, or the best level of this processor; LibraryError if that lacks it."""
    best = int(library.fu_best_level())
    if wanted is not None and wanted not in LEVELS[: best + 1]:
        can = ", ".join(LEVELS[: best + 1])
        raise LibraryError(f"FASTUNLEARN_KERNELS_LEVEL must be one of {can} on this processor, got {wanted!r}")
    level = best if wanted is None else LEVELS.index(wanted)
    library.fu_use_level(level)
    return LEVELS[level]


def load(path: Path = LIBRARY) -> None:
    """Loads ``path`` for the whole process; afterwards :func:`is_available` tells whether that worked."""
    global _library, _level, _error
    _library, _error = None, None
    try:
        library = open_library(path)
        _level = use_level(library, os.environ.get("FASTUNLEARN_KERNELS_LEVEL") or None)
        _library = library
    except LibraryError as error:
        _error = str(error)
        if path.is_file():
            warnings.warn(f"{_error}. Until then plain torch serves CPU tensors, several times as slow.", stacklevel=2)


def is_available() -> bool:
    """Whether CPU tensors can take the library; loads it when first asked."""
    if _library is None and _error is None:
        load()
    return _library is not None


def why_not() -> str:
    return _error or ""


def describe() -> str:
    """The level that runs, and in how many threads; or why it does not."""
    if not is_available():
        return f"native C++ that cannot run: {why_not()}"
    count = torch.get_num_threads()
    return f"native C++, {NAMES[_level]}, {count} thread{'s' * (count != 1)}"


def library() -> ctypes.CDLL:
    """The loaded library; only where :func:`is_available` has said so."""
    assert _library is not None
    return _library
