"""The field's libraries: imported when they are asked for, and what they cannot do said in one line."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
from collections.abc import Iterator
from typing import Any

from ..errors import UserError


def library_of(metric: str, module: str, package: str) -> Any:
    """The module that the metric needs.  Raises UserError that says which package to install."""
    from ..models.runtime import mend_torchvision

    try:
        mend_torchvision()  # which all of them import
        return importlib.import_module(module)
    except ImportError as error:
        extra = "dreamsim" if package == "dreamsim" else "metrics"
        raise UserError(
            f"the metric {metric} needs the package {package} ({error}): pip install 'fastunlearn[{extra}]', "
            "or leave the metric out"
        ) from error


@contextlib.contextmanager
def fetching(metric: str, weights: str, place: str) -> Iterator[None]:
    """Turns whatever a library raises when it cannot fetch or read its weights into one line, and mutes it."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # progress bars are on stderr and stay
            yield
    except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(
            f"the metric {metric} needs the weights {weights}, which could not be fetched or read ({reason}): let this "
            f"machine reach their source once, put the intact file into {place}, or leave the metric out"
        ) from error
    finally:
        logging.disable(level)
