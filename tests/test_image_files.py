"""Image files: which are found and read; a hostile one can neither start a program nor fill the memory."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from fastunlearn.errors import UserError
from fastunlearn.files.images import MAX_PIXELS, find_images, read_image, unread_images


def image(seed=0, size=(16, 16)):
    return Image.fromarray(np.random.default_rng(seed).integers(256, size=(*size, 3), dtype=np.uint8))


def bomb(path, width, height):
    """A PNG of so many black pixels in a few kilobytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = zlib.compressobj(9)
    data = b"".join(row.compress(bytes(1 + width)) for _ in range(height)) + row.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


@pytest.mark.parametrize(
    ("suffix", "form"),
    [
        *((".jfif", "JPEG"), (".JPE", "JPEG"), (".avif", "AVIF"), (".ppm", "PPM"), (".pgm", "PPM"), (".dib", "DIB")),
        *((".PNG", "PNG"), (".webp", "WEBP"), (".gif", "GIF"), (".tiff", "TIFF")),
    ],
)
def test_kinds_that_the_field_uses_are_found_and_read(suffix, form, tmp_path):
    image().save(tmp_path / f"a{suffix}", format=form)
    assert list(find_images(tmp_path)) == ["a"]
    assert read_image(tmp_path / f"a{suffix}").pixels.shape == (16, 16, 3)


@pytest.mark.parametrize("kind", ["EPS", "PDF", "TGA", "ICO", "SGI"])
def test_other_kinds_under_our_names_are_refused_unopened(kind, tmp_path, monkeypatch):
    """An EPS would start Ghostscript."""
    image().save(tmp_path / "a.bin", format=kind)
    (tmp_path / "a.bin").rename(tmp_path / "a.png")
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail("a program was started"))
    with pytest.raises(UserError, match=r"a\.png \(its content is no image of a kind that is read\)"):
        read_image(tmp_path / "a.png")


def test_what_looks_like_an_image_and_is_not_read_can_be_told(tmp_path):
    image().save(tmp_path / "a.png")
    for name in ("b.heic", "c.SVG", "d.txt", ".e.heic", "sub/f.jxl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in unread_images(tmp_path)] == ["b.heic", "c.SVG", "f.jxl"]
    assert list(find_images(tmp_path)) == ["a"]


def test_folders_that_are_links_are_entered_once_and_loops_end(tmp_path):
    (tmp_path / "here" / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    image().save(tmp_path / "here" / "a.png")
    image().save(tmp_path / "elsewhere" / "deep" / "b.png")
    (tmp_path / "here" / "style").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "here" / "sub" / "up").symlink_to(tmp_path / "here")
    (tmp_path / "here" / "c.png").symlink_to(tmp_path / "here" / "a.png")
    (tmp_path / "here" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert list(find_images(tmp_path / "here")) == ["a", "c", "style/deep/b"]


@pytest.mark.parametrize(("width", "height"), [(9000, 9000), (64, 2**20), (5793, 5793)])
def test_too_many_pixels_are_refused_before_they_are_decoded(width, height, tmp_path):
    bomb(tmp_path / "a.png", width, height)
    with pytest.raises(UserError, match=rf"{width} x {height} pixels, and at most {MAX_PIXELS:,} are read"):
        read_image(tmp_path / "a.png")


def test_as_many_pixels_as_are_read_are_read(tmp_path):
    bomb(tmp_path / "a.png", 2, 4096)
    assert read_image(tmp_path / "a.png").pixels.shape == (4096, 2, 3)


def test_a_name_that_is_no_text_is_named(tmp_path):
    name = os.fsencode(tmp_path) + b"/\xff.png"
    image().save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", name)
    with pytest.raises(UserError, match=r"udcff\.png' is not UTF-8"):
        find_images(tmp_path)
