"""What can go wrong: something that the user can mend, said in one line, or a bug of ours, shown as a traceback."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable


class UserError(ValueError):
    """Something that the user can mend: a setting, a prompt, a file, a model, this machine.

    Its text is one line that says what is wrong, what was got and what to do.
    """


def one_line(error: BaseException) -> str:
    """The error's text without line breaks; its class where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` Did you mean ...?``, with the blank before it, where one of ``known`` is like ``word``; else nothing."""
    names = [str(name) for name in known]
    longer = [name for name in names if len(word.lstrip("-")) > 2 and name.startswith(word)]
    close = difflib.get_close_matches(word, names, 1, 0.7) or longer
    return f" Did you mean `{close[0]}`?" if close else ""


def is_disk_full(error: BaseException) -> bool:
    """A full disk comes as an OSError, or inside another library's error."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this machine's memory, or its device's, did not suffice."""
    if isinstance(error, MemoryError):
        return True
    signs = ("out of memory", "can't allocate memory", "cannot allocate memory")
    may_be = isinstance(error, RuntimeError | OSError) or _is_of_safetensors(error)
    return may_be and any(sign in str(error).lower() for sign in signs)


def is_expected(error: BaseException) -> bool:
    """Whether the user can mend it.  Everything else is a bug of ours."""
    if isinstance(error, UserError | OSError) or is_out_of_memory(error) or is_disk_full(error):
        return True
    return _is_of_safetensors(error)


def _is_of_safetensors(error: BaseException) -> bool:
    """safetensors raises a class of its own for files that it cannot read or write."""
    return any(kind.__name__ == "SafetensorError" for kind in type(error).__mro__)


def explain(error: BaseException) -> str:
    """One line for people about an expected error."""
    if is_disk_full(error):
        return "the disk is full: what was being written was removed again. Free some space and run the command again."
    if is_out_of_memory(error):
        return (
            "out of memory: `train --dry-run` says which flag makes each phase fit; for an evaluation use a smaller "
            f"`--batch-size`, `--decode-batch-size` or `--offload` ({one_line(error)[:160]})."
        )
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    return one_line(error)
