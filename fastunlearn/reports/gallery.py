"""Images in a report: rows of them under named columns, embedded in the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..errors import UserError

ImageArray = npt.NDArray[np.uint8]

MAX_PIXELS = 320  # longest side of an image inside the HTML file; larger ones are shown smaller


@dataclass(frozen=True)
class GalleryRow:
    """One line of images (H, W, 3) uint8, one per column; ``captions`` is empty or has one text per image."""

    label: str
    images: Sequence[ImageArray]
    captions: Sequence[str] = ()


@dataclass(frozen=True)
class Gallery:
    """A table of images; ``columns`` names what every row shows, such as ``original`` and ``ovw``."""

    title: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[GalleryRow]


def check_gallery(gallery: Gallery) -> None:
    for row in gallery.rows:
        where = f"gallery {gallery.title!r}, row {row.label!r}"
        if len(row.images) != len(gallery.columns):
            raise UserError(f"{where}: got {len(row.images)} images for {len(gallery.columns)} columns")
        if row.captions and len(row.captions) != len(row.images):
            raise UserError(f"{where}: got {len(row.captions)} captions for {len(row.images)} images")
        for pixels in row.images:
            check_image(pixels, where)


def check_image(pixels: ImageArray, where: str) -> None:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise UserError(f"{where}: images must be (H, W, 3) uint8, got {pixels.shape} {pixels.dtype}")


def data_uri(pixels: ImageArray) -> str:
    image = Image.fromarray(pixels)
    if max(image.size) > MAX_PIXELS:
        image = fit(image, MAX_PIXELS)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def fit(image: Image.Image, side: int) -> Image.Image:
    """Scaled so that the longer side is ``side``; small images keep their pixels visible instead of being blurred."""
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)
