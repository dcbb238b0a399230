"""One PNG of images side by side, labeled: what a run did, at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..errors import UserError
from ..files.atomic import whole_file
from .fonts import font, shortened
from .gallery import ImageArray, check_image, fit


def write_grid(
    path: Path | str,
    rows: Sequence[str],
    columns: Sequence[str],
    images: Sequence[Sequence[ImageArray]],
    *,
    groups: Sequence[str] = (),
    title: str = "",
    cell: int = 128,
) -> None:
    """Write a labelled PNG of images: ``rows`` such as before and after, ``columns`` such as prompts.

    ``images[row][column]``: (H, W, 3) uint8, each fitted into ``cell`` x ``cell`` pixels.  ``groups`` names the
    group of each column (such as forget and retain); neighbours of one name share a heading.  The file is whole or
    absent.  Raises ``UserError`` where counts differ or an image is not (H, W, 3) uint8.
    """
    if not rows or not columns or cell < 16:
        raise UserError(f"a grid needs rows, columns and cell >= 16, got {len(rows)}, {len(columns)}, {cell}")
    if len(images) != len(rows) or any(len(line) != len(columns) for line in images):
        raise UserError(f"a grid of {len(rows)} rows and {len(columns)} columns needs that many images in each")
    if groups and len(groups) != len(columns):
        raise UserError(f"groups must name each column, got {len(groups)} names for {len(columns)} columns")
    for pixels in (pixels for line in images for pixels in line):
        check_image(pixels, "the grid")

    text, strong = font(13), font(15, bold=True)
    gap, margin = 6, 16
    labels = [_wrap(label, text, cell - 4) for label in columns]
    row_labels = [_wrap(label, strong, 150) for label in rows]
    left = margin + round(max(strong.getlength(line) for label in row_labels for line in label)) + 12
    spans = [(name, len(list(members))) for name, members in groupby(groups)] if groups else []
    # A wider gap stands between two groups.
    starts, edges = [], {sum(count for _, count in spans[:index]) for index in range(1, len(spans))}
    x = left
    for column in range(len(columns)):
        x += 3 * gap if column in edges else 0
        starts.append(x)
        x += cell + gap
    title_height, group_height = (30 if title else 0), (28 if spans else 0)
    label_height = 17 * max(len(label) for label in labels) + 6
    top = margin + title_height + group_height + label_height
    canvas = Image.new("RGB", (x - gap + margin, top + len(rows) * (cell + gap) - gap + margin), "white")
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((margin, margin), title, fill="#111827", font=font(18, bold=True))
    first = 0
    for name, count in spans:  # first: the column a group starts at
        x0, x1, y = starts[first], starts[first + count - 1] + cell, margin + title_height
        draw.text(((x0 + x1) / 2, y), shortened(name, strong, x1 - x0), fill="#111827", font=strong, anchor="ma")
        draw.line((x0, y + 22, x1, y + 22), fill="#9ca3af", width=2)
        first += count
    for x, label in zip(starts, labels, strict=True):
        for index, line in enumerate(label):
            y = top - 6 - 17 * (len(label) - index)
            draw.text((x + cell / 2, y), line, fill="#374151", font=text, anchor="ma")
    for index, (label, shown) in enumerate(zip(row_labels, images, strict=True)):
        y = top + index * (cell + gap)
        draw.multiline_text((margin, y + cell / 2), "\n".join(label), fill="#111827", font=strong, anchor="lm")
        for x, pixels in zip(starts, shown, strict=True):
            image = fit(Image.fromarray(pixels), cell)
            canvas.paste(image, (x + (cell - image.width) // 2, y + (cell - image.height) // 2))
    with whole_file(Path(path)) as unfinished:
        canvas.save(unfinished, format="PNG", optimize=True)


def _wrap(label: str, face: ImageFont.FreeTypeFont, width: float, lines: int = 4) -> list[str]:
    """``label`` in at most ``lines`` lines of ``width`` pixels; what does not fit is cut off visibly."""
    wrapped = [""]
    for word in label.split() or [""]:
        longer = f"{wrapped[-1]} {word}".strip()
        if not wrapped[-1] or face.getlength(longer) <= width:
            wrapped[-1] = longer
        else:
            wrapped.append(word)
    if len(wrapped) > lines:
        wrapped = [*wrapped[: lines - 1], " ".join(wrapped[lines - 1 :])]
    return [shortened(line, face, width) for line in wrapped]
