"""Two folders of images: what is read and refused, pairs, records, intervals, the report, and the command."""

import csv
import dataclasses
import fcntl
import importlib
import json
import os
import re
import shutil
import struct
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from outputs import files_of
from PIL import Image
from toys import names_in

from fastunlearn import EvaluateImagesConfig, evaluate_images
from fastunlearn.errors import UserError
from fastunlearn.evaluation.evaluate_images import _records, summarize_folders
from fastunlearn.evaluation.folder_scores import Scores
from fastunlearn.evaluation.image_pairs import Pair, find_pairs
from fastunlearn.evaluation.judging import Unprompted
from fastunlearn.files.atomic import write_lines
from fastunlearn.files.images import find_images, read_image
from fastunlearn.metrics.base import load_metric
from fastunlearn.metrics.distances import load_perceptual
from fastunlearn.metrics.lpips import PerceptualDistance
from fastunlearn.schema import FoldersEvaluation
from fastunlearn.worlds.shapes import SHAPES_WORLD

COUNT = 7


def pixels(seed: int, size: tuple[int, int] = (64, 64)) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=(*size, 3), dtype=np.uint8)


def save(path: Path, array: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


@pytest.fixture
def folders(tmp_path):
    """``before`` and ``after`` with 7 pairs; the first is unchanged, the last lies in a subfolder."""
    for index in range(COUNT):
        name = f"sub/p{index}.png" if index == COUNT - 1 else f"p{index}.png"
        save(tmp_path / "before" / name, pixels(index))
        changed = pixels(index).copy()
        changed[:8, : 8 * index] = 255
        save(tmp_path / "after" / name, changed)
    return tmp_path


@pytest.fixture
def command(folders, cli):
    def run(*more):
        return cli(
            *("evaluate-images", "--original-images", folders / "before", "--unlearned-images", folders / "after"),
            *("--metric", "shapes", "--output", folders / "out", "--num-workers", 2, *more),
        )

    return run


@pytest.fixture
def rejected(command, folders):
    """Runs the command, which must refuse in one line and leave no output; returns the line."""

    def run(*more):
        answer = command(*more)
        assert answer.status == 2, answer
        assert len(answer.err.splitlines()) == 1, answer.err
        assert not (folders / "out").exists()
        return answer.err

    return run


def result(folder: Path) -> dict:
    return json.loads((folder / "evaluation.json").read_text())


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]


# ---- what it finds ---------------------------------------------------------------------------------------------------


def test_distances_are_those_of_the_images(command, folders):
    answer = command("--batch-size", 3)
    assert answer.status == 0, answer
    found = result(folders / "out")
    lines = records(folders / "out")
    names = [f"p{index}" for index in range(COUNT - 1)] + [f"sub/p{COUNT - 1}"]
    assert [line["file"] for line in lines] == names
    sides = [
        torch.from_numpy(np.stack([np.asarray(Image.open(folders / side / f"{name}.png")) for name in names]))
        for side in ("before", "after")
    ]
    expected = load_perceptual("shapes").distance(*(side.permute(0, 3, 1, 2).contiguous() for side in sides))
    np.testing.assert_allclose([line["distance"] for line in lines], expected.numpy(), atol=1e-6)
    assert lines[0]["distance"] == 0
    integrity = found["integrity"]
    assert integrity["mean"] == pytest.approx(float(expected.mean()), abs=1e-6)
    assert integrity["ci95"][0] < integrity["mean"] < integrity["ci95"][1]
    assert (integrity["n_pairs"], integrity["n_prompts"], integrity["clusters"]) == (COUNT, COUNT, "pairs")
    assert integrity["metric"].startswith("lpips-form/shapes-classifier@")
    assert integrity["unchanged"] == pytest.approx(1 / COUNT)
    assert found["groups"].keys() == {"retain"}
    assert (found["spec"]["width"], found["spec"]["height"]) == (64, 64)
    assert "7 pairs" in answer.out


def test_a_folder_against_itself_is_exactly_zero(folders):
    config = EvaluateImagesConfig(
        original_images=str(folders / "before"),
        unlearned_images=str(folders / "before"),
        output=str(folders / "out"),
        metric="shapes",
    )
    evaluation = evaluate_images(config)
    integrity = evaluation.integrity
    assert (integrity.mean, integrity.ci95, integrity.unchanged) == (0, (0, 0), 1)
    assert evaluation.notes == ()
    assert result(folders / "out") == evaluation.to_dict()
    assert FoldersEvaluation.read(folders / "out" / "evaluation.json") == evaluation


def test_images_of_one_color_are_noted(command, folders):
    """As a safety checker leaves them.  Black, white or any color; on one side alone too."""
    for name, color in (("p1", (0, 0, 0)), ("p3", (255, 255, 255)), ("p5", (7, 99, 8))):
        for side in ("before", "after"):
            save(folders / side / f"{name}.png", np.full((64, 64, 3), color, np.uint8))
    save(folders / "after" / "p2.png", np.zeros((64, 64, 3), np.uint8))
    nearly = np.zeros((64, 64, 3), np.uint8)
    nearly[63, 63] = 1
    save(folders / "after" / "p4.png", nearly)
    answer = command()
    assert answer.status == 0
    both, alone = result(folders / "out")["notes"]
    assert both.startswith("3 of 7 pairs are of one color on both sides")
    assert alone == "1 of 7 image is of one color in the unlearned folder alone: look at them."
    assert f"note: {both}" in answer.out
    assert both in (folders / "out" / "report.html").read_text()


def test_no_interval_of_a_distance_begins_below_zero(command, folders):
    """A t interval would: one pair of seven changed."""
    for index in range(COUNT - 1):
        save(folders / "after" / f"p{index}.png", pixels(index))
    answer = command()
    low, high = result(folders / "out")["integrity"]["ci95"]
    assert low == result(folders / "out")["groups"]["retain"]["ci95"][0] == 0 < high
    assert "-" not in answer.out.split("interval")[-1].split(")")[0]


def test_texts_of_users_are_no_markup(command, folders):
    """Brackets, tags and names of pictures stand in table, page and records as they were written."""
    evil = ["near [/b]", "[red]far[/red]", "[/]", "a [link=x]", ":star: group", "$x^2$", "<b>"]
    rows = [
        [row[0], f"{group} {index // 2}", group]
        for index, (row, group) in enumerate(zip(rows_of(folders), evil, strict=True))
    ]
    answer = command("--prompts", write_prompts(folders, rows))
    assert (answer.status, answer.err) == (0, "")
    for group in evil:
        assert group in answer.out
    assert list(result(folders / "out")["groups"]) == evil
    page = (folders / "out" / "report.html").read_text()
    assert "&lt;b&gt;" in page
    assert "<b>" not in page


def test_workers_and_company_change_no_bit(command, folders):
    """Batches of one fixed size: a pair's distance depends neither on the decoders nor on its neighbours."""
    assert command().status == 0
    together = {line["file"]: line["distance"] for line in records(folders / "out")}
    assert command("--num-workers", 5, "--overwrite").status == 0
    assert {line["file"]: line["distance"] for line in records(folders / "out")} == together
    for name in ("p0", "p2", "p4"):
        for side in ("before", "after"):
            (folders / side / f"{name}.png").unlink()
    assert command("--overwrite").status == 0
    apart = {line["file"]: line["distance"] for line in records(folders / "out")}
    assert apart == {name: together[name] for name in apart}


def test_several_unlearned_folders_are_each_what_they_are_alone(command, cli, folders, monkeypatch):
    """And the original's images pass through the trunk once: N + 1 passes, not 2 N."""
    shutil.copytree(folders / "after", folders / "other")
    for index in range(2, 5):
        save(folders / "other" / f"p{index}.png", pixels(900 + index))
    shutil.copytree(folders / "before", folders / "same")
    alone = {}
    for name in ("after", "other", "same"):
        arguments = ["--original-images", folders / "before", "--unlearned-images", folders / name]
        answer = cli("evaluate-images", *arguments, "--output", folders / f"alone {name}", "--metric", "shapes")
        assert answer.status == 0, answer
        alone[name] = files_of(folders / f"alone {name}")
    passes = []
    original = PerceptualDistance._features
    monkeypatch.setattr(
        PerceptualDistance, "_features", lambda self, images: passes.append(1) or original(self, images)
    )
    answer = command("--also", folders / "other", "--also", folders / "same")
    assert answer.status == 0, answer
    assert len(passes) == 3 + 1  # one batch
    assert answer.out.count("report: ") == 3
    for name, written in (("after", ""), ("other", "other"), ("same", "same")):
        for file in ("pairs.jsonl", "evaluation.json"):
            assert (folders / "out" / written / file).read_bytes() == alone[name][file], (name, file)
    assert command("--also", folders / "other").status == 2
    assert command("--also", folders / "other", "--also", folders / "same", "--overwrite").status == 0


def test_two_further_folders_of_one_name_are_refused(command, folders):
    shutil.copytree(folders / "after", folders / "x" / "other")
    shutil.copytree(folders / "after", folders / "y" / "other")
    answer = command("--also", folders / "x" / "other", "--also", folders / "y" / "other")
    assert answer.status == 2
    assert "called other" in answer.err
    assert answer.err.count("\n") == 1
    assert not (folders / "out").exists()


def test_a_bfloat16_trunk_is_another_metric_and_says_how_far_it_rounds(command, folders):
    assert command().status == 0
    wide = result(folders / "out")
    answer = command("--mixed-precision", "bf16", "--overwrite")
    assert answer.status == 0, answer
    low = result(folders / "out")
    assert low["integrity"]["metric"] == wide["integrity"]["metric"] + "+bf16"
    assert low["integrity"]["mean"] != wide["integrity"]["mean"]
    (note,) = [note for note in low["notes"] if "bfloat16" in note]
    floor = float(re.search(r"average and (\S+) at most", note)[1])
    assert 0 < abs(low["integrity"]["mean"] - wide["integrity"]["mean"]) <= floor
    assert records(folders / "out")[0]["distance"] == 0  # equal images stay equal
    assert note in answer.out


def test_suffixes_may_differ_and_other_files_do_not_disturb(command, folders):
    (folders / "after" / "p1.png").rename(folders / "after" / "p1.tmp")
    save(folders / "after" / "p1.bmp", np.asarray(Image.open(folders / "before" / "p1.png")))
    (folders / "after" / "p1.tmp").unlink()
    (folders / "after" / "notes.txt").write_text("no image")
    (folders / "after" / ".thumbnails").mkdir()
    save(folders / "after" / ".thumbnails" / "x.png", pixels(0))
    assert command().status == 0
    assert next(line for line in records(folders / "out") if line["file"] == "p1")["distance"] == 0


def write_prompts(folders, rows, **options):
    with (folders / "prompts.csv").open("w", encoding=options.get("encoding", "utf-8"), newline="") as stream:
        writer = csv.writer(stream, lineterminator=options.get("lineterminator", "\n"))
        writer.writerows([["file", "prompt", "group"], *rows])
    return folders / "prompts.csv"


def rows_of(folders):
    """Two images per prompt; the group of the last prompt is to be forgotten."""
    names = [f"p{index}.png" for index in range(COUNT - 1)] + [f"sub/p{COUNT - 1}"]
    groups = ["near"] * 4 + ["far"] * 2 + ["forget"]
    return [
        [name, f"prompt é {index // 2}", group] for index, (name, group) in enumerate(zip(names, groups, strict=True))
    ]


def test_prompts_make_clusters_and_groups(command, folders):
    path = write_prompts(folders, rows_of(folders), encoding="utf-8-sig", lineterminator="\r\n")
    assert command("--prompts", path, "--metrics", "clip-score,fid,dreamsim").status == 0
    found, lines = result(folders / "out"), records(folders / "out")
    distances = np.array([line["distance"] for line in lines])
    assert [line["prompt"] for line in lines] == [f"prompt é {index // 2}" for index in range(COUNT)]
    assert (found["integrity"]["n_pairs"], found["integrity"]["n_prompts"]) == (6, 3)
    assert found["integrity"]["clusters"] == "prompts"
    assert found["integrity"]["mean"] == pytest.approx(distances[:6].mean(), abs=1e-6)
    assert {name: group["n_pairs"] for name, group in found["groups"].items()} == {"near": 4, "far": 2, "forget": 1}
    assert found["groups"]["far"]["ci95"] is None
    assert found["groups"]["forget"]["mean"] == pytest.approx(distances[6], abs=1e-6)
    assert found["metrics"].keys() == {"clip-score", "fid", "dreamsim"}
    assert found["metrics"]["fid"]["n_pairs"] == 6
    assert len(lines[0]["clip-score"]) == 2
    assert lines[0]["dreamsim"] == 0
    assert "fid" not in lines[0]
    report = (folders / "out" / "report.html").read_text()
    assert "clip-score" in report
    assert "prompt é 1" in report


EXAMPLE = Path(__file__).parents[1] / "examples" / "plugin" / "brightness_metric.py"


@pytest.fixture
def plug_in(tmp_path, monkeypatch):
    """Another package, installed: its one file, and the entry points that the file's docstring gives."""
    text = EXAMPLE.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40
    site = tmp_path / "site"
    (site / "brightness-1.0.dist-info").mkdir(parents=True)
    (site / EXAMPLE.name).write_text(text)
    entries = [line.strip() for line in text.split('"""')[1].splitlines() if line.startswith("    ")]
    content = "\n".join(entries).replace("project.entry-points.", "").replace('"', "")
    (site / "brightness-1.0.dist-info" / "entry_points.txt").write_text(content + "\n")
    (site / "brightness-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: brightness\nVersion: 1\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(sys.modules, EXAMPLE.stem, raising=False)
    return importlib.import_module(EXAMPLE.stem)


def test_another_packages_metric_and_distance_are_used_by_name(plug_in, command, cli, folders):
    answer = command("--metrics", "brightness,fid", "--metric", "shapes")
    assert answer.status == 0, answer
    found = result(folders / "out")["metrics"]
    assert found.keys() == {"brightness", "fid"}
    assert found["brightness"]["of"] == "pixels"
    assert found["brightness"]["value"] > 0
    assert command("--metric", "pixels", "--overwrite").status == 0
    assert result(folders / "out")["integrity"]["metric"] == "pixels@1"
    listed = cli("info").out
    assert "brightness     mean gray levels gained" in listed
    assert "pixels         mean absolute difference" in listed


def test_metrics_and_distances_are_also_objects(plug_in, folders):
    config = EvaluateImagesConfig(
        original_images=str(folders / "before"), unlearned_images=str(folders / "after"), output=str(folders / "out")
    )
    metrics = [plug_in.BRIGHTNESS.load("cpu", None)]
    found = evaluate_images(config, metric=plug_in.Pixels(), metrics=metrics)
    assert found.integrity.metric == "pixels@1"
    assert found.metrics.keys() == {"brightness"}
    with pytest.raises(UserError, match="unknown metric 'nonsense'"):
        evaluate_images(dataclasses.replace(config, overwrite=True), metric=plug_in.Pixels(), metrics=["nonsense"])
    with pytest.raises(UserError, match="is no perceptual distance, it lacks `metric`"):
        evaluate_images(dataclasses.replace(config, overwrite=True), metric=folders)
    with pytest.raises(UserError, match="belongs to a metric by name"):
        evaluate_images(dataclasses.replace(config, overwrite=True, trunk_weights="x"), metric=plug_in.Pixels())


def test_the_report_is_one_file_that_loads_nothing(command, folders):
    assert command().status == 0
    page = (folders / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 * 4 * 2
    assert not re.search(r"(src|href)=[\"'](?!data:)", page)
    assert "url(" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert page.index("The most changed") < page.index("In the middle") < page.index("The least changed")
    assert sorted(names_in(folders / "out")) == [
        "evaluation.json",
        "pairs.jsonl",
        "report.html",
    ]


def test_lpips_with_trunk_weights_from_a_file(command, folders, random_trunk):
    """The whole way on an LPIPS net, the trunk's weights being random ones from a file."""
    trunk = random_trunk("alex")
    answer = command("--metric", "lpips-alex", "--trunk-weights", trunk)
    assert answer.status == 0, answer
    distance = load_perceptual("lpips-alex", trunk_weights=trunk)
    assert result(folders / "out")["integrity"]["metric"] == distance.metric
    assert records(folders / "out")[0]["distance"] == 0


# ---- images that are converted -------------------------------------------------------------------------------------


def test_grey_palette_and_opaque_alpha_are_converted(tmp_path):
    gray = pixels(0)[..., 0]
    save(tmp_path / "gray.png", gray)
    np.testing.assert_array_equal(read_image(tmp_path / "gray.png").pixels, np.repeat(gray[..., None], 3, axis=2))
    opaque = np.dstack([pixels(1), np.full((64, 64), 255, np.uint8)])
    save(tmp_path / "alpha.png", opaque)
    np.testing.assert_array_equal(read_image(tmp_path / "alpha.png").pixels, pixels(1))
    few = Image.fromarray(pixels(2)).quantize(16)
    few.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read_image(tmp_path / "palette.png").pixels, np.asarray(few.convert("RGB")))
    few.save(tmp_path / "still.gif")
    assert read_image(tmp_path / "still.gif").pixels.shape == (64, 64, 3)
    Image.fromarray(gray > 128).save(tmp_path / "bits.png")
    assert set(np.unique(read_image(tmp_path / "bits.png").pixels)) == {0, 255}


def test_the_orientation_of_exif_is_applied(tmp_path):
    image, exif = Image.fromarray(pixels(0, (16, 32))), Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    result = read_image(tmp_path / "turned.png").pixels
    np.testing.assert_array_equal(result, np.rot90(pixels(0, (16, 32)), -1))


# ---- images that are refused ---------------------------------------------------------------------------------------


def deep_png(color_type: int) -> bytes:
    """A PNG of 16 bits per channel, which Pillow would read as 8 bits without a word."""
    channels = {0: 1, 2: 3, 6: 4}[color_type]

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + bytes(range(64)) * 2 * channels for _ in range(64))
    header = struct.pack(">IIBBBBB", 64, 64, 16, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def broken(path: Path, kind: str) -> Path:
    """Puts an image that must be refused beside ``path``, in its place, and returns where it is."""
    path.unlink()
    if kind.startswith("16 bits"):
        path.write_bytes(deep_png({"gray": 0, "RGB": 2, "RGBA": 6}[kind.split()[-1]]))
    elif kind == "cmyk":
        path = path.with_suffix(".jpg")
        Image.new("CMYK", (64, 64)).save(path)
    elif kind == "float":
        path = path.with_suffix(".tif")
        Image.fromarray(np.zeros((64, 64), np.float32)).save(path)
    elif kind == "transparent":
        save(path, np.dstack([pixels(0), np.full((64, 64), 254, np.uint8)]))
    elif kind == "transparent palette":
        Image.fromarray(pixels(0)).quantize(4).save(path, transparency=0)
    elif kind == "animation":
        path = path.with_suffix(".gif")
        frames = [Image.fromarray(pixels(seed)) for seed in (0, 1)]
        frames[0].save(path, save_all=True, append_images=frames[1:])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("no image")
    elif kind == "truncated":
        save(path, pixels(0))
        path.write_bytes(path.read_bytes()[:-5000])
    elif kind == "damaged":
        save(path, pixels(0))
        content = bytearray(path.read_bytes())
        content[200:260] = bytes(60)
        path.write_bytes(content)
    elif kind == "other size":
        save(path, pixels(0, (64, 32)))
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("16 bits gray", "more than 8 bits per channel"),
        ("16 bits RGB", "more than 8 bits per channel"),
        ("16 bits RGBA", "more than 8 bits per channel"),
        ("float", "more than 8 bits per channel"),
        ("cmyk", "color mode CMYK. Convert it to RGB"),
        ("transparent", "has transparent pixels"),
        ("transparent palette", "has transparent pixels"),
        ("animation", "is an animation"),
        ("empty", "cannot read the image .* (it is empty)"),
        ("text", "cannot read the image .* (its content is no image of a kind that is read)"),
        ("truncated", "cannot read the image"),
        ("damaged", "cannot read the image"),
        ("other size", "has 32 x 64 pixels, the first one 64 x 64"),
    ],
)
def test_a_image_is_refused(rejected, folders, kind, message):
    path = broken(folders / "after" / "p3.png", kind)
    line = rejected()
    assert str(path) in line
    assert re.search(message.replace("(", r"\(").replace(")", r"\)"), line), line


def test_a_image_that_may_not_be_read_is_refused(rejected, folders, monkeypatch):
    real = Path.read_bytes

    def read_bytes(path):
        if path.name == "p3.png":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    line = rejected()
    assert "cannot read the image" in line
    assert "Permission denied" in line


def test_images_too_small_for_the_network_are_refused(folders, refused, random_trunk):
    for side in ("a", "b"):
        for name in ("x", "y"):
            save(folders / side / f"{name}.png", pixels(0, (8, 8)))
    line = refused(
        *("evaluate-images", "--original-images", folders / "a", "--unlearned-images", folders / "b"),
        *("--trunk-weights", random_trunk("alex"), "--output", folders / "out"),
    )
    assert "8 x 8 pixels are too small for lpips/alex" in line
    assert not (folders / "out").exists()


# ---- folders and prompt files that do not fit ------------------------------------------------------------------------


def test_missing_partners_are_counted_with_three_examples(rejected, folders):
    for index in range(4):
        (folders / "after" / f"p{index}.png").unlink()
    (folders / "before" / "p5.png").unlink()
    line = rejected()
    assert "4 in the unlearned folder (p0, p1, p2, ...)" in line
    assert "1 in the original folder (p5)" in line


def test_a_name_with_two_suffixes_is_refused(rejected, folders):
    save(folders / "after" / "p3.jpg", pixels(0))
    line = rejected()
    assert "two images named p3" in line
    assert "p3.jpg" in line
    assert "p3.png" in line


@pytest.mark.parametrize("content", [None, "empty", "text", "file"])
def test_a_folder_without_images_is_refused(rejected, folders, content):
    for path in sorted((folders / "after").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    if content in (None, "file"):
        (folders / "after").rmdir()
    if content == "file":
        (folders / "after").write_text("")
    if content == "text":
        (folders / "after" / "notes.txt").write_text("x")
    assert re.search("is no folder" if content in (None, "file") else "holds no image", rejected())


def test_a_single_pair_is_refused(tmp_path):
    for side in ("before", "after"):
        save(tmp_path / side / "x.png", pixels(0))
    with pytest.raises(ValueError, match="at least 2 pairs"):
        find_pairs(tmp_path / "before", tmp_path / "after")


def test_a_folder_named_like_a_image_is_no_image(tmp_path):
    (tmp_path / "x.png").mkdir()
    save(tmp_path / "x.png" / "y.png", pixels(0))
    assert list(find_images(tmp_path)) == ["x.png/y"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda rows: rows[:-2], "2 are missing in it (p5, sub/p6)"),
        (lambda rows: [*rows, ["nowhere.png", "x", ""]], "1 name no image of the folders (nowhere.png)"),
        (lambda rows: [*rows, rows[1]], "1 are there twice (p1.png)"),
        (lambda rows: [[*row[:2], "forget"] for row in rows], "all images are of a forget group"),
    ],
)
def test_a_prompt_file_that_does_not_fit_is_refused(rejected, folders, damage, message):
    assert message in rejected("--prompts", write_prompts(folders, damage(rows_of(folders))))


def test_a_prompt_file_that_cannot_be_read_is_refused(rejected, folders):
    assert "cannot read the prompt file" in rejected("--prompts", folders / "none.csv")
    (folders / "latin.csv").write_bytes("file,prompt\np0,é\n".encode("latin-1"))
    assert "is not UTF-8 text" in rejected("--prompts", folders / "latin.csv")
    (folders / "columns.csv").write_text("name,prompt\np0,x\n")
    assert "no column named `file`" in rejected("--prompts", folders / "columns.csv")
    (folders / "quote.csv").write_text('file,prompt\np0,"x\n')
    assert "no proper CSV" in rejected("--prompts", folders / "quote.csv")


# ---- settings, disks, neighbours -------------------------------------------------------------------------------------


def test_settings_are_refused(rejected, folders):
    assert "unknown metric 'nonsense'" in rejected("--metrics", "nonsense")
    assert "names a metric twice" in rejected("--metrics", "fid,fid")
    assert "needs the prompts of the images" in rejected("--metrics", "clip-score")
    assert "must be at least 1" in rejected("--batch-size", 0)
    assert "must be at least 1" in rejected("--num-workers", 0)
    assert "leave `--trunk-weights` out" in rejected("--trunk-weights", folders / "x.safetensors")


def test_an_earlier_evaluation_is_not_overwritten_by_accident(command, folders):
    assert command().status == 0
    before = (folders / "out" / "evaluation.json").read_bytes()
    answer = command()
    assert answer.status == 2
    assert "is not empty" in answer.err
    assert (folders / "out" / "evaluation.json").read_bytes() == before
    assert command("--overwrite").status == 0


def test_the_second_of_two_on_one_folder_is_refused(command, folders):
    (folders / "out").mkdir()
    handle = os.open(folders / "out", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        answer = command()
    finally:
        os.close(handle)
    assert answer.status == 2
    assert "another command is writing" in answer.err
    assert not list((folders / "out").iterdir())
    assert command().status == 0


def test_a_full_disk_leaves_nothing_half_written(command, folders, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastunlearn.files.run_folder.os.replace", full)
    answer = command()
    assert answer.status == 2
    assert "the disk is full" in answer.err
    assert not (folders / "out").exists()


def test_a_bug_of_a_decoder_is_not_swallowed(command, folders, monkeypatch):
    def fails(path):
        raise ZeroDivisionError

    monkeypatch.setattr("fastunlearn.evaluation.evaluate_images.read_image", fails)
    answer = command()
    assert answer.status == 1
    assert "ZeroDivisionError" in answer.err


@pytest.mark.slow
def test_a_hundred_thousand_pairs_stay_under_a_gigabyte(tmp_path):
    """All that is kept of them, from the pairs to the written records; features of FID would come on top."""
    count, distance = 100_000, load_perceptual("shapes")
    config = EvaluateImagesConfig(original_images="before", unlearned_images="after", output="out", prompts="p.csv")
    tracemalloc.start()
    pairs = [
        Pair(f"p{index:06}", Path(f"before/p{index:06}.png"), Path(f"after/p{index:06}.png"), f"p{index % 999}", "near")
        for index in range(count)
    ]
    drawn = np.random.default_rng(0).random((count, 1), dtype=np.float32)
    scores = Scores(drawn[:, 0], {"dreamsim": drawn}, ("", ""), (512, 512), np.zeros((2, count), dtype=bool))
    none = Unprompted(None, [pair.prompt for pair in pairs], [], np.ones(count, dtype=bool))
    summary = summarize_folders(pairs, scores, distance, [load_metric("dreamsim", world=SHAPES_WORLD)], config, none)
    write_lines(tmp_path / "pairs.jsonl", _records(pairs, scores, none))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert summary.integrity.n_pairs == count
    assert summary.integrity.n_prompts == 999
    assert len((tmp_path / "pairs.jsonl").read_text().splitlines()) == count
    assert peak < 1e9
