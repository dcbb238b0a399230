"""What a comparison of evaluations shows to people: a plot and a page."""

from __future__ import annotations

from pathlib import Path

from ..files.atomic import whole_file, write_text
from ..schema import Comparison
from .pages import templates
from .sentences import judges_words


def write_plot(path: Path, result: Comparison) -> None:
    """Each comparison's difference with its 95 % interval (thin) and 90 % interval (thick) against the margins."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = result.comparisons
    figure = Figure(figsize=(8, 1.6 + 0.5 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    with matplotlib.rc_context({"font.size": 10}):
        axes = figure.add_subplot()
        if result.margin is not None:
            axes.axvspan(-result.margin, result.margin, color="#dbe7f7", label="within the margin")
        axes.axvline(0, color="#6b7280", linewidth=1)
        for index, row in enumerate(reversed(rows)):
            axes.plot(row.ci95, [index, index], color="#1d5fc4", linewidth=1.5)
            axes.plot(row.ci90, [index, index], color="#1d5fc4", linewidth=4, alpha=0.5)
            axes.plot([row.difference], [index], "o", color="#1d5fc4")
        axes.set_yticks(range(len(rows)), [f"{row.a} − {row.b}" for row in reversed(rows)], parse_math=False)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlabel(f"{result.unit.partition(':')[0]}: to the right the first keeps more (95 %, thick: 90 %)")
        if result.margin is not None:
            axes.legend(loc="best", frameon=False)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        with whole_file(path) as unfinished:
            figure.savefig(unfinished, format="png", dpi=120, metadata={"Software": None})


def write_page(path: Path, result: Comparison) -> None:
    ends = [abs(end) for row in result.comparisons for end in (*row.ci95, *row.ci90)]
    margin = result.margin or 0.0
    reach = max([2 * margin, *(1.05 * end for end in ends)]) or 1.0
    # Where a difference stands on a rail that is `reach` wide to both sides of 0.
    places = {"at": lambda value: f"{50 + 50 * value / reach:.2f}%", "width": f"{100 * margin / reach:.2f}%"}
    judges = judges_words(run.judge for run in result.runs)
    write_text(path, templates().get_template("compare.html.j2").render(result=result, judges=judges, **places))
