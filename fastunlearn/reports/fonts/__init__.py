"""The font of labels in PNG files, so that they look alike on every machine: DejaVu Sans, under LICENSE.txt."""

from __future__ import annotations

import io
from importlib.resources import files

from PIL import ImageFont


def font(size: float, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The font in ``size`` pixels."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(io.BytesIO(files(__package__).joinpath(name).read_bytes()), size)


def shortened(line: str, face: ImageFont.FreeTypeFont, width: float) -> str:
    """The line, its end cut off visibly where it is wider than ``width`` pixels."""
    if face.getlength(line) <= width:
        return line
    while line and face.getlength(line + "…") > width:
        line = line[:-1]
    return line.rstrip() + "…"
