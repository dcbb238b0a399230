"""Folders as users have them: what is read of them, and what is refused before anything is loaded."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build, ddim, diffusers, safety_checker, sd1, sdxl

from fastunlearn.errors import UserError, explain, is_out_of_memory
from fastunlearn.files.weights import find_variant, weight_files
from fastunlearn.models import loading
from fastunlearn.models.base import Model
from fastunlearn.models.loading import load_model

UNET = "unet/diffusion_pytorch_model"


@pytest.fixture
def folder(tmp_path):
    build(sd1).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def states_of(folder, **options):
    model = load_model(str(folder), "cpu", **options)
    assert isinstance(model, Model)
    return model, {name: p.clone() for name, p in model.denoiser.named_parameters()}


def save(folder, make=sd1, seed=0, **options):
    pipeline = build(make, seed)
    if options.get("variant") == "fp16":
        pipeline.to(torch.float16)
    pipeline.save_pretrained(folder, **options)
    return pipeline.unet.state_dict()


# ---- which files are read --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sd1, sdxl])
@pytest.mark.parametrize("size", [None, "200KB"], ids=["whole", "shards"])
@pytest.mark.parametrize("variant", [None, "fp16", "ema"])
def test_the_weights_are_found_in_whatever_files_they_are(tmp_path, make, size, variant):
    options = {"variant": variant} | ({"max_shard_size": size} if size else {})
    saved = save(tmp_path, make, **{key: value for key, value in options.items() if value})
    model, states = states_of(tmp_path)
    assert model.variant == variant
    assert all(torch.equal(states[name], saved[name].float()) for name in states)
    read = weight_files(tmp_path / "unet", variant)
    assert (len(read) > 1) is bool(size)
    assert {path.suffix for path in read} == {".safetensors"}


def test_the_usual_weights_are_read_where_a_variant_lies_beside(folder):
    usual = save(folder)
    save(folder, seed=1, variant="fp16")
    save(folder, seed=2, variant="non_ema")
    model, states = states_of(folder)
    assert model.variant is None
    assert all(torch.equal(states[name], usual[name]) for name in states)


def test_a_variant_can_be_asked_for(folder):
    other = save(folder, seed=1, variant="non_ema")
    model, states = states_of(folder, variant="non_ema")
    assert model.variant == "non_ema"
    assert all(torch.equal(states[name], other[name]) for name in states)


def test_a_variant_of_one_part_alone_is_read_with_the_usual_others(folder):
    """As many repositories hold it: the UNet in half precision, the rest as ever."""
    (folder / f"{UNET}.safetensors").rename(folder / f"{UNET}.fp16.safetensors")
    model, _ = states_of(folder)
    assert model.variant == "fp16"


def test_two_variants_and_nothing_else_are_a_question(tmp_path):
    save(tmp_path, variant="fp16")
    save(tmp_path, variant="ema")
    with pytest.raises(UserError, match=r"only as variants: ema, fp16\. Say which one"):
        load_model(str(tmp_path), "cpu")
    assert load_model(str(tmp_path), "cpu", variant="ema").variant == "ema"


def test_a_variant_that_is_not_there_is_refused(folder):
    with pytest.raises(UserError, match=r"cannot load the model.*bf16"):
        load_model(str(folder), "cpu", variant="bf16")
    assert find_variant(folder, ["unet", "vae"]) is None


# ---- pickles ---------------------------------------------------------------------------------------------------------


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def pickle_into(path, canary):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(Canary(canary)))


BESIDE = (
    "vae_decoder/openvino_model.bin",
    "checkpoint-500/pytorch_model.bin",
    "tokenizer/training_args.bin",
    "unet/diffusion_pytorch_model.bin",
    "optimizer.bin",
    "v1-5-pruned.ckpt",
)


@pytest.mark.parametrize("name", BESIDE)
def test_a_pickle_that_nobody_reads_harms_nobody(folder, tmp_path, name):
    pickle_into(folder / name, tmp_path / "ran")
    states_of(folder)
    assert not (tmp_path / "ran").exists()


def test_a_safety_checker_that_is_not_loaded_may_be_pickled(tmp_path):
    folder = tmp_path / "model"
    save(folder, lambda: sd1(with_checker=True))
    for path in (folder / "safety_checker").glob("*.safetensors"):
        path.unlink()
    pickle_into(folder / "safety_checker" / "pytorch_model.bin", tmp_path / "ran")
    model, _ = states_of(folder)
    assert model.pipeline.safety_checker is None
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_a_part_that_is_pickled_alone_is_refused(folder, tmp_path, part):
    for path in (folder / part).glob("*.safetensors"):
        path.unlink()
    pickle_into(folder / part / "pytorch_model.bin", tmp_path / "ran")
    with pytest.raises(UserError, match=rf"{part}/pytorch_model\.bin is pickled"):
        load_model(str(folder), "cpu")
    assert not (tmp_path / "ran").exists()


# ---- an index of shards ----------------------------------------------------------------------------------------------


def redirect(folder, target):
    """The UNet's index sends one tensor to another file."""
    index = folder / f"{UNET}.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][min(content["weight_map"])] = target
    index.write_text(json.dumps(content))


FILES = {
    "a pickle": ("diffusion_pytorch_model.bin", "no safetensors file in its folder"),
    "up": ("../vae/diffusion_pytorch_model.safetensors", "no safetensors file in its folder"),
    "absolute": ("/tmp/weights.safetensors", "no safetensors file in its folder"),
    "below": ("more/weights.safetensors", "no safetensors file in its folder"),
    "no text": (7, "damaged|no safetensors file"),
    "missing": ("diffusion_pytorch_model-00099-of-00099.safetensors", "is missing. Fetch it again"),
}


@pytest.mark.parametrize(("target", "said"), FILES.values(), ids=FILES)
def test_an_index_that_leads_out_of_its_folder_is_refused_before_loading(tmp_path, monkeypatch, target, said):
    folder = tmp_path / "model"
    save(folder, max_shard_size="200KB")
    pickle_into(folder / "unet" / "diffusion_pytorch_model.bin", tmp_path / "ran")
    redirect(folder, target)
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_pretrained", None)  # nothing gets that far
    with pytest.raises(UserError, match=said):
        load_model(str(folder), "cpu")
    assert not (tmp_path / "ran").exists()


def test_an_index_that_is_no_json_is_damaged(tmp_path):
    save(tmp_path, max_shard_size="200KB")
    (tmp_path / f"{UNET}.safetensors.index.json").write_text('{"weight_map": ')
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        load_model(str(tmp_path), "cpu")


def test_an_index_of_pickles_beside_safetensors_is_not_read(folder):
    (folder / "unet" / "diffusion_pytorch_model.bin.index.json").write_text('{"weight_map": {"x": "../x.bin"}}')
    states_of(folder)


def test_a_link_that_leads_out_of_the_model_is_refused(folder, tmp_path):
    (folder / f"{UNET}.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / f"{UNET}.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(UserError, match=r"is a link to .*outside the model's folder"):
        load_model(str(folder), "cpu")


# ---- one clear line --------------------------------------------------------------------------------------------------


def custom(folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": ["mine", "MyPipeline"]}))


def nameless(folder):
    index = json.loads((folder / "model_index.json").read_text())
    del index["_class_name"]
    (folder / "model_index.json").write_text(json.dumps(index))


def lora_injected(folder):
    tensors = load_file(folder / f"{UNET}.safetensors")
    name = next(name for name in tensors if name.endswith("attn2.to_k.weight"))
    stem = name.removesuffix(".weight")
    tensors |= {
        f"{stem}.lora_A.default.weight": torch.zeros(4, 32),
        f"{stem}.lora_B.default.weight": torch.zeros(32, 4),
    }
    tensors[f"{stem}.base_layer.weight"] = tensors.pop(name)
    save_file(tensors, folder / f"{UNET}.safetensors", metadata={"format": "pt"})


def inpainting(folder):
    shutil.rmtree(folder)
    save(folder, lambda: sd1(ddim(), in_channels=9))


def no_size(folder):
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"sample_size": None}))


def refiner(folder):
    shutil.rmtree(folder)
    save(folder, sdxl)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"text_encoder": [None, None], "tokenizer": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))


UNSERVED = {
    "a custom pipeline": (custom, r"is a custom pipeline, \['mine', 'MyPipeline'\], whose code is not run"),
    "no class": (nameless, r"model_index\.json is damaged: its `_class_name` is None"),
    "LoRA layers": (lora_injected, r"holds LoRA layers.*`fuse_lora\(\)`"),
    "inpainting": (inpainting, r"takes 9 channels where an image's latents have 4"),
    "no size": (no_size, r"does not say its resolution"),
    "a refiner": (refiner, r"has no text_encoder, tokenizer, without which"),
}


@pytest.mark.parametrize(("damage", "said"), UNSERVED.values(), ids=UNSERVED)
def test_what_cannot_be_served_is_one_clear_line(folder, damage, said):
    damage(folder)
    with pytest.raises(UserError, match=said) as error:
        load_model(str(folder), "cpu")
    assert len(str(error.value).splitlines()) == 1


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        OSError(12, "Cannot allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("where", ["reading", "loading"])
def test_memory_that_runs_out_is_not_called_damage(folder, monkeypatch, error, where):
    def fail(*arguments, **keywords):
        raise error

    if where == "reading":
        monkeypatch.setattr("safetensors.safe_open", fail)
    else:
        monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_pretrained", fail)
    with pytest.raises(type(error)) as raised:
        load_model(str(folder), "cpu")
    assert raised.value is error
    assert is_out_of_memory(error)
    assert explain(error).startswith("out of memory")


def test_a_safety_checker_has_weights_of_its_own(tmp_path):
    """Else the test of the pickled one could pass by there being none."""
    safety_checker().save_pretrained(tmp_path)
    assert weight_files(tmp_path)


def test_every_name_that_others_import_is_there():
    assert all(hasattr(loading, name) for name in loading.__all__)
