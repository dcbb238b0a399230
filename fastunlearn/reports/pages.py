"""The pages' templates."""

from __future__ import annotations

import base64
import functools
import hashlib
from importlib.resources import files

import jinja2

from .gallery import data_uri
from .sentences import distance_text, percent, percent_range


@functools.cache
def templates() -> jinja2.Environment:
    """The pages' templates, each compiled once."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fastunlearn.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = files(__package__).joinpath("templates/script.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # The page's own script is the only one that a browser runs in it.
    environment.globals.update(script=script, script_hash=f"sha256-{digest}")
    environment.filters.update(
        percent=percent,
        percent_range=percent_range,
        distance=distance_text,
        uri=data_uri,
        signed=lambda value: f"{value:+.3f}".replace("-", "\u2212"),
        p_value=lambda value: f"{value:.3f}" if value >= 0.001 else "< 0.001",
    )
    return environment
