"""How a model is loaded and sampled: each option against plain diffusers, recorded, and refused where it cannot be."""

import json
import types

import pytest
import torch
from against_diffusers import CASES, GUIDANCE, PROMPTS, assert_same, drawn_by, images_of
from tiny_models import build, diffusers, flux, sd1
from toys import MeanDifference

from fastunlearn import EvaluateConfig, TrainConfig, evaluate
from fastunlearn.errors import UserError
from fastunlearn.evaluation.generators import PipelineSource, check_comparable
from fastunlearn.methods.recipe import NEGATIVE, UNCONDITIONAL, Recipe, Row
from fastunlearn.methods.rules import Sum
from fastunlearn.models import attention
from fastunlearn.models.attention import set_attention
from fastunlearn.models.loading import load_model, wrap_pipeline
from fastunlearn.models.options import ModelOptions
from fastunlearn.models.sampling import SamplerSpec
from fastunlearn.training.bank import build_bank, plan_bank
from fastunlearn.training.config import ApplyConfig, MaskConfig

slow = pytest.mark.slow


def wrapped(case, **options):
    pipeline = build(CASES[case])
    return wrap_pipeline(pipeline, "mine", ModelOptions(**options)), pipeline


# ---- resolution ------------------------------------------------------------------------------------------------------

SIZED = ["sd1 DDIM", "sdxl", "sd3 dynamic", "flux dev"]
SIZED += [
    pytest.param(case, marks=slow) for case in ("sd2 v", "playground", "pixart sigma", "sana", "lumina2", "auraflow")
]


@pytest.mark.parametrize("case", SIZED)
def test_another_resolution_is_that_of_plain_diffusers(case):
    """What a family derives of it, sizes, shifts, positions, it derives anew."""
    width, height = (64, 32) if case == "auraflow" else (96, 64)  # which has no more positions
    model, pipeline = wrapped(case, resolution=f"{width}x{height}")
    assert model.image_size == (width, height)
    ours = images_of(model)
    assert ours.shape[-2:] == (height, width)
    assert_same(ours, drawn_by(pipeline, size=(width, height)))


def test_xl_is_told_the_size_that_it_draws():
    model, _ = wrapped("sdxl", resolution="96x64")
    assert model.encode(["x"]).tensors["time_ids"].tolist() == [[64, 96, 0, 0, 64, 96]]


def test_flux_shifts_its_steps_by_the_size():
    small, large = (wrapped("flux dev", resolution=size)[0].new_scheduler(4).timesteps for size in ("64", "512"))
    assert (small[1:] < large[1:]).all()


@pytest.mark.parametrize(
    ("case", "size", "said"),
    [
        ("sd1 DDIM", "100", r"multiples of 8 pixels\. Use 96x96\."),
        ("flux dev", "72x64", r"multiples of 16 pixels\. Use 64x64\."),
        ("sd3.5", "512", r"has places for 256 pixels a side"),
        ("auraflow", "128", r"has places for 64 pixels a side"),
        ("sana", "3", r"multiples of \d+ pixels"),
    ],
)
def test_a_size_that_a_model_cannot_draw_is_one_line(case, size, said):
    with pytest.raises(UserError, match=rf"^`--resolution` .*{said}") as error:
        wrapped(case, resolution=size)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["0", "-8", "8x", "x8", "8x8x8", "8.5", "a", "", "0x8", "123456"])
def test_a_size_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="`--resolution` must be N or WxH"):
        ModelOptions(resolution=text)


def test_sizes_are_read_as_people_write_them():
    assert ModelOptions(resolution=512).size == (512, 512)
    assert ModelOptions(resolution="768X512").size == (768, 512)
    assert ModelOptions().size is None


# ---- a negative prompt -----------------------------------------------------------------------------------------------

NEGATIVES = ["sd1 DDIM", "sdxl", "lumina2"]
NEGATIVES += [pytest.param(case, marks=slow) for case in ("sd2 v", "sd3.5", "pixart sigma", "auraflow", "sana")]


@pytest.mark.parametrize("case", NEGATIVES)
def test_a_negative_prompt_is_that_of_plain_diffusers(case):
    model, pipeline = wrapped(case, negative_prompt="blurry, ugly")
    ours = images_of(model)
    assert_same(ours, drawn_by(pipeline, negative_prompt=["blurry, ugly"] * len(PROMPTS)))
    assert not torch.equal(ours, images_of(wrapped(case)[0]))


def test_an_empty_negative_prompt_is_a_text_where_the_unconditional_is_none():
    model, pipeline = wrapped("sdxl", negative_prompt="")
    ours = images_of(model)
    assert_same(ours, drawn_by(pipeline, negative_prompt=[""] * len(PROMPTS)))
    assert not torch.equal(ours, images_of(wrapped("sdxl")[0]))


@pytest.mark.parametrize("case", ["flux dev", "flux schnell", "sd1 LCM"])
def test_a_distilled_model_has_nothing_to_lead_away_from(case):
    with pytest.raises(UserError, match=r"^mine is distilled: .*Leave `--negative-prompt` out"):
        wrapped(case, negative_prompt="blurry")


def test_a_negative_prompt_that_is_cut_is_refused():
    with pytest.raises(UserError, match=r"^the negative prompt has \d+ tokens and mine reads 75"):
        wrapped("sd1 DDIM", negative_prompt="ugly " * 40)


@pytest.mark.parametrize("scale", [0, 1])
def test_a_negative_prompt_without_guidance_is_refused(scale):
    with pytest.raises(UserError, match="does nothing without guidance"):
        TrainConfig(forget="x", output="o", negative_prompt="ugly", trajectory_guidance_scale=scale)
    with pytest.raises(UserError, match="does nothing without guidance"):
        EvaluateConfig(original="a", unlearned=("b",), output="o", negative_prompt="ugly", guidance_scale=scale)


def test_trajectories_lead_away_from_it_and_targets_do_not():
    """ESD's target mixes the unconditional; mixed with the negative prompt it would teach the concept to be ugly."""
    row = Row("forget", "star", "star", {UNCONDITIONAL: 2.0, "star": -1.0})
    recipe = Recipe([row], Sum())
    banks = {}
    for negative in (None, "ugly"):
        model, _ = wrapped("sd1 DDIM", negative_prompt=negative)
        plan = plan_bank(model, recipe, trajectories=1, num_inference_steps=2, guidance_scale=GUIDANCE, seed=0)
        banks[negative] = (plan, build_bank(model, recipe, plan), model)
    (plain, before, model), (plan, bank, _) = banks.values()
    assert plain.branch_prompts(row) == [UNCONDITIONAL, "star"]
    assert plan.branch_prompts(row) == [NEGATIVE, "star", UNCONDITIONAL]
    assert plan.unet_evaluations == plain.unet_evaluations * 3 // 2
    assert bank.coefficients[0].tolist() == [0, -1, 2]
    assert torch.allclose(bank.teacher_preds[2, 0], before.teacher_preds[0, 0], atol=1e-5)
    assert bank.way_to_go() > 0
    assert not torch.allclose(bank.latents[1], before.latents[1])
    with torch.no_grad():
        asked = model.predict(bank.latents, bank.timesteps, model.encode([UNCONDITIONAL]).rows([0, 0]))
    assert torch.allclose(asked, bank.teacher_preds[2], atol=1e-5)


# ---- what is not computed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "scale", "rows"), [("flux dev", 3.5, 2), ("sd1 DDIM", 1.0, 2), ("sd1 DDIM", 3.5, 4)])
def test_the_unconditional_costs_nothing_where_it_guides_nothing(case, scale, rows):
    model, _ = wrapped(case)
    sizes = []

    def seen(module, args, kwargs):
        sizes.append(len(args[0] if args else kwargs["hidden_states"]))

    model.denoiser.register_forward_pre_hook(seen, with_kwargs=True)
    images_of(model, scale)
    assert set(sizes) == {rows}


def test_flux_keeps_the_unconditional_where_a_target_mixes_it():
    model, _ = wrapped("flux dev")
    rows = [Row("forget", "a", "a", {"a": 2.0, UNCONDITIONAL: -1.0}), Row("retain", "b", "b", {"b": 1.0})]
    plan = plan_bank(model, Recipe(rows, Sum()), trajectories=1, num_inference_steps=2, guidance_scale=3.5, seed=0)
    assert [plan.branch_prompts(row) for row in rows] == [["a", UNCONDITIONAL], ["b"]]
    assert plan.unet_evaluations == 2 * 3
    bank = build_bank(model, Recipe(rows, Sum()), plan)
    assert bank.own.tolist() == [0] * 4
    assert bank.way_to_go() > 0


# ---- a sampler by name -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "name"),
    [("sd1 PNDM", "DDIM"), ("sdxl Turbo", "Euler"), ("sd1 LCM", "DPMSolverMultistep"), ("sd3", "DPMSolverMultistep")],
)
def test_a_sampler_by_name_draws_what_plain_diffusers_draws_with_it(case, name):
    model, pipeline = wrapped(case, scheduler=name)
    assert type(model.pipeline.scheduler) is not type(pipeline.scheduler), "the caller's keeps its own"
    own = images_of(wrapped(case)[0])
    pipeline.scheduler = model.pipeline.scheduler
    ours = images_of(model)
    assert_same(ours, drawn_by(pipeline))
    assert not torch.equal(ours, own)


# ---- attention -------------------------------------------------------------------------------------------------------


def test_two_names_mean_torchs_own_and_one_is_recorded():
    recorded = {name: ModelOptions(attention=name).backend for name in (None, "native", "sdpa", "xformers", "flash")}
    assert recorded == {None: "native", "native": "native", "sdpa": "native", "xformers": "xformers", "flash": "flash"}
    assert torch.equal(*(images_of(wrapped("flux dev", attention=name)[0]) for name in (None, "sdpa")))


@pytest.mark.parametrize(
    ("case", "backend", "said"),
    [
        ("sd1 DDIM", "xformers", "needs a CUDA device"),
        ("sd1 DDIM", "flash", "do not ask diffusers' dispatcher"),
        ("flux dev", "xformers", "needs a CUDA device"),
        ("flux dev", "flash", "needs a CUDA device"),
        ("sd3.5", "xformers", "needs a CUDA device"),
        ("auraflow", "xformers", "layers that it cannot compute"),
        ("qwen-image", "flash", "layers that it cannot compute"),
        ("sana", "xformers", "layers that it cannot compute"),
    ],
)
def test_attention_that_cannot_run_is_one_line(monkeypatch, case, backend, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=rf"^`--attention {backend}`.*{said}") as error:
        wrapped(case, attention=backend)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("case", "backend"), [("sd1 DDIM", "xformers"), ("flux dev", "xformers"), ("flux dev", "flash")]
)
def test_a_library_that_is_missing_is_named(monkeypatch, case, backend):
    """With a device, diffusers itself is asked; here it has neither library."""
    pipeline = build(CASES[case])
    network = getattr(pipeline, "unet", None) or pipeline.transformer
    monkeypatch.setattr(attention.torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=rf"^`--attention {backend}` cannot run here: .*Install (xformers|flash-attn)"):
        set_attention(network, backend, "mine")


def test_the_environment_does_not_choose_the_attention(monkeypatch):
    """diffusers reads a variable where nobody sets a backend: what is recorded must be what ran."""
    model, _ = wrapped("flux dev")
    backends = {str(m.processor._attention_backend) for m in model.denoiser.modules() if hasattr(m, "processor")}
    assert len(backends) == 1
    assert "native" in backends.pop().lower()


@pytest.mark.parametrize("case", ["sd1 DDIM", "flux dev"])
def test_attention_is_set_by_diffusers_own_means(case):
    asked = []
    network = torch.nn.Module()
    network.layer = torch.nn.Module()
    network.layer.processor = (
        types.SimpleNamespace() if case != "flux dev" else types.SimpleNamespace(_attention_backend=None)
    )
    if case != "flux dev":
        network.layer.processor = diffusers.models.attention_processor.AttnProcessor2_0()
    network.set_attention_backend = asked.append
    network.enable_xformers_memory_efficient_attention = lambda: asked.append("classic")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention.torch.cuda, "is_available", lambda: True)
        set_attention(network, "xformers", "mine")
    assert asked == (["xformers"] if case == "flux dev" else ["classic"])


# ---- a part of the definition ----------------------------------------------------------------------------------------

CHANGES = {"resolution": "128", "negative_prompt": "ugly", "scheduler": "DDIM"}


def test_each_option_is_a_part_of_what_names_an_image():
    states = []
    for changes in ({}, *({key: value} for key, value in CHANGES.items())):
        model, _ = wrapped("sd1 PNDM", **changes)
        source = PipelineSource(model, SamplerSpec(2, GUIDANCE, 2), saved=False)
        source.content = lambda: "the same"
        states.append(json.dumps(source.state(), sort_keys=True, default=str))
    model, _ = wrapped("sd1 PNDM")
    model.options = ModelOptions(attention="xformers")  # which no device here can run
    source = PipelineSource(model, SamplerSpec(2, GUIDANCE, 2), saved=False)
    source.content = lambda: "the same"
    states.append(json.dumps(source.state(), sort_keys=True, default=str))
    assert len(set(states)) == 5


def test_an_evaluation_records_how_its_models_were_sampled(tmp_path):
    build(sd1).save_pretrained(tmp_path / "model")
    evaluate(
        str(tmp_path / "model"),
        str(tmp_path / "model"),
        ["a ring", "a cross"],
        metric=MeanDifference(),
        num_inference_steps=2,
        batch_size=2,
        control_pairs=2,
        output=tmp_path / "evaluation",
        device="cpu",
        **CHANGES,
        attention="sdpa",
    )
    spec = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())["spec"]
    assert spec["resolution"] == "128x128"
    assert spec["negative_prompt"] == "ugly"
    assert spec["sampler"] == "DDIMScheduler"
    assert spec["attention"] == "native"
    assert spec["steps"] == 2


def test_every_command_takes_the_same_names():
    fields = set(ModelOptions.__dataclass_fields__)
    for kind in (TrainConfig, MaskConfig, EvaluateConfig):
        assert fields <= set(kind.__dataclass_fields__)
    assert {"variant", "parts"} <= set(ApplyConfig.__dataclass_fields__)


def test_a_run_with_other_options_is_another_run(cli, tmp_path):
    words = [
        "train",
        "--forget",
        "star",
        "--output",
        tmp_path / "run",
        "--trajectories",
        "1",
        "--trajectory-steps",
        "2",
    ]
    words += ["--steps", "1", "--evaluation-prompts", "none", "--device", "cpu"]
    assert cli(*words, "--scheduler", "DDIM", "--negative-prompt", "ugly").status == 0
    saved = (tmp_path / "run" / "config.yaml").read_text()
    assert "scheduler: DDIM\n" in saved
    answer = cli(*words, "--resume", "--scheduler", "PNDM")
    assert answer.status == 2
    assert "has scheduler = 'DDIM', now it is 'PNDM'" in answer.err
    assert cli("train", "--resume", "--output", tmp_path / "run").status == 0


def test_help_lists_them_apart(cli):
    out = cli("train", "--help").out.split("options:")[1]
    assert out.index("--overwrite") < out.index("how the model is loaded and sampled") < out.index("--negative-prompt")


def test_load_model_takes_the_names_too():
    model = load_model("shapes", "cpu", scheduler="Euler", resolution=96)
    assert type(model.pipeline.scheduler).__name__ == "EulerDiscreteScheduler"
    assert model.latent_shape[1:] == (96 // model.pixels_per_latent,) * 2
    with pytest.raises(TypeError):
        load_model("shapes", "cpu", sampler="Euler")


def test_guidance_is_embedded_where_a_distilled_network_takes_it():
    model = wrap_pipeline(build(flux), "mine")
    conditions = model.encode(["x"]).tensors
    assert model.with_guidance(conditions, 3.5)["guidance"].tolist() == [3.5]
    assert model.guided_from(3.5) == ()


def test_models_that_are_compared_were_loaded_alike():
    sources = [
        PipelineSource(wrapped("sd1 DDIM", negative_prompt=text)[0], SamplerSpec(2, GUIDANCE, 2))
        for text in (None, "ugly")
    ]
    with pytest.raises(UserError, match="theirs was loaded with negative_prompt = 'ugly', the original with None"):
        check_comparable(*sources, "theirs")
    check_comparable(sources[0], sources[0], "theirs")
