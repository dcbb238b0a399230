"""What a run needs of memory: the counts against what is measured on tiny models, and at the sizes of real ones."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import auraflow, build, ddim, flux, lumina2, pixart, qwen_image, sana, saved, sd1, sd3, sdxl, z_image

from fastunlearn.evaluation.generators import PipelineSource
from fastunlearn.methods import get_method
from fastunlearn.methods.recipe import Concept
from fastunlearn.models.loading import load_frozen, load_model
from fastunlearn.models.placement import Placement
from fastunlearn.models.sampling import SamplerSpec
from fastunlearn.models.sd import StableDiffusion
from fastunlearn.models.sketch import Blueprint, Sketch
from fastunlearn.training.bank import build_bank, plan_bank
from fastunlearn.training.engine import TorchEngine
from fastunlearn.training.memory import Workload, count_phases
from fastunlearn.training.meter import Meter
from fastunlearn.training.selection import Selection, select_parameters
from fastunlearn.training.trainer import Schedule, Trainer

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import real_sizes

GB = 1e9
slow = pytest.mark.slow
FRUGAL = {
    **{"mixed_precision": "bf16", "weights_dtype": "bf16", "gradient_checkpointing": True, "offload": True},
    **{"bank_batch_size": 4, "decode_batch_size": 1, "evaluation_batch_size": 4, "micro_batch_size": 1},
    # ESD's defaults: 16 trajectories of 50 points and two predictions.
    **{"trajectories": 16, "rows": 16 * 50, "prompts": 3, "branches": 2},
}


# ---- against torch's own allocator -----------------------------------------------------------------------------------

BY_LENGTH = {"lumina2": lumina2, "qwen-image": qwen_image, "z-image": z_image}  # what they take follows the prompts
TINY = {"sd1": lambda: sd1(ddim()), "sdxl": sdxl, "flux": flux} | BY_LENGTH


def allocated(work):
    """The most bytes that torch's CPU allocator had given out at once during ``work``, as its profiler saw it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak, result


def test_the_meter_sees_what_the_allocator_gives():
    def work():
        x = torch.zeros(1000, 1000)
        y = (x + 1).view(-1)[10:]
        del x
        return (y * y).sum()

    with Meter() as meter:
        work()
    assert allocated(work)[0] == pytest.approx(meter.peak, rel=1e-3)
    assert meter.peak == pytest.approx(2 * 4e6, rel=1e-3)
    with Meter(known := [torch.zeros(10)]) as meter:
        known[0].add_(1).view(2, 5)
    assert meter.peak == 0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = saved(tmp_path_factory, TINY)
    return lambda name: str(folder(name))


CHECKPOINTED, LEAN = {"gradient_checkpointing": True}, {"weights_dtype": "bf16"}


@pytest.fixture
def one_thread():
    """oneDNN's convolutions have scratch memory for each thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("sdxl", CHECKPOINTED), ("flux", LEAN), ("z-image", {})),
        *(pytest.param("sd1", options, marks=slow) for options in ({}, CHECKPOINTED, LEAN)),
        *(pytest.param("sdxl", options, marks=slow) for options in ({}, LEAN)),
        *(pytest.param("flux", options, marks=slow) for options in ({}, CHECKPOINTED)),
        *(pytest.param(name, options, marks=slow) for name in BY_LENGTH for options in (CHECKPOINTED, LEAN)),
        *(pytest.param(name, {}, marks=slow) for name in ("lumina2", "qwen-image")),
    ],
    ids=str,
)
def test_the_counts_are_what_torch_takes(tiny, name, options, one_thread):
    """Bank, training and evaluation of a tiny model, run for real under the profiler of torch's allocator."""
    lean = options.get("weights_dtype") == "bf16"
    if lean and name != "flux" and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this CPU has no bfloat16: oneDNN convolves float32 copies, which no device with it has")
    model = load_model(tiny(name), "cpu", placement=Placement("bf16" if lean else "fp32"))
    names = select_parameters(model, model.default_group if model.default_group in model.groups else "all")
    model.settle_denoiser(names)
    method = get_method("ovw")
    settings = method.defaults_for(*model.defaults_keys)
    monet, painter, dog, cat = (_long(model, words) for words in ("a Monet", "a painter", "a dog", "a cat"))
    recipe = method.recipe(Concept("a painter", (monet,), {monet: painter}, (dog, cat), settings))
    plan = plan_bank(model, recipe, trajectories=4, num_inference_steps=3, guidance_scale=3.0, seed=0)
    precision = "bf16" if lean else "no"
    work = Workload(
        tuple(names),
        micro_batch_size=4,
        bank_batch_size=4,
        trajectories=len(plan.assignments),
        branches=plan.branches,
        rows=plan.rows,
        prompts=len(recipe.prompts()),
        mixed_precision=precision,
        evaluation_batch_size=4,
        decode_batch_size=2,
        **options,
    )
    counted = {phase.name: phase.device for phase in count_phases(Blueprint.of_model(model), work)}

    bytes_of_bank, bank = allocated(lambda: build_bank(model, recipe, plan, micro_batch_size=4))

    def train():
        selection, options = Selection.of(model.denoiser, names), {"mixed_precision": precision}
        engine = TorchEngine(model.denoiser, selection, learning_rate=1e-4, **options)
        trainer = Trainer(model, bank, recipe.rule, engine, Schedule(2, 4, 0, 10, 0), Path())
        for _ in range(2):
            trainer._train_step()

    if options.get("gradient_checkpointing"):
        model.checkpoint_gradients()
    bytes_of_training, _ = allocated(train)
    frozen = load_frozen(tiny(name), "cpu", placement=model.placement)
    spec = SamplerSpec(2, 3.0, 4, precision, decode_batch_size=2)
    keys = [(_long(model, f"a dog {number}"), 0) for number in range(4)]
    bytes_of_evaluation, _ = allocated(lambda: PipelineSource(frozen, spec).generate(keys))

    def predicted(phase, *kinds):
        return sum(counted[phase].get(kind, 0) for kind in kinds)

    # The evaluation keeps 8 batches of prompts and the unconditional; here there are 4.
    states = 5 * counted["evaluation"]["conditions"] // (8 * 4 + 1)
    made = max(
        predicted("encoding", "activations", "conditions"), predicted("bank", "activations", "bank", "conditions")
    )
    for expected, got in (
        (made, bytes_of_bank),
        (predicted("training", "activations", "gradients", "optimizer"), bytes_of_training),
        (predicted("evaluation", "activations") + states, bytes_of_evaluation),
    ):
        assert 0.85 * got < expected < 1.15 * got, (expected, got)


def _long(model, words):
    """A prompt as long as the model reads."""
    tokens_of_a = model.count_tokens("a a") - model.count_tokens("a")
    return words + " a" * ((model.max_tokens - model.count_tokens(words)) // tokens_of_a)


ALL = TINY | {"sd3": sd3, "pixart": pixart, "sana": sana, "auraflow": auraflow}


def test_a_denoiser_that_asks_for_values_is_not_counted_and_the_plan_says_so(tiny, tmp_path, cli, monkeypatch):
    """Lengths of prompts are known; what an image will be is not."""
    predict = StableDiffusion.predict

    def asking(model, latents, *rest, **named):
        return predict(model, latents * float(latents.mean() > 0.1), *rest, **named)

    monkeypatch.setattr(StableDiffusion, "predict", asking)
    words = ["--model", tiny("sd1"), "--forget", "dog", "--method", "esd", "--trajectories", 1]
    words += ["--trajectory-steps", 2, "--output", tmp_path / "run"]
    answer = cli("train", "--dry-run", *words)
    assert (answer.status, answer.err) == (0, "")
    assert "memory      not counted" in answer.out


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == "sd3" else [slow]) for name in ALL])
def test_every_family_is_counted_without_its_weights(name, tmp_path):
    """A folder's settings give the loaded model's shapes, and every phase has a peak."""
    build(ALL[name]).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), "cpu")
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()
    blueprint = Blueprint.of_folder(tmp_path, name)
    sketch = Sketch.of(blueprint).model
    shapes = [{n: p.shape for n, p in one.denoiser.named_parameters()} for one in (model, sketch)]
    assert shapes[0] == shapes[1]
    assert blueprint.parameters() == Blueprint.of_model(model).parameters()
    names = select_parameters(model, model.default_group if model.default_group in model.groups else "all")
    work = Workload(tuple(names), **{**FRUGAL, "trajectories": 2, "rows": 6})
    counted = count_phases(blueprint, work)
    assert [phase.name for phase in counted] == ["encoding", "bank", "training", "export", "evaluation"]
    assert all(phase.device["activations"] for phase in counted if phase.name != "export")
    # Of an edit the new weights, of a mask the summed gradients, beside the denoiser.
    trained = sum(dict(model.denoiser.named_parameters())[name].nbytes for name in names)
    (edit,) = count_phases(blueprint, dataclasses.replace(work, is_edit=True, rows=0), ["edit"])
    (mask,) = count_phases(blueprint, dataclasses.replace(work, makes_mask=True), ["mask"])
    assert edit.device["new weights"] == mask.device["saliency"] == trained
    assert mask.device["activations"] > edit.device["activations"]


# ---- at the sizes of real models -------------------------------------------------------------------------------------

#: What diffusers' and transformers' own classes count, and the models' cards say.
PUBLIC = {
    "sd15": {"unet": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863},
    "sdxl": {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840, "vae": 83_653_863},
    "flux-dev": {"transformer": 11_901_408_320, "text_encoder_2": 4_762_310_656, "text_encoder": 123_060_480},
    "z-image": {"transformer": 6_154_908_736, "text_encoder": 4_022_468_096},
    "qwen-image": {"transformer": 20_430_401_088, "text_encoder": 8_292_166_656, "vae": 126_892_531},
}


@pytest.fixture(scope="module")
def blueprint(tmp_path_factory):
    made = {}

    def of(name):
        if name not in made:
            folder = real_sizes.write(name, tmp_path_factory.mktemp(name))
            made[name] = Blueprint.of_folder(folder, name)
        return made[name]

    return of


def names_of(blueprint, selector):
    return tuple(select_parameters(Sketch.of(blueprint).model, selector))


@pytest.mark.parametrize("name", PUBLIC)
def test_the_real_sizes_are_those_of_the_public_models(blueprint, name):
    counted = blueprint(name).parameters()
    assert {part: counted[part] for part in PUBLIC[name]} == PUBLIC[name]


def peaks(blueprint, work, *only):
    return {phase.name: phase.device_bytes / GB for phase in count_phases(blueprint, work, only)}


def test_sdxl_trains_its_cross_attention_below_24_gb(blueprint):
    model = blueprint("sdxl")
    counted = peaks(model, Workload(names_of(model, "cross-attention"), **FRUGAL), "training", "export")
    assert max(counted.values()) < 24, counted
    # Weights in bfloat16, what trains in float32 with gradients and two moments: nothing less would do.
    frozen, trained = 2_567_463_684 - 546_201_600, 546_201_600
    least = (2 * frozen + 16 * trained) / GB
    assert least < counted["training"] < least + 4


@slow
def test_every_phase_of_sdxl_fits_24_gb_evaluation_at_batch_4_too(blueprint):
    model = blueprint("sdxl")
    counted = peaks(model, Workload(names_of(model, "cross-attention"), **FRUGAL))
    assert list(counted) == ["encoding", "bank", "training", "export", "evaluation"]
    assert max(counted.values()) < 24, counted


@slow
def test_sdxl_trains_an_adapter_below_16_gb(blueprint):
    pytest.importorskip("peft", reason="peft is not installed")
    model = blueprint("sdxl")
    work = Workload(names_of(model, "cross-attention"), rank=16, **FRUGAL)
    assert peaks(model, work, "training")["training"] < 16
    assert peaks(model, work, "bank")["bank"] < 16


@slow
def test_flux_trains_an_adapter_below_40_gb(blueprint):
    pytest.importorskip("peft", reason="peft is not installed")
    model = blueprint("flux-dev")
    work = Workload(names_of(model, "text-attention"), rank=16, **FRUGAL)
    counted = peaks(model, work)
    assert max(counted.values()) < 40, counted
    assert counted["training"] > 2 * 11.9, "the weights alone"


@slow
def test_an_evaluation_of_sdxl_in_float32_needs_turns_and_no_less(blueprint):
    """At batch 4: below 24 GB if networks take turns, not below if both models lie on the device."""
    model = blueprint("sdxl")
    work = Workload((), **FRUGAL | {"mixed_precision": "no", "weights_dtype": "fp32"})
    assert peaks(model, work, "evaluation")["evaluation"] < 24
    whole = dataclasses.replace(work, offload=False)
    assert peaks(model, whole, "evaluation")["evaluation"] > 2 * 4 * 2.567


# ---- what is said of it ----------------------------------------------------------------------------------------------


def sparse(name, folder):
    """The model's folder with weight files that have the real size, and take no place on the disk."""
    real_sizes.write(name, folder)
    sketch = Sketch.of(Blueprint.of_folder(folder, name))
    for part in sketch.model.pipeline.components:
        network = getattr(sketch.model.pipeline, part)
        if not isinstance(network, torch.nn.Module):
            continue
        header, end = {}, 0
        for key, parameter in network.state_dict().items():
            size = 2 * parameter.numel()
            header[key] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        file = "model.safetensors" if part.startswith("text") else "diffusion_pytorch_model.safetensors"
        with (folder / part / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
    return folder


@slow
def test_a_dry_run_of_flux_reads_no_weights_and_names_the_flags_that_make_it_fit(cli, tmp_path, monkeypatch):
    from fastunlearn.training import budget

    monkeypatch.setattr(budget, "memory_left", lambda: 24 * 2**30)
    folder = sparse("flux-dev", tmp_path / "flux")
    flags = ["--model", folder, "--method", "esd", "--forget", "Van Gogh", "--output", tmp_path / "run", "--dry-run"]
    flags += ["--trajectories", "2", "--device", "cpu", "--device-memory-gib"]
    answer = cli("train", *flags, 80)
    assert (answer.status, answer.err) == (0, "")
    for phase in ("encoding", "bank", "training", "export", "evaluation"):
        assert f" {phase} " in answer.out
    assert "training does not fit 80.0 GiB: add `" in answer.out
    assert "estimate    none: the weights do not fit the memory that this machine has left" in answer.out
    frugal = ["--offload", "--mixed-precision", "bf16", "--weights-dtype", "bf16", "--gradient-checkpointing"]
    frugal += ["--bank-batch-size", 1, "--evaluation-batch-size", 1, "--decode-batch-size", 1]
    answer = cli("train", *flags, 80, *frugal)
    assert (answer.status, answer.err) == (0, "")
    assert "every phase fits 80.0 GiB" in answer.out


@slow
@pytest.mark.parametrize("name", ["z-image", "qwen-image"])
def test_a_dry_run_counts_what_a_machine_could_not_even_map(cli, tmp_path, monkeypatch, name):
    """Denoisers that ask for the lengths of prompts; one's file is larger than the memory of most machines."""
    from fastunlearn.training import budget

    monkeypatch.setattr(budget, "memory_left", lambda: 8 * 2**30)
    flags = ["--model", sparse(name, tmp_path / name), "--method", "esd", "--forget", "Van Gogh", "--dry-run"]
    flags += ["--output", tmp_path / "run", "--trajectories", "2", "--device", "cpu", "--device-memory-gib", 2000]
    answer = cli("train", *flags)
    assert (answer.status, answer.err) == (0, "")
    assert "every phase fits 2000.0 GiB" in answer.out


def test_what_does_not_fit_is_told_with_the_flag_that_mends_it(cli, tmp_path):
    """The bundled model on a device of so few bytes that a phase is too large, and again with what was said."""
    train = ("train", "--forget", "star", "--output", tmp_path / "run", "--dry-run", "--device", "cpu")
    # So many rows that several phases do not fit, and few enough for a bank that does, which no flag makes smaller.
    train += ("--trajectories", 16, "--trajectory-steps", 50)
    answer = cli(*train, "--device-memory-gib", "0.06")
    assert answer.status == 0
    told = [line.strip() for line in answer.out.splitlines() if "does not fit" in line]
    assert len(told) >= 2, answer.out
    flags = [word for line in told for quoted in line.split("`")[1::2] for word in quoted.split()]
    assert "--offload" in flags
    answer = cli(*train, "--device-memory-gib", "0.06", *flags)
    assert "every phase fits 0.1 GiB" in answer.out


# ---- the figures of the docs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def counts():
    """benchmarks/memory.py, which is called as our own module is."""
    path = Path(__file__).parents[1] / "benchmarks" / "memory.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_memory", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_the_docs_are_those_of_the_results(counts):
    results = json.loads(counts.RESULTS.read_text())
    for page in ("memory.md", "distributed.md"):
        path = counts.DOCS / page
        assert counts.rendered(path, results) == path.read_text()
    models = {(one["model"], tuple(one["gpus"])) for one in results["processes"]}
    assert models == {("sdxl", ("1", "8", "64")), ("flux-dev", ("1", "8", "64"))}


@slow
def test_the_results_are_what_is_counted_today(counts):
    results = json.loads(counts.RESULTS.read_text())
    assert counts.on_device(*counts.DEVICE[0]) == results["device"][0]
    assert counts.over(*counts.PROCESSES[0]) == results["processes"][0]
