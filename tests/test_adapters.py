"""Low-rank adapters on every family: what they change, what they leave, and that plain diffusers reads them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from outputs import files_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_families import CASES, GUIDANCE, PROMPTS, assert_same, drawn_by, images_of, settings_of
from tiny_models import build, diffusers, saved, sdxl

from fastunlearn import evaluate, unlearn
from fastunlearn.config import to_yaml
from fastunlearn.errors import UserError
from fastunlearn.evaluation.generators import PipelineSource
from fastunlearn.methods import get_method
from fastunlearn.models.adapter_files import FILE, AdapterFile, adapter_for, read_adapter, save_adapter
from fastunlearn.models.adapters import without_adapter
from fastunlearn.models.base import Model
from fastunlearn.models.kohya import kohya_tensors, kohya_values
from fastunlearn.models.loading import load_model
from fastunlearn.models.loras import _believed
from fastunlearn.models.sampling import SamplerSpec
from fastunlearn.training.config import ExportConfig
from fastunlearn.training.formats import export_run
from fastunlearn.training.plan import plan_training
from fastunlearn.training.plan_words import plan_lines

slow = pytest.mark.slow
LONG_TAIL = {"sana", "lumina2", "auraflow", "sd2 zero SNR", "qwen-image", "z-image"}
WEIGHTS = "diffusion_pytorch_model.safetensors"
ADAPTED = {"adapter": "lora", "rank": 3, "learning_rate": 0.05}
#: Family -> the method that trains it here.
FAMILIES = {
    "sd1 DDIM": "salun",
    "sd2 zero SNR": "ovw",
    "sdxl": "esd",
    "sd3.5": "neggrad",
    "flux dev": "esd",
    "pixart sigma": "saddle",
    "sana": "esd",
    "lumina2": "esd",
    "auraflow": "ovw",
    "qwen-image": "esd",
    "z-image": "esd",
}
BASES = {**CASES, "sdxl": lambda: sdxl(width=48)}  # a single file's reader tells its text encoders by their width


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """``folder_of("sdxl")``: the pipeline of a case, saved once."""
    return saved(tmp_path_factory, BASES)


@pytest.fixture
def trained(monkeypatch):
    """``trained(config)``: the model as the training leaves it in memory, its adapter still on it."""
    from fastunlearn.training import unlearn as module

    kept = []
    conclude = module.conclude

    def keep(config, plan, model, *rest):
        kept.append(model)
        return conclude(config, plan, model, *rest)

    monkeypatch.setattr(module, "conclude", keep)
    monkeypatch.setattr(Model, "discard", lambda model: None)  # its weights would go before they are looked at

    def train(config):
        result = unlearn(config)
        return kept[-1], result

    return train


def config_of(folder, output, method="esd", **changes):
    takes_none = {"anchor": None} if get_method(method).anchor == "none" else {}
    return settings_of(folder, output, method, **ADAPTED | takes_none | changes)


def plain(folder):
    return diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)


def with_lora(folder, file):
    """The pipeline as a stranger loads it with the file."""
    pipeline = plain(folder)
    if hasattr(pipeline, "load_lora_weights"):
        pipeline.load_lora_weights(file.parent, weight_name=file.name)
        return pipeline
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    with safe_open(file, "pt") as stream:
        header = json.loads(stream.metadata()["lora_adapter_metadata"])
    values = {name.removeprefix("transformer."): value for name, value in load_file(file).items()}
    own = {key.removeprefix("transformer."): value for key, value in header.items() if key.startswith("transformer.")}
    inject_adapter_in_model(LoraConfig(**own), pipeline.transformer)
    set_peft_model_state_dict(pipeline.transformer, values)
    return pipeline


@pytest.mark.parametrize("case", [pytest.param(case, marks=slow) if case in LONG_TAIL else case for case in FAMILIES])
def test_what_is_trained_is_what_plain_diffusers_reads_and_off_it_is_the_original(folder_of, tmp_path, trained, case):
    folder, run = folder_of(case), tmp_path / "run"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    model, result = trained(config_of(folder, run, FAMILIES[case]))
    assert result.model == run / FILE
    assert not (run / "model").exists()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    original, student = images_of(load_model(str(folder), "cpu")), images_of(model)
    assert not torch.equal(student, original)
    with without_adapter(model):
        assert torch.equal(images_of(model), original), "bit for bit"
    assert torch.equal(images_of(model), student)
    assert_same(drawn_by(with_lora(folder, run / FILE), GUIDANCE, PROMPTS), student)
    loaded = load_model(str(run), "cpu")
    assert_same(images_of(loaded), student)
    assert not any("lora" in name or "base_layer" in name for name in loaded.denoiser.state_dict())
    with safe_open(run / FILE, "pt") as stream:
        header = json.loads(stream.metadata()["lora_adapter_metadata"])
    said = {name: header[f"fastunlearn.{name}"] for name in ("base", "rank", "alpha", "method", "concept")}
    base = result.record.hashes["original"]
    assert said == {"base": base, "rank": 3, "alpha": 3, "method": FAMILIES[case], "concept": "Van Gogh"}
    record = result.record
    assert record.trainable_parameters == sum(value.numel() for value in load_file(run / FILE).values())
    assert (record.adapter.rank, record.adapter.base) == (3, str(folder))
    assert record.hashes["unlearned"] == loaded.hash_files() != record.hashes["original"]


# ---- export ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_of(folder_of, tmp_path_factory):
    """``run_of("sdxl")``: a run with an adapter, trained once."""
    runs = {}

    def make(case, **changes):
        key = (case, *sorted(changes.items()))
        if key not in runs:
            runs[key] = tmp_path_factory.mktemp("run") / "run"
            unlearn(config_of(folder_of(case), runs[key], **changes))
        return runs[key]

    return make


def export(run, form, output):
    return export_run(ExportConfig(run=str(run), format=form, output=str(output)))


@pytest.mark.parametrize("case", ["sdxl", "pixart sigma"])
def test_a_merged_folder_is_what_diffusers_fuses_itself(folder_of, run_of, tmp_path, case):
    run, folder = run_of(case), folder_of(case)
    merged = plain(export(run, "diffusers", tmp_path / "merged"))
    original = plain(folder)
    part = "unet" if hasattr(original, "unet") else "transformer"
    theirs = with_lora(folder, run / FILE)
    network = getattr(theirs, part)
    for layer in network.modules():
        if hasattr(layer, "merge"):
            layer.merge()
    wanted = {name.replace(".base_layer", ""): value for name, value in network.state_dict().items()}
    changed = 0
    for name, value in getattr(merged, part).state_dict().items():
        assert torch.allclose(value, wanted[name], atol=1e-6, rtol=0)
        changed += not torch.equal(value, getattr(original, part).state_dict()[name])
    assert changed == len(load_file(run / FILE)) / 2
    for path in folder.rglob("*"):
        if path.is_file() and part not in path.parts:
            copied = tmp_path / "merged" / path.relative_to(folder)
            assert copied.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("case", ["sd1 DDIM", pytest.param("sd2 zero SNR", marks=slow), "sdxl"])
@pytest.mark.parametrize("trainable", [pytest.param("cross-attention", marks=slow), "all"])
def test_kohyas_names_are_read_back_by_diffusers(folder_of, run_of, tmp_path, case, trainable):
    """``all`` has convolutions, the time embedding and the projections."""
    # Diffusers' reader does not know XL's own embedding under the names that it writes itself.
    everything = "attentions,resnets,conv_in,conv_out,time_embedding" if case == "sdxl" else "all"
    names = everything if trainable == "all" else trainable
    run = run_of(case, trainable=names, rank=2, lora_alpha=3.0)
    file = export(run, "kohya-lora", tmp_path / "kohya.safetensors")
    theirs = with_lora(folder_of(case), file)
    own = with_lora(folder_of(case), run / FILE)
    ours, read = (factors_of(one.unet) for one in (own, theirs))
    assert ours.keys() == read.keys()
    assert all(torch.equal(value, read[name]) for name, value in ours.items())
    for one in (own, theirs):
        layers = [layer for layer in one.unet.modules() if hasattr(layer, "scaling")]
        assert {scale for layer in layers for scale in layer.scaling.values()} == {1.5}


def factors_of(network):
    """The tensors of a network's adapters, by name without the adapter's own."""
    return {re.sub(r"default_\d", "default", k): v for k, v in network.state_dict().items() if "lora_" in k}


def test_a_layer_that_kohyas_reader_would_lose_is_refused(run_of, tmp_path):
    run = run_of("sdxl", trainable="add_embedding", rank=2)
    with pytest.raises(UserError, match=r"kohya's names cannot hold"):
        export(run, "kohya-lora", tmp_path / "kohya.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("case", "form", "words"),
    [
        ("pixart sigma", "kohya-lora", "reads no LoRA file for PixArtSigmaPipeline"),
        ("pixart sigma", "lora", "reads no LoRA file for PixArtSigmaPipeline"),
        ("flux dev", "single-file", "no single-file layout of all parts for flux"),
    ],
)
def test_a_form_that_a_family_lacks_is_refused(run_of, tmp_path, case, form, words):
    with pytest.raises(UserError, match=words):
        export(run_of(case), form, tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())


def test_kohyas_names_are_those_of_its_scripts(run_of, tmp_path):
    """As a file of sd-scripts has them: networks.lora, Stable Diffusion 1."""
    tensors = load_file(export(run_of("sd1 DDIM"), "kohya-lora", tmp_path / "kohya.safetensors"))
    block = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2"
    for layer in ("to_q", "to_k", "to_v", "to_out_0"):
        down, up = tensors[f"{block}_{layer}.lora_down.weight"], tensors[f"{block}_{layer}.lora_up.weight"]
        assert (down.shape[0], up.shape[1], float(tensors[f"{block}_{layer}.alpha"])) == (3, 3, 3.0)
    assert {name.rpartition(".")[2] for name in tensors} == {"weight", "alpha"}
    assert len(tensors) == 3 * len({name.partition(".")[0] for name in tensors})


@pytest.mark.parametrize("case", ["sd1 DDIM", "sd2 zero SNR", "sdxl"])
def test_a_single_file_is_read_back_by_diffusers_to_equal_tensors(folder_of, run_of, tmp_path, case):
    file = export(run_of(case), "single-file", tmp_path / "one.safetensors")
    merged = plain(export(run_of(case), "diffusers", tmp_path / "merged"))
    kind = type(merged)
    again = kind.from_single_file(file, config=str(tmp_path / "merged"), local_files_only=True)
    parts = [name for name, part in merged.components.items() if isinstance(part, torch.nn.Module)]
    assert {"unet", "vae", "text_encoder"} <= set(parts)
    for part in parts:
        wanted, found = getattr(merged, part).state_dict(), getattr(again, part).state_dict()
        assert wanted.keys() == found.keys()
        assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []
    assert torch.equal(drawn_by(again), drawn_by(merged))
    ours = load_model(str(file), "cpu", parts=str(tmp_path / "merged"))
    assert_same(images_of(ours), drawn_by(merged))


# ---- in processes ----------------------------------------------------------------------------------------------------


@slow
@pytest.mark.parametrize(("case", "stage"), [("sdxl", 2), ("flux dev", 3)])
def test_two_processes_train_the_adapter_that_one_trains(folder_of, tmp_path, case, stage):
    """Sums run in another order, and products with another number of threads; of steps of 0.05 that is rounding."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    settings = {"trajectories": 4, "steps": 3, "stop_residual": None}
    one = config_of(folder_of(case), tmp_path / "one", gradient_accumulation_steps=2, **settings)
    unlearn(one)
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    both = {"deepspeed": str(tmp_path / "zero.json"), "num_processes": 2}
    (tmp_path / "both.yaml").write_text(to_yaml(config_of(folder_of(case), tmp_path / "both", **settings, **both)))
    words = [sys.executable, "-m", "fastunlearn", "train", "--config", tmp_path / "both.yaml"]
    done = subprocess.run(
        words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=280
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = (load_file(tmp_path / name / FILE) for name in ("one", "both"))
    assert ours.keys() == theirs.keys()
    assert max(float((value - theirs[name]).abs().max()) for name, value in ours.items()) <= 1e-3
    assert max(float(value.abs().max()) for name, value in theirs.items() if "lora_B" in name) > 0.05


# ---- a run is a model's name -----------------------------------------------------------------------------------------


@slow
def test_an_evaluation_draws_what_the_adapter_draws_and_tells_a_changed_one(folder_of, run_of, tmp_path, random_trunk):
    folder, run = folder_of("sd1 DDIM"), Path(shutil.copytree(run_of("sd1 DDIM"), tmp_path / "run"))
    settings = {"prompts": PROMPTS, "forget": "Van Gogh", "num_inference_steps": 2, "batch_size": 2, "device": "cpu"}
    settings |= {"metric": "lpips-alex", "trunk_weights": random_trunk("alex"), "control_pairs": 1}
    report = evaluate(str(folder), str(run), **settings)
    merged = evaluate(str(folder), str(export(run, "diffusers", tmp_path / "merged")), **settings)
    mean = report.summary["integrity"]["mean"]
    assert mean == pytest.approx(merged.summary["integrity"]["mean"], abs=1e-6)
    assert mean > 0
    file = run / FILE
    other = read_adapter(file)
    values = {name: 2 * value for name, value in other.values.items()}
    save_adapter(file, other.part, adapter_for(load_model(str(folder), "cpu"), other, other.made["base"]), values)
    with pytest.raises(UserError, match="has changed since its run wrote it"):
        evaluate(str(folder), str(run), **settings)


PLAIN = {"adapter": None, "rank": None, "steps": None}


def test_a_training_on_a_run_with_an_adapter_begins_with_what_it_made(run_of, tmp_path):
    run = run_of("sd1 DDIM")
    result = unlearn(config_of(run, tmp_path / "second", "identity", **PLAIN))
    assert_same(drawn_by(plain(result.model)), images_of(load_model(str(run), "cpu")))
    with pytest.raises(UserError, match="Make it with `fastunlearn export"):
        unlearn(config_of(run, tmp_path / "third"))


def test_a_run_that_left_a_delta_is_exported_and_trained_on_too(folder_of, tmp_path):
    for save in ("model", "delta"):
        changes = {"adapter": None, "rank": None, "save": save}
        unlearn(config_of(folder_of("sd1 DDIM"), tmp_path / save, **changes))
    whole = export(tmp_path / "delta", "diffusers", tmp_path / "whole")
    assert files_of(whole) == files_of(tmp_path / "model" / "model")
    result = unlearn(config_of(tmp_path / "delta", tmp_path / "second", "identity", **PLAIN))
    assert files_of(result.model) == files_of(whole)


def test_the_types_of_the_base_are_kept_and_rank_one_is_enough(tmp_path):
    build(BASES["sd1 DDIM"]).to(torch.float16).save_pretrained(tmp_path / "half")
    unlearn(config_of(tmp_path / "half", tmp_path / "run", rank=1, learning_rate=0.5))
    tensors = load_file(tmp_path / "run" / FILE)
    assert {value.dtype for value in tensors.values()} == {torch.float16}
    assert {value.shape[0] for name, value in tensors.items() if "lora_A" in name} == {1}
    merged = load_file(export(tmp_path / "run", "diffusers", tmp_path / "merged") / "unet" / WEIGHTS)
    assert {value.dtype for value in merged.values()} == {torch.float16}


def test_a_plan_says_what_an_adapter_is_on_and_what_it_leaves_out(folder_of, tmp_path):
    model = load_model(str(folder_of("sd1 DDIM")), "cpu")
    config = config_of(folder_of("sd1 DDIM"), tmp_path / "run", "salun", trainable="all", rank=40)
    plan = plan_training(config, get_method("salun"), model)
    said = " ".join(" ".join(plan_lines(plan)).split())
    assert "of rank 40, alpha 40" in said
    assert re.search(r"\d+ selected parameters are no weights of layers, and stay as they are", said)
    assert "are of a smaller rank themselves" in said
    assert "without the mask that salun makes" in said
    assert "untried on adapters" not in said, "a learning rate was given"
    assert plan.trainable_parameters == plan.adapter.adapter.total
    assert not any("lora" in name for name, _ in model.denoiser.named_parameters()), "a plan changes nothing"


# ---- a base that carries a LoRA --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["sd3.5"])
def test_kohyas_names_are_for_unets_and_flux(run_of, tmp_path, case):
    with pytest.raises(UserError, match=r"for UNets and FLUX.*Use `--format lora`"):
        export(run_of(case), "kohya-lora", tmp_path / "kohya.safetensors")


def test_flux_under_kohyas_names_draws_the_same(folder_of, run_of, tmp_path):
    run = run_of("flux dev", trainable="add_k_proj,add_v_proj,to_add_out,ff")
    file = export(run, "kohya-lora", tmp_path / "kohya.safetensors")
    names = {name.partition(".")[0] for name in load_file(file)}
    block = "lora_unet_double_blocks_0_"
    assert names == {block + name for name in ("txt_attn_qkv", "txt_attn_proj", "img_mlp_0", "img_mlp_2")}
    wanted = drawn_by(with_lora(folder_of("flux dev"), run / FILE))
    assert_same(drawn_by(with_lora(folder_of("flux dev"), file)), wanted)


@pytest.mark.parametrize("alpha", [2.0, 1.0])
def test_flux_at_its_size_has_single_blocks_too(alpha):
    """Diffusers' reader knows their real widths alone, so the factors are of these."""
    block, values = "single_transformer_blocks.37", {}
    draw = torch.Generator().manual_seed(0)
    for layer, (out, wide) in {"attn.to_q": (3072, 3072), "proj_mlp": (12288, 3072), "proj_out": (3072, 15360)}.items():
        values[f"{block}.{layer}.lora_A.weight"] = torch.randn(2, wide, generator=draw)
        values[f"{block}.{layer}.lora_B.weight"] = torch.randn(out, 2, generator=draw)
    tensors = kohya_tensors(AdapterFile(Path("x"), "transformer", 2, alpha, {}, values), "FluxPipeline")
    shapes = {name.removeprefix("lora_unet_single_blocks_37_"): tuple(value.shape) for name, value in tensors.items()}
    assert shapes["linear1.lora_down.weight"] == (8, 3072)
    assert shapes["linear1.lora_up.weight"] == (3 * 3072 + 12288, 8)
    found = kohya_values(tensors, diffusers.FluxPipeline)
    for name, value in values.items():
        assert torch.equal(found.pop(f"transformer.{name}"), value * (alpha / 2 if "lora_A" in name else 1.0))
    others = {name for name in found if found[name].any()}
    assert not others, "what was not adapted changes nothing"


@pytest.mark.parametrize("form", [pytest.param("lora", marks=slow), "kohya-lora"])
def test_a_base_may_carry_a_lora_under_either_names(folder_of, run_of, tmp_path, form):
    run = run_of("sdxl", lora_alpha=6.0)
    file = export(run, form, tmp_path / "lora.safetensors")
    model = load_model(str(folder_of("sdxl")), "cpu", lora=str(file))
    assert torch.equal(images_of(model), images_of(load_model(str(run), "cpu")))
    assert model.hash_files() != load_model(str(folder_of("sdxl")), "cpu").hash_files()


@pytest.fixture(scope="module")
def style(folder_of, tmp_path_factory):
    """A LoRA of plain diffusers on the denoiser and both text encoders of ``sdxl``: its file, and what it draws."""
    from peft import LoraConfig, get_peft_model_state_dict

    pipeline, folder = plain(folder_of("sdxl")), tmp_path_factory.mktemp("style")
    settings = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=["to_v", "v_proj"])
    layers = {}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        getattr(pipeline, part).add_adapter(settings)
        layers[f"{part}_lora_layers"] = get_peft_model_state_dict(getattr(pipeline, part))
        layers[f"{part}_lora_adapter_metadata"] = settings.to_dict()
    type(pipeline).save_lora_weights(folder, **layers)
    return folder / FILE, drawn_by(pipeline)


def test_a_lora_of_text_encoders_goes_with_training_and_export(folder_of, style, tmp_path):
    file, wanted = style
    result = unlearn(config_of(folder_of("sdxl"), tmp_path / "run", "identity", lora=str(file), **PLAIN))
    assert_same(drawn_by(plain(result.model)), wanted)
    whole = ExportConfig(run=str(folder_of("sdxl")), format="diffusers", output=str(tmp_path / "whole"), lora=str(file))
    assert_same(drawn_by(plain(export_run(whole))), wanted)


def test_models_of_which_one_carries_a_lora_do_not_share_text_states(folder_of, style):
    file, wanted = style
    models = load_model(str(folder_of("sdxl")), "cpu"), load_model(str(folder_of("sdxl")), "cpu", lora=str(file))
    assert_same(images_of(models[1]), wanted)
    one, other = (PipelineSource(model, SamplerSpec(2, 3.0, 2)) for model in models)
    other.share_text(one)
    assert other.text is not one.text


def test_of_a_loras_settings_none_that_loads_code_or_computes_is_passed_on():
    told = {"unet.r": 2, "unet.megatron_config": {}, "unet.megatron_core": "code", "unet.init_lora_weights": "pissa"}
    assert json.loads(_believed({"lora_adapter_metadata": json.dumps(told)})["lora_adapter_metadata"]) == {"unet.r": 2}
    assert _believed({"format": "pt"}) == {}


def test_a_lora_that_fits_in_part_or_not_at_all_is_refused(folder_of, style, tmp_path):
    tensors = load_file(style[0])
    odd = next(name for name in tensors if name.startswith("unet.") and "lora_B" in name)
    zeros = {name: torch.zeros_like(value) if "lora_B" in name else value for name, value in tensors.items()}
    layer = odd.rpartition(".lora_B")[0]
    renamed = {name.replace(layer, "unet.nowhere.to_v"): value for name, value in tensors.items()}
    elsewhere = {f"transformer.{name}": value for name, value in tensors.items()}
    cases = {"changes nothing": zeros, "of its \\d+ layers of it fits": renamed, "nothing of it fits": elsewhere}
    cases["of DoRA"] = tensors | {f"{layer}.lora_magnitude_vector": torch.ones(4)}
    cases["no numbers"] = tensors | {odd: tensors[odd] * float("nan")}
    cases["does not fit"] = tensors | {odd: tensors[odd][:3].contiguous()}
    for words, content in cases.items():
        save_file(content, tmp_path / "lora.safetensors")
        with pytest.raises(UserError, match=words):
            load_model(str(folder_of("sdxl")), "cpu", lora=str(tmp_path / "lora.safetensors"))
