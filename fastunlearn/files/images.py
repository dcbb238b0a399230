"""Reads image files as the evaluation needs them: 8-bit RGB, the pixels that a viewer shows, or a clear refusal.

Converted: gray and palette images become RGB, an alpha channel that hides nothing is dropped, EXIF's orientation is
applied.  Refused, because every conversion would be a choice that changes distances: 16 and 32 bits per channel, CMYK
and other color spaces, pixels that are not opaque, animations.  Color profiles are not applied.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from ..errors import UserError, is_out_of_memory

if TYPE_CHECKING:
    import torch

#: What is read: a suffix, whatever its case, and Pillow's formats; a file's content decides which it is of.
SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".webp", ".avif", ".bmp", ".dib", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "DIB", "TIFF", "GIF", "PPM")  # none that starts another program
_UNREAD = (
    *(".heic", ".heif", ".jxl", ".jp2", ".j2k", ".svg", ".psd", ".exr", ".hdr", ".ico", ".tga", ".eps", ".pdf"),
    *(".raw", ".dng", ".cr2", ".nef", ".arw", ".npy", ".qoi", ".xcf"),
)
MAX_PIXELS = 2**25  # 5792 x 5792: a pair of larger ones needs gigabytes in every network

_GRAY_OR_PALETTE = ("1", "L", "P", "RGB")
_ALPHA = ("LA", "PA", "RGBA")
_DEEP = re.compile(r"I;16|;16[BLN]")  # how Pillow names 16 bits per channel, which it would cut to 8 without a word


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """``pixels``: (H, W, 3) uint8; ``digest``: the SHA-256 of the file."""

    pixels: npt.NDArray[np.uint8]
    digest: bytes


def find_images(folder: Path) -> dict[str, Path]:
    """Every image in the folder and below it, by its path in there without suffix, sorted.

    Hidden files and files of other kinds are passed over.  Raises UserError for no folder, no image, and two
    images that differ in their suffix alone.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder. Name a folder of images.")
    result: dict[str, Path] = {}
    for path in _files_below(folder):
        if path.suffix.lower() not in SUFFIXES:
            continue
        name = path.relative_to(folder).with_suffix("").as_posix()
        _check_name(path)
        if name in result:
            raise UserError(
                f"{folder} holds two images named {name}: {result[name].name} and {path.name}. Images are paired "
                "by their name without suffix, so remove one."
            )
        result[name] = path
    if not result:
        raise UserError(f"{folder} holds no image ({', '.join(SUFFIXES)}).")
    return result


def unread_images(folder: Path) -> list[Path]:
    """Files in the folder that look like images of kinds that are not read, sorted."""
    return [path for path in _files_below(folder) if path.suffix.lower() in _UNREAD]


def _files_below(folder: Path) -> list[Path]:
    """Every file that is not hidden, sorted; folders that are links are entered, each real folder once."""
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = [name for name in folders if not name.startswith(".")]
        files = (Path(place, name) for name in names if not name.startswith("."))
        found += [path for path in files if path.is_file()]
    return sorted(found)


def _check_name(path: Path) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"the name of the image {str(path)!a} is not UTF-8. Rename it.") from None


def read_image(path: Path) -> ImageFile:
    """One image as 8-bit RGB.  Raises UserError, in one line, where it cannot be read or is refused."""
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            _check(image)
            image.load()
            turned = ImageOps.exif_transpose(image)
            if turned.mode in _ALPHA or turned.has_transparency_data:
                turned = turned.convert("RGBA")
                if np.asarray(turned)[..., 3].min() < 255:
                    raise _Refusal("has transparent pixels. Put it on a background first")
            pixels = np.asarray(turned.convert("RGB"))
    except _Refusal as refusal:
        raise UserError(f"the image {path} {refusal}.") from None
    except Exception as error:  # of a damaged file Pillow raises whatever it stumbles over
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split()).replace(repr(path), "").rstrip(".") or type(error).__name__
        if "cannot identify image file" in reason:
            reason = "it is empty" if not content else "its content is no image of a kind that is read"
        raise UserError(f"cannot read the image {path} ({reason}). Make it again.") from error
    return ImageFile(pixels, hashlib.sha256(content).digest())


class _Refusal(Exception):
    pass


def _check(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise _Refusal(
            f"has {image.width} x {image.height} pixels, and at most {MAX_PIXELS:,} are read. Scale both sides down"
        )
    if getattr(image, "n_frames", 1) > 1:
        raise _Refusal("is an animation. Save one frame as an image")
    layout = [str(tile[3]) for tile in getattr(image, "tile", [])]
    if image.mode.startswith(("I", "F")) or any(_DEEP.search(arguments) for arguments in layout):
        raise _Refusal("has more than 8 bits per channel. Convert it to 8 bits, as you would for the other side")
    if image.mode not in (*_GRAY_OR_PALETTE, *_ALPHA):
        raise _Refusal(f"has the color mode {image.mode}. Convert it to RGB")


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """Images (B, 3, H, W) uint8 on the CPU, as most preprocessing wants them."""
    return [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in images]
