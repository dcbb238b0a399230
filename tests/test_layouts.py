"""The folders that users have: each is read whole, trained on, exported and rebuilt, and stays what it was."""

import json
import os
import shutil

import pytest
import torch
from against_diffusers import assert_same, drawn_by, images_of
from safetensors.torch import load_file
from tiny_models import build, ddim, diffusers, sd1

from fastunlearn import unlearn
from fastunlearn.errors import UserError
from fastunlearn.files.weights import snapshot_of
from fastunlearn.models.loading import load_model

UNET = "unet/diffusion_pytorch_model"
PICKLE = b"\x80\x04pickled, and never read."


def saved(folder, seed=0, **options):
    pipeline = build(lambda: sd1(ddim()), seed)
    if options.get("variant") == "fp16":
        pipeline.to(torch.float16)
    pipeline.save_pretrained(folder, **options)
    return folder


def usual(root):
    return saved(root / "model")


def variant(root):
    return saved(root / "model", variant="fp16")


def shards(root):
    return saved(root / "model", max_shard_size="200KB")


def variant_in_shards(root):
    return saved(root / "model", variant="fp16", max_shard_size="100KB")


def full_clone(root):
    """As the hub's page of Stable Diffusion 1.5 lists it."""
    folder = saved(root / "model")
    saved(folder, variant="fp16")
    saved(folder, seed=1, variant="non_ema")
    names = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
    for part, name in names.items():
        for mark in ("", ".fp16", ".non_ema"):
            (folder / part / f"{name}{mark}.bin").write_bytes(PICKLE)
    for name in ("v1-5-pruned.ckpt", "v1-5-pruned.safetensors", "README.md"):
        (folder / name).write_bytes(PICKLE)
    return folder


def cache_root(root, *, snapshot=False, main=True):
    """Files by their hashes, and a snapshot of links to them."""
    name, revision = "models--somebody--model", "0123abcd"
    place = root / name / "snapshots" / revision
    (root / name / "blobs").mkdir(parents=True)
    whole = saved(root / "whole")
    for number, file in enumerate(sorted(path for path in whole.rglob("*") if path.is_file())):
        link = place / file.relative_to(whole)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, root / name / "blobs" / f"{number:064x}")
        link.symlink_to(os.path.relpath(root / name / "blobs" / f"{number:064x}", link.parent))
    if main:
        (root / name / "refs").mkdir()
        (root / name / "refs" / "main").write_text(revision)
    return place if snapshot else root / name


LAYOUTS = {
    "usual": (usual, {}, {}),
    "variant": (variant, {}, {"variant": "fp16"}),
    "shards": (shards, {}, {}),
    "variant in shards": (variant_in_shards, {}, {"variant": "fp16"}),
    "full clone": (full_clone, {}, {}),
    "full clone, variant": (full_clone, {"variant": "fp16"}, {"variant": "fp16"}),
    "full clone, without the moving average": (full_clone, {"variant": "non_ema"}, {"variant": "non_ema"}),
    "snapshot of the hub's cache": (lambda root: cache_root(root, snapshot=True), {}, {}),
    "root of the hub's cache": (cache_root, {}, {}),
}


def files_in(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tensors_of(files, folder):
    """All tensors of these files of a folder."""
    return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}


FAST = ("variant in shards", "full clone", "root of the hub's cache")
CASES = [pytest.param(*row, id=name, marks=[] if name in FAST else pytest.mark.slow) for name, row in LAYOUTS.items()]


@pytest.mark.parametrize(("make", "asked", "options"), CASES)
def test_a_layout_is_trained_on_and_exported_whole(tmp_path, cli, make, asked, options):
    given = make(tmp_path)
    before = files_in(given)
    source = snapshot_of(given)
    settings = {"trajectories": 1, "trajectory_steps": 2, "steps": 1, "learning_rate": 1e-2, "device": "cpu"}
    settings |= {"evaluation_prompts": "none", **asked}
    unlearn(str(given), "Van Gogh", "esd", output=tmp_path / "run", **settings)
    assert files_in(given) == before, "what was given stays what it was"

    made = tmp_path / "run" / "model"
    old, new = files_in(source), files_in(made)
    mark = f".{options['variant']}" if options else ""
    read = {name for name in new if name.startswith("unet/") and name.endswith(".safetensors")}
    assert read, "the weights that were read"
    assert all(mark in name if mark else ".fp16" not in name and ".non_ema" not in name for name in read)
    assert not [name for name in new if new[name] == PICKLE]
    changed = {name for name in new if new[name] != old[name]}
    assert changed <= read
    trained, original = tensors_of(read, made), tensors_of(read, source)
    moved = {name for name in trained if not torch.equal(trained[name], original[name])}
    assert moved
    assert all("attn2" in name for name in moved)

    pipeline = diffusers.DiffusionPipeline.from_pretrained(made, torch_dtype=torch.float32, **options)
    assert_same(images_of(load_model(str(made), "cpu")), drawn_by(pipeline))

    unlearn(str(given), "Van Gogh", "esd", output=tmp_path / "small", save="delta", **settings)
    words = ["apply", "--model", given, "--delta", tmp_path / "small" / "delta.safetensors"]
    assert cli(*words, "--output", tmp_path / "applied").status == 0
    applied = {name: content for name, content in files_in(tmp_path / "applied").items() if not name.startswith(".")}
    assert applied == new


def test_weights_that_still_hold_the_concept_are_not_handed_on(tmp_path):
    """Else who loads the run in half precision would load the model before it was unlearned."""
    unlearn(
        str(full_clone(tmp_path)),
        "Van Gogh",
        "esd",
        output=tmp_path / "run",
        **{"trajectories": 1, "trajectory_steps": 2, "steps": 1, "evaluation_prompts": "none", "device": "cpu"},
    )
    made = tmp_path / "run" / "model"
    assert [path.name for path in (made / "unet").glob("*.safetensors")] == ["diffusion_pytorch_model.safetensors"]
    assert len(list((made / "vae").glob("*.safetensors"))) == 3, "the other parts are as they were"


# ---- the hub's cache -------------------------------------------------------------------------------------------------


def two_snapshots(root):
    folder = cache_root(root, main=False)
    (folder / "snapshots" / "ffff").mkdir()
    return folder


def main_says(text):
    def make(root):
        folder = cache_root(root)
        (folder / "refs" / "main").write_text(text)
        return folder

    return make


def emptied(root):
    folder = cache_root(root, main=False)
    shutil.rmtree(folder / "snapshots" / "0123abcd")
    return folder


ROOTS = {
    "two snapshots": (two_snapshots, "holds 2 snapshots and no refs/main to choose"),
    "no snapshot": (emptied, "holds no snapshot"),
    "a revision that is not there": (main_says("beef"), "names the snapshot 'beef', which .* does not have"),
    "a way out": (main_says("../../whole"), "names the snapshot '../../whole'"),
    "an empty name": (main_says(""), "names the snapshot ''"),
}


@pytest.mark.parametrize(("make", "said"), ROOTS.values(), ids=ROOTS)
def test_a_root_of_the_cache_that_does_not_say_which_is_one_line(tmp_path, make, said):
    with pytest.raises(UserError, match=said) as error:
        load_model(str(make(tmp_path)), "cpu")
    assert len(str(error.value).splitlines()) == 1


def test_the_only_snapshot_needs_no_name(tmp_path):
    folder = cache_root(tmp_path, main=False)
    assert snapshot_of(folder) == folder / "snapshots" / "0123abcd"
    assert snapshot_of(tmp_path) == tmp_path


def test_a_delta_says_which_weights_it_is_of(tmp_path):
    from fastunlearn.files.tensors import load_tensors
    from fastunlearn.training.export import DELTA_FORMAT

    folder = full_clone(tmp_path)
    settings = {"trajectories": 1, "trajectory_steps": 2, "steps": 1, "evaluation_prompts": "none", "device": "cpu"}
    for name in ("fp16", None):
        run = tmp_path / f"run-{name}"
        unlearn(str(folder), "Van Gogh", "esd", output=run, save="delta", variant=name, **settings)
        _, content = load_tensors(run / "delta.safetensors", DELTA_FORMAT, "delta")
        assert content.get("variant") == name


def test_a_variant_of_a_run_is_found_again(tmp_path, cli):
    """A run that was made of half precision has nothing else."""
    folder = full_clone(tmp_path)
    settings = {"trajectories": 1, "trajectory_steps": 2, "steps": 1, "evaluation_prompts": "none", "device": "cpu"}
    unlearn(str(folder), "Van Gogh", "esd", output=tmp_path / "run", variant="fp16", **settings)
    words = ["evaluate", "--original", folder, "--unlearned", tmp_path / "run", "--variant", "fp16", "--device", "cpu"]
    words += ["--prompts", "a ring;a cross", "--num-inference-steps", "1", "--batch-size", "2", "--control-pairs", "1"]
    assert cli(*words, "--metric", "shapes", "--output", tmp_path / "evaluation").status == 0
    spec = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())["spec"]
    assert spec["hashes"]["original"] != spec["hashes"]["unlearned"]
