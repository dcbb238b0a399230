"""Which parameters a method may change: named groups and patterns over parameter names."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn

# The groups of the field, with ESD's names in brackets.
GROUPS = {
    "cross-attention": "every parameter of the attn2 blocks (esd-x)",
    "cross-attention-kv": "attn2.to_k and attn2.to_v (esd-x-strict)",
    "non-cross-attention": "everything outside the attn2 blocks (esd-u)",
    "all": "every parameter (esd-all)",
}


def select_parameters(module: nn.Module, selector: str) -> list[str]:
    """Names of the parameters that ``selector`` selects, in the module's order.

    ``selector`` is a group of :data:`GROUPS` or a comma list of patterns; a pattern selects a parameter when it is a
    part of its name between dots (``attn2.to_k``) or, with ``*`` or ``?``, matches the whole name.  ValueError if a
    pattern selects nothing.
    """
    names = [name for name, _ in module.named_parameters()]
    if selector == "all":
        return names
    if selector == "cross-attention":
        return _matching(names, "attn2", selector)
    if selector == "cross-attention-kv":
        return [n for n in names if _matches(n, "attn2.to_k") or _matches(n, "attn2.to_v")] or _nothing(names, selector)
    if selector == "non-cross-attention":
        return [name for name in names if not _matches(name, "attn2")] or _nothing(names, selector)
    patterns = [pattern.strip() for pattern in selector.split(",") if pattern.strip()]
    if not patterns:
        return _nothing(names, selector)
    selected = {name for pattern in patterns for name in _matching(names, pattern, selector)}
    return [name for name in names if name in selected]


def _matches(name: str, pattern: str) -> bool:
    if "*" in pattern or "?" in pattern:
        return fnmatchcase(name, pattern)
    return f".{pattern}." in f".{name}."


def _matching(names: list[str], pattern: str, selector: str) -> list[str]:
    return [name for name in names if _matches(name, pattern)] or _nothing(names, selector, pattern)


def _nothing(names: list[str], selector: str, pattern: str = "") -> list[str]:
    which = f"the part {pattern!r} of " if pattern and pattern != selector else ""
    raise ValueError(
        f"`--trainable`: {which}{selector!r} selects no parameter. Use {', '.join(GROUPS)}, or parts of names such as "
        f"{names[len(names) // 2]!r}."
    )
