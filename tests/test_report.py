"""The report says in words what the numbers say, escapes what users wrote, and needs nothing but its own file."""

import base64
import copy
import dataclasses
import hashlib
import html.parser
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastunlearn.reports import pages
from fastunlearn.reports.gallery import Gallery, GalleryRow
from fastunlearn.reports.grid import write_grid
from fastunlearn.reports.html import HtmlReport, write_report
from fastunlearn.reports.sentences import percent, percent_range, verdict
from fastunlearn.schema import Evaluation


def evaluation(name="ovw", method="ovw", **changes):
    return Evaluation.from_dict(content(name, method, **changes))


def content(name="ovw", method="ovw", **changes):
    """What a file holds; ``part__key=value`` changes a key of a part."""
    content = {
        "schema": 1,
        "kind": "evaluation",
        "fastunlearn": "0.1.0",
        "name": name,
        "method": method,
        "concept": "star",
        "model": "shapes",
        "integrity": {
            "mean": 0.0247,
            "ci95": [0.0206, 0.0294],
            "ceiling": 0.4127,
            "retention": 0.94,
            "retention_ci95": [0.924, 0.952],
            "n_pairs": 224,
            "n_prompts": 56,
            "metric": "lpips-form/shapes-classifier@0123456789ab",
            "interval": "95 % percentile bootstrap clustered by prompt, 10000 resamples",
            "quantiles": {"q50": 0.01, "q90": 0.05, "q95": 0.08, "q99": 0.2},
            "floor": 0.0,
            "changed": {
                "numeric": {"threshold": 0.0, "source": "q99 of 8 pairs", "share": 0.75, "ci95": [0.7, 0.8]},
                "redrawn": {"threshold": 0.41, "source": "median", "share": 0.01, "ci95": [0.0, 0.03]},
            },
        },
        "groups": {
            "forget": {
                "n_pairs": 40,
                "n_prompts": 40,
                "mean": 0.31,
                "ci95": [0.28, 0.35],
                "quantiles": {"q50": 0.3, "q90": 0.4, "q95": 0.45, "q99": 0.5},
                "shown": 0.0,
                "shown_ci95": [0.0, 0.0876],
                "valid": 0.975,
            },
            "near": {
                "n_pairs": 4,
                "n_prompts": 1,
                "mean": 0.02,
                "ci95": None,
                "quantiles": {"q50": 0.01, "q90": 0.05, "q95": 0.0777, "q99": 0.2},
                "changed": {"numeric": 0.75, "redrawn": 0.0},
                "ceiling": 0.4,
                "retention": 0.95,
                "retention_ci95": None,
            },
        },
        "erasure": {
            "concept": "star",
            "shown": 0.0,
            "shown_ci95": [0.0, 0.0876],
            "shown_original": 1.0,
            "valid": 0.975,
            "valid_original": 1.0,
            "unlearning_accuracy": 1.0,
            "unlearning_accuracy_valid": 0.975,
            "n_images": 40,
        },
        "retain": {
            "n_images": 224,
            "attributes": {
                "species": {"accuracy": 0.9955, "original": 1.0, "agreement": 0.99, "n_asked": 224},
                "mood": {"accuracy": 0.97, "original": 0.98, "agreement": 0.95, "n_asked": 200},
            },
            "agreement": 0.94,
            "valid": 0.93,
            "valid_original": 0.98,
        },
        "judge": {
            "name": "zoo@0123456789ab",
            "threshold": 0.7,
            "valid_threshold": 0.4,
            "attributes": ["species", "mood"],
        },
        "controls": {
            "repeat": 0.0,
            "numeric": {"what": "in batches of 8", "n_pairs": 8, "mean": 0.0, "q99": 0.0, "max": 0.0},
            "precision": {"what": "in bfloat16", "n_pairs": 8, "mean": 0.0003, "q99": 0.0006, "max": 0.0006},
            "placebo": None,
            "redrawn": 0.4127,
            "redrawn_ci95": [0.39, 0.43],
        },
        "spec": {
            "sampler": "DDIMScheduler",
            "steps": 25,
            "guidance_scale": 3.0,
            "dtype": "float32",
            "micro_batch_size": 32,
            "seeds_per_prompt": 4,
            "hashes": {"original": "a" * 64, "unlearned": "b" * 64},
            "versions": {"torch": "2.13.0"},
        },
    }
    for path, value in changes.items():
        part, _, key = path.partition("__")
        if key:
            content[part][key] = value
        else:
            content[part] = value
    return content


def image(seed=0, size=8):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


class Page(html.parser.HTMLParser):
    """What a browser would make of the file: open elements, loads, and the visible text."""

    def __init__(self, markup):
        super().__init__()
        self.open, self.loads, self.tags, self.words, self.scripts = [], [], [], [], []
        self.feed(markup)
        self.close()
        assert not self.open, f"unclosed: {self.open}"
        self.text = " ".join(" ".join(self.words).replace("\xa0", " ").split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [value for key, value in attributes if key in ("src", "href", "srcset", "data", "action")]
        if tag not in ("meta", "img", "br", "line", "circle", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in ("meta", "img", "br", "line", "circle", "rect"):
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.words.append(data)


def page(tmp_path, report):
    write_report(tmp_path / "report.html", report)
    markup = (tmp_path / "report.html").read_text(encoding="utf-8")
    return markup, Page(markup)


def test_verdict_in_plain_words():
    assert verdict(evaluation(), "prompts that no loss has seen").replace("\xa0", " ") == (
        "The model no longer generates “star”: 0 of 40 images show it (before: 40 of 40; 95 % interval now 0 to 9 %); "
        "98 % of them are valid images. "
        "On 56 prompts that no loss has seen it keeps on average 94 % of each image (95 % interval 92 to 95 %), "
        "where 100 % is the same image and 0 % one redrawn from other noise; the species asked for is there in "
        "99.6 % of 224 images (before: 100 %), the mood in 97 % (before: 98 %); the judge sees the same as before in "
        "94 % of the images."
    )


@pytest.mark.parametrize(
    ("share", "claim", "count"),
    [
        (0.05, "hardly ever generates", "2 of 40"),
        (0.075, "sometimes generates", "3 of 40"),
        (0.5, "sometimes generates", "20 of 40"),
        (1.0, "still generates", "40 of 40"),
    ],
)
def test_verdict_follows_the_share(share, claim, count):
    words = verdict(evaluation(erasure__shown=share))
    assert f"The model {claim} “star”: {count} images" in words


def test_verdict_names_breakage_collapse_and_what_was_not_measured():
    broken = verdict(evaluation(erasure__valid=0.4))
    assert "Only 40\xa0% of them are valid images, so part of this is breakage, not forgetting." in broken
    assert "Whether the images are valid was not judged" in verdict(evaluation(erasure__valid=None))
    collapsed = verdict(evaluation(integrity__retention=-0.12, integrity__retention_ci95=[-0.2, -0.05]))
    assert "further from the original's than" in collapsed
    assert "retention −12\xa0%" in collapsed
    unmeasured = verdict(evaluation(erasure=None, retain=None))
    assert "was not measured" in unmeasured
    assert "no longer" not in unmeasured
    assert "species" not in unmeasured
    assert "valid" not in unmeasured


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0 %"),
        (1.0, "100 %"),
        (0.94, "94 %"),
        (0.996, "99.6 %"),
        (0.9996, "99.96 %"),
        (0.004, "0.4 %"),
        (-0.12, "−12 %"),
    ],
)
def test_percent_reads_0_or_100_only_where_it_is(share, text):
    assert percent(share) == text.replace(" ", "\xa0")


def test_percent_range():
    assert percent_range([0.0, 0.0876]) == "0 to 9\xa0%"
    assert percent_range([0.985, 0.9991]) == "98.5 to 99.9\xa0%"


def test_report_holds_the_numbers(tmp_path):
    models = [
        evaluation(
            "esd", "esd", integrity__retention=0.73, integrity__retention_ci95=[0.69, 0.76], integrity__mean=0.1114
        ),
        evaluation("ovw", "ovw", is_reconstruction=True),
        evaluation("placebo", "placebo", integrity__retention=0.999, erasure__shown=1.0),
    ]
    markup, result = page(tmp_path, HtmlReport("Forgetting star", "star", models, notes=["Trained in 41 s."]))
    for expected in (
        "Forgetting star",
        "0 of 40",
        "94.0 % 92.4 to 95.2 %",
        "0.1114",
        "0.4127",
        "Trained in 41 s.",
        "guidance_scale",
        "esd: near 4 (1) 0.0200 0.0777 95.0 % – –",
        "more than rounding (above 0)",
        "75.0 % 70.0 to 80.0 %",
        "a" * 64,
        "q99 0.2000",
        "Counting images with the right species and mood hardly tells these models apart (97.0 to 99.6 %)",
        "images show “star”; 98 % are valid images",
        "Right species Right mood Judged the same as before",
        "100 % → 0 % 0 to 9 % 97.5 % was 100.0 % 99.6 % was 100.0 % 97.0 % was 98.0 % 94.0 % 93.0 % valid",
        "judged by zoo@0123456789ab (shown from a score of 0.7 on, valid from 0.4 on)",
        "esd: forget 40 (40) 0.3100 0.2800 to 0.3500 0.4500 – 0.0 % 0.0 to 8.8 % 97.5 %",
        "ovw keeps 94 % of each image, esd only 73 %",
        "ovw: a reconstruction. The full text of the paper",
        "Running the original twice must give a distance of exactly 0; here it gave 0.",
    ):
        assert expected in result.text
    assert markup.count('<article class="verdict">') == 2, "a control gets no verdict beside real models"
    assert "Control placebo : the same training without the forgetting part" in result.text
    rungs = re.findall(r'aria-label="([^"]*): [^"]*"', markup)
    assert rungs == [
        "same model, run again",
        "in batches of 8",
        "in bfloat16",
        "ovw",
        "placebo",
        "esd",
        "redrawn from other noise",
    ]
    # The ladder is drawn to scale.
    assert f'cx="{100 * 0.1114 / 0.4127:.2f}%"' in markup
    assert 'cx="0.00%"' in markup
    assert 'cx="100.00%"' in markup


def assert_only_our_script(markup, result):
    """The page's policy lets a browser run this text alone, and nothing of it depends on the report."""
    (script,) = result.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'\"" in markup
    assert script == (Path(pages.__file__).parent / "templates" / "script.js").read_text(encoding="utf-8")


def test_what_was_to_go_and_what_was_to_stay_come_before_the_figures(tmp_path):
    rows = [GalleryRow("a circle", [image(1)])]
    galleries = [Gallery(title, "", ["original"], rows) for title in ("to forget", "to keep", "the most changed")]
    markup, _ = page(tmp_path, HtmlReport("Title", "star", [evaluation()], galleries))
    headings = re.findall(r"<h2>(.*?)</h2>", markup)
    order = [headings.index(one) for one in ("to forget", "to keep", "Side by side", "the most changed")]
    assert order == sorted(order)


def test_report_stands_alone(tmp_path):
    gallery = Gallery(
        "Before", "", ["original", "ovw"], [GalleryRow("a circle", [image(1), image(2, 400)], ["", "far"])]
    )
    markup, result = page(tmp_path, HtmlReport("Title", "star", [evaluation()], [gallery]))
    assert len(result.loads) == 2
    assert all(load.startswith("data:image/png;base64,") for load in result.loads)
    assert not {"link", "iframe"} & set(result.tags)
    assert_only_our_script(markup, result)
    assert "http:" not in markup
    assert "https:" not in markup
    assert "url(" not in markup
    assert "prefers-color-scheme: dark" in markup
    assert "width=device-width" in markup
    first, second = (Image.open(io.BytesIO(base64.b64decode(load.partition(",")[2]))) for load in result.loads)
    assert np.array_equal(np.asarray(first), image(1)), "small images are embedded as they are"
    assert second.size == (320, 320)


def test_report_escapes_what_users_wrote(tmp_path):
    evil = '<script>alert("1")</script>&'
    gallery = Gallery(evil, evil, [evil], [GalleryRow(evil, [image()], [evil])])
    one = evaluation(evil, concept=evil, spec__sampler=evil, integrity__metric=evil, judge__name=evil)
    markup, result = page(tmp_path, HtmlReport(evil, evil, [one], [gallery], [evil], evil))
    assert_only_our_script(markup, result)
    assert '<script>alert("1")' not in markup
    assert result.text.count(evil) > 15


def test_report_without_classifier(tmp_path):
    _, result = page(
        tmp_path,
        HtmlReport("Title", "star", [evaluation(method="esd", erasure=None, retain=None, judge=None, groups={})]),
    )
    assert "Whether the model still generates “star” was not measured" in result.text
    assert "94 % of each image kept" in result.text
    assert "reconstruction" not in result.text
    assert "Counting images" not in result.text
    assert "Valid" not in result.text
    assert "Right" not in result.text


def test_report_on_controls_only(tmp_path):
    same = evaluation("identity", "identity", integrity__mean=0.0, integrity__ci95=[0.0, 0.0], integrity__retention=1.0)
    markup, result = page(tmp_path, HtmlReport("Title", "star", [same]))
    assert markup.count('<article class="verdict">') == 1
    assert "identity control" in result.text


def test_ladders_keep_metrics_and_ceilings_apart(tmp_path):
    other = evaluation("b", integrity__metric="lpips/alex@0", controls__redrawn=0.6)
    third = evaluation("c", controls__redrawn=0.5)
    markup, result = page(tmp_path, HtmlReport("Title", "star", [evaluation("a"), other, third]))
    assert markup.count('<div class="ladder">') == 2
    assert "redrawn from other noise (a)" in result.text
    assert "redrawn from other noise (c)" in result.text


def test_histograms_show_each_model_beside_the_redrawn(tmp_path):
    distances = {"ovw": np.array([0.0, 0.1, 0.1, 0.2]), "esd": np.array([0.3, 0.4])}
    report = HtmlReport("T", "star", [evaluation()], distances=distances, redrawn=np.array([0.8, 0.4]))
    markup, result = page(tmp_path, report)
    assert markup.count('<div class="histogram">') == 2
    heights = re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="2.5" height="([\d.]+)" fill="var\(--accent\)"', markup)
    assert heights[:3] == [("0.00", "50.00"), ("12.50", "100.00"), ("25.00", "50.00")]
    assert "0.8000" in result.text
    nothing = HtmlReport("T", "star", [evaluation()], distances={"a": np.zeros(3)}, redrawn=np.zeros(3))
    assert '<div class="histogram">' not in page(tmp_path, nothing)[0]


def test_no_insight_where_intervals_overlap_or_accuracies_differ(tmp_path):
    near = evaluation("near", integrity__retention=0.93, integrity__retention_ci95=[0.91, 0.96])
    fewer = {"species": {"accuracy": 0.8, "original": 1.0, "agreement": 0.8, "n_asked": 224}}
    fewer["mood"] = content()["retain"]["attributes"]["mood"]
    worse = evaluation(
        "worse", integrity__retention=0.5, integrity__retention_ci95=[0.4, 0.6], retain__attributes=fewer
    )
    for other in (near, worse):
        _, result = page(tmp_path, HtmlReport("Title", "star", [evaluation(), other]))
        assert "hardly tells" not in result.text


def test_same_report_same_bytes_and_nothing_else_left(tmp_path):
    report = HtmlReport("Title", "star", [evaluation()], [Gallery("g", "", ["o"], [GalleryRow("r", [image()])])])
    first, _ = page(tmp_path, report)
    second, _ = page(tmp_path, copy.deepcopy(report))
    assert first == second
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "report.html").write_text("old")
    (tmp_path / "grid.png").write_text("old")
    monkeypatch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path / "report.html", HtmlReport("Title", "star", [evaluation()]))
    with pytest.raises(OSError, match="disk full"):
        write_grid(tmp_path / "grid.png", ["a"], ["b"], [[image()]])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"report.html": "old", "grid.png": "old"}


def in_memory(**changes):
    """An evaluation that was never in a file, which would have refused it."""
    one = evaluation()
    return dataclasses.replace(one, integrity=dataclasses.replace(one.integrity, **changes))


@pytest.mark.parametrize(
    ("report", "message"),
    [
        (HtmlReport("t", "star", []), "at least one evaluation"),
        (
            HtmlReport("t", "star", [in_memory(mean=float("nan"))]),
            "'ovw' holds no number: integrity.mean must be a finite",
        ),
        (
            HtmlReport("t", "star", [in_memory(ci95=(0.1, float("inf")))]),
            "'ovw' holds no number: integrity.ci95 must be",
        ),
        (HtmlReport("t", "heart", [evaluation()]), "about 'heart', evaluation 'ovw' about 'star'"),
        (
            HtmlReport("t", "star", [evaluation()], [Gallery("g", "", ["a", "b"], [GalleryRow("r", [image()])])]),
            "gallery 'g', row 'r': got 1 images for 2 columns",
        ),
        (
            HtmlReport(
                "t", "star", [evaluation()], [Gallery("g", "", ["a"], [GalleryRow("r", [image()], ["x", "y"])])]
            ),
            "got 2 captions for 1 images",
        ),
        (
            HtmlReport("t", "star", [evaluation()], [Gallery("g", "", ["a"], [GalleryRow("r", [image() / 255])])]),
            r"must be \(H, W, 3\) uint8",
        ),
    ],
)
def test_bad_reports_are_refused(tmp_path, report, message):
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path / "report.html", report)
    assert not list(tmp_path.iterdir())


def test_grid_shows_every_image_where_it_belongs(tmp_path):
    flat = [
        [np.full((16, 16, 3), (40 + 60 * row, 50 + 40 * column, 200), np.uint8) for column in range(4)]
        for row in range(2)
    ]
    columns = ["a star", "a very long prompt " * 6, "wordwithoutanyspaceatallbutlong" * 2, ""]
    write_grid(
        tmp_path / "grid.png",
        ["before", "after"],
        columns,
        flat,
        groups=["forget", "forget", "retain", "retain"],
        title="T",
        cell=64,
    )
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    boxes = {}
    for row in range(2):
        for column in range(4):
            ys, xs = np.nonzero((pixels == flat[row][column][0, 0]).all(axis=2))
            assert len(ys) == 64 * 64, "whole, and nothing drawn over it"
            boxes[row, column] = (ys.min(), xs.min())
    assert boxes[0, 0][0] == boxes[0, 3][0] < boxes[1, 0][0]
    lefts = [boxes[0, column][1] for column in range(4)]
    assert lefts == sorted(lefts) == [boxes[1, column][1] for column in range(4)]
    assert lefts[2] - lefts[1] > lefts[1] - lefts[0] == lefts[3] - lefts[2], "groups stand apart"
    assert (pixels[: boxes[0, 0][0]] < 128).any(), "column labels"
    assert (pixels[boxes[0, 0][0] :, : lefts[0]] < 128).any(), "row labels"


def test_grid_takes_images_of_any_shape(tmp_path):
    write_grid(tmp_path / "grid.png", ["r"], ["c"], [[np.full((20, 200, 3), (9, 200, 9), np.uint8)]], cell=100)
    green = (np.asarray(Image.open(tmp_path / "grid.png")) == (9, 200, 9)).all(axis=2)
    assert green.sum() == 100 * 10
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([], ["c"], []), {}, "needs rows, columns"),
        ((["r"], ["c"], [[image()]]), {"cell": 4}, "cell >= 16"),
        ((["r"], ["c"], [[image(), image()]]), {}, "1 rows and 1 columns"),
        ((["r"], ["c"], [[image()]]), {"groups": ["a", "b"]}, "got 2 names for 1 columns"),
        ((["r"], ["c"], [[image()[:, :, 0]]]), {}, r"must be \(H, W, 3\) uint8"),
    ],
)
def test_bad_grids_are_refused(tmp_path, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        write_grid(tmp_path / "grid.png", *arguments, **options)
    assert not list(tmp_path.iterdir())
