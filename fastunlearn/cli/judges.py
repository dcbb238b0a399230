"""What `fastunlearn judges` prints: the table of all judges, or the page of one."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from ..judges import all_judges, broken_judges, find_judge
from ..judges.factory import JudgeFactory
from .console import terminal


def judges_table() -> None:
    """Every judge: what it is for, what it needs, its license, and whether it can run here."""
    grid = Table()
    for name in ("judge", "for", "needs", "license", "here"):
        grid.add_column(name, overflow="fold", min_width=8 if name in ("judge", "here") else None)
    for name in all_judges():
        judge = find_judge(name)
        if isinstance(judge, JudgeFactory):
            grid.add_row(name, judge.purpose, judge.needs, judge.license, _here(judge))
        else:
            grid.add_row(name, _summary(judge), "another package, which is installed", "see that package", "yes")
    out = terminal()
    out.print(grid)
    out.print(
        "`fastunlearn judges NAME` shows one, with its option; `--judge NAME[:OPTION]` takes it. In Python any "
        "function (images, concept) -> scores is a judge."
    )
    for name, why in broken_judges().items():
        out.print(f"{name}: cannot be loaded ({why})")


def judge_page(name: str) -> None:
    """One judge: what it is for, needs and takes, and how it decides."""
    judge = find_judge(name)
    out = terminal(soft_wrap=True)
    if not isinstance(judge, JudgeFactory):
        out.print(f"judge     {name}: {_summary(judge)}")
        out.print(f"from      {getattr(judge, '__module__', 'another package')}")
        return
    missing = judge.missing()
    for label, text in (
        ("judge", f"{name}: {judge.purpose}"),
        ("needs", judge.needs),
        ("license", judge.license),
        ("here", f"cannot run: it needs {missing}" if missing else _here(judge)),
        ("option", f"--judge {name}:OPTION, OPTION being {judge.option}" if judge.option else "takes none"),
    ):
        out.print(f"{label:9} {text}")
    out.print()
    out.print(judge.about)


def _here(judge: JudgeFactory) -> str:
    return "no" if judge.missing() else judge.here()


def _summary(judge: Any) -> str:
    return next(iter((getattr(judge, "__doc__", None) or "").strip().splitlines()), "a judge of another package")
