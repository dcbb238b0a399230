"""Every family against plain diffusers: same images, exact retain rows, training that changes what it may alone."""

import types
from pathlib import Path

import pytest
import torch
from against_diffusers import (
    CASES,
    GUIDANCE,
    PROMPTS,
    STEPS,
    assert_same,
    drawn_by,
    images_of,
    images_of_diffusers,
)
from pixart_alpha_family import PixArtAlpha
from safetensors.torch import load_file
from tiny_models import (
    ZERO_SNR,
    auraflow,
    build,
    ddim,
    diffusers,
    flux,
    saved,
    sd1,
    sd3,
)

from fastunlearn import TrainConfig, plugins, unlearn
from fastunlearn.errors import UserError
from fastunlearn.evaluation.generators import PipelineSource
from fastunlearn.methods import get_method
from fastunlearn.methods.recipe import EMPTY, MASK, NOISE, STATES, UNCONDITIONAL, Recipe, Row
from fastunlearn.methods.rules import Sum
from fastunlearn.models.base import Model
from fastunlearn.models.families import all_families, family_of
from fastunlearn.models.loading import load_model, wrap_pipeline
from fastunlearn.models.options import ModelOptions
from fastunlearn.models.sampling import SamplerSpec
from fastunlearn.models.sketch import is_sketch
from fastunlearn.training import budget
from fastunlearn.training.bank import build_bank, plan_bank
from fastunlearn.training.budget import sketch_of_large
from fastunlearn.training.edit import pooled_inputs, pooled_layers, text_layers, text_matrices
from fastunlearn.training.plan import plan_training
from fastunlearn.training.plan_words import plan_lines
from fastunlearn.training.selection import select_parameters

pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")  # KDPM2 and numpy
slow = pytest.mark.slow


def slow_case(*case):
    return pytest.param(*case, marks=slow)


FAST = {("sd1 PNDM", "salun"), ("sd1 distilled", "salun"), ("sd2 zero SNR", "ovw"), ("sdxl", "esd")}
FAST |= {("playground", "salun"), ("pixart alpha", "esd"), ("sd3.5", "esd"), ("flux dev", "esd")}
FAST |= {("lumina2", "esd"), ("auraflow", "ovw"), ("qwen-image", "esd"), ("z-image", "esd")}
TRAINED = [
    (case, method) if (case, method) in FAST else slow_case(case, method)
    for case in CASES
    for method in ("esd", "ovw", "salun")
]
LONG_TAIL = {
    "sd1 KDPM2 ancestral",
    "sd1 TCD",
    "sd1 DPM++ 2M SDE",
    "sdxl LCM",
    "sdxl Lightning",
    "sd1 Euler linspace",
    "sd1 LMS",
    "sd1 KDPM2",
    "sd1 DPM++ 2S",
    "sd1 DEIS",
    "sd2 v PNDM",
    "sd2 zero SNR Euler",
    "pixart alpha",
    "sd3 dynamic",
    "sd3 Heun",
    "sd3",
    "flux schnell",
    "sana Euler",
    "lumina2 dynamic",
}


@pytest.fixture(scope="module", autouse=True)
def _another_package_adds_pixart():
    entry = types.SimpleNamespace(
        name="pixart-alpha", value="pixart_alpha_family:PixArtAlpha", load=lambda: PixArtAlpha
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugins, "entry_points", lambda group: [entry] if group == "fastunlearn.families" else [])
        yield


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """``folder_of("sdxl")``: the pipeline of a case, saved once."""
    return saved(tmp_path_factory, CASES)


@pytest.fixture(params=[slow_case(case) if case in LONG_TAIL else case for case in CASES])
def model(request, folder_of):
    return load_model(str(folder_of(request.param)), "cpu")


# ---- images ----------------------------------------------------------------------------------------------------------


def test_an_image_is_that_of_plain_diffusers(model):
    assert_same(images_of(model), images_of_diffusers(model.source))


@slow
def test_stable_diffusion_3_in_memory_may_lack_t5():
    pipeline = build(lambda: sd3(with_t5=False))
    model = wrap_pipeline(pipeline, "mine")
    assert_same(images_of(model), drawn_by(pipeline))
    assert model.max_tokens == 75


@pytest.mark.parametrize("case", ["sd1 DDIM", "sd1 distilled", "sdxl", "flux dev", slow_case("lumina2")])
def test_a_guidance_of_1_or_0_is_none_as_in_diffusers(folder_of, case):
    model = load_model(str(folder_of(case)), "cpu")
    ours = images_of(model, 1.0)
    assert_same(ours, images_of_diffusers(folder_of(case), 1.0))
    assert torch.equal(ours, images_of(model, 0.0))
    assert not torch.equal(ours, images_of(model, GUIDANCE))


def test_the_empty_prompt_is_not_the_unconditional(folder_of):
    """XL's unconditional is zeros; somebody who asks for nothing asks with the encoded empty prompt."""
    model = load_model(str(folder_of("sdxl")), "cpu")
    encoded = model.encode([UNCONDITIONAL, EMPTY, "x"])
    for name in ("encoder_hidden_states", "text_embeds"):
        assert not encoded.of([UNCONDITIONAL])[name].any()
        assert encoded.of([EMPTY])[name].any()
    assert torch.equal(encoded.of([UNCONDITIONAL])["time_ids"], encoded.of([EMPTY])["time_ids"])
    assert_same(images_of(model, prompts=["", "x"]), images_of_diffusers(folder_of("sdxl"), prompts=["", "x"]))


@pytest.mark.parametrize("case", ["lumina2", slow_case("sana")])
def test_the_unconditional_is_read_without_what_stands_before_a_prompt(folder_of, case):
    model = load_model(str(folder_of(case)), "cpu")
    encoded = model.encode([UNCONDITIONAL, EMPTY, "x"])
    states = encoded.tensors["encoder_hidden_states"]
    assert not torch.allclose(states[0], states[1], atol=0.1)
    assert_same(images_of(model, prompts=["", "x"]), images_of_diffusers(folder_of(case), prompts=["", "x"]))


@pytest.mark.parametrize("case", ["sd1 DDIM", "sd2 v", "sdxl encoded empty prompt", "sd3.5", "flux dev", "auraflow"])
def test_where_the_unconditional_is_the_empty_prompt_both_are_equal(folder_of, case):
    encoded = load_model(str(folder_of(case)), "cpu").encode([EMPTY, "x", UNCONDITIONAL], 3)
    assert encoded.prompts == (EMPTY, "x", UNCONDITIONAL)
    for values in encoded.tensors.values():
        assert torch.equal(values[0], values[2])


def test_models_share_text_states_only_if_their_unconditional_is_one(folder_of):
    zeros, encoded = (load_model(str(folder_of(c)), "cpu") for c in ("sdxl", "sdxl encoded empty prompt"))
    encoded.source = zeros.source  # the same text encoders, another index
    one, other = (PipelineSource(model, SamplerSpec(STEPS, GUIDANCE, 2)) for model in (zeros, encoded))
    other.share_text(one)
    assert other.text is not one.text


# ---- rows ------------------------------------------------------------------------------------------------------------


def bank_of(model, target):
    recipe = Recipe([Row("retain", prompt, prompt, target(prompt)) for prompt in [EMPTY, *PROMPTS]], Sum())
    plan = plan_bank(model, recipe, trajectories=3, num_inference_steps=STEPS, guidance_scale=GUIDANCE, seed=0)
    return build_bank(model, recipe, plan)


def test_before_training_the_student_answers_retain_rows_as_the_teacher(model):
    """The student's batch differs from the teacher's, so rounding is left: squared, below 1e-10 of the answer's."""
    bank = bank_of(model, lambda prompt: {prompt: 1.0})
    assert bank.timesteps.dtype == torch.float32
    points = model.new_scheduler(STEPS).timesteps.float()
    assert torch.equal(bank.timesteps.view(3, -1), points.expand(3, -1))
    with torch.no_grad():
        student = model.predict(bank.latents, bank.timesteps, bank.conditions.rows(bank.condition))
    target = torch.einsum("pk,kpchw->pchw", bank.coefficients, bank.teacher_preds)
    assert (student - target).square().mean() < 1e-10 * target.square().mean()


def test_noise_rows_are_made_for_every_point(model):
    bank = bank_of(model, lambda prompt: {NOISE: 1.0})
    points = len(model.new_scheduler(STEPS).timesteps)
    assert len(bank) == 3 * points
    assert bank.latents.isfinite().all()
    assert len(bank.latents.flatten(1).unique(dim=0)) == len(bank), "each has noise of its own"


# ---- training --------------------------------------------------------------------------------------------------------


def settings_of(folder, output, method, **changes):
    config = {"trajectories": 2, "trajectory_steps": STEPS, "trajectory_guidance_scale": GUIDANCE}
    config |= {"steps": 2, "micro_batch_size": 2, "learning_rate": 1e-3, "seed": 3, "device": "cpu"}
    if method != "esd":
        config |= {"anchor": "a painter", "retain_prompts": ";".join(PROMPTS)}
    config |= {"evaluation_prompts": "none", "model": str(folder), "output": str(output), "method": method}
    return TrainConfig(forget="Van Gogh", **config | changes)


def files_in(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("case", "method"), TRAINED)
def test_training_changes_the_selected_tensors_and_plain_diffusers_reads_them(folder_of, tmp_path, case, method):
    folder = folder_of(case)
    unlearn(settings_of(folder, tmp_path / "run", method))
    result = tmp_path / "run" / "model"
    before, after = files_in(folder), files_in(result)
    changed = {name for name in before if before[name] != after.get(name)}
    model = load_model(str(result), "cpu")
    (weights,) = {name for name in before if name.startswith(model.denoiser_folder) and name.endswith(".safetensors")}
    assert before.keys() == after.keys()
    assert changed == {weights}
    old, new = load_file(folder / weights), load_file(result / weights)
    moved = {name for name in old if old[name].numpy().tobytes() != new[name].numpy().tobytes()}
    assert moved
    assert moved <= set(select_parameters(model, "all" if method == "salun" else model.default_group))
    ours = images_of(model)
    assert_same(ours, images_of_diffusers(result))
    assert not torch.equal(ours, images_of_diffusers(folder))


EDITED = {"sd1 DDIM": "cross-attention-kv", "sdxl": "cross-attention-kv", "pixart sigma": "all", "sana": "all"}
EDITED |= {
    "sd3.5": "all",
    "flux dev": "all",
    "lumina2": "all",
    "auraflow": "all",
    "qwen-image": "all",
    "z-image": "all",
}
EDITS = [(case, "uce") for case in EDITED] + [("flux dev", "rece"), ("lumina2", "speed")]
EDITS += [slow_case(case, name) for case in EDITED for name in ("rece", "speed") if (case, name) not in EDITS]


@pytest.mark.parametrize(("case", "method"), EDITS)
def test_an_edit_changes_what_reads_the_text_and_plain_diffusers_reads_it(folder_of, tmp_path, case, method):
    """Which weights these are is found by one forward: PixArt's text goes through a projection of its own, Lumina's
    through a norm first, and Z-Image's without its padding.  Biases stay."""
    folder = folder_of(case)
    settings = {"steps": None, "learning_rate": None, "trainable": EDITED[case]}
    if method == "speed":  # tiny models have few dimensions
        settings["options"] = {"null_below": 0.9, "invariant_directions": 0}
    unlearn(settings_of(folder, tmp_path / "run", method, **settings))
    result = tmp_path / "run" / "model"
    model = load_model(str(result), "cpu")
    (weights,) = {path.relative_to(result) for path in (result / model.denoiser_folder).glob("*.safetensors")}
    old, new = load_file(folder / weights), load_file(result / weights)
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert moved == {*text_matrices(model), *pooled_layers(model)}
    ours = images_of(model)
    assert_same(ours, images_of_diffusers(result))
    assert not torch.equal(ours, images_of_diffusers(folder))


def test_a_family_names_what_reads_the_text_as_one_forward_finds_it(model):
    found = {*text_matrices(model), *pooled_layers(model)}
    assert found == set(select_parameters(model, model.text_readers) if model.text_readers else ())


@pytest.mark.parametrize(
    ("case", "method", "expected"),
    [
        ("sdxl", "uce", "cross-attention-kv"),
        ("pixart sigma", "rece", "caption_projection.linear_1.weight"),
        ("flux dev", "uce", "context_embedder.weight,text_embedder.linear_1.weight"),
        ("sd3.5", "holdfast", "text-attention,context_embedder.weight,text_embedder.linear_1.weight"),
        ("qwen-image", "speed", "txt_in.weight"),
        ("lumina2", "uce", "caption_embedder.1.weight"),
        ("z-image", "rece", "cap_embedder.1.weight"),
    ],
)
def test_by_default_an_edit_changes_what_reads_the_text(folder_of, tmp_path, case, method, expected):
    """What the user selects must have some of it; the plan says so, before anything is trained."""
    folder = folder_of(case)
    settings = {"steps": None, "learning_rate": None, "dry_run": True}
    config = settings_of(folder, tmp_path / "run", method, trainable=None, **settings)
    plan = plan_training(config, get_method(method), load_model(str(folder), "cpu"))
    assert plan.settings.trainable == expected
    config = settings_of(folder, tmp_path / "run", method, trainable="*.bias", **settings)
    with pytest.raises(UserError, match=r"`--trainable` selects none of them\. Have it select"):
        plan_training(config, get_method(method), load_model(str(folder), "cpu"))


@pytest.mark.parametrize("case", ["sdxl", "pixart sigma", "flux dev", "z-image"])
def test_a_dry_run_of_what_is_too_large_refuses_an_edit_of_nothing(folder_of, tmp_path, monkeypatch, case):
    """No weights are read, so the family says what reads the text."""
    monkeypatch.setattr(budget, "memory_left", lambda: 1)
    folder = str(folder_of(case))
    assert is_sketch(sketch_of_large(folder, ModelOptions(), "fp32"))
    settings = {"output": tmp_path / "run", "dry_run": True, "device": "cpu"}
    assert unlearn(folder, "Van Gogh", "uce", **settings).record is None
    with pytest.raises(UserError, match=r"`--trainable` selects none of them\. Have it select"):
        unlearn(folder, "Van Gogh", "uce", trainable="*.bias", **settings)


@pytest.mark.parametrize("case", ["sdxl", "pixart sigma", "flux dev", "sana", "lumina2", "qwen-image", "z-image"])
def test_a_dry_run_counts_the_memory_of_every_family(folder_of, tmp_path, case):
    folder = folder_of(case)
    config = settings_of(folder, tmp_path / "run", "esd", dry_run=True)
    plan = plan_training(config, get_method("esd"), load_model(str(folder), "cpu"))
    assert plan.memory is not None
    assert not plan.is_uncounted


@pytest.mark.parametrize("case", ["pixart sigma", "sana", "lumina2", "qwen-image", "z-image"])
def test_the_mask_says_which_states_the_denoiser_reads(folder_of, case):
    """Edits sum over these alone."""
    model = load_model(str(folder_of(case)), "cpu")
    conditions = model.encode(["a dog", "a dog on a hill"]).rows([0])
    is_read = conditions[MASK].bool()
    assert 0 < is_read.sum() < is_read.numel()
    noise = torch.randn(conditions[STATES].shape, generator=torch.Generator().manual_seed(0))

    def predicted(states):
        latents = torch.ones(1, *model.latent_shape)
        with torch.no_grad():
            return model.predict(latents, torch.tensor([500.0]), conditions | {STATES: states})

    before = predicted(conditions[STATES])
    torch.testing.assert_close(predicted(conditions[STATES] + noise * ~is_read[..., None]), before, rtol=0, atol=1e-6)
    changed = predicted(conditions[STATES] + noise * is_read[..., None])
    assert (changed - before).abs().max() > 1e-4


def test_an_edit_sees_the_states_as_a_layer_reads_them_and_says_what_it_cannot_see(folder_of):
    """Lumina's text goes through a norm; SDXL, SD3 and FLUX have a pooled vector beside the states."""
    lumina = load_model(str(folder_of("lumina2")), "cpu")
    ((name, norm),) = text_layers(lumina).items()
    layer, given = lumina.denoiser.get_submodule(name.removesuffix(".weight")), []
    hook = layer.register_forward_hook(lambda module, inputs, output: given.append(inputs[0]))
    conditions = lumina.encode(["a dog"]).tensors
    lumina.predict(torch.zeros(1, *lumina.latent_shape), torch.tensor([500.0]), conditions)
    hook.remove()
    torch.testing.assert_close(norm(conditions["encoder_hidden_states"]), given[0])
    pooled = {
        case: pooled_inputs(load_model(str(folder_of(case)), "cpu"), "a dog") for case in ("sdxl", "sd3.5", "sana")
    }
    assert pooled == {"sdxl": ["text_embeds"], "sd3.5": ["pooled_projections"], "sana": []}


def test_an_edit_changes_what_reads_the_whole_text_where_it_is_selected(folder_of, tmp_path):
    """SD3's pooled text goes into one layer as it is; SDXL's goes in beside the sizes, which no edit can part."""
    folder = folder_of("sd3.5")
    model = load_model(str(folder), "cpu")
    ((name, argument),) = pooled_layers(model).items()
    assert (name, argument) == ("time_text_embed.text_embedder.linear_1.weight", "pooled_projections")
    assert pooled_layers(load_model(str(folder_of("sdxl")), "cpu")) == {}
    assert pooled_inputs(model, "a dog", [name]) == []
    settings = {"steps": None, "learning_rate": None, "trainable": "context_embedder,text_embedder.linear_1"}
    for method in ("uce", "speed"):
        options = {"options": {"null_below": 0.9, "invariant_directions": 0}} if method == "speed" else {}
        unlearn(settings_of(folder, tmp_path / method, method, **settings, **options))
        edited = load_model(str(tmp_path / method / "model"), "cpu")
        old, new = (dict(one.denoiser.named_parameters()) for one in (model, edited))
        moved = {one for one in old if not torch.equal(old[one], new[one])}
        assert moved == {name, "context_embedder.weight"}


# ---- the registry ----------------------------------------------------------------------------------------------------


def test_another_package_adds_a_family():
    assert all_families()["pixart-alpha"] is PixArtAlpha


def test_a_family_that_cannot_be_loaded_is_named_where_it_is_missed(monkeypatch):
    def load():
        raise ImportError("no module named theirs")

    entry = types.SimpleNamespace(name="theirs", value="theirs:Theirs", load=load)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [entry])
    with pytest.raises(
        UserError, match=r"is a HunyuanDiTPipeline, a family not supported.*'?theirs.*no module named theirs"
    ):
        family_of("HunyuanDiTPipeline", "'theirs'")
    assert family_of("StableDiffusionPipeline", "'sd'").family == "stable-diffusion"


def test_no_file_but_a_familys_own_asks_for_a_family():
    engine = Path(plugins.__file__).parent
    for path in engine.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "if family" not in text, path
        if path.parent.name != "models":
            assert "attn2" not in text, path


def test_groups_are_the_familys_own(folder_of):
    model = load_model(str(folder_of("pixart alpha")), "cpu")
    assert all(".attn2." in name for name in select_parameters(model, "cross-attention"))
    with pytest.raises(UserError, match=r"selects no parameter. Use cross-attention, all, or parts"):
        select_parameters(model, "cross-attention-kv")


def test_text_attention_is_what_belongs_to_the_text(folder_of):
    """Stable Diffusion 3.5 has a self-attention that is called attn2: no group of its own picks it."""
    model = load_model(str(folder_of("sd3.5")), "cpu")
    names = select_parameters(model, "text-attention")
    assert names
    assert not any("attn2" in name for name in names)
    assert {name.split(".")[3] for name in names} == {"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
    assert set(select_parameters(model, "text-attention-kv")) < set(names)
    with pytest.raises(UserError, match=r"selects no parameter. Use text-attention, text-attention-kv, all, or parts"):
        select_parameters(model, "cross-attention")


def test_a_list_takes_groups_and_parts_of_names(folder_of):
    model = load_model(str(folder_of("sd3.5")), "cpu")
    alone = [set(select_parameters(model, one)) for one in ("text-attention-kv", "context_embedder")]
    assert set(select_parameters(model, "context_embedder, text-attention-kv")) == alone[0] | alone[1]
    with pytest.raises(UserError, match=r"the part 'cross-attention' of .* selects no parameter"):
        select_parameters(model, "text-attention,cross-attention")


@pytest.mark.parametrize("case", ["sd3.5", "flux dev", "sana", "lumina2", "auraflow", "qwen-image", "z-image"])
def test_every_group_of_a_family_selects_something_and_all_selects_all(folder_of, case):
    model = load_model(str(folder_of(case)), "cpu")
    everything = {name for name, _ in model.denoiser.named_parameters()}
    for group in model.groups:
        selected = set(select_parameters(model, group))
        assert (selected == everything) == (group == "all")
    assert model.default_group in model.groups


@pytest.mark.parametrize(
    ("case", "method", "taken"),
    [
        ("sd3.5", "esd", "text-attention"),
        ("sd3.5", "neggrad", "all"),
        ("lumina2", "saddle", "joint-attention"),
        ("sana", "ovw", "cross-attention"),
    ],
)
def test_the_plan_names_the_group_and_that_its_settings_are_untried(folder_of, tmp_path, case, method, taken):
    model = load_model(str(folder_of(case)), "cpu")
    changes = {"anchor": None} if method != "ovw" else {}
    plan = plan_training(settings_of(folder_of(case), tmp_path, method, **changes), get_method(method), model)
    text = "\n".join(plan_lines(plan))
    assert f"may change  {taken}: " in text
    assert f"those for stable-diffusion: untried on {model.family}\n" in text
    chosen = settings_of(folder_of(case), tmp_path, method, trainable="all", **changes)
    assert plan_training(chosen, get_method(method), model).settings.trainable == "all"


def test_flux_is_square_at_the_pipelines_default_size_unless_its_settings_name_another():
    pipeline = build(flux)
    assert wrap_pipeline(pipeline, "mine").latent_shape == (16, 8, 8)
    pipeline.transformer.register_to_config(sample_size=None)
    assert wrap_pipeline(pipeline, "mine").latent_shape == (16, 128, 128)
    pipeline.transformer.register_to_config(sample_size=[8, 4])
    assert wrap_pipeline(pipeline, "mine").latent_shape == (16, 8, 4)


def test_auraflow_is_as_large_as_its_pipeline_draws_where_it_has_positions():
    pipeline = build(auraflow)
    pipeline.transformer.register_to_config(sample_size=64)
    for positions, size in [(16, 8), (4096, 128), (9216, 128)]:
        pipeline.transformer.register_to_config(pos_embed_max_size=positions)
        assert wrap_pipeline(pipeline, "mine").latent_shape == (4, size, size)


def test_a_sampler_that_takes_no_noise_levels_is_named(folder_of):
    model = wrap_pipeline(build(lambda: flux(diffusers.FlowMatchHeunDiscreteScheduler())), "mine")
    with pytest.raises(UserError, match=r"^FlowMatchHeunDiscreteScheduler takes no noise levels"):
        model.new_scheduler(STEPS)


# ---- prompts ---------------------------------------------------------------------------------------------------------


LIMITS = [("sd1 DDIM", 75), ("sdxl", 75), ("pixart sigma", 299), ("flux dev", 511), ("lumina2", 91), ("sana", 298)]
LIMITS += [("qwen-image", 332), ("z-image", 497)]
LIMITS += [slow_case("sd3", 255), slow_case("auraflow", 255)]


@pytest.mark.parametrize(("case", "limit"), LIMITS)
def test_prompts_whose_end_is_not_read_are_told(folder_of, case, limit):
    model = load_model(str(folder_of(case)), "cpu")
    assert model.max_tokens == limit
    word = "yz" * limit
    fits = next(word[:size] for size in range(limit, 0, -1) if model.count_tokens(word[:size]) == limit)
    assert model.too_long(["short", fits, fits + "y", fits + "y", ""]) == [fits + "y"]


# ---- pipelines that no verb can serve --------------------------------------------------------------------------------


def test_a_pipeline_in_memory_is_checked_as_a_folder_is():
    with pytest.raises(UserError, match=r"^mine's denoiser takes 9 channels where an image's latents have 4"):
        wrap_pipeline(build(lambda: sd1(ddim(), in_channels=9)), "mine")


def test_a_sampler_that_does_not_fit_the_model_is_named_before_training(folder_of):
    sampler = ddim(**ZERO_SNR | {"prediction_type": "epsilon"}, set_alpha_to_one=True)
    model = wrap_pipeline(build(lambda: sd1(sampler)), "mine")
    with pytest.raises(UserError, match=r"^mine's DDIMScheduler leads to latents that are no finite numbers"):
        bank_of(model, lambda prompt: {prompt: 1.0})


def test_a_model_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Model(None, Path(), "mine", torch.device("cpu"))
