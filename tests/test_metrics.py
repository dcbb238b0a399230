"""The field's metrics: their arithmetic against the libraries', every path on bundled or random nets, and refusals."""

import dataclasses
import importlib
import subprocess
import sys
import types
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from fastunlearn import plugins
from fastunlearn.errors import UserError
from fastunlearn.files.images import to_pil
from fastunlearn.metrics import cmmd, kid
from fastunlearn.metrics.base import Metric, MetricFactory, all_metrics, broken_metrics, load_metric, load_metrics
from fastunlearn.metrics.clip import Clip
from fastunlearn.metrics.cmmd import rbf_distance
from fastunlearn.metrics.fid import frechet_distance
from fastunlearn.metrics.kid import kernel_distance
from fastunlearn.models.runtime import mend_torchvision
from fastunlearn.worlds.shapes import SHAPES_WORLD

PROMPTS = ["a red star on a plain background", "a blue ring on a dotted background", "a pink heart", ""]


@pytest.fixture(scope="module")
def renders():
    """Images of the world and others of it, (12, 3, 64, 64) uint8 each."""
    from fastunlearn.worlds.shapes.world import render, sample_scenes

    return render(sample_scenes(12, 0)), render(sample_scenes(12, 1))


def features(count: int, width: int, seed: int, shift: float = 0.0) -> np.ndarray:
    draws = np.random.default_rng(seed)
    return draws.normal(size=(count, width)) @ draws.normal(size=(width, width)) / 3 + shift


def result_of(name, original, unlearned, prompts=None):
    metric = load_metric(name, world=SHAPES_WORLD)
    prompts = prompts or [f"prompt {index}" for index in range(len(original))]
    values = metric.measure(original, unlearned, prompts)
    assert (values.dtype, values.device.type, len(values)) == (torch.float32, "cpu", len(original))
    assert values.ndim == 2
    return metric.aggregate(values.numpy(), prompts)


@pytest.mark.filterwarnings("ignore:The `disp` argument")  # clean-fid's way to call scipy
@pytest.mark.parametrize("count", [400, 30])
def test_fid_equals_clean_fid_scipy_and_torchmetrics(count):
    """To 4 decimals; 30 images of 48 features make both covariances singular."""
    one, other = features(count, 48, 1), features(count, 48, 2, shift=0.3)
    means, covariances = [f.mean(0) for f in (one, other)], [np.cov(f, rowvar=False) for f in (one, other)]
    result = frechet_distance(one, other)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    shift = np.square(means[0] - means[1]).sum()
    by_scipy = shift + np.trace(covariances[0] + covariances[1] - 2 * root)
    mend_torchvision()
    clean = pytest.importorskip("cleanfid.fid").frechet_distance(means[0], covariances[0], means[1], covariances[1])
    theirs = pytest.importorskip("torchmetrics.image.fid")._compute_fid(
        *(torch.from_numpy(part) for pair in zip(means, covariances, strict=True) for part in pair)
    )
    assert result > 1
    if count > 48:
        assert round(result, 4) == round(float(by_scipy), 4) == round(float(clean), 4) == round(float(theirs), 4)
    else:  # where the others' general solvers lose digits
        assert result == pytest.approx(float(by_scipy), abs=1e-3)
        assert result == pytest.approx(float(theirs), abs=1e-3)


def test_fid_of_known_gaussians():
    """Covariances diag(4) and diag(9) share their axes: F (2 - 3)^2 + |shift|^2."""
    axes = np.concatenate([np.eye(3), -np.eye(3)])
    unit = axes * np.sqrt(5 / 2)  # its unbiased covariance is the identity
    assert frechet_distance(2 * unit, 3 * unit + [1, 0, 2]) == pytest.approx(3 + 5, abs=1e-12)
    assert frechet_distance(unit, unit[::-1]) == pytest.approx(0, abs=1e-9)


def test_cmmd_is_the_formula_and_does_not_depend_on_chunks(monkeypatch):
    one, other = features(20, 5, 1), features(30, 5, 2, shift=0.5)

    def kernel(x, y):
        return np.exp(-np.square(x[:, None] - y[None]).sum(-1) / (2 * 1.5**2)).mean()

    expected = 1000 * (kernel(one, one) + kernel(other, other) - 2 * kernel(one, other))
    assert rbf_distance(one, other, 1.5) == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr(cmmd, "_CHUNK", 7)
    assert rbf_distance(one, other, 1.5) == pytest.approx(expected, rel=1e-12)
    assert rbf_distance(one, one) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="no scale"):
        rbf_distance(np.ones((4, 2)), np.ones((4, 2)))


def test_kid_is_unbiased_and_draws_the_same_subsets(monkeypatch):
    pytest.importorskip("torchmetrics")
    compare = kernel_distance()
    one, other = features(60, 8, 1), features(60, 8, 2, shift=0.2)

    def kernel(x, y):
        return (x @ y.T / 8 + 1) ** 3

    whole = sum((kernel(x, x).sum() - np.diag(kernel(x, x)).sum()) / (60 * 59) for x in (one, other))
    assert compare(one, other) == pytest.approx(whole - 2 * kernel(one, other).mean(), rel=1e-9)
    monkeypatch.setattr(kid, "_SUBSET", 20)
    subsets = compare(one, other)
    assert subsets == compare(one, other)
    assert subsets == pytest.approx(whole - 2 * kernel(one, other).mean(), rel=0.5)


@pytest.mark.parametrize("name", all_metrics())
def test_every_metric_runs_on_the_bundled_world(name, renders):
    if name in ("kid", "ssim"):
        pytest.importorskip("torchmetrics")
    original, other = renders
    prompts = (PROMPTS * 3)[: len(original)]
    same, apart = result_of(name, original, original, prompts), result_of(name, original, other, prompts)
    assert same["n_pairs"] == 12
    assert same["of"].startswith("shapes-classifier@") or name == "ssim"
    if name == "clip-score":
        assert same["change"] == 0
        assert same["change_ci95"] == [0, 0]
        assert apart["original"] == same["value"] != apart["value"]
    elif name == "ssim":
        assert same["value"] == pytest.approx(1, abs=1e-5)
        assert apart["value"] < 0.9
    elif name == "kid":
        assert same["value"] < apart["value"]
    else:
        assert same["value"] == pytest.approx(0, abs=1e-3)
        assert apart["value"] > 0.01


@pytest.mark.parametrize("name", ["fid", "cmmd", "clip-score", "dreamsim"])
def test_company_changes_no_bit(name, renders):
    metric = load_metric(name, world=SHAPES_WORLD)
    original, other = (torch.cat([side] * 3) for side in renders)
    prompts = (PROMPTS * 9)[: len(original)]
    together = metric.measure(original, other, prompts)
    assert torch.equal(metric.measure(original[33:], other[33:], prompts[33:]), together[33:])


def test_the_order_of_pairs_does_not_change_sets(renders):
    """What makes these metrics blind to who is who: a permutation of one side is the same set."""
    original, other = renders
    for name in ("fid", "cmmd"):
        straight = result_of(name, original, other)["value"]
        assert result_of(name, original, other.flip(0))["value"] == pytest.approx(straight, rel=1e-9)
        assert result_of(name, original, original.flip(0))["value"] == pytest.approx(0, abs=1e-9)
    assert result_of("dreamsim", original, original.flip(0))["value"] > 0.01


def test_the_bundled_prompt_match_reads_the_prompt():
    from fastunlearn.worlds.shapes.world import BACKGROUNDS, COLORS, SHAPES, render, sample_scenes

    scenes = sample_scenes(4000, 3)
    wanted = (scenes.shape == SHAPES.index("ring")) & (scenes.color == COLORS.index("blue"))
    scenes = scenes[wanted & (scenes.background == BACKGROUNDS.index("plain"))]
    metric, images = load_metric("clip-score", world=SHAPES_WORLD), render(scenes)
    right, wrong, half, nothing = (
        float(metric.measure(images, images, [prompt] * len(images))[:, 1].mean())
        for prompt in ("a blue ring on a plain background", "a red star", "a ring that is red", "")
    )
    assert right > 90
    assert wrong < 10
    assert 40 < half < 60
    assert nothing > 90


def test_too_few_images_are_refused(renders):
    metric = load_metric("fid", world=SHAPES_WORLD)
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        metric.aggregate(np.zeros((1, 8), np.float32), ["x"])


def test_open_clip_on_a_random_model(monkeypatch, renders):
    """CLIPScore and CMMD as the field has them, the weights alone being random."""
    mend_torchvision()
    library = pytest.importorskip("open_clip")
    asked = []

    def tiny(architecture, pretrained, device):
        asked.append((architecture, pretrained))
        torch.manual_seed(0)
        vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
        model = library.CLIP(
            32, vision, {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
        )
        return model, library.image_transform(32, is_train=False)

    monkeypatch.setattr(library, "create_model_from_pretrained", tiny)
    original, other = renders
    score = load_metric("clip-score")
    values = score.measure(original, other, (PROMPTS * 3)[:12])
    model, preprocess = tiny("", "", "cpu")
    image = to_pil(original[:1])[0]
    with torch.inference_mode():
        text = model.eval().encode_text(library.get_tokenizer("ViT-B-32-quickgelu")([PROMPTS[0]]), normalize=True)
        expected = 100 * (model.encode_image(preprocess(image)[None], normalize=True) * text).sum()
    assert values[0, 0] == pytest.approx(float(expected), abs=1e-3)
    assert score.aggregate(values.numpy(), (PROMPTS * 3)[:12])["of"].startswith("open_clip/ViT-B-32-quickgelu@")
    distance = load_metric("cmmd")
    result = distance.aggregate(distance.measure(original, other, [""] * 12).numpy(), [""] * 12)
    assert result["value"] > 0
    assert asked[:1] == [("ViT-B-32-quickgelu", "openai")]
    assert ("ViT-L-14-336-quickgelu", "openai") in asked


def test_clean_fid_on_a_random_network(monkeypatch, renders, tmp_path):
    """FID's path through clean-fid: its resizing, its network's place, 0..255 in, features out."""
    mend_torchvision()
    library = pytest.importorskip("cleanfid.inception_torchscript")
    seen = []

    class Network(nn.Module):
        def __init__(self, path, download, resize_inside):
            super().__init__()
            seen.append((path, download, resize_inside))

        def forward(self, images):
            assert images.shape[1:] == (3, 299, 299)
            assert 1 < images.max() <= 255
            return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)

    monkeypatch.setattr(library, "InceptionV3W", Network)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    metric = load_metric("fid")
    original, other = renders
    values = metric.measure(original, other, [""] * 12)
    assert values.shape == (12, 24)
    assert metric.aggregate(values.numpy(), [""] * 12)["value"] > 1
    assert seen == [(str(tmp_path / "checkpoints"), True, False)]


def test_dreamsim_is_the_cosine_of_the_packages_embedding(monkeypatch, renders, tmp_path):
    from torchvision import transforms

    class Model(nn.Module):
        def embed(self, images):
            assert images.shape[1:] == (3, 224, 224)
            return nn.functional.adaptive_avg_pool2d(images, 3).flatten(1)

    class Library:
        @staticmethod
        def dreamsim(pretrained, device, cache_dir):
            print("Downloading checkpoint")
            resize = transforms.Compose([transforms.Resize((224, 224)), transforms.ToTensor()])
            return Model(), lambda image: resize(image)[None]

    monkeypatch.setitem(sys.modules, "dreamsim", Library)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    metric = load_metric("dreamsim")
    original, other = renders
    result = metric.measure(original, other, [""] * 12)[:, 0]
    library, preprocess = Library.dreamsim(True, "cpu", "")
    one, two = (library.embed(torch.cat([preprocess(p) for p in to_pil(side)])) for side in (original, other))
    torch.testing.assert_close(result, 1 - nn.functional.cosine_similarity(one, two), rtol=1e-4, atol=1e-6)
    assert not metric.measure(original, original, [""] * 12).any()


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("fid", "cleanfid.inception_torchscript", "metrics"),
        ("kid", "cleanfid.resize", "metrics"),
        ("clip-score", "open_clip", "metrics"),
        ("cmmd", "open_clip", "metrics"),
        ("dreamsim", "dreamsim", "dreamsim"),
        ("ssim", "torchmetrics.functional.image", "metrics"),
    ],
)
def test_a_missing_package_says_what_to_install(monkeypatch, name, module, extra):
    if name == "kid":
        pytest.importorskip("cleanfid")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"the metric {name} needs the package .*fastunlearn\[{extra}\]") as caught:
        load_metric(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "module"), [("clip-score", "open_clip"), ("fid", "cleanfid.inception_torchscript")])
def test_missing_weights_say_what_to_do(monkeypatch, capfd, tmp_path, name, module):
    mend_torchvision()
    library = pytest.importorskip(module)

    def fails(*arguments, **options):
        print("Downloading")
        raise OSError("no route\nto host")

    for attribute in ("create_model_from_pretrained", "InceptionV3W"):
        monkeypatch.setattr(library, attribute, fails, raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match=rf"the metric {name} needs the weights .*\(no route\).*leave the metric out"):
        load_metric(name)
    assert capfd.readouterr() == ("", "")


def test_an_unknown_name_lists_the_names():
    with pytest.raises(
        ValueError, match=r"unknown metric 'is'\. There are: fid, kid, cmmd, clip-score, dreamsim, ssim"
    ):
        load_metric("is")


def test_names_and_objects_mix(renders):
    class Own:
        name, of, needs_prompts = "own", "pixels", False

        def measure(self, original, unlearned, prompts):
            return (original.float() - unlearned.float()).flatten(1).mean(1, keepdim=True)

        def aggregate(self, values, prompts):
            return {"value": float(values.mean())}

    own = Own()
    assert isinstance(own, Metric)
    assert load_metrics(None) == []
    metrics = load_metrics(["fid", own], world=SHAPES_WORLD)
    assert [metric.name for metric in metrics] == ["fid", "own"]
    assert [metric.name for metric in load_metrics(" fid, clip-score,", world=SHAPES_WORLD)] == ["fid", "clip-score"]
    with pytest.raises(UserError, match="names a metric twice, fid"):
        load_metrics("fid,fid", world=SHAPES_WORLD)
    del Own.aggregate
    with pytest.raises(UserError, match="a Own is no metric, it lacks `aggregate`"):
        load_metrics([own])


def test_a_metric_of_another_package_is_found_by_name(monkeypatch):
    ours = load_metric("fid", world=SHAPES_WORLD)
    theirs = MetricFactory("theirs", "a metric of another package", lambda device, world: ours)
    entries = [
        types.SimpleNamespace(name="theirs", value="theirs:METRIC", load=lambda: theirs),
        types.SimpleNamespace(name="odd", value="odd:METRIC", load=lambda: "no metric"),
    ]
    monkeypatch.setattr(plugins, "entry_points", lambda group: entries if group == "fastunlearn.metrics" else [])
    assert list(all_metrics())[-1] == "theirs"
    assert load_metric("theirs") is ours
    assert "a str, not a fastunlearn.metrics.base.MetricFactory" in broken_metrics()["odd"]
    with pytest.raises(UserError, match="the metric 'odd' of another package cannot be loaded"):
        load_metric("odd")


def test_a_world_without_a_network_is_measured_with_the_fields(monkeypatch):
    worlds = []
    factory = MetricFactory("theirs", "", lambda device, world: worlds.append(world) or Silent())
    entry = types.SimpleNamespace(name="theirs", value="theirs:METRIC", load=lambda: factory)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [entry] if group == "fastunlearn.metrics" else [])
    load_metric("theirs", world=SHAPES_WORLD)
    load_metric("theirs", world=dataclasses.replace(SHAPES_WORLD, load_network=None))
    assert worlds == [SHAPES_WORLD, None]


class Silent:
    name, of, needs_prompts = "theirs", "nothing", False

    def measure(self, original, unlearned, prompts):
        return torch.zeros(len(original), 1)

    def aggregate(self, values, prompts):
        return {"value": 0.0}


# ---- the network that the weights were made for ---------------------------------------------------------------------


@pytest.fixture
def small_clips(monkeypatch):
    """open_clip as it is, but for the number of layers and for the weights, which are random instead of fetched."""
    mend_torchvision()
    pytest.importorskip("open_clip")
    factory = importlib.import_module("open_clip.factory")
    configs, built = factory.get_model_config, []

    def small(name):
        config = configs(name)
        for part in ("text_cfg", "vision_cfg"):
            config[part]["layers"] = 1
        return config

    def random_weights(model, path, **options):
        built.append(model)

    monkeypatch.setattr(factory, "get_model_config", small)
    monkeypatch.setattr(factory, "download_pretrained", lambda config, **options: "random")
    monkeypatch.setattr(factory, "load_checkpoint", random_weights)
    return built


@pytest.mark.parametrize("name", ["clip-score", "cmmd"])
def test_openais_weights_get_the_activation_that_they_were_trained_with(small_clips, name):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="QuickGELU mismatch")
        load_metric(name)
    (model,) = small_clips
    activations = {type(module).__name__ for module in model.modules() if "GELU" in type(module).__name__}
    assert activations == {"QuickGELU"}


def test_a_network_of_another_activation_is_no_metric(small_clips):
    with pytest.raises(UserWarning, match="QuickGELU mismatch"):
        Clip("ViT-B-32", "openai", "clip-score", "cpu")


@pytest.mark.parametrize("name", ["kid", "ssim"])
def test_a_library_that_needs_torchvision_loads_in_a_fresh_process(name):
    pytest.importorskip("torchmetrics")
    script = (
        "from fastunlearn.metrics.base import load_metric; from fastunlearn.worlds.shapes import SHAPES_WORLD; "
        f"print(load_metric({name!r}, world=SHAPES_WORLD).name)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == name, done.stderr[-1000:]


def test_no_library_is_imported_before_it_is_asked_for():
    script = (
        "import sys; from fastunlearn.metrics.base import all_metrics; all_metrics(); "
        "print(sorted({'torchmetrics', 'cleanfid', 'open_clip', 'dreamsim', 'diffusers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr[-1000:]
