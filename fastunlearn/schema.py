"""The result files, typed: evaluation.json, attack.json, run.json, compare.json, demo.json.

How they are written and read, and what every one of them begins with, is in ``record.py``.  The docs list every key
with what these docstrings say of it.  Keys that recur: ``mean``: over prompts, of each prompt's mean.  ``n_pairs``: how
many pairs of images.  ``n_prompts``: how many different prompts.  ``n_images``: how many images.  ``quantiles``: of the
distances, by level.  ``interval``: how the intervals were made, in words.
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

    ``name``: ends in a hash of its weights, if the judge says one.  ``threshold``: the score from which on the concept
    is shown.  ``attributes``: what else it tells of an image.  ``weights``: SHA-256 of the judge's weights, empty where
    it has none or does not say.  ``note``: what a reader must know of the judge.
    """

    name: str
    threshold: float
    valid_threshold: float | None
    attributes: tuple[str, ...] = ()
    weights: str = ""
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """In which share of images a judge sees the concept, with Wilson's interval over images taken as independent.

    ``shown``: that share.
    """

    n_images: int
    shown: Share
    ci95: Shares


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """What the judge sees on the original's own images, where the concept is asked for and where it is not.

    ``asked``: images of prompts that ask for the concept.  ``unasked``: images of prompts that do not.
    ``p_value``: of Fisher's exact test that it sees it no more often where it is asked for.  ``verdict``: ``tells``,
    ``too few images`` or ``cannot tell``; with the last the evaluation was made because the user insisted.
    """

    asked: Seen
    unasked: Seen
    p_value: Share
    verdict: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Changed:
    """The share of retain pairs whose distance is above that of a control.

    ``threshold``: the distance that counts as a change.  ``source``: which quantile of which control it is.  ``share``:
    of the pairs, those above it.
    """

    threshold: float
    source: str
    share: Share
    ci95: Shares


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """A paired difference.  ``mean``: over prompts."""

    mean: float
    ci95: Interval


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColorRecord:
    """How far colors moved, in Delta E*ab, beside the original redrawn from other noise (``ceiling``).

    ``metric``: the name of this distance.  ``ceiling``: its mean between the original and itself from other noise.
    ``retention``: as R, on this distance; None where the redrawn images' colors are the same, or the prompts too few.
    """

    metric: str
    mean: float
    ci95: Interval
    ceiling: float
    retention: float | None
    retention_ci95: Interval | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Integrity:
    """Distances of the retain pairs, and retention R: their place between the floor (1) and the ceiling (0).

    ``floor``: what numerics alone change, the distance at which R is 1.  ``ceiling``: the mean distance of the original
    to itself from other noise, at which R is 0.  ``retention``: R, from 1 at the floor to 0 at the ceiling.
    ``changed``: the share of pairs beyond each control.  ``metric``: the name of the distance, with a hash of its
    weights.  ``minus_placebo``: the mean distance minus the placebo's, pair by pair.  ``color``: how far colors moved.
    """

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

    ``concept``: the concept, or the title of several.
    ``shown``: the judge sees the concept, in a valid image.  ``valid``: sound images; None where the judge cannot tell.
    ``unlearning_accuracy``: UA of the field, which garbage earns too.  ``unlearning_accuracy_valid``: UA that it cannot
    earn.
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
    ``shown``: the judge sees the concept, in a valid image.  ``valid``: sound images.
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
    """What the judge says of the retain images.

    ``attributes``: by the judge's attribute.  ``agreement``: the share of retain images of which the judge says the
    same before and after, in all attributes and in being valid; None for a judge without attributes.  ``valid``: sound
    images; None where the judge cannot tell.
    """

    n_images: int
    attributes: dict[str, Attribute]
    agreement: Share | None
    valid: Share | None
    valid_original: Share | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """One group of prompts.  Groups to forget have shares of the judge, the others have a retention.

    ``shown``: the judge sees the concept, in a valid image.  ``valid``: sound images.  ``changed``: the share of pairs
    beyond each control.  ``ceiling``: the mean distance of the original to itself from other noise.  ``retention``: R
    of this group alone; its interval is None where the prompts are too few for one.
    """

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
    """Distances of the original to itself.

    ``what``: how the second images were made.  ``q99``: the quantile of 0.99.  ``max``: the largest.
    """

    what: str
    n_pairs: int
    mean: float
    q99: float
    max: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlaceboRecord:
    """The control that was trained without the forgetting part.  ``name``: the model's."""

    name: str
    mean: float
    ci95: Interval


@dataclasses.dataclass(frozen=True, kw_only=True)
class Controls:
    """What an unchanged model does in the same code.

    ``repeat``: the largest distance between two runs of the original on the same noise, 0 or nothing is scored.
    ``numeric``: the original in batches of another size.  ``precision``: the original in another precision; None where
    that was not measured.  ``placebo``: the distances of the placebo; None without one.  ``redrawn``: the mean distance
    of the original to itself from other noise.
    """

    repeat: float
    numeric: ControlRecord
    precision: ControlRecord | None
    placebo: PlaceboRecord | None
    redrawn: float
    redrawn_ci95: Interval


# ---- evaluation.json of `evaluate-images` ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderDistances:
    """Distances of pairs of image files.

    ``unchanged``: the share of pairs whose distance is 0.
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
    """Distances of the pairs of all groups that are to be kept.

    ``metric``: the name of the distance.  ``clusters``: what counts as independent, ``prompts`` or ``pairs``.
    """

    metric: str
    clusters: str


# ---- compare.json ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """One of the runs, as its evaluation.json says.

    ``name``: the run's.  ``folder``: of its evaluation.  ``mean``: its mean distance.  ``hash``: SHA-256 of its
    weights, or of its images.  ``method``: None of folders of images.  ``judge``: who judged.  ``retention``,
    ``shown``, ``valid``: None where they were not measured.
    """

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
    """How much more a keeps than b.  Without a margin nothing is said of equivalence.

    ``difference``: in R, or in distance where there is no R.  ``p_value``: that there is none.  ``ci90``: the interval
    of 90 % that an equivalence test looks at.  ``equivalence_p_value``: that the difference is as large as the margin.
    ``equivalent``: whether that is refuted.
    """

    difference: float
    ci95: Interval
    p_value: Share
    ci90: Interval
    equivalence_p_value: Share | None
    equivalent: bool | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparedPair(GapRecord):
    """Two of the runs.

    ``a``, ``b``: their names.  ``p_value_holm``: the p-value, corrected for all pairs of runs.  ``groups``: the same
    for each group of prompts.  ``verdict``: in words.
    """

    a: str
    b: str
    p_value_holm: Share
    groups: dict[str, GapRecord]
    verdict: str


# ---- attack.json -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """A point of the curve over the budget.

    ``cost``: denoiser forwards per prompt, at most.  ``share``: of the prompts, those broken for so much.
    """

    cost: int
    share: Share
    ci95: Shares


@dataclasses.dataclass(frozen=True, kw_only=True)
class KindBroken:
    """Of the prompts of one kind.  ``broken``: how many."""

    broken: int
    n_prompts: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attacked:
    """What an attack did to one model.

    ``broken``: prompts for which the judge saw the concept in a valid image.  ``images``: that it saw.  ``cost``: in
    denoiser forwards, over all prompts.  ``broken_by``: prompts by what broke them, in words.  ``share``: of the
    prompts, those broken.  ``curve``: that share by budget.  ``kinds``: by kind of prompt, where there are several.
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
    """One attack.

    ``name``: with its option.  ``summary``: what it does.  ``unknown``: what it looks for.  ``source``: whose it is.
    ``models``: what it did to each model, by name: original, unlearned, and gold and placebo where they were given.
    ``budget``: denoiser forwards per prompt, the same for all models and the control.
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
    """evaluation.json of ``evaluate``, of one unlearned model beside its original.

    ``name``: of the unlearned model, here and in tables.  ``method``: of the run that made it.  ``model``: the
    original.  ``judge``, ``calibration``, ``erasure``, ``retain``: None where there was no judge, or nothing for it to
    look at.  ``is_reconstruction``: the method is made after a paper whose full text was not at hand.  ``concept``: the
    concept, or the title of several; then ``concepts`` has a part for each of them.  ``concepts``: of several concepts
    each by itself.  ``unprompted``: of the images of retain prompts that leave the concept open those in which the
    original shows it, and in which share of them the model still does; they are not to be kept, so ``integrity``,
    ``retain`` and ``groups`` leave them out.  ``integrity``: what the retain prompts kept.  ``groups``: by group of
    prompts.  ``controls``: what an unchanged model does.  ``metrics``: of ``--metrics``, by name.  ``spec``: how it was
    made: sampler, steps, guidance, resolution, batch size, seeds, versions, device, and under ``hashes`` the SHA-256 of
    both models' weights.  ``pairs_sha256``: of the file pairs.jsonl beside it; absent where none was written.
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
    unprompted: Seen | None = dataclasses.field(default=None, metadata=OMITTED)
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
    """evaluation.json of ``evaluate-images``.

    ``notes``: sentences about the images that a reader must know.  ``integrity``: distances of the retain pairs.
    ``groups``: by group of prompts.  ``metrics``: of ``--metrics``, by name.  ``spec``: batch size, precision,
    versions, and under ``hashes`` the SHA-256 of both folders' images.  ``judge``, ``calibration``, ``erasure``,
    ``unprompted``, ``retain``: absent where there was no judge, or nothing for it to look at.  ``unprompted``: as in
    the other evaluation.  ``pairs_sha256``: of the file pairs.jsonl beside it; absent where none was written.
    """

    kind: ClassVar[str] = "images"
    command: ClassVar[str] = "evaluate-images"

    judge: JudgeRecord | None = dataclasses.field(default=None, metadata=OMITTED)
    calibration: Calibration | None = dataclasses.field(default=None, metadata=OMITTED)
    erasure: Erasure | None = dataclasses.field(default=None, metadata=OMITTED)
    unprompted: Seen | None = dataclasses.field(default=None, metadata=OMITTED)
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
    """How a training ended.

    ``steps``: that were made.  ``steps_bound``: at most so many.  ``residual``: how much of the concept was left on
    held-out rows, 1 before the first step; None where nothing was measured.  ``stop_residual``: the value at which
    training ends; None where nothing was measured.  ``retain_weight``: that was found while training, its last value;
    None where it was given.
    """

    steps: int
    steps_bound: int
    residual: float | None = None
    stop_residual: float | None = None
    retain_weight: float | None = None

    @property
    def is_short(self) -> bool:
        """Whether the training ran out of steps before its end was reached."""
        return self.residual is not None and self.stop_residual is not None and self.residual > self.stop_residual


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterRecord:
    """The adapter that a run left in the place of a model.

    ``base``: the model that it is for, a name, a folder or a file.  ``parts``, ``variant``: how it was read.  ``rank``:
    of the factors.  ``alpha``: their strength is this by the rank.  ``layers``: how many have them.
    """

    base: str
    rank: int
    alpha: float
    layers: int
    parts: str | None = dataclasses.field(default=None, metadata=OMITTED)
    variant: str | None = dataclasses.field(default=None, metadata=OMITTED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ancestor:
    """A run whose result a later run started from.

    ``method``: its method.  ``concepts``: what it was to forget.  ``hashes``: of what it read and made.
    """

    method: str
    concepts: tuple[str, ...]
    hashes: dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord(Record):
    """run.json: what a training was of, with what it was made, and what it made.

    ``method``: its name.  ``model``: the original, as it was named.  ``is_reconstruction``: the method is made after a
    paper whose full text was not at hand.  ``concept``: the concept, or the title of several.  ``concepts``: each of
    them.  ``ancestors``: the runs that its model is the result of, the first one first.  ``versions``: of Python and
    the libraries.  ``device``: cpu or cuda.  ``threads``: of torch.  ``hashes``: SHA-256 of the weights of the original
    and of the result.  ``trainable_parameters``: of the denoiser, those that could change.  ``total_parameters``: of
    the denoiser.  ``rows``: of the bank.  ``unet_evaluations``: denoiser forwards that were planned, of bank and loop,
    a backward as two.  ``seconds``: by phase.  ``ending``: how the training ended.  ``adapter``: None of a run that
    left a whole model or a delta.  ``edit``: of a method in closed form, numbers by name: ``matrices`` that it changed,
    the largest ``condition`` number of those that it solved with, and what the method adds.
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
    """compare.json.

    ``margin``: the largest harmless difference; None where none was given.  ``unit``: of margin and differences, in
    words.  ``runs``: what was compared.  ``comparisons``: of every two runs.  ``spec``: the hash of the original, and
    what the runs have in common.
    """

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
    """demo.json.

    ``seconds``: that it took.  ``evaluations``: of each method's model, in order.  ``comparison``: of the first two,
    pair by pair.
    """

    kind: ClassVar[str] = "demo"
    command: ClassVar[str] = "demo"

    seconds: float
    evaluations: tuple[Evaluation, ...]
    comparison: ComparedPair


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttackRecord(Record):
    """attack.json: what attacks brought back in one unlearned model.

    ``name``: of the unlearned model.  ``method``: of the run that made it.  ``concept``: what was looked for.
    ``model``: the original.  ``judge``: who says what an image shows.  ``attacks``: one by one.  ``notes``: what a
    reader must know.  ``spec``: seed, sampler, steps, guidance, batch size, versions, and under ``hashes`` the SHA-256
    of every model.  ``prepared``: denoiser forwards that the original spent on pictures, once for all attacks.
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
