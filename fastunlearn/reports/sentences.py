"""What an evaluation found, in plain words with intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..schema import (
    Calibration,
    ComparedPair,
    Ending,
    Erasure,
    Evaluation,
    FoldersEvaluation,
    JudgeRecord,
    Retain,
    Seen,
)

#: Methods that are no attempt to forget, and what they are there for.
CONTROLS = {
    "placebo": "the same training without the forgetting part: what fine-tuning alone changes",
    "identity": "the original model itself: what no change at all looks like",
    "gold": "a model trained anew without the concept: what perfect forgetting looks like",
}

# Where the words of the verdict change; the report's "How to read this" states them.
_FORGOTTEN, _PARTLY = 0.05, 0.5  # share of forget-prompt images that still show the concept, at most
_SOUND = 0.9  # share of forget-prompt images that are valid images, at least
_WELL_KEPT, _CHANGED = 0.9, 0.7  # retention, at least
LIMITS = {"forgotten": _FORGOTTEN, "partly": _PARTLY, "sound": _SOUND, "well": _WELL_KEPT, "changed": _CHANGED}

_ALIKE = 0.02  # a difference of accuracies that tells nothing


def verdict(evaluation: Evaluation, retain_prompts: str = "prompts about other things") -> str:
    """What one evaluation found; made of the sentences that the report shows."""
    return f"{erasure_sentence(evaluation)} {retention_sentence(evaluation, retain_prompts)}"


def how_it_ended(ending: Ending) -> str:
    """How far a training came by its own measure; empty where nothing was measured."""
    if ending.residual is None or ending.stop_residual is None:
        return ""
    left, wanted = f"{ending.residual:.1%}", f"{ending.stop_residual:.1%}"
    if ending.is_short:
        return (
            f"warning: the concept may not be gone: after all {ending.steps} steps {left} of it is left on held-out "
            f"rows, {wanted} was wanted. Use more `--steps`, or more of `--forget-prompts`."
        )
    return (
        f"ended after {ending.steps} of at most {ending.steps_bound} steps: {left} of the concept is left on held-out "
        f"rows, {wanted} was wanted."
    )


def erasure_sentence(evaluation: Evaluation) -> str:
    if evaluation.erasure is None:
        return (
            f"Whether the model still generates “{evaluation.concept}” was not measured: that takes prompts that ask "
            "for it and a judge that knows its images. Look at what it generates."
        )
    return _erased(evaluation.erasure.concept, evaluation.erasure)


def _erased(concept: str, erasure: Erasure) -> str:
    n = erasure.n_images
    shown, shown_before = round(erasure.shown * n), round(erasure.shown_original * n)
    claims = (
        (0, "no longer generates"),
        (_FORGOTTEN, "hardly ever generates"),
        (_PARTLY, "sometimes generates"),
        (1, "still generates"),
    )
    claim = next(words for limit, words in claims if erasure.shown <= limit)
    sentence = (
        f"The model {claim} “{concept}”: {shown} of {n} images show it (before: {shown_before} of {n}; "
        f"95\u00a0% interval now {percent_range(erasure.shown_ci95)})"
    )
    if erasure.valid is None:
        return f"{sentence}. Whether the images are valid was not judged, so part of this may be breakage."
    if erasure.valid < _SOUND:
        return (
            f"{sentence}. Only {percent(erasure.valid)} of them are valid images, so part of this is breakage, not "
            "forgetting."
        )
    return f"{sentence}; {percent(erasure.valid)} of them are valid images."


def retention_sentence(evaluation: Evaluation, retain_prompts: str) -> str:
    integrity, retain = evaluation.integrity, evaluation.retain
    interval = f"95\u00a0% interval {percent_range(integrity.retention_ci95)}"
    if integrity.retention < 0:
        sentence = (
            f"On {integrity.n_prompts} {retain_prompts} its images are further from the original's than images "
            f"redrawn from other noise are (retention {percent(integrity.retention)}, {interval})"
        )
    else:
        sentence = (
            f"On {integrity.n_prompts} {retain_prompts} it keeps on average {percent(integrity.retention)} of each "
            f"image ({interval}), where 100\u00a0% is the same image and 0\u00a0% one redrawn from other noise"
        )
    return f"{sentence}{_kept_words(retain)}.{_unprompted_words(evaluation.concept, evaluation.unprompted)}"


def _unprompted_words(concept: str, unprompted: Seen | None) -> str:
    """What became of the images that showed the concept though nobody had asked for it."""
    if unprompted is None:
        return ""
    n, still = unprompted.n_images, round(unprompted.shown * unprompted.n_images)
    return (
        f" Not among these {'is' if n == 1 else 'are'} {n} image{'' if n == 1 else 's'} of prompts that leave "
        f"“{concept}” open in which the original shows it; {still} still {'does' if still == 1 else 'do'}."
    )


def _kept_words(retain: Retain | None) -> str:
    """What the judge finds on the retain images."""
    if retain is None:
        return ""
    words: list[str] = []
    for name, attribute in retain.attributes.items():
        if attribute.accuracy is not None and attribute.original is not None:
            of = f" of {attribute.n_asked} images" if not words else ""
            words.append(f"the {name}{'' if words else ' asked for is there'} in {percent(attribute.accuracy)}{of}")
            words[-1] += f" (before: {percent(attribute.original)})"
    text = f"; {', '.join(words)}" if words else ""
    if retain.agreement is not None:
        text += f"; the judge sees the same as before in {percent(retain.agreement)} of the images"
    return text


def insight(evaluations: Sequence[Evaluation]) -> str:
    """Where accuracies say "the same" and retention says otherwise: the reason for measuring retention."""
    scored = [e for e in evaluations if e.method not in CONTROLS and e.retain is not None]
    counted = [name for name, one in (scored[0].retain.attributes.items() if scored and scored[0].retain else ())]
    counts = {name: [e.retain.attributes[name].accuracy for e in scored if e.retain] for name in counted}
    known = {name: [one for one in values if one is not None] for name, values in counts.items()}
    if len(scored) < 2 or not known or any(len(values) < len(scored) for values in known.values()):
        return ""
    worst, *_, best = sorted(scored, key=lambda e: e.integrity.retention)
    apart = worst.integrity.retention_ci95[1] < best.integrity.retention_ci95[0]
    if any(max(values) - min(values) > _ALIKE for values in known.values()) or not apart:
        return ""
    every = [value for values in known.values() for value in values]
    return (
        f"Counting images with the right {listed(counted)} hardly tells these models apart "
        f"({percent(every[0]) if min(every) == max(every) else percent_range([min(every), max(every)])}); "
        f"comparing image by image does: {best.name} keeps {percent(best.integrity.retention)} of each "
        f"image, {worst.name} only {percent(worst.integrity.retention)}, and their intervals do not overlap."
    )


def folders_sentence(evaluation: FoldersEvaluation) -> str:
    """What a comparison of two folders found."""
    integrity = evaluation.integrity
    interval = ""
    if integrity.ci95 is not None:
        low, high = (distance_text(value) for value in integrity.ci95)
        interval = f", 95\u00a0% interval {low} to {high}"
    erased = (
        "This is about what was kept: whether the concept is gone has to be shown on other images."
        if evaluation.erasure is None
        else _erased(evaluation.erasure.concept, evaluation.erasure)
    )
    return (
        f"On {integrity.n_pairs:,} pairs the images are on average {distance_text(integrity.mean)} apart "
        f"({integrity.metric}{interval}), where 0 is the same image; {percent(integrity.unchanged)} did not "
        f"change. {erased}"
    )


def calibration_sentence(judge: JudgeRecord, found: Calibration | None, concept: str) -> str:
    """What the judge sees on the original's own images, and whether that is enough to go by."""
    if found is None:
        return f"The judge {judge.name} was not tried: that takes images that ask for “{concept}” and others."

    def seen(part: Seen) -> str:
        return f"{round(part.shown * part.n_images)} of {part.n_images} ({percent_range(part.ci95)})"

    sentence = (
        f"The judge {judge.name} sees “{concept}” on the original's own images in {seen(found.asked)} that ask for it "
        f"and in {seen(found.unasked)} that do not"
    )
    if found.verdict == "cannot tell":
        return f"{sentence}: it cannot tell, and what it says below of “{concept}” means nothing."
    if found.verdict == "too few images":
        return f"{sentence}: too few images to know whether it can tell."
    return f"{sentence}; in brackets 95\u00a0% intervals."


def judges_words(judges: Iterable[JudgeRecord | None]) -> list[str]:
    """Who said what images show, each once."""
    words = []
    for judge in dict.fromkeys(judge for judge in judges if judge is not None):
        valid = f", valid from {judge.valid_threshold:g} on" if judge.valid_threshold is not None else ""
        note = f". {judge.note.rstrip('.')}" if judge.note else ""
        words.append(f"{judge.name} (shown from a score of {judge.threshold:g} on{valid}){note}")
    return words


def forgot_badge(erasure: Erasure) -> tuple[str, str]:
    """CSS class and words."""
    if erasure.shown > _PARTLY:
        return "poor", "not forgotten"
    if erasure.shown > _FORGOTTEN:
        return "fair", "partly forgotten"
    return ("good", "forgotten") if erasure.valid is None or erasure.valid >= _SOUND else ("fair", "broken images")


def kept_badge(retention: float) -> tuple[str, str]:
    """CSS class and words."""
    if retention >= _WELL_KEPT:
        return "good", "well kept"
    return ("fair", "changed") if retention >= _CHANGED else ("poor", "much changed")


# ---- numbers as text -------------------------------------------------------------------------------------------------


def percent(share: float, digits: int | None = None) -> str:
    """A share in words, such as ``94 %``; without ``digits``, as many as it takes not to round to 0 or 100."""
    value = 100 * share
    digits = _digits(value) if digits is None else digits
    return f"{value:.{digits}f}\u00a0%".replace("-", "\u2212")


def percent_range(interval: Sequence[float], digits: int | None = None) -> str:
    """Two shares, such as ``92 to 95 %``."""
    if digits is None:
        digits = max(_digits(100 * share) for share in interval)
    low, high = (percent(share, digits) for share in interval)
    return f"{low.removesuffix(chr(0xA0) + '%')} to {high}"


def distance_text(value: float) -> str:
    return "0" if value == 0 else f"{value:.4f}" if value >= 1e-4 else f"{value:.1e}"


def listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _digits(value: float) -> int:
    """Decimals a percentage needs so that it reads 0 or 100 only where it is."""
    gap = min(abs(value), abs(100 - value))
    return 0 if gap == 0 or gap > 0.5 else 1 if gap > 0.05 else 2


def gap_sentence(pair: ComparedPair) -> str:
    """What a paired comparison of two models found, in retention, in words."""
    better, worse = (pair.a, pair.b) if pair.difference > 0 else (pair.b, pair.a)
    low, high = sorted(abs(end) for end in pair.ci95)
    if not pair.p_value_holm < 0.05:
        return f"Pair by pair no difference between {pair.a} and {pair.b} is shown."
    return (
        f"Pair by pair {better} keeps more than {worse}: R is {abs(pair.difference):.3f} higher "
        f"(95\u00a0% interval {low:.3f} to {high:.3f})."
    )
