"""What a hostile file can do: nothing but be refused.  Each input is well-formed and has the right checksums."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastunlearn.errors import UserError
from fastunlearn.files.tensors import load_tensors, save_tensors
from fastunlearn.files.weights import hash_pipeline, pipeline_files
from fastunlearn.training.export import DELTA_FORMAT, copy_pipeline
from fastunlearn.worlds.shapes import pipeline_folder

UNET = "unet/diffusion_pytorch_model.safetensors"
ORIGINAL = pipeline_folder("shapes")


@pytest.fixture(scope="module")
def delta():
    """The content of an honest delta of one tensor."""
    name = min(load_file(ORIGINAL / UNET))
    shape = list(load_file(ORIGINAL / UNET)[name].shape)
    tensors = {f"{name}.values": torch.zeros(3), f"{name}.indices": torch.tensor([0, 1, 2], dtype=torch.int32)}
    return name, tensors, {"original": hash_pipeline(ORIGINAL), "part": "unet", "shapes": {name: shape}}


def write(folder, delta, tensors=None, **changes):
    _, own, content = delta
    save_tensors(folder / "x.safetensors", own if tensors is None else tensors, DELTA_FORMAT, content | changes)
    return folder / "x.safetensors"


def test_the_honest_one_is_applied(delta, cli, tmp_path):
    path = write(tmp_path, delta)
    assert cli("apply", "--model", "shapes", "--delta", path, "--output", tmp_path / "out").status == 0
    assert load_file(tmp_path / "out" / UNET)[delta[0]].view(-1)[:3].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "part", ["../victim/unet", "..", ".", "", "/", "unet/..", "unet/../../victim/unet", "{victim}/unet"]
)
def test_a_delta_writes_to_no_folder_but_the_models(part, delta, refused, tmp_path):
    victim = Path(shutil.copytree(ORIGINAL, tmp_path / "victim"))
    before = (victim / UNET).read_bytes()
    path = write(tmp_path, delta, part=part.format(victim=victim))
    line = refused("apply", "--model", "shapes", "--delta", path, "--output", tmp_path / "out")
    assert "is for the part" in line
    assert (victim / UNET).read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["victim", "x.safetensors"]


LIES = {
    "no part": ({"part": None}, None),
    "a part that is a list": ({"part": ["unet"]}, None),
    "shapes that are a text": ({"shapes": "x"}, None),
    "a shape of another tensor": ({"shapes": {"NAME": [3]}}, None),
    "a shape below 0": ({"shapes": {"NAME": [-1]}}, None),
    "a shape of 2^60 elements": ({"shapes": {"NAME": [2**30, 2**30]}}, None),
    "a tensor that the model lacks": ({"shapes": {"other": [3]}}, {"other.values": [1.0], "other.indices": [0]}),
    "an index beyond the tensor": ({}, {"NAME.values": [1.0], "NAME.indices": [2**31 - 1]}),
    "more values than elements": ({}, {"NAME.values": [1.0, 2.0], "NAME.indices": [0]}),
    "values that are no numbers": ({}, {"NAME.values": [float("nan")], "NAME.indices": [0]}),
    "no values": ({}, {"NAME.indices": [0]}),
}


@pytest.mark.parametrize(("content", "tensors"), LIES.values(), ids=LIES)
def test_a_delta_that_lies_is_refused_in_one_line(content, tensors, delta, refused, tmp_path):
    name = delta[0]
    content = json.loads(json.dumps(content).replace("NAME", name))
    if tensors is not None:
        kinds = {"values": torch.float32, "indices": torch.int32}
        tensors = {key.replace("NAME", name): value for key, value in tensors.items()}
        tensors = {key: torch.tensor(value, dtype=kinds[key.rsplit(".", 1)[1]]) for key, value in tensors.items()}
    path = write(tmp_path, delta, tensors, **content)
    refused("apply", "--model", "shapes", "--delta", path, "--output", tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("name", ["../../hijack", "/etc", "..", "a/b", "a\\b", "."])
def test_the_parts_of_a_model_are_names_of_folders_in_it(name, tmp_path):
    model = Path(shutil.copytree(ORIGINAL, tmp_path / "deep" / "er" / "model"))
    (tmp_path / "hijack").mkdir()
    (tmp_path / "hijack" / "secret.json").write_text("{}")
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, name: ["diffusers", "DDIMScheduler"]}))
    for use in (pipeline_files, hash_pipeline, lambda source: copy_pipeline(source, tmp_path / "copy")):
        with pytest.raises(UserError, match="no name of a folder in it"):
            use(model)
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("kind", ["file", "folder", "part"])
def test_a_link_that_leads_out_of_a_model_is_never_copied(kind, tmp_path):
    model = Path(shutil.copytree(ORIGINAL, tmp_path / "model"))
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "key.json").write_text('"secret"')
    if kind == "file":
        (model / "unet" / "notes.json").symlink_to(tmp_path / "secrets" / "key.json")
    elif kind == "folder":
        (model / "unet" / "more").symlink_to(tmp_path / "secrets")
    else:
        shutil.rmtree(model / "scheduler")
        (model / "scheduler").symlink_to(tmp_path / "secrets")
    try:
        copy_pipeline(model, tmp_path / "copy")
    except UserError as error:
        assert "outside the model's folder" in str(error)  # noqa: PT017 - or it is left out
    assert not [
        path for path in tmp_path.rglob("copy/**/*") if path.is_file() and "secret" in path.read_text("latin-1")[:99]
    ]


def test_a_model_in_the_hubs_cache_is_made_of_links_to_its_own_blobs(tmp_path):
    repository = tmp_path / "models--x--y"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in ORIGINAL.rglob("*") if path.is_file())):
        place = snapshot / path.relative_to(ORIGINAL)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blobs / str(number))
        place.symlink_to(blobs / str(number))
    assert hash_pipeline(snapshot) == hash_pipeline(ORIGINAL)
    copy_pipeline(snapshot, tmp_path / "copy")
    assert not [path for path in (tmp_path / "copy").rglob("*") if path.is_symlink()]
    assert hash_pipeline(tmp_path / "copy") == hash_pipeline(ORIGINAL)


def test_a_read_only_model_is_copied_as_files_that_can_be_written(tmp_path):
    model = Path(shutil.copytree(ORIGINAL, tmp_path / "model"))
    for path in [*model.rglob("*"), model]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    copy_pipeline(model, tmp_path / "copy")
    modes = {path.stat().st_mode & 0o200 for path in (tmp_path / "copy").rglob("*")}
    assert modes == {0o200}


def test_a_tensor_file_of_another_format_is_no_delta(tmp_path, delta):
    save_tensors(tmp_path / "x", {"a": torch.zeros(1)}, "fastunlearn-mask-2", {})
    with pytest.raises(UserError, match="its format is 'fastunlearn-mask-2'"):
        load_tensors(tmp_path / "x", DELTA_FORMAT, "delta of fastunlearn")
