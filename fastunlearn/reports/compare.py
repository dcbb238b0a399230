"""What a comparison of evaluations shows to people: a plot and a page."""

from __future__ import annotations

import math
from pathlib import Path

from PIL import Image, ImageDraw

from ..files.atomic import whole_file, write_text
from ..schema import Comparison
from .fonts import font, shortened
from .pages import templates
from .sentences import judges_words

WIDTH = 1920  # of the plot, in pixels
_INK, _QUIET, _MARK = "#16202c", "#6b7280", "#1d5fc4"


def write_plot(path: Path, result: Comparison) -> None:
    """Each comparison's difference with its 95 % interval (thin) and 90 % interval (thick) against the margins.

    A PNG of 1920 pixels width.  The file is whole or absent.
    """
    text, small = font(26), font(22)
    names = [f"{row.a} \u2212 {row.b}" for row in result.comparisons]
    names = [shortened(name, text, 700) for name in names]
    left, right = 60 + max(round(text.getlength(name)) for name in names), WIDTH - 60
    step, reach = 80, _reach(result)
    bottom = 40 + step * len(names)
    canvas = Image.new("RGB", (WIDTH, bottom + 150), "white")
    draw = ImageDraw.Draw(canvas)

    def at(value: float) -> float:
        return left + (right - left) * (value + reach) / (2 * reach)

    if result.margin is not None:
        draw.rectangle((at(-result.margin), 30, at(result.margin), bottom), fill="#dbe7f7")
        draw.text((right, bottom + 105), f"shaded: within the margin of \u00b1{result.margin:g}", _INK, small, "ra")
    draw.line((at(0), 30, at(0), bottom), _QUIET, 2)
    draw.line((left, bottom, right, bottom), _QUIET, 2)
    for tick in _ticks(reach):
        draw.line((at(tick), bottom, at(tick), bottom + 10), _QUIET, 2)
        draw.text((at(tick), bottom + 16), f"{tick:.6g}".replace("-", "\u2212"), _INK, small, "ma")
    for index, (name, row) in enumerate(zip(names, result.comparisons, strict=True)):
        y = 40 + step * index + step / 2
        draw.text((left - 30, y), name, _INK, text, "rm")
        draw.line((at(row.ci90[0]), y, at(row.ci90[1]), y), "#8eaee1", 12)
        draw.line((at(row.ci95[0]), y, at(row.ci95[1]), y), _MARK, 4)
        draw.circle((at(row.difference), y), 10, _MARK)
    said = f"{result.unit.partition(':')[0]}: to the right the first keeps more (95 %, thick: 90 %)"
    draw.text((left, bottom + 60), said, _INK, small)
    with whole_file(path) as unfinished:
        canvas.save(unfinished, format="PNG", optimize=True)


def _reach(result: Comparison) -> float:
    """How far a scale must go to both sides of 0."""
    ends = [abs(end) for row in result.comparisons for end in (*row.ci95, *row.ci90)]
    return max([2 * (result.margin or 0.0), *(1.05 * end for end in ends)]) or 1.0


def _ticks(reach: float) -> list[float]:
    """Round numbers from ``-reach`` to ``reach``, at most nine of them."""
    power = 10.0 ** math.floor(math.log10(reach / 2))
    step = next(power * part for part in (1, 2, 5, 10) if reach / (power * part) < 5)
    count = math.floor(reach / step)
    return [step * number for number in range(-count, count + 1)]


def write_page(path: Path, result: Comparison) -> None:
    margin, reach = result.margin or 0.0, _reach(result)
    # Where a difference stands on a rail that is `reach` wide to both sides of 0.
    places = {"at": lambda value: f"{50 + 50 * value / reach:.2f}%", "width": f"{100 * margin / reach:.2f}%"}
    judges = judges_words(run.judge for run in result.runs)
    write_text(path, templates().get_template("compare.html.j2").render(result=result, judges=judges, **places))
