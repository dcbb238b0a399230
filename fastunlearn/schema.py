"""The result files, typed: evaluation.json, attack.json, run.json, compare.json, demo.json.

How they are written and read, and what every one of them begins with, is in ``record.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from .errors import UserError
from .record import FREE, OMITTED, Record, Share, read_json

Interval = tuple[float, float]
Shares = tuple[Share, Share]


# ---- evaluation.json of `evaluate` -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeRecord:
    """Who said what an image shows.  ``valid_threshold``: None for a judge that cannot tell a valid image.

    ``weights``: SHA-256 of the judge's weights, empty where it has none or does not say.  ``note``: what a reader must
    know of the judge.
    """

    name: str
    threshold: float
    valid_threshold: float | None
    attributes: tuple[str, ...] = ()
    weights: str = ""
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """In which share of images a judge sees the concept, with Wilson's interval over images taken as independent."""

    n_images: int
    shown: Share
    ci95: Shares


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """What the judge sees on the original's own images, where the concept is asked for and where it is not.

    ``p_value``: of Fisher's exact test that it sees it no more often where it is asked for.  ``verdict``: ``tells``,
    ``too few images`` or ``cannot tell``; with the last the evaluation was made because the user insisted.
    """

    asked: Seen
    unasked: Seen
    p_value: Share
    verdict: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Changed:
    """The share of retain pairs whose distance is above that of a control."""

    threshold: float
    source: str
    share: Share
    ci95: Shares


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    mean: float
    ci95: Interval


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColorRecord:
    """How far colors moved, in Delta E*ab, beside the original redrawn from other noise (``ceiling``).

    ``retention``: None where the redrawn images' colors are the same, or the prompts too few.
    """

    metric: str
    mean: float
    ci95: Interval
    ceiling: float
    retention: float | None
    retention_ci95: Interval | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Integrity:
    """Distances of the retain pairs, and retention R: their place between the floor (1) and the ceiling (0)."""

    mean: float
    ci95: Interval
    floor: float
    ceiling: float
    retention: float
    retention_ci95: Interval
    n_pairs: int
    n_prompts: int
    interval: str
    quantiles: dict[str, float]
    changed: dict[str, Changed]
    metric: str
    minus_placebo: Difference | None = dataclasses.field(default=None, metadata=OMITTED)
    color: ColorRecord | None = dataclasses.field(default=None, metadata=OMITTED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Erasure:
    """Shares of the images that were asked for with the concept.

    ``shown``: the judge sees the concept, in a valid image.  ``valid``: None where the judge cannot tell.
    ``unlearning_accuracy``: UA of the field, which garbage earns too; ``unlearning_accuracy_valid``: which it cannot.
    """

    concept: str
    n_images: int
    shown: Share
    shown_ci95: Shares
    shown_original: Share
    valid: Share | None
    valid_original: Share | None
    unlearning_accuracy: Share
    unlearning_accuracy_valid: Share | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConceptShares:
    """Of several concepts one: the images that were asked for with it and with no other of them.

    ``forgotten``: whether this model is to have forgotten it; a row of the matrix "erase i, look at j" is one model's.
    ``distance``: the mean of the pairs.  Where there is no judge, or no such image, the shares are None.
    """

    forgotten: bool
    n_images: int
    shown: Share | None
    shown_ci95: Shares | None
    shown_original: Share | None
    shown_original_ci95: Shares | None
    valid: Share | None
    distance: float | None
    distance_ci95: Interval | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attribute:
    """What the judge says of one attribute of the retain images.

    ``accuracy``, ``original``: the share that shows the word that the prompt asks for, after and before; None where no
    prompt asks.  ``n_asked``: images whose prompt asks.  ``agreement``: the share with one word before and after.
    """

    accuracy: Share | None
    original: Share | None
    agreement: Share
    n_asked: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retain:
    """``agreement``: the share of retain images of which the judge says the same before and after, in all attributes
    and in being valid; None for a judge without attributes."""

    n_images: int
    attributes: dict[str, Attribute]
    agreement: Share | None
    valid: Share | None
    valid_original: Share | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """One group of prompts.  Groups to forget have shares of the judge, the others have a retention."""

    n_pairs: int
    n_prompts: int
    mean: float
    ci95: Interval | None
    quantiles: dict[str, float]
    shown: Share | None = dataclasses.field(default=None, metadata=OMITTED)
    shown_ci95: Shares | None = dataclasses.field(default=None, metadata=OMITTED)
    valid: Share | None = dataclasses.field(default=None, metadata=OMITTED)
    changed: dict[str, Share] | None = dataclasses.field(default=None, metadata=OMITTED)
    ceiling: float | None = dataclasses.field(default=None, metadata=OMITTED)
    retention: float | None = dataclasses.field(default=None, metadata=OMITTED)
    retention_ci95: Interval | None = dataclasses.field(default=None, metadata=OMITTED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlRecord:
    """Distances of the original to itself, made as ``what`` says."""

    what: str
    n_pairs: int
    mean: float
    q99: float
    max: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlaceboRecord:
    name: str
    mean: float
    ci95: Interval


@dataclasses.dataclass(frozen=True, kw_only=True)
class Controls:
    repeat: float
    numeric: ControlRecord
    precision: ControlRecord | None
    placebo: PlaceboRecord | None
    redrawn: float
    redrawn_ci95: Interval


# ---- evaluation.json of `evaluate-images` ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderDistances:
    """Distances of pairs of image files; ``unchanged`` is the share that is 0.

    ``shown``, ``valid``: of a group to forget, what the judge says of the unlearned images.
    """

    mean: float
    ci95: Interval | None
    interval: str
    quantiles: dict[str, float]
    unchanged: Share
    n_pairs: int
    n_prompts: int
    shown: Share | None = dataclasses.field(default=None, metadata=OMITTED)
    shown_ci95: Shares | None = dataclasses.field(default=None, metadata=OMITTED)
    valid: Share | None = dataclasses.field(default=None, metadata=OMITTED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderIntegrity(FolderDistances):
    """``clusters``: what counts as independent, ``prompts`` or ``pairs``."""

    metric: str
    clusters: str


# ---- compare.json ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """``retention``, ``shown``, ``valid``: None where they were not measured."""

    name: str
    folder: str
    mean: float
    hash: str
    method: str | None = None
    retention: float | None = None
    retention_ci95: Interval | None = None
    shown: Share | None = None
    valid: Share | None = None
    judge: JudgeRecord | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GapRecord:
    """How much more a keeps than b.  Without a margin nothing is said of equivalence."""

    difference: float
    ci95: Interval
    p_value: Share
    ci90: Interval
    equivalence_p_value: Share | None
    equivalent: bool | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparedPair(GapRecord):
    a: str
    b: str
    p_value_holm: Share
    groups: dict[str, GapRecord]
    verdict: str


# ---- attack.json -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """The share of prompts that were broken for at most ``cost`` denoiser forwards each."""

    cost: int
    share: Share
    ci95: Shares


@dataclasses.dataclass(frozen=True, kw_only=True)
class KindBroken:
    """Of the prompts of one kind."""

    broken: int
    n_prompts: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attacked:
    """What an attack did to one model.

    ``broken``: prompts for which the judge saw the concept in a valid image.  ``images``: that it saw.  ``cost``: in
    denoiser forwards, over all prompts.  ``broken_by``: prompts by what broke them, in words.
    """

    broken: int
    n_prompts: int
    share: Share
    share_ci95: Shares
    images: int
    cost: int
    curve: tuple[CurvePoint, ...]
    broken_by: dict[str, int]
    kinds: dict[str, KindBroken] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttackResult:
    """One attack.  ``budget``: denoiser forwards per prompt, the same for all models and the control.

    ``control``: best of as many seeds as the budget pays for, on the unlearned model.  ``minus_control``,
    ``minus_gold``: the unlearned model's share minus theirs, prompt by prompt; None without a gold, for the control
    itself, and where the control has other prompts.
    """

    name: str
    summary: str
    unknown: str
    source: str
    budget: int
    interval: str
    models: dict[str, Attacked]
    control: Attacked
    minus_control: Difference | None
    minus_gold: Difference | None


# ---- the files -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation(Record):
    """evaluation.json of ``evaluate``: one unlearned model beside its original.

    ``judge``, ``calibration``, ``erasure``, ``retain``: None where there was no judge, or nothing for it to look at.
    ``is_reconstruction``: the method is made after a paper whose full text was not at hand.
    ``concept``: the concept, or the title of several; then ``concepts`` has a part for each of them.
    ``pairs_sha256``: of the file pairs.jsonl beside it; absent where none was written.
    """

    kind: ClassVar[str] = "evaluation"
    command: ClassVar[str] = "evaluate"

    name: str
    method: str
    concept: str
    model: str
    is_reconstruction: bool = False
    judge: JudgeRecord | None
    calibration: Calibration | None = None
    integrity: Integrity
    erasure: Erasure | None
    concepts: dict[str, ConceptShares] | None = dataclasses.field(default=None, metadata=OMITTED)
    retain: Retain | None
    groups: dict[str, Group]
    controls: Controls
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict, metadata=FREE)
    spec: dict[str, Any] = dataclasses.field(default_factory=dict, metadata=FREE)
    pairs_sha256: str | None = dataclasses.field(default=None, metadata=OMITTED)

    def __post_init__(self) -> None:
        _check_hashes(self.spec, "original", "unlearned")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoldersEvaluation(Record):
    """evaluation.json of ``evaluate-images``.  ``notes``: sentences about the images that a reader must know.

    ``judge``, ``calibration``, ``erasure``, ``retain``: absent where there was no judge, or nothing for it to look at.
    ``pairs_sha256``: of the file pairs.jsonl beside it; absent where none was written.
    """

    kind: ClassVar[str] = "images"
    command: ClassVar[str] = "evaluate-images"

    judge: JudgeRecord | None = dataclasses.field(default=None, metadata=OMITTED)
    calibration: Calibration | None = dataclasses.field(default=None, metadata=OMITTED)
    erasure: Erasure | None = dataclasses.field(default=None, metadata=OMITTED)
    retain: Retain | None = dataclasses.field(default=None, metadata=OMITTED)
    integrity: FolderIntegrity
    groups: dict[str, FolderDistances]
    notes: tuple[str, ...] = ()
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict, metadata=FREE)
    spec: dict[str, Any] = dataclasses.field(default_factory=dict, metadata=FREE)
    pairs_sha256: str | None = dataclasses.field(default=None, metadata=OMITTED)

    def __post_init__(self) -> None:
        _check_hashes(self.spec, "original_images", "unlearned_images")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ending:
    """How a training ended: after how many ``steps`` of at most ``steps_bound``.

    ``residual``: how much of the concept was left on held-out rows, 1 before the first step, and ``stop_residual`` the
    value at which training ends; both None where nothing was measured.
    """

    steps: int
    steps_bound: int
    residual: float | None = None
    stop_residual: float | None = None

    @property
    def is_short(self) -> bool:
        """Whether the training ran out of steps before its end was reached."""
        return self.residual is not None and self.stop_residual is not None and self.residual > self.stop_residual


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterRecord:
    """The adapter that a run left in the place of a model.

    ``base``: the model that it is for, a name, a folder or a file; ``parts``, ``variant``: how it was read.
    """

    base: str
    rank: int
    alpha: float
    layers: int
    parts: str | None = dataclasses.field(default=None, metadata=OMITTED)
    variant: str | None = dataclasses.field(default=None, metadata=OMITTED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ancestor:
    """A run whose result a later run started from."""

    method: str
    concepts: tuple[str, ...]
    hashes: dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord(Record):
    """run.json: what a training was of, with what it was made, and what it made.

    ``concept``: the concept, or the title of several; ``concepts``: each of them.  ``ancestors``: the runs that its
    model is the result of, the first one first.
    ``edit``: of a method in closed form, numbers by name: ``matrices`` that it changed, the largest ``condition``
    number of those that it solved with, and what the method adds.
    """

    kind: ClassVar[str] = "run"
    command: ClassVar[str] = "train"

    method: str
    concept: str
    model: str
    is_reconstruction: bool = False
    versions: dict[str, str]
    device: str
    threads: int
    hashes: dict[str, str]
    trainable_parameters: int
    total_parameters: int
    rows: int
    unet_evaluations: dict[str, int]
    seconds: dict[str, float]
    ending: Ending | None = None
    adapter: AdapterRecord | None = dataclasses.field(default=None, metadata=OMITTED)
    edit: dict[str, Any] = dataclasses.field(default_factory=dict, metadata=FREE)
    concepts: tuple[str, ...] = ()
    ancestors: tuple[Ancestor, ...] = ()

    @property
    def forgotten(self) -> tuple[str, ...]:
        """What the run was to forget, one by one."""
        return self.concepts or (self.concept,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison(Record):
    """compare.json.  ``margin``: the largest harmless difference, in ``unit``; None where none was given."""

    kind: ClassVar[str] = "comparison"
    command: ClassVar[str] = "compare"

    margin: float | None
    unit: str
    interval: str
    n_pairs: int
    n_prompts: int
    runs: tuple[ComparedRun, ...]
    comparisons: tuple[ComparedPair, ...]
    spec: dict[str, Any] = dataclasses.field(default_factory=dict, metadata=FREE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo(Record):
    """demo.json: the evaluation of each method's model, in order, and the methods compared pair by pair."""

    kind: ClassVar[str] = "demo"
    command: ClassVar[str] = "demo"

    seconds: float
    evaluations: tuple[Evaluation, ...]
    comparison: ComparedPair


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttackRecord(Record):
    """attack.json: what attacks brought back in one unlearned model.

    ``prepared``: denoiser forwards that the original spent on pictures, once for all attacks.
    """

    kind: ClassVar[str] = "attack"
    command: ClassVar[str] = "attack"

    name: str
    method: str
    concept: str
    model: str
    judge: JudgeRecord
    n_prompts: int
    prepared: int
    attacks: tuple[AttackResult, ...]
    notes: tuple[str, ...] = ()
    spec: dict[str, Any] = dataclasses.field(default_factory=dict, metadata=FREE)

    def __post_init__(self) -> None:
        _check_hashes(self.spec, "original", "unlearned")


def read_evaluation(path: Path) -> Evaluation | FoldersEvaluation:
    """An evaluation.json, of ``evaluate`` or of ``evaluate-images``.  Raises UserError like ``Record.read``."""
    content = read_json(path, Evaluation.command)
    is_of_folders = isinstance(content, dict) and content.get("kind") == FoldersEvaluation.kind
    return (FoldersEvaluation if is_of_folders else Evaluation).from_dict(content, str(path))


def _check_hashes(spec: Mapping[str, Any], *names: str) -> None:
    hashes = spec.get("hashes")
    for name in names:
        if not isinstance(hashes, Mapping) or not isinstance(hashes.get(name), str):
            raise UserError(f"spec.hashes.{name} is missing")
