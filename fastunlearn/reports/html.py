"""What a run shows to people: a grid of images, and one self-contained HTML file that needs no explanation beside it.

Everything here takes plain data (the content of ``evaluation.json`` files and uint8 images), nothing heavy.
"""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from ..errors import UserError
from ..files.atomic import whole_file, write_text

ImageArray = npt.NDArray[np.uint8]
Evaluation = Mapping[str, Any]

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

_MAX_PIXELS = 320  # longest side of an image inside the HTML file; larger ones are shown smaller

_SCHEMA = {
    "integrity": (
        *("mean", "ci95", "retention", "retention_ci95", "n_pairs", "n_prompts"),
        *("metric", "interval", "quantiles", "floor", "changed"),
    ),
    "controls": ("repeat", "numeric", "precision", "redrawn"),
    "erasure": (
        *("concept", "forget_accuracy", "forget_accuracy_ci95", "forget_accuracy_original"),
        *("forget_valid", "n_images"),
    ),
    "retain": (
        *(f"{what}_accuracy{which}" for what in ("shape", "color", "background") for which in ("", "_original")),
        "n_images",
    ),
}


@dataclass(frozen=True)
class GalleryRow:
    """One line of images (H, W, 3) uint8, one per column; ``captions`` is empty or has one text per image."""

    label: str
    images: Sequence[ImageArray]
    captions: Sequence[str] = ()


@dataclass(frozen=True)
class Gallery:
    """A table of images; ``columns`` names what every row shows, such as ``original`` and ``ovw``."""

    title: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[GalleryRow]


@dataclass(frozen=True)
class Report:
    """What ``write_report`` shows.

    ``evaluations``: contents of ``evaluation.json`` files, in the order they are to appear.  ``galleries``: the first
    one stands right below the verdict.  ``notes``: sentences about this run.  ``retain_prompts``: what to call the
    retain prompts in a sentence, such as ``prompts that no loss has seen`` where that is so.  ``distances``: by model
    the distances of its retain pairs, and ``redrawn`` the original's to itself from other noise, for the histograms.
    """

    title: str
    concept: str
    evaluations: Sequence[Evaluation]
    galleries: Sequence[Gallery] = ()
    notes: Sequence[str] = field(default_factory=tuple)
    retain_prompts: str = "prompts about other things"
    distances: Mapping[str, npt.NDArray[np.floating]] = field(default_factory=dict)
    redrawn: npt.NDArray[np.floating] | None = None


def write_report(path: Path | str, report: Report) -> None:
    """Write ``report`` as one HTML file that loads nothing from elsewhere; the same report gives the same bytes.

    The file is whole or absent.  Raises ``UserError`` for no evaluation, a missing or non-finite entry of one, and
    images that are not (H, W, 3) uint8 or do not match their columns.
    """
    if not report.evaluations:
        raise UserError("a report needs at least one evaluation, got none: pass the content of an evaluation.json")
    for evaluation in report.evaluations:
        _check_evaluation(evaluation)
        if evaluation["concept"] != report.concept:
            raise UserError(
                f"the report is about {report.concept!r}, evaluation {evaluation['name']!r} about "
                f"{evaluation['concept']!r}: write one report a concept"
            )
    for gallery in report.galleries:
        _check_gallery(gallery)
    models = [_model(evaluation, report.retain_prompts) for evaluation in report.evaluations]
    html = (
        templates()
        .get_template("report.html.j2")
        .render(
            report=report,
            models=models,
            verdicts=[model for model in models if not model["control"]] or models,
            controls=[model for model in models if model["control"]],
            judged=any(evaluation["retain"] is not None for evaluation in report.evaluations),
            insight=_insight(report.evaluations),
            ladders=_ladders(report.evaluations),
            histograms=_histograms(report),
            changed_limits=_changed_limits(report.evaluations[0]),
            spec=_spec(report.evaluations),
            reconstructed=any(evaluation["method"] in ("ovw", "saddle") for evaluation in report.evaluations),
            limits={
                "forgotten": _FORGOTTEN,
                "partly": _PARTLY,
                "sound": _SOUND,
                "well": _WELL_KEPT,
                "changed": _CHANGED,
            },
            max_pixels=_MAX_PIXELS,
        )
    )
    write_text(Path(path), html)


@functools.cache
def templates() -> jinja2.Environment:
    """The pages' templates, each compiled once."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fastunlearn.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=percent,
        percent_range=percent_range,
        distance=distance_text,
        uri=_data_uri,
        signed=lambda value: f"{value:+.3f}".replace("-", "\u2212"),
        p_value=lambda value: f"{value:.3f}" if value >= 0.001 else "< 0.001",
    )
    return environment


def verdict(evaluation: Evaluation, retain_prompts: str = "prompts about other things") -> str:
    """What one evaluation found, in plain words with intervals; made of the sentences the report shows."""
    return f"{_erasure_sentence(evaluation)} {_retention_sentence(evaluation, retain_prompts)}"


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
        _check_image(pixels, "the grid")

    text, strong = _font("DejaVuSans.ttf", 13), _font("DejaVuSans-Bold.ttf", 15)
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
        draw.text((margin, margin), title, fill="#111827", font=_font("DejaVuSans-Bold.ttf", 18))
    first = 0
    for name, count in spans:  # first: the column a group starts at
        x0, x1, y = starts[first], starts[first + count - 1] + cell, margin + title_height
        draw.text(((x0 + x1) / 2, y), _shorten(name, strong, x1 - x0), fill="#111827", font=strong, anchor="ma")
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
            image = _fit(Image.fromarray(pixels), cell)
            canvas.paste(image, (x + (cell - image.width) // 2, y + (cell - image.height) // 2))
    with whole_file(Path(path)) as unfinished:
        canvas.save(unfinished, format="PNG", optimize=True)


# ---- sentences -------------------------------------------------------------------------------------------------------


def _erasure_sentence(evaluation: Evaluation) -> str:
    concept, erasure = evaluation["concept"], evaluation["erasure"]
    if erasure is None:
        return (
            f"Whether the model still generates “{concept}” was not measured: that takes prompts that ask for it and a "
            "classifier that knows its images. Look at what it generates."
        )
    share, n = erasure["forget_accuracy"], erasure["n_images"]
    shown, shown_before = round(share * n), round(erasure["forget_accuracy_original"] * n)
    claims = (
        (0, "no longer generates"),
        (_FORGOTTEN, "hardly ever generates"),
        (_PARTLY, "sometimes generates"),
        (1, "still generates"),
    )
    claim = next(words for limit, words in claims if share <= limit)
    sentence = (
        f"The model {claim} “{concept}”: {shown} of {n} images show it (before: {shown_before} of {n}; "
        f"95\u00a0% interval now {percent_range(erasure['forget_accuracy_ci95'])})."
    )
    if erasure["forget_valid"] < _SOUND:
        sentence += (
            f" Only {percent(erasure['forget_valid'])} of them are sound images, so part of this is breakage, "
            "not forgetting."
        )
    return sentence


def _retention_sentence(evaluation: Evaluation, retain_prompts: str) -> str:
    integrity, retain = evaluation["integrity"], evaluation["retain"]
    share = integrity["retention"]
    interval = f"95\u00a0% interval {percent_range(integrity['retention_ci95'])}"
    if share < 0:
        sentence = (
            f"On {integrity['n_prompts']} {retain_prompts} its images are further from the original's than images "
            f"redrawn from other noise are (retention {percent(share)}, {interval})"
        )
    else:
        sentence = (
            f"On {integrity['n_prompts']} {retain_prompts} it keeps on average {percent(share)} of each image "
            f"({interval}), where 100\u00a0% is the same image and 0\u00a0% one redrawn from other noise"
        )
    if retain is None or retain["shape_accuracy"] is None:
        return sentence + "."
    return (
        f"{sentence}; the shape asked for is there in {percent(retain['shape_accuracy'])} of "
        f"{retain['n_images']} images (before: {percent(retain['shape_accuracy_original'])})."
    )


def _insight(evaluations: Sequence[Evaluation]) -> str:
    """Where accuracies say "the same" and retention says otherwise: the reason for measuring retention."""
    scored = [e for e in evaluations if e["method"] not in CONTROLS and e["retain"] is not None]
    accuracies = [e["retain"]["shape_accuracy"] for e in scored]
    if len(scored) < 2 or None in accuracies:
        return ""
    worst, *_, best = sorted(scored, key=lambda e: e["integrity"]["retention"])
    apart = worst["integrity"]["retention_ci95"][1] < best["integrity"]["retention_ci95"][0]
    if max(accuracies) - min(accuracies) > 0.02 or not apart:
        return ""
    return (
        f"Counting right shapes hardly tells these models apart ({percent_range([min(accuracies), max(accuracies)])}); "
        f"comparing image by image does: {best['name']} keeps {percent(best['integrity']['retention'])} of each "
        f"image, {worst['name']} only {percent(worst['integrity']['retention'])}, and their intervals do not overlap."
    )


def _digits(value: float) -> int:
    """Decimals a percentage needs so that it reads 0 or 100 only where it is."""
    gap = min(abs(value), abs(100 - value))
    return 0 if gap == 0 or gap > 0.5 else 1 if gap > 0.05 else 2


def distance_text(value: float) -> str:
    return "0" if value == 0 else f"{value:.4f}" if value >= 1e-4 else f"{value:.1e}"


# ---- what the template sees ------------------------------------------------------------------------------------------


def _model(evaluation: Evaluation, retain_prompts: str) -> dict[str, Any]:
    erasure = evaluation["erasure"]
    return {
        **evaluation,
        "control": CONTROLS.get(evaluation["method"]),
        "erasure_sentence": _erasure_sentence(evaluation),
        "retention_sentence": _retention_sentence(evaluation, retain_prompts),
        "shown": erasure and round(erasure["forget_accuracy"] * erasure["n_images"]),
        "forgot": erasure and _forgot(erasure),
        "kept": _kept(evaluation["integrity"]["retention"]),
    }


def _forgot(erasure: Mapping[str, Any]) -> tuple[str, str]:
    """CSS class and words."""
    if erasure["forget_accuracy"] > _PARTLY:
        return "poor", "not forgotten"
    if erasure["forget_accuracy"] > _FORGOTTEN:
        return "fair", "partly forgotten"
    return ("good", "forgotten") if erasure["forget_valid"] >= _SOUND else ("fair", "broken images")


def _kept(retention: float) -> tuple[str, str]:
    if retention >= _WELL_KEPT:
        return "good", "well kept"
    return ("fair", "changed") if retention >= _CHANGED else ("poor", "much changed")


def _ladders(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """One ladder a metric, since distances of different metrics do not compare; positions in percent of its width."""
    ladders = []
    for metric in dict.fromkeys(e["integrity"]["metric"] for e in evaluations):
        group = [e for e in evaluations if e["integrity"]["metric"] == metric]
        rungs = [_rung("same model, run again", "control", max(e["controls"]["repeat"] for e in group))]
        for control in ("numeric", "precision"):
            for result in {c["what"]: c for e in group if (c := e["controls"][control])}.values():
                rungs.append(_rung(result["what"], "control", result["mean"]))
        for e in sorted(group, key=lambda e: e["integrity"]["mean"]):
            kind = "control" if e["method"] in CONTROLS else "model"
            rungs.append(_rung(e["name"], kind, e["integrity"]["mean"], e["integrity"]["ci95"]))
        ceilings = dict.fromkeys(e["controls"]["redrawn"] for e in group)
        for ceiling in ceilings:
            names = ", ".join(e["name"] for e in group if e["controls"]["redrawn"] == ceiling)
            label = "redrawn from other noise" + (f" ({names})" if len(ceilings) > 1 else "")
            rungs.append(_rung(label, "control", ceiling))
        width = max(rung["high"] for rung in rungs) or 1.0
        for rung in rungs:
            rung["at"] = {key: f"{100 * rung[key] / width:.2f}%" for key in ("mean", "low", "high")}
        ladders.append({"metric": metric, "rungs": rungs})
    return ladders


def _changed_limits(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """From which distance on an image counts as changed, by the control that the limit comes from."""
    words = {
        "numeric": "more than rounding",
        "precision": "more than a coarser precision",
        "placebo": "more than training without forgetting",
        "redrawn": "as if generated anew",
    }
    return {name: {"words": words[name], **limit} for name, limit in evaluation["integrity"]["changed"].items()}


def _histograms(report: Report, bins: int = 40) -> dict[str, Any]:
    """For each model how many pairs have which distance, beside the redrawn ones; heights and places in percent."""
    sides = [*report.distances.values(), *([report.redrawn] if report.redrawn is not None else [])]
    reach = max((float(np.max(side)) for side in sides if len(side)), default=0.0)
    if not report.distances or reach == 0:
        return {"reach": reach, "models": []}

    def heights(values: npt.NDArray[np.floating]) -> list[float]:
        return [float(share) for share in np.histogram(values, bins, (0, reach))[0] / len(values)]

    redrawn = heights(report.redrawn) if report.redrawn is not None and len(report.redrawn) else []
    models = []
    for name, values in report.distances.items():
        own = heights(values)
        top = max(own)
        # Each kind fills the height by itself: where they lie is the point, not how wide they are.
        models.append(
            {
                "name": name,
                "bars": [(100 * i / bins, 100 * h / top) for i, h in enumerate(own) if h],
                "redrawn": [(100 * i / bins, 100 * h / max(redrawn)) for i, h in enumerate(redrawn) if h],
                "width": 100 / bins,
            }
        )
    return {"reach": reach, "models": models}


def _rung(label: str, kind: str, mean: float, interval: Sequence[float] | None = None) -> dict[str, Any]:
    low, high = interval or (mean, mean)
    return {"label": label, "kind": kind, "mean": mean, "low": low, "high": high, "interval": interval}


def _spec(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """Settings all evaluations share, and for each what is its own."""
    flat = [dict(_flatten({"model": e["model"], "metric": e["integrity"]["metric"], **e["spec"]})) for e in evaluations]
    shared = {key: value for key, value in flat[0].items() if all(other.get(key) == value for other in flat)}
    own = [
        (evaluation["name"], {key: value for key, value in settings.items() if key not in shared})
        for evaluation, settings in zip(evaluations, flat, strict=True)
    ]
    return {"shared": shared, "own": [(name, settings) for name, settings in own if settings]}


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, str(value)


def _check_evaluation(evaluation: Evaluation) -> None:
    name = evaluation.get("name", "without a name")
    missing = [
        key for key in ("name", "method", "concept", "model", "spec", "groups", *_SCHEMA) if key not in evaluation
    ]
    for part, keys in _SCHEMA.items():
        content = evaluation.get(part)
        if content is not None:
            missing += [f"{part}.{key}" for key in keys if key not in content]
            numbers = [n for key in keys if key in content for n in np.ravel(content[key]) if isinstance(n, float)]
            if not np.isfinite(numbers).all():
                raise UserError(f"evaluation {name!r} holds NaN or infinity in {part!r}: evaluate the model again")
        elif part in ("integrity", "controls") and part in evaluation:
            missing.append(part)
    if missing:
        raise UserError(f"evaluation {name!r} lacks {', '.join(missing)}: pass the content of an evaluation.json")


def _check_gallery(gallery: Gallery) -> None:
    for row in gallery.rows:
        where = f"gallery {gallery.title!r}, row {row.label!r}"
        if len(row.images) != len(gallery.columns):
            raise UserError(f"{where}: got {len(row.images)} images for {len(gallery.columns)} columns")
        if row.captions and len(row.captions) != len(row.images):
            raise UserError(f"{where}: got {len(row.captions)} captions for {len(row.images)} images")
        for pixels in row.images:
            _check_image(pixels, where)


# ---- images --------------------------------------------------------------------------------------------------------


def _check_image(pixels: ImageArray, where: str) -> None:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise UserError(f"{where}: images must be (H, W, 3) uint8, got {pixels.shape} {pixels.dtype}")


def _data_uri(pixels: ImageArray) -> str:
    image = Image.fromarray(pixels)
    if max(image.size) > _MAX_PIXELS:
        image = _fit(image, _MAX_PIXELS)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _fit(image: Image.Image, side: int) -> Image.Image:
    """Scaled so that the longer side is ``side``; small images keep their pixels visible instead of being blurred."""
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)


def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A font that comes with matplotlib, so that labels look alike on every machine."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _wrap(label: str, font: ImageFont.FreeTypeFont, width: float, lines: int = 4) -> list[str]:
    """``label`` in at most ``lines`` lines of ``width`` pixels; what does not fit is cut off visibly."""
    wrapped = [""]
    for word in label.split() or [""]:
        longer = f"{wrapped[-1]} {word}".strip()
        if not wrapped[-1] or font.getlength(longer) <= width:
            wrapped[-1] = longer
        else:
            wrapped.append(word)
    if len(wrapped) > lines:
        wrapped = [*wrapped[: lines - 1], " ".join(wrapped[lines - 1 :])]
    return [_shorten(line, font, width) for line in wrapped]


def _shorten(line: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line.rstrip() + "…"
