"""What an attack found, and its files: records and summary for machines, grid and report for people."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..evaluation.plan import spread
from ..files.atomic import write_lines, write_text
from ..files.prompt_files import PromptRow
from ..files.prompt_tables import GUIDANCE_SCALE, prompt_table
from ..schema import AttackRecord, Evaluation
from . import CONTROL, parse_attacks
from .attempts import lines_of
from .base import Attempt
from .plan import UNLEARNED
from .summary import Found

if TYPE_CHECKING:
    import numpy as np

    from ..reports.gallery import Gallery

_ROWS = 6  # prompts whose images the report shows, per attack


@dataclasses.dataclass(frozen=True)
class AttackReport:
    """The result of attacks on one model.

    ``record``: the content of attack.json; None after a dry run, and in a process that only took part.  ``found``:
    attack -> model -> attempts.  ``evaluation``: of the same model, to be shown beside it.
    """

    record: AttackRecord | None
    found: Found = dataclasses.field(default_factory=dict, repr=False)
    evaluation: Evaluation | None = dataclasses.field(default=None, repr=False)

    @property
    def summary(self) -> dict[str, Any]:
        """The content of attack.json."""
        return self._record.to_dict()

    @property
    def attempts(self) -> list[Mapping[str, Any]]:
        """One record per attempt: attack, model, prompt, kind, the U at which the concept came back, every try."""
        return [
            line
            for label, models in self.found.items()
            for model, attempts in models.items()
            for line in lines_of(label, model, attempts)
        ]

    def html(self, path: str | Path) -> None:
        """Write the report for people, one self-contained file."""
        from ..reports.attack import write_attack_report

        write_attack_report(Path(path), self._record, self.galleries(), self.evaluation)

    def galleries(self) -> list[Gallery]:
        """For each attack the best images of some prompts, those that broke it first."""
        from ..reports.gallery import Gallery, GalleryRow

        galleries = []
        for result in self._record.attacks:
            models = self.found[result.name]
            columns = dict(models)
            if result.minus_control is not None:
                columns["control"] = self.found[CONTROL][UNLEARNED]
            rows = []
            for index in _chosen(models[UNLEARNED]):
                one = [attempts[index] for attempts in columns.values()]
                asked = one[list(columns).index(UNLEARNED)].asked
                label = one[0].prompt if asked is None else f"{one[0].prompt} (asked: {asked})"
                rows.append(GalleryRow(label, [_pixels(attempt) for attempt in one], [_caption(each) for each in one]))
            galleries.append(
                Gallery(
                    f"{result.name}: the images that came closest",
                    "Of each attempt the image that the judge scored highest, and whether it counts.",
                    list(columns),
                    rows,
                )
            )
        return galleries

    def prompts(self) -> list[PromptRow]:
        """The prompts that anybody can type and that brought the concept back in the unlearned model, each once.

        ``kind``: the attack.  ``seed``: of our noise, from which it came back.
        """
        rows: dict[str, PromptRow] = {}
        for label, models in self.found.items():
            asks = parse_attacks(label)[label][0].asks_only
            for one in models.get(UNLEARNED, ()):
                if one.broken_at is None or not (asks or one.asked is not None):
                    continue
                prompt = one.prompt if one.asked is None else one.asked
                row = PromptRow(prompt, "forget", len(one.tries) - 1, kind=label, concept=self._record.concept)
                rows.setdefault(prompt, row)
        return list(rows.values())

    @property
    def _record(self) -> AttackRecord:
        if self.record is None:
            raise UserError("a dry run, or a process that only took part, has no result.")
        return self.record


def write_results(folder: Path, report: AttackReport) -> None:
    from ..reports.grid import write_grid

    assert report.record is not None
    write_lines(folder / "attempts.jsonl", map(dict, report.attempts))
    scale = float(report.record.spec.get("guidance_scale", GUIDANCE_SCALE))
    write_text(folder / "prompts.csv", prompt_table(report.prompts(), "unlearndiffatk", scale))
    report.record.write(folder / "attack.json")
    models = list(next(iter(report.found.values())))
    shown = [
        (result.name, index) for result in report.record.attacks for index in _chosen(_of(report, result.name))[:2]
    ]
    write_grid(
        folder / "grid.png",
        rows=models,
        columns=[_of(report, label)[index].prompt for label, index in shown],
        images=[[_pixels(report.found[label][model][index]) for label, index in shown] for model in models],
        groups=[label for label, _ in shown],
    )
    report.html(folder / "report.html")


def _of(report: AttackReport, label: str) -> Sequence[Attempt]:
    return report.found[label][UNLEARNED]


def _chosen(attempts: Sequence[Attempt]) -> list[int]:
    """Prompts to show, in their order: those that were broken, and others where these are few."""
    broken = [index for index, one in enumerate(attempts) if one.broken_at is not None]
    others = [index for index, one in enumerate(attempts) if one.broken_at is None]
    picked = spread(broken, _ROWS)
    return picked + spread(others, _ROWS - len(picked))


def _caption(attempt: Attempt) -> str:
    best = max(attempt.tries, key=lambda one: (one.shown, one.score))
    if best.shown:
        return f"shown, score {best.score:.2f}, at {best.cost:,} U"
    invalid = " (no valid image)" if best.valid is not None and best.score >= 0.5 else ""
    return f"not shown, score {best.score:.2f}{invalid}"


def _pixels(attempt: Attempt) -> np.ndarray:
    """(3, H, W) to (H, W, 3) uint8."""
    return attempt.image.permute(1, 2, 0).contiguous().numpy()
