"""What saves memory changes no result: checkpointing, bfloat16 weights, batches, offloading; all families."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import auraflow, build, ddim, flux, lumina2, pixart, sana, saved, sd1, sd3, sdxl

from fastunlearn import TrainConfig, evaluate, unlearn
from fastunlearn.errors import UserError
from fastunlearn.evaluation.generators import PipelineSource
from fastunlearn.methods import get_method
from fastunlearn.methods.recipe import Concept
from fastunlearn.models.loading import load_frozen, load_model
from fastunlearn.models.placement import Placement, Shelf
from fastunlearn.models.sampling import SamplerSpec, initial_noise
from fastunlearn.training.bank import build_bank, plan_bank
from fastunlearn.training.selection import select_parameters

FAMILIES = {
    **{"sd1": lambda: sd1(ddim()), "sdxl": sdxl, "sd3": sd3, "flux": flux, "pixart": pixart, "sana": sana},
    **{"lumina2": lumina2, "auraflow": auraflow},
}
LEAN = Placement("bf16")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """``folder_of("sdxl")``: the pipeline of a case, saved once."""
    return saved(tmp_path_factory, FAMILIES)


def conditions_of(model, prompts=("a dog", "a painter")):
    return model.encode(prompts).rows([0, 1])


def asked(model, conditions, *, autocast=False, trained=()):
    """A prediction of two rows and the gradients of its square."""
    named = dict(model.denoiser.named_parameters())
    for name in trained:
        named[name].requires_grad_(True)
    noise = initial_noise(["a", "b"], [0, 1], model.latent_shape)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        prediction = model.predict(noise, torch.tensor([10.0, 500.0]), conditions)
    if trained:
        prediction.square().mean().backward()
    return prediction.detach(), {name: named[name].grad for name in trained}


def bits(tensors):
    return {name: tensor.view(torch.int32) for name, tensor in tensors.items()}


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(bits(one)[name], bits(other)[name]) for name in one)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_bit(folder_of, family):
    plain, frugal = (load_model(str(folder_of(family)), "cpu") for _ in range(2))
    frugal.checkpoint_gradients()
    names, conditions = select_parameters(plain, "all"), conditions_of(plain)
    names = [name for name in names if "pos_embed" not in name]
    counts = []
    for model in (plain, frugal):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.nbytes) or t, lambda t: t):
            prediction, gradients = asked(model, conditions, trained=names)
        counts.append((prediction, {n: g for n, g in gradients.items() if g is not None}, sum(saved)))
    assert torch.equal(counts[0][0], counts[1][0])
    assert len(counts[0][1]) > 10
    assert same_bits(counts[0][1], counts[1][1])
    assert counts[1][2] < counts[0][2]


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_in_bfloat16_give_what_autocast_makes_of_float32_ones(folder_of, family):
    """To the bit, forward and backward; what trains is float32 and has the file's own values."""
    whole, lean = load_model(str(folder_of(family)), "cpu"), load_model(str(folder_of(family)), "cpu", placement=LEAN)
    names = select_parameters(whole, whole.default_group if whole.default_group in whole.groups else "all")
    lean.settle_denoiser(names)
    kept = dict(lean.denoiser.named_parameters())
    assert all(torch.equal(kept[name], dict(whole.denoiser.named_parameters())[name]) for name in names)
    assert {kept[name].dtype for name in names} == {torch.float32}
    frozen = sum(p.nbytes for n, p in kept.items() if n not in names)
    assert frozen < 0.7 * sum(p.nbytes for n, p in whole.denoiser.named_parameters() if n not in names)
    conditions = conditions_of(whole)
    expected = asked(whole, conditions, autocast=True, trained=names)
    got = asked(lean, conditions, trained=names)
    assert torch.equal(got[0], expected[0])
    assert same_bits(got[1], expected[1])
    # Text encoders are rounded too: their states are close, not the same.
    states, exact = (conditions_of(model)["encoder_hidden_states"] for model in (lean, whole))
    assert states.dtype == torch.float32
    assert (states - exact).norm() < 0.02 * exact.norm()


def test_files_in_bfloat16_are_read_as_they_are(folder_of, tmp_path):
    """A file's own values, in norms too, and never at twice its size; tables that a network computes stay float32."""
    for name in ("flux", "pixart"):
        pipeline = build(FAMILIES[name]).to(torch.bfloat16)
        pipeline.save_pretrained(tmp_path / name)
        whole = load_frozen(str(tmp_path / name), "cpu", placement=Placement())
        lean = load_frozen(str(tmp_path / name), "cpu", placement=LEAN)
        conditions = conditions_of(whole)
        assert torch.equal(asked(lean, conditions)[0], asked(whole, conditions, autocast=True)[0])


def bank_of(model, **options):
    method = get_method("esd")
    settings = method.defaults_for("stable-diffusion")
    recipe = method.recipe(Concept(None, ("Monet", "a Monet"), {}, (), settings))
    plan = plan_bank(model, recipe, trajectories=5, num_inference_steps=3, guidance_scale=3.0, seed=0)
    return build_bank(model, recipe, plan, **options)


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_a_bank_in_other_batches_is_the_same_up_to_rounding(folder_of, family):
    model = load_model(str(folder_of(family)), "cpu")
    whole, single = bank_of(model), bank_of(model, micro_batch_size=2)
    first = [row * (len(whole) // 5) for row in range(5)]
    assert torch.equal(whole.latents[first], single.latents[first]), "the noise"
    assert torch.equal(whole.timesteps, single.timesteps)
    assert torch.equal(whole.coefficients, single.coefficients)
    scale = whole.teacher_preds.abs().max()
    assert (whole.teacher_preds - single.teacher_preds).abs().max() < 1e-4 * scale
    again = bank_of(model, micro_batch_size=2)
    assert torch.equal(single.teacher_preds, again.teacher_preds)


@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_an_image_does_not_depend_on_those_it_is_decoded_with(folder_of, family):
    model = load_model(str(folder_of(family)), "cpu")
    latents = initial_noise(["a"] * 5, range(5), model.latent_shape)
    whole = model.decode(latents)
    for size in (1, 2, 3):
        images = model.decode(latents, size)
        assert (images.int() - whole.int()).abs().max() <= 1
        assert torch.equal(images[2:], model.decode(latents[2:], size)), "another company"


class Recorder(Shelf):
    """A shelf whose device is where networks wait, and that tells who was on it."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.told = []

    def hold(self, network):
        super().hold(network)
        if not self.told or self.told[-1] is not network:
            self.told.append(network)


def test_networks_take_turns_and_nothing_else_changes(folder_of):
    """On one device: two models, of which one network at a time is held, draw what they draw without."""
    shelf = Recorder()
    models = [load_frozen(str(folder_of("sdxl")), "cpu", placement=Placement("fp32", shelf)) for _ in range(2)]
    plain = load_model(str(folder_of("sdxl")), "cpu")
    spec = SamplerSpec(2, 3.0, 2)
    keys = [("a dog", 0), ("a cat", 1)]
    images = [PipelineSource(model, spec).generate(keys) for model in (*models, plain)]
    assert torch.equal(images[0], images[2])
    assert torch.equal(images[1], images[2])
    pipelines = [model.pipeline for model in models]
    order = [
        name for network in shelf.told for p in pipelines for name, part in p.components.items() if part is network
    ]
    turns = ["text_encoder", "text_encoder_2", "unet", "vae"]
    assert [name for n, name in enumerate(order) if n == 0 or order[n - 1] != name][-2:] == ["unet", "vae"]
    assert set(order) == set(turns)
    assert shelf._held is pipelines[1].vae
    assert PipelineSource(models[0], spec).takes_turns
    assert not PipelineSource(plain, spec).takes_turns


def test_on_a_cpu_there_is_nothing_to_offload(cli, folder_of, tmp_path):
    assert Placement.of("fp32", torch.device("cpu"), offload=True).shelf is None
    assert Placement.of("fp32", torch.device("cuda"), offload=True).shelf is not None
    assert Placement.of("fp32", torch.device("cuda"), offload=False).shelf is None
    answer = cli("train", "--forget", "star", "--output", tmp_path / "run", "--offload", "--dry-run", "--device", "cpu")
    assert answer.status == 0
    assert "`--offload` changes nothing here" in answer.out + answer.err


TRAIN = {
    **{"forget": "Van Gogh", "method": "ovw", "anchor": "a painter", "retain_prompts": "a dog;a cat", "steps": 2},
    **{"trajectories": 2, "trajectory_steps": 3, "learning_rate": 1e-3, "micro_batch_size": 2, "device": "cpu"},
}


def trained(folder, output, **settings):
    return unlearn(TrainConfig(model=str(folder), output=str(output), **TRAIN | settings))


def stored(folder, part):
    return load_file(next((folder / part).glob("*.safetensors")))


@pytest.mark.parametrize(("family", "part"), [("sdxl", "unet"), ("flux", "transformer")])
def test_a_run_with_every_flag_changes_what_it_may_alone_and_is_the_run_without(folder_of, tmp_path, family, part):
    """Checkpointing, offloading and decoding change no bit of the weights; bfloat16 weights leave the others' bytes."""
    free = {"gradient_checkpointing": True, "offload": True, "decode_batch_size": 1, "evaluation_batch_size": 2}
    folder = folder_of(family)
    plain, frugal = (trained(folder, tmp_path / name, **more) for name, more in (("a", {}), ("b", free)))
    original, first, second = (stored(path, part) for path in (folder, plain.model, frugal.model))
    assert same_bits(first, second)
    lean = trained(folder, tmp_path / "c", mixed_precision="bf16", weights_dtype="bf16", **free)
    third = stored(lean.model, part)
    changed = {name for name in original if not torch.equal(original[name], third[name])}
    selected = set(select_parameters(load_model(str(folder), "cpu"), json_of(lean.folder)["trainable"]))
    assert changed
    assert changed <= selected
    moved = torch.cat([(first[n] - original[n]).flatten() for n in sorted(selected)])
    leaned = torch.cat([(third[n] - original[n]).flatten() for n in sorted(selected)])
    assert torch.cosine_similarity(moved, leaned, dim=0) > 0.7, "the same way, in another precision"
    same = [p for p in folder.rglob("*") if p.is_file() and part not in p.parts]
    assert all((lean.model / p.relative_to(folder)).read_bytes() == p.read_bytes() for p in same)


def json_of(folder):
    import yaml

    return yaml.safe_load((folder / "config.yaml").read_text())


def test_a_lean_student_starts_where_its_teacher_is(folder_of):
    """Retain rows have an error of exactly 0 before training: bank and student run in one precision."""
    model = load_model(str(folder_of("sdxl")), "cpu", placement=LEAN)
    model.settle_denoiser(select_parameters(model, "cross-attention"))
    bank = bank_of(model)
    rows = torch.arange(4)
    with torch.autocast("cpu", torch.bfloat16):
        prediction = model.predict(bank.latents[rows], bank.timesteps[rows], bank.conditions.rows(bank.condition[rows]))
    own = [bank.teacher_preds[k, rows] for k in range(len(bank.teacher_preds))]
    error = min(float((prediction - one).abs().max()) for one in own)
    assert error < 1e-2 * float(prediction.abs().max())


def test_an_evaluation_in_bfloat16_weights_and_slices_says_so(folder_of, tmp_path):
    folder = folder_of("sd1")
    options = {
        "prompts": [("a dog", "keep"), ("a cat", "keep"), ("Van Gogh", "forget")],
        "batch_size": 2,
        "num_inference_steps": 2,
        "control_pairs": 2,
        "metric": Pixels(),
        "device": "cpu",
        "forget": "Van Gogh",
    }
    plain = evaluate(str(folder), str(folder), mixed_precision="bf16", **options)
    lean = evaluate(
        str(folder),
        str(folder),
        mixed_precision="bf16",
        weights_dtype="bf16",
        decode_batch_size=1,
        offload=True,
        **options,
    )
    for report in (plain, lean):
        assert report.results[0].evaluation.integrity.mean == 0
    said = [report.results[0].evaluation.spec for report in (plain, lean)]
    assert [one["dtype"] for one in said] == ["bfloat16 autocast", "bfloat16 weights and autocast"]
    assert ["decode_batch_size" in one for one in said] == [False, True]


class Pixels:
    metric = "pixels"

    def distance(self, first, second):
        return (first.float() - second.float()).abs().mean((1, 2, 3)) / 255


def test_objects_have_no_other_weights(folder_of):
    pipeline = build(FAMILIES["sd1"])
    with pytest.raises(UserError, match="for models by name"):
        evaluate(
            pipeline,
            pipeline,
            ["a", "b"],
            mixed_precision="bf16",
            weights_dtype="bf16",
            device="cpu",
            metric=Pixels(),
            forget="x",
        )


def test_a_denoiser_that_cannot_checkpoint_is_refused(folder_of, monkeypatch):
    model = load_model(str(folder_of("flux")), "cpu")
    monkeypatch.setattr(type(model.denoiser), "_supports_gradient_checkpointing", False)
    with pytest.raises(UserError, match=r"`--gradient-checkpointing`: the FluxTransformer2DModel of .* cannot"):
        model.checkpoint_gradients()


@pytest.mark.gpu
def test_on_a_gpu_one_network_at_a_time_lies_on_it(folder_of):
    device = torch.device("cuda")
    model = load_frozen(str(folder_of("sdxl")), device, placement=Placement.of("fp32", device, offload=True))
    parts = {name: part for name, part in model.pipeline.components.items() if isinstance(part, torch.nn.Module)}

    def there():
        return {name for name, part in parts.items() if next(part.parameters()).device.type == "cuda"}

    assert there() == set()
    conditions = conditions_of(model)
    assert there() == {"text_encoder_2"}
    latents = initial_noise(["a", "b"], [0, 1], model.latent_shape).to(device)
    model.predict(latents, torch.tensor([10.0, 500.0], device=device), conditions)
    assert there() == {"unet"}
    model.decode(latents)
    assert there() == {"vae"}
