"""The pages' templates."""

from __future__ import annotations

import functools

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
    environment.filters.update(
        percent=percent,
        percent_range=percent_range,
        distance=distance_text,
        uri=data_uri,
        signed=lambda value: f"{value:+.3f}".replace("-", "\u2212"),
        p_value=lambda value: f"{value:.3f}" if value >= 0.001 else "< 0.001",
    )
    return environment
