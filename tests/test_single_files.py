"""Models in one file, under the names of their makers; and files that are none."""

import inspect
import json
import shutil
from pathlib import Path

import original_names
import pytest
import torch
from against_diffusers import assert_same, drawn_by, images_of, images_of_diffusers
from safetensors.torch import load_file, save_file
from tiny_models import build, clip_text, ddim, diffusers, flux, sd1, sd2, sd3, sd35, sdxl

from fastunlearn import unlearn
from fastunlearn.errors import UserError
from fastunlearn.models import single_file, usual_settings
from fastunlearn.models.foreign_files import foreign, headers
from fastunlearn.models.loading import load_model
from fastunlearn.models.usual_settings import has_settings, write_settings

slow = pytest.mark.slow


def sdxl_of_two_widths():
    """diffusers tells the text encoders of a file apart by their widths, which real ones differ in."""
    pipeline = sdxl()
    pipeline.text_encoder_2 = wide(48)
    pipeline.unet = diffusers.UNet2DConditionModel.from_config(
        pipeline.unet.config, cross_attention_dim=80, projection_class_embeddings_input_dim=6 * 8 + 48
    )
    return pipeline


def wide(size):
    import transformers

    config = clip_text(projection=32, activation="gelu").config
    changed = {**config.to_dict(), "hidden_size": size, "intermediate_size": 2 * size, "projection_dim": size}
    return transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**changed))


def sd3_of_two_widths(make=sd3):
    pipeline = make()
    pipeline.text_encoder_2 = wide(48)
    settings = {"pooled_projection_dim": 80, "joint_attention_dim": 80}
    pipeline.transformer = diffusers.SD3Transformer2DModel.from_config(pipeline.transformer.config, **settings)
    import tiny_models

    pipeline.text_encoder_3 = tiny_models.t5(d_model=80)
    with torch.no_grad():  # the file of a CLIP without a projection stands for the identity
        pipeline.text_encoder.text_projection.weight.copy_(torch.eye(32))
    return pipeline


KINDS = {
    "sd1": (lambda: sd1(ddim()), original_names.stable_diffusion),
    "sd2": (sd2, original_names.stable_diffusion),
    "sdxl": (sdxl_of_two_widths, original_names.stable_diffusion_xl),
    "sd3": (sd3_of_two_widths, original_names.stable_diffusion_3),
    "sd3.5": (lambda: sd3_of_two_widths(sd35), original_names.stable_diffusion_3),
    "flux": (flux, original_names.flux),
}


@pytest.fixture
def narrow_flux(monkeypatch):
    narrow_converter(monkeypatch)


def narrow_converter(monkeypatch):
    """diffusers' converter knows FLUX's own width alone: here it knows the tiny one."""
    from diffusers.loaders import single_file_model, single_file_utils

    name = "convert_flux_transformer_checkpoint_to_diffusers"
    source = inspect.getsource(getattr(single_file_utils, name))
    assert source.count("3072") == 1
    space = vars(single_file_utils).copy()
    exec(source.replace("3072", "32"), space)
    entry = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    monkeypatch.setitem(entry, "checkpoint_mapping_fn", space[name])


def written(root, kind, dtype=None, drop=()):
    """(the single file, the folder of settings, the pipeline) of a kind.  ``drop``: beginnings left out of the file."""
    make, names = KINDS[kind]
    pipeline = build(make)
    if dtype is not None:
        pipeline.to(dtype)
    pipeline.save_pretrained(root / "whole")
    tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in names(pipeline).items()}
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(tuple(drop))}
    save_file(kept, root / "model.safetensors")
    weights = [] if kind == "flux" else ["*.safetensors"]
    shutil.copytree(root / "whole", root / "base", ignore=shutil.ignore_patterns(*weights))
    if kind == "flux":
        shutil.rmtree(root / "base" / "transformer")
        (root / "base" / "transformer").mkdir()
        shutil.copy(root / "whole" / "transformer" / "config.json", root / "base" / "transformer")
    return root / "model.safetensors", root / "base", root / "whole"


@pytest.mark.parametrize("kind", [k if k in ("sdxl", "flux") else pytest.param(k, marks=slow) for k in KINDS])
def test_a_single_file_is_the_model_that_it_was_made_of(tmp_path, narrow_flux, kind):
    file, base, whole = written(tmp_path, kind)
    before = file.read_bytes()
    model = load_model(str(file), "cpu", parts=str(base))
    for part, module in diffusers.DiffusionPipeline.from_pretrained(whole).components.items():
        if isinstance(module, torch.nn.Module):
            ours = getattr(model.pipeline, part).state_dict()
            assert ours.keys() == module.state_dict().keys()
            assert all(torch.equal(ours[name], tensor) for name, tensor in module.state_dict().items()), part
    assert_same(images_of(model), images_of_diffusers(whole))
    assert file.read_bytes() == before


def train(file, base, output, **changes):
    settings = {"trajectories": 1, "trajectory_steps": 2, "steps": 1, "learning_rate": 1e-3, "device": "cpu"}
    settings |= {"evaluation_prompts": "none", "parts": str(base)}
    return unlearn(str(file), "Van Gogh", "esd", output=output, **settings | changes)


def test_training_from_a_single_file_leaves_a_folder_that_plain_diffusers_reads(tmp_path, cli):
    file, base, whole = written(tmp_path, "sd1", torch.float16)
    run = train(file, base, tmp_path / "run")
    assert run.record.model == str(file)
    made = tmp_path / "run" / "model"
    unet = "unet/diffusion_pytorch_model.safetensors"
    old, new = load_file(whole / unet), load_file(made / unet)
    assert {tensor.dtype for tensor in new.values()} == {torch.float16}, "the file's precision"
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert moved
    assert all("attn2" in name for name in moved)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(made, torch_dtype=torch.float32)
    assert_same(images_of(load_model(str(made), "cpu")), drawn_by(pipeline))
    train(file, base, tmp_path / "small", save="delta")
    words = ["apply", "--model", file, "--parts", base, "--delta", tmp_path / "small" / "delta.safetensors"]
    assert cli(*words, "--output", tmp_path / "applied").status == 0
    assert (tmp_path / "applied" / unet).read_bytes() == (made / unet).read_bytes()


def test_an_evaluation_takes_a_single_file_beside_its_run(tmp_path, cli):
    file, base, _ = written(tmp_path, "sd1")
    train(file, base, tmp_path / "run")
    words = ["evaluate", "--original", file, "--parts", base, "--unlearned", tmp_path / "run", "--metric", "shapes"]
    words += ["--prompts", "a ring;a cross", "--num-inference-steps", "1", "--batch-size", "2", "--control-pairs", "1"]
    assert cli(*words, "--output", tmp_path / "evaluation").status == 0
    assert (tmp_path / "evaluation" / "evaluation.json").is_file()


# ---- what a file lacks -----------------------------------------------------------------------------------------------


def test_a_part_that_the_file_lacks_comes_from_the_folder_or_is_named(tmp_path):
    file, base, whole = written(tmp_path, "sd3", drop=["text_encoders.t5xxl."])
    with pytest.raises(UserError, match=r"has no text_encoder_3 \(T5EncoderModel\).*by `--parts`"):
        load_model(str(file), "cpu", parts=str(base))
    model = load_model(str(file), "cpu", parts=str(whole))
    assert_same(images_of(model), images_of_diffusers(whole))
    (whole / "text_encoder_3" / "model.safetensors").rename(whole / "text_encoder_3" / "model.fp16.safetensors")
    assert torch.equal(images_of(load_model(str(copied(file)), "cpu", parts=str(whole))), images_of(model))


def copied(file):
    """The same file by another name, which is converted anew."""
    return shutil.copy(file, file.with_name("again.safetensors"))


def test_parts_that_lead_out_of_their_folder_are_not_read(tmp_path):
    file, base, whole = written(tmp_path, "sd1", drop=["first_stage_model."])
    name = "diffusion_pytorch_model.safetensors"
    (base / "vae" / name).symlink_to(whole / "vae" / name)
    with pytest.raises(UserError, match=r"is a link to .*outside the model's folder"):
        load_model(str(file), "cpu", parts=str(base))


def test_a_part_that_is_pickled_there_is_not_read(tmp_path):
    file, base, _ = written(tmp_path, "sd1", drop=["first_stage_model."])
    torch.save({}, base / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"has no vae \(AutoencoderKL\), and .* has no safetensors of it"):
        load_model(str(file), "cpu", parts=str(base))


def test_a_part_of_which_a_tensor_is_missing_is_named(tmp_path):
    file, base, _ = written(tmp_path, "sd1")
    tensors = load_file(file)
    del tensors["model.diffusion_model.out.2.weight"]
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"is incomplete: its unet has no conv_out|cannot read .* as a StableDiff"):
        load_model(str(file), "cpu", parts=str(base))


def test_without_a_folder_of_settings_the_hubs_cache_is_asked_and_nothing_is_fetched(tmp_path, monkeypatch):
    """Of Stable Diffusion 2 there are two kinds, epsilon and v, that no tensor tells apart."""
    import huggingface_hub

    monkeypatch.setattr(single_file, "_repository", lambda tensors: "stabilityai/stable-diffusion-2-1")
    file, base, whole = written(tmp_path, "sd2")
    asked = []

    def cached(repository, **options):
        asked.append((repository, options["local_files_only"]))
        return str(base)

    with pytest.raises(UserError, match="those of stabilityai/stable-diffusion-2-1, which is not in the hub's cache"):
        load_model(str(file), "cpu")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    assert_same(images_of(load_model(str(file), "cpu")), images_of_diffusers(whole))
    assert asked == [("stabilityai/stable-diffusion-2-1", True)]


def test_the_repository_is_the_one_that_diffusers_names():
    tensors = {"model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": {"shape": [320, 1024]}}
    assert single_file._repository(tensors) == "stabilityai/stable-diffusion-2-1"


#: Parameters of the public models, as their cards and papers have them.
PARAMETERS = {
    "StableDiffusionPipeline": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "StableDiffusionXLPipeline": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
}


@pytest.mark.parametrize("kind", PARAMETERS)
def test_the_usual_settings_are_those_of_the_public_models(tmp_path, kind):
    import transformers

    pytest.importorskip("open_clip")
    write_settings(tmp_path, kind, ())
    index = diffusers.DiffusionPipeline.load_config(tmp_path)
    for part, count in PARAMETERS[kind].items():
        library, name = index[part]
        with torch.device("meta"):
            if library == "diffusers":
                cls = getattr(diffusers, name)
                module = cls.from_config(cls.load_config(tmp_path, subfolder=part))
            else:
                config = transformers.CLIPTextConfig.from_pretrained(tmp_path, subfolder=part)
                module = getattr(transformers, name)(config)
        assert sum(parameter.numel() for parameter in module.parameters()) == count, part


# What open_clip's own cleaning leaves as it is, without XL's padding, a mark of its own.
TEXTS = (
    "a photo of a cat",
    "Van Gogh's Starry Night, 1889.",
    "caf\u00e9 \U0001f40e",
    "x" * 300,
)


def test_the_vocabulary_is_clips(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    import transformers

    write_settings(tmp_path, "StableDiffusionXLPipeline", ())
    theirs = open_clip.SimpleTokenizer()
    for part, pad in (("tokenizer", 49407), ("tokenizer_2", 0)):
        ours = transformers.CLIPTokenizer.from_pretrained(tmp_path, subfolder=part)
        assert ours.pad_token_id == pad
        assert ours.model_max_length == 77
        for text in TEXTS:
            ids = ours(text, truncation=True).input_ids
            assert ids == theirs([text])[0][: len(ids)].tolist(), text


def test_a_file_that_says_so_predicts_v(tmp_path):
    pytest.importorskip("open_clip")
    write_settings(tmp_path, "StableDiffusionXLPipeline", ("v_pred", "ztsnr"))
    scheduler = diffusers.EulerDiscreteScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.rescale_betas_zero_snr
    assert has_settings("StableDiffusionXLPipeline", ())
    assert not has_settings("StableDiffusionXLPipeline", ("edm_mean",)), "Playground v2.5"
    assert not has_settings("StableDiffusionPipeline", ("cond_stage_model.model.token_embedding.weight",))
    assert not has_settings("FluxPipeline", ())


def test_the_usual_settings_serve_where_no_folder_is_named(tmp_path, monkeypatch):
    """Those of the tiny model stand in for them here."""
    file, base, whole = written(tmp_path, "sd1")
    monkeypatch.setattr(
        single_file, "write_settings", lambda folder, *rest: shutil.copytree(base, folder, dirs_exist_ok=True)
    )
    assert_same(images_of(load_model(str(file), "cpu")), images_of_diffusers(whole))


def test_without_a_vocabulary_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(usual_settings.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="`pip install open_clip_torch` brings it, or name"):
        write_settings(tmp_path, "StableDiffusionPipeline", ())


def index(folder, **changes):
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


MISTAKES = {
    "another family's": (lambda f: index(f, _class_name="FluxPipeline"), "and `--parts` .* is a FluxPipeline"),
    "no pipeline": (lambda f: (f / "model_index.json").unlink(), "is no diffusers folder: it has no model_index"),
    "another size": (
        lambda f: (f / "unet/config.json").write_text(
            json.dumps(json.loads((f / "unet/config.json").read_text()) | {"block_out_channels": [64, 64]})
        ),
        "cannot read .* as a StableDiffusionPipeline with the settings of",
    ),
}


@pytest.mark.parametrize(("damage", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_folder_of_settings_that_does_not_fit_is_one_line(tmp_path, damage, said):
    file, base, _ = written(tmp_path, "sd1")
    damage(base)
    with pytest.raises(UserError, match=said) as error:
        load_model(str(file), "cpu", parts=str(base))
    assert len(str(error.value).splitlines()) == 1


# ---- files that are no model -----------------------------------------------------------------------------------------


def tensors(*names):
    return {name: torch.zeros(2, 2) for name in names}


FOREIGN = {
    "a kohya LoRA": (tensors("lora_unet_down_blocks_0.lora_down.weight", "lora_unet_x.alpha"), "is a LoRA"),
    "a PEFT LoRA": (tensors("unet.down_blocks.0.attn2.to_k.lora_A.weight"), "is a LoRA"),
    "a LoKr": (tensors("lora_unet_x.lokr_w1"), "is a LoRA"),
    "a ControlNet": (tensors("control_model.time_embed.0.weight"), "is a ControlNet"),
    "a ControlNet of diffusers": (
        tensors("controlnet_cond_embedding.conv_in.weight", "down_blocks.0.x"),
        "is a ControlNet",
    ),
    "a VAE": (tensors("encoder.conv_in.weight", "decoder.conv_in.weight", "quant_conv.weight"), "is a VAE alone"),
    "a VAE of a checkpoint": (tensors("first_stage_model.encoder.conv_in.weight"), "is a VAE alone"),
    "a CLIP": (tensors("text_model.embeddings.token_embedding.weight"), "is a text encoder alone"),
    "a T5": (tensors("shared.weight", "encoder.block.0.layer.0.x"), "is a text encoder alone"),
    "an embedding": (tensors("emb_params"), "is a textual inversion's embedding"),
    "an IP-Adapter": (tensors("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"), "is an IP-Adapter"),
    "a UNet of diffusers": (tensors("down_blocks.0.resnets.0.conv1.weight", "conv_in.weight"), "is one network in"),
    "anything": (tensors("x"), "is no text-to-image model whose layout is known"),
    "nothing": ({}, "is no text-to-image model whose layout is known"),
}


@pytest.mark.parametrize(("content", "said"), FOREIGN.values(), ids=FOREIGN)
def test_a_file_that_is_no_model_is_called_what_it_is(tmp_path, content, said):
    save_file(content, tmp_path / "file.safetensors")
    with pytest.raises(UserError, match=said) as error:
        load_model(str(tmp_path / "file.safetensors"), "cpu")
    assert len(str(error.value).splitlines()) == 1


def test_a_folder_that_holds_a_lora_is_called_so(tmp_path):
    save_file(tensors("unet.x.lora_A.weight"), tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=r"is no diffusers pipeline: it holds a LoRA"):
        load_model(str(tmp_path), "cpu")


def test_no_model_is_taken_for_something_else(tmp_path):
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        file, _, _ = written(tmp_path / kind, kind)
        assert foreign(*headers(file)) is None, kind


def test_a_file_that_is_cut_or_pickled_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(tensors("model.diffusion_model.input_blocks.0.0.weight"), file)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(UserError, match="is no whole safetensors file"):
        load_model(str(file), "cpu")
    Path(tmp_path / "model.ckpt").write_bytes(b"")
    with pytest.raises(UserError, match=r"model\.ckpt is pickled"):
        load_model(str(tmp_path / "model.ckpt"), "cpu")


def test_weights_in_a_precision_that_is_not_served_are_named(tmp_path):
    file, base, _ = written(tmp_path, "sd1")
    small = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(file).items()}
    save_file(small, file)
    with pytest.raises(UserError, match="has weights in F8_E4M3, which is not served"):
        load_model(str(file), "cpu", parts=str(base))


def test_weights_in_two_precisions_are_read_in_the_larger(tmp_path):
    file, base, _ = written(tmp_path, "sd1")
    mixed = {n: t.half() if n.startswith("model.") else t for n, t in load_file(file).items()}
    save_file(mixed, file)
    model = load_model(str(file), "cpu", parts=str(base))
    stored = load_file(model.source / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}


def test_what_belongs_to_folders_or_to_files_alone_is_said(tmp_path):
    file, base, whole = written(tmp_path, "sd1")
    with pytest.raises(UserError, match="`--variant` chooses among the files of a folder"):
        load_model(str(file), "cpu", parts=str(base), variant="fp16")
    with pytest.raises(UserError, match="`--parts` completes a model in a single file"):
        load_model(str(whole), "cpu", parts=str(base))
    with pytest.raises(UserError, match="`--parts` completes a model in a single file"):
        load_model("shapes", "cpu", parts=str(base))
