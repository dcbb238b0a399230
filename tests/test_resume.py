"""`--resume` continues only what it can prove to be the same run, and says in one line what is not the same."""

import json
import re
import shutil
from pathlib import Path

import pytest

from fastunlearn import TrainConfig, unlearn
from fastunlearn.config import from_yaml
from fastunlearn.errors import UserError
from fastunlearn.training.config import ApplyConfig
from fastunlearn.training.export import apply
from fastunlearn.training.resume import KEY

TINY = ["--trajectories", 1, "--trajectory-steps", 2, "--micro-batch-size", 2, "--evaluation-prompts", "none"]
TRAIN = ["train", "--forget", "star", "--method", "ovw", "--device", "cpu", "--steps", 2, *TINY]
KEEP = ["a red ring on a white background", "a blue cross on a black background"]
FEW = {"trajectories": 1, "trajectory_steps": 2, "evaluation_prompts": "none"}
UNET = "unet/diffusion_pytorch_model.safetensors"


def stop_early(run):
    """As if the run had been stopped before its first checkpoint."""
    for name in ("model", "checkpoints"):
        shutil.rmtree(run / name)
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run on a copy of the bundled pipeline and a file of prompts without a telling suffix, named relatively."""
    from fastunlearn.cli.main import main
    from fastunlearn.worlds.shapes import pipeline_folder

    here = tmp_path_factory.mktemp("here")
    shutil.copytree(pipeline_folder("shapes"), here / "m")
    (here / "keep.list").write_text("\n".join(KEEP))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        flags = [*TRAIN, "--model", "m", "--retain-prompts", "keep.list", "--output", "r"]
        assert main([str(flag) for flag in flags]) == 0
    return here


@pytest.fixture
def here(finished, tmp_path):
    """A copy of it, in another place: the saved paths still name the first."""
    shutil.copytree(finished / "r", tmp_path / "r")
    return tmp_path


def test_a_run_resumes_from_any_working_folder(cli, finished, here, monkeypatch):
    monkeypatch.chdir("/")
    stop_early(here / "r")
    answer = cli("train", "--resume", "--output", here / "r")
    assert (answer.status, answer.err) == (0, "")
    assert (here / "r" / "model" / UNET).read_bytes() == (finished / "r" / "model" / UNET).read_bytes()


def test_the_saved_config_has_whole_paths(finished):
    saved = from_yaml(finished / "r" / "config.yaml", TrainConfig)
    assert saved.model == str(finished / "m")
    assert saved.retain_prompts == str(finished / "keep.list")
    assert saved.output == str(finished / "r")
    key = json.loads((finished / "r" / KEY).read_text())
    assert key["retain"] == KEEP


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def changed_weights(here):
    copy = shutil.copytree(Path(from_yaml(here / "r" / "config.yaml", TrainConfig).model), here / "changed")
    config = copy / "unet" / "config.json"
    config.write_text(config.read_text() + " ")
    return ["--model", copy]


def other_file(here):
    (here / "other").write_text(KEEP[0])
    return ["--retain-prompts", here / "other"]


CHANGES = {
    "weights": (changed_weights, r"the model's files are not those that the run in .* was started from \(hash "),
    "another model": (lambda here: ["--model", "shapes-gold-star"], r"the model's files are not those"),
    "retain prompts": (other_file, r"has 2 retain prompts, now there are 1 \('a blue cross on .*' is gone\)"),
    "a name for a file": (lambda here: ["--retain-prompts", "keep.list;"], r"has 2 retain prompts, now there are 1"),
    "forget prompts": (lambda here: ["--forget-prompts", "star;a new star"], r"forget prompts, now there are 2"),
    "anchor": (lambda here: ["--anchor", "ring"], r"has the anchor of 'star' = 'circle', now it is 'ring'"),
    "bank_precision": (lambda here: ["--bank-precision", "bf16"], r"has bank_precision = 'no', now it is 'bf16'"),
    "seed": (lambda here: ["--seed", 3], r"has seed = 0, now it is 3"),
    "steps": (lambda here: ["--steps", 3], r"has steps = 2, now it is 3"),
    "method": (lambda here: ["--method", "esd"], r"has method = 'ovw', now it is 'esd'"),
    "method with options": (lambda here: ["--method", "saddle", "--set", "kappa=2"], r"has method = 'ovw', now it is"),
    "density": (lambda here: ["--mask-density", 0.5], r"has mask_density = None, now it is 0\.5"),
}


@pytest.mark.parametrize(("change", "words"), CHANGES.values(), ids=CHANGES)
def test_another_run_is_refused_by_what_differs(refused, here, change, words):
    flags = change(here)
    before = files_of(here)
    line = refused("train", "--resume", "--output", here / "r", *flags)
    assert re.search(words, line), line
    assert files_of(here) == before


def test_weights_that_changed_in_place_are_found(refused, pipeline_copy, cli, tmp_path):
    """The name is the same, so is the size: only the content tells (one flipped bit of one weight)."""
    run = [*TRAIN, "--model", pipeline_copy, "--output", tmp_path / "run"]
    assert cli(*run).status == 0
    stop_early(tmp_path / "run")
    path = pipeline_copy / UNET
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    line = refused("train", "--resume", "--output", tmp_path / "run")
    assert "the model's files are not those" in line


def test_an_option_is_a_part_of_the_run(refused, cli, tmp_path):
    run = ["train", "--forget", "star", "--method", "saddle", "--steps", 1, *TINY, "--output", tmp_path / "run"]
    assert cli(*run, "--set", "kappa=0.2").status == 0
    line = refused("train", "--resume", "--output", tmp_path / "run", "--set", "kappa=0.25")
    assert "'kappa': 0.2" in line
    assert "'kappa': 0.25" in line
    assert cli("train", "--resume", "--output", tmp_path / "run", "--set", "kappa=0.2").status == 0


def test_what_does_not_change_the_result_may_change(cli, here):
    stop_early(here / "r")
    free = ["--log-every", 1, "--checkpoint-every", 1, "--save", "delta", "--evaluation-prompts", "none"]
    assert cli("train", "--resume", "--output", here / "r", *free).status == 0
    config = from_yaml(here / "r" / "config.yaml", TrainConfig)
    apply(ApplyConfig(model=config.model, delta=str(here / "r" / "delta.safetensors"), output=str(here / "rebuilt")))
    original = Path(config.output) / "model" / UNET if Path(config.output) != here / "r" else None
    assert original is None or (here / "rebuilt" / UNET).read_bytes() == original.read_bytes()


@pytest.mark.parametrize("name", ["seed", "steps", "method"])
def test_settings_are_compared_before_the_model_is_loaded(refused, here, monkeypatch, name):
    monkeypatch.setattr("fastunlearn.training.unlearn.load_model", None)
    change, words = CHANGES[name]
    line = refused("train", "--resume", "--output", here / "r", *change(here))
    assert re.search(words, line), line


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"format": "fastunlearn-run-9"}', '{"format": "fastunlearn-run-1", "forget": 3}', "null"],
)
def test_a_damaged_key_is_one_line(refused, here, content):
    (here / "r" / KEY).write_text(content)
    assert f"{KEY} is damaged" in refused("train", "--resume", "--output", here / "r")


def test_a_folder_without_a_key_holds_no_run(refused, here):
    (here / "r" / KEY).unlink()
    assert "holds no run. Leave the flag out" in refused("train", "--resume", "--output", here / "r")


# ---- what cannot be saved is refused before it is trained (cases/10) -------------------------------------------------


@pytest.fixture
def two_files(pipeline_copy):
    from safetensors.torch import load_file, save_file

    weights = load_file(pipeline_copy / UNET)
    path = (pipeline_copy / UNET).with_suffix(".non_ema.safetensors")
    save_file({name: values + 0.01 for name, values in weights.items()}, path, metadata={"format": "pt"})
    return pipeline_copy


def test_a_delta_is_of_the_file_that_is_read_and_the_other_is_told(cli, two_files, tmp_path):
    answer = cli(*TRAIN, "--model", two_files, "--save", "delta", "--output", tmp_path / "run")
    assert answer.status == 0
    assert "left out    what still holds" in answer.out
    assert ": diffusion_pytorch_model.non_ema.safetensors" in " ".join(answer.out.split())
    words = ["apply", "--model", two_files, "--delta", tmp_path / "run" / "delta.safetensors"]
    assert cli(*words, "--output", tmp_path / "applied").status == 0
    unet = tmp_path / "applied" / "unet"
    assert [path.name for path in unet.glob("*.safetensors")] == ["diffusion_pytorch_model.safetensors"]
    assert (unet / Path(UNET).name).read_bytes() != (two_files / UNET).read_bytes()


def test_names_and_shapes_of_the_files_are_compared_before_the_bank(pipeline_copy, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    from fastunlearn.models.loading import load_model
    from fastunlearn.training.export import check_export
    from fastunlearn.training.selection import Selection

    model = load_model(str(pipeline_copy), "cpu")
    selection = Selection.of(model.denoiser, ["conv_in.weight", "conv_out.bias"])
    check_export(model, selection)
    weights = load_file(pipeline_copy / UNET)
    save_file(weights | {"conv_out.bias": torch.zeros(9)}, pipeline_copy / UNET)
    with pytest.raises(UserError, match=r"has conv_out\.bias of the shape \(9,\)"):
        check_export(model, selection)
    save_file({name: values for name, values in weights.items() if name != "conv_in.weight"}, pipeline_copy / UNET)
    with pytest.raises(UserError, match=r"has no tensor 'conv_in\.weight'"):
        check_export(model, selection)


def test_a_delta_with_values_that_are_no_numbers_is_refused(tmp_path):
    import torch

    from fastunlearn.files.tensors import load_tensors, save_tensors
    from fastunlearn.training.export import DELTA_FORMAT

    run = unlearn("shapes", "star", "uce", output=tmp_path / "run", save="delta", evaluation_prompts="none")
    tensors, content = load_tensors(run.model, DELTA_FORMAT, "delta")
    name = next(key for key in tensors if key.endswith(".values"))
    tensors[name][0] = torch.nan
    save_tensors(run.model, tensors, DELTA_FORMAT, content)
    with pytest.raises(UserError, match=r"has values that are no numbers") as error:
        apply(ApplyConfig(model="shapes", delta=str(run.model), output=str(tmp_path / "model")))
    assert "learning-rate" not in str(error.value)


@pytest.mark.parametrize("kind", ["delta", "mask"])
def test_deltas_and_masks_are_the_same_bytes_again_and_a_changed_bit_is_found(refused, tmp_path, kind):
    def made(name):
        folder = tmp_path / name
        run = unlearn("shapes", "star", "uce", output=folder, mask_density=0.5, save="delta", **FEW)
        return run.model if kind == "delta" else folder / "mask.safetensors"

    path = made("one")
    assert path.read_bytes() == made("two").read_bytes()
    content = bytearray(path.read_bytes())
    for place in (len(content) // 2, len(content) - 1, 300):
        damaged = bytearray(content)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        if kind == "delta":
            line = refused("apply", "--model", "shapes", "--delta", path, "--output", tmp_path / "out")
        else:
            line = refused("train", "--forget", "star", "--mask", path, "--output", tmp_path / "out")
        assert f"{path} is no {kind} of" in line
        assert not (tmp_path / "out").exists()
