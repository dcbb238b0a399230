"""The operations as torch operators, with what fake tensors need to know of them.

Compilers, fake tensors, ``torch.func`` and dispatch modes look at operators, not at addresses: where one of them is at
work the public functions call these, elsewhere what runs is called directly, which costs no dispatch. On the Hub an
operator may be registered only under the prefix that its builder generates, hence the name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

try:
    from ._ops import add_op_namespace_prefix as _qualified  # type: ignore[import-not-found]  # made by the Hub's builder
except ImportError:

    def _qualified(name: str) -> str:
        return f"{(__package__ or 'fastunlearn_kernels').replace('.', '_')}::{name}"


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_watched(tensor: torch.Tensor) -> bool:
    """Whether somebody looks at operators: a compiler, a fake or other subclass, a dispatch mode, ``torch.func``."""
    return (
        torch.compiler.is_compiling()
        or type(tensor) not in _PLAIN
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )


def operator(
    name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any], mutates: tuple[str, ...] = ()
) -> Any:
    """Registers ``run`` for all devices, and ``fake``, which makes results of the right shapes and dtypes."""
    registered = torch.library.custom_op(_qualified(name), run, mutates_args=mutates, schema=schema)
    registered.register_fake(fake)
    return registered
