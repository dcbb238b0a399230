"""What `fastunlearn judges` prints: the table of all judges, or the page of one."""

from __future__ import annotations

from typing import Any

from ..judges import all_judges, broken_judges, find_judge
from ..judges.factory import JudgeFactory
from .console import listed, pages, terminal


def judges_table() -> None:
    """Every judge: what it is for, what it needs, its license, and whether it can run here."""
    rows = []
    for fact in map(judge_facts, all_judges()):
        said = f"{fact['for']}.\nNeeds {fact['needs']}. License: {fact['license']}.\nHere: {fact['here']}\n"
        rows.append((fact["name"], said))
    out = terminal()
    out.print(listed(rows))
    out.print(
        "`fastunlearn judges NAME` shows one, with its option; `--judge NAME[:OPTION]` takes it. In Python any "
        "function (images, concept) -> scores is a judge."
    )
    for name, why in broken_judges().items():
        out.print(f"{name}: cannot be loaded ({why})")


def judge_facts(name: str) -> dict[str, Any]:
    """What is known of a judge, as JSON can hold it."""
    judge = find_judge(name)
    if isinstance(judge, JudgeFactory):
        told = {"for": judge.purpose, "needs": judge.needs, "license": judge.license, "here": _here(judge)}
        return {"name": name, **told, "option": judge.option, "missing": judge.missing()}
    told = {"for": _summary(judge), "needs": "another package, which is installed", "license": "see that package"}
    return {"name": name, **told, "here": "yes", "option": "", "missing": ""}


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
    pages(judge.about)


def _here(judge: JudgeFactory) -> str:
    return "no" if judge.missing() else judge.here()


def _summary(judge: Any) -> str:
    return next(iter((getattr(judge, "__doc__", None) or "").strip().splitlines()), "a judge of another package")
