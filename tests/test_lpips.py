"""The distance equals the lpips package, is exactly 0 on itself, and does not depend on a pair's company."""

import hashlib
import subprocess
import sys
import urllib.error
import warnings

import pytest
import torch
from safetensors.torch import save_file

from fastunlearn.metrics.distances import all_distances, load_perceptual
from fastunlearn.metrics.lpips import PerceptualDistance, from_lpips
from fastunlearn.models.runtime import mend_torchvision
from fastunlearn.worlds import all_worlds
from fastunlearn.worlds.classifier import Classifier, to_pixel_values
from fastunlearn.worlds.shapes.classifier import HEADS


def images(count: int, seed: int, size: int = 64) -> torch.Tensor:
    return torch.randint(256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def package(net: str):
    """An ``lpips.LPIPS`` with the package's channel weights on a random trunk."""
    mend_torchvision()
    lpips = pytest.importorskip("lpips")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torchvision on the package's way to call it
        return lpips.LPIPS(net=net, pnet_rand=True, verbose=False)


@pytest.fixture
def random_classifier(monkeypatch):
    torch.manual_seed(0)
    classifier = Classifier(HEADS).eval()
    monkeypatch.setattr("fastunlearn.worlds.shapes.load_classifier", lambda: classifier)
    return classifier


@pytest.mark.parametrize("net", ["alex", "vgg", "squeeze"])
def test_equals_the_lpips_package(net):
    model = package(net)
    one, other = images(5, 1), images(5, 2)
    other[0] = one[0]
    other[1] = (one[1] // 2 + 40).to(torch.uint8)
    distance = from_lpips(model, micro_batch_size=3)
    with torch.inference_mode():
        expected = model(to_pixel_values(one), to_pixel_values(other)).flatten()
    result = distance.distance(one, other)
    assert result.dtype == torch.float32
    assert result.shape == (5,)
    assert result[0] == 0
    assert (result[1:] > 1e-4).all()
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(distance.distance(other, one), result)
    assert not distance.distance(one, one).any()


def test_shapes_is_a_mean_over_layers_of_unit_normalised_differences(random_classifier):
    distance = load_perceptual("shapes")
    one, other = images(4, 1), images(4, 2)
    with torch.inference_mode():
        expected = torch.stack(
            [
                (torch.nn.functional.normalize(a, dim=1) - torch.nn.functional.normalize(b, dim=1))
                .square()
                .sum(1)
                .mean((1, 2))
                for a, b in zip(
                    random_classifier.features(to_pixel_values(one)),
                    random_classifier.features(to_pixel_values(other)),
                    strict=True,
                )
            ]
        ).mean(0)
    result = distance.distance(one, other)
    assert (result > 0.01).all()
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(distance.distance(other, one), result)
    assert not distance.distance(one, one).any()


def test_company_changes_no_bit(random_classifier):
    distance = load_perceptual("shapes")
    one, other = images(70, 1), images(70, 2)
    together = distance.distance(one, other)
    assert torch.equal(distance.distance(one[65:], other[65:]), together[65:])
    order = torch.randperm(70, generator=torch.Generator().manual_seed(3))
    assert torch.equal(distance.distance(one[order], other[order]), together[order])


def test_no_pairs_no_distances(random_classifier):
    assert load_perceptual("shapes").distance(images(0, 1), images(0, 1)).shape == (0,)


def test_metric_names_the_weights(random_classifier):
    first = load_perceptual("shapes").metric
    name, _, digest = first.partition("@")
    assert name == "lpips-form/shapes-classifier"
    assert len(digest) == 12
    assert int(digest, 16) >= 0
    assert load_perceptual("shapes").metric == first
    with torch.no_grad():
        random_classifier.stages[0][0].weight[0, 0, 0, 0] += 1e-3
    assert load_perceptual("shapes").metric != first


def test_metric_is_a_sha256_prefix():
    distance = PerceptualDistance(torch.nn.Identity(), [torch.ones(3)], "own")
    digest = hashlib.sha256(b"weights.0 torch.float32 (3,)\n" + torch.ones(3).numpy().tobytes())
    assert distance.metric == f"own@{digest.hexdigest()[:12]}"


def test_bundled_weights_see_a_change():
    distance = load_perceptual("shapes")
    one = torch.full((2, 3, 64, 64), 200, dtype=torch.uint8)
    other = one.clone()
    other[1, :, 20:44, 20:44] = torch.tensor([200, 30, 30], dtype=torch.uint8)[:, None, None]
    near, far = distance.distance(one, other).tolist()
    assert near == 0
    assert far > 0.01


def test_trunk_weights_come_from_torchvision_names(monkeypatch):
    """A fetched file is put where the package would put it, with the caller's random numbers left alone."""
    model = package("squeeze")
    state = {"features." + key.partition(".")[2]: value for key, value in model.net.state_dict().items()}
    calls = []

    def fetched(url, folder, **options):
        calls.append((url, options))
        return {**state, "classifier.1.weight": torch.zeros(1)}

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetched)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    distance = load_perceptual("lpips-squeeze")
    assert torch.equal(torch.get_rng_state(), before)
    assert distance.metric == from_lpips(model, "lpips/squeeze").metric
    [(url, options)] = calls
    assert "squeezenet1_1" in url
    assert options["weights_only"]
    assert options["check_hash"]


def torchvision_state(model):
    """The trunk's weights under the names that torchvision gives them."""
    return {"features." + key.partition(".")[2]: value for key, value in model.net.state_dict().items()}


@pytest.mark.parametrize("net", ["alex", "vgg", "squeeze"])
def test_trunk_weights_come_from_a_file(net, tmp_path):
    model = package(net)
    save_file(torchvision_state(model) | {"classifier.1.weight": torch.zeros(1)}, tmp_path / "trunk.safetensors")
    distance = load_perceptual(f"lpips-{net}", trunk_weights=tmp_path / "trunk.safetensors", micro_batch_size=2)
    assert distance.metric == from_lpips(model, f"lpips/{net}").metric
    one, other = images(3, 1), images(3, 2)
    one[0] = other[0]
    with torch.inference_mode():
        expected = model(to_pixel_values(one), to_pixel_values(other)).flatten()
    torch.testing.assert_close(distance.distance(one, other), expected, rtol=1e-5, atol=1e-5)
    assert not distance.distance(one, one).any()


def test_half_precision_trunk_weights_are_widened(tmp_path):
    model = package("squeeze")
    state = {name: value.half() for name, value in torchvision_state(model).items()}
    save_file(state, tmp_path / "trunk.safetensors")
    distance = load_perceptual("lpips-squeeze", trunk_weights=tmp_path / "trunk.safetensors")
    assert {parameter.dtype for parameter in distance.parameters()} == {torch.float32}
    assert distance.metric != from_lpips(model, "lpips/squeeze").metric
    assert distance.distance(images(1, 1), images(1, 2)) > 1e-4


def test_bad_trunk_weights_are_refused(tmp_path):
    state, path = torchvision_state(package("squeeze")), tmp_path / "trunk.safetensors"

    def refusal(name="lpips-squeeze"):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            load_perceptual(name, trunk_weights=path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "cannot read the trunk weights" in refusal()
    path.write_bytes(b"no safetensors")
    assert "cannot read the trunk weights" in refusal()
    save_file({name: value for name, value in state.items() if name != "features.0.bias"}, path)
    assert "`features.0.bias` is missing" in refusal()
    save_file(state | {"features.0.bias": torch.zeros(3)}, path)
    assert "`features.0.bias` has the shape (3,)" in refusal()
    save_file(state | {"features.0.bias": torch.full_like(state["features.0.bias"], torch.nan)}, path)
    assert "NaN" in refusal()
    save_file(state, path)
    assert "does not hold the trunk alex" in refusal("lpips-alex")
    assert "leave `--trunk-weights` out" in refusal("shapes")


@pytest.mark.parametrize(
    "problem",
    [
        urllib.error.URLError("no route"),
        RuntimeError('invalid hash value (expected "1")'),
        EOFError(),
        {"features.0.x": 1},
    ],
    ids=["unreachable", "wrong hash", "truncated", "another network"],
)
def test_missing_trunk_weights_say_what_to_do(monkeypatch, problem):
    package("alex")

    def fetch(*arguments, **options):
        if isinstance(problem, Exception):
            raise problem
        return problem

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    with pytest.raises(
        ValueError, match=r"lpips-alex needs the ImageNet weights alexnet-.*\.pth.*put the intact file"
    ) as caught:
        load_perceptual("lpips-alex")
    assert "\n" not in str(caught.value)


def test_missing_package_says_what_to_do(monkeypatch):
    package("alex")
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ValueError, match="needs the packages lpips and torchvision"):
        load_perceptual("lpips-alex")


def test_unknown_name_lists_the_names():
    assert list(all_distances()) == [*all_worlds(), "lpips-alex", "lpips-vgg", "lpips-squeeze"]
    with pytest.raises(ValueError, match=r"unknown perceptual distance 'lpips'\. There are: shapes, .*lpips-alex, "):
        load_perceptual("lpips")


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (images(2, 1).float(), images(2, 1), r"got torch.float32 \(2, 3, 64, 64\)"),
        (images(2, 1), images(2, 1)[:, :1], r"got torch.uint8 \(2, 1, 64, 64\)"),
        (images(2, 1)[0], images(2, 1)[0], r"got torch.uint8 \(3, 64, 64\)"),
        (images(2, 1), images(3, 1), "both sides must have one shape"),
        (images(2, 1), images(2, 1, 32), "both sides must have one shape"),
    ],
)
def test_bad_images_are_refused(random_classifier, one, other, message):
    with pytest.raises(ValueError, match=message):
        load_perceptual("shapes").distance(one, other)


def test_bad_construction_is_refused():
    with pytest.raises(ValueError, match="micro_batch_size"):
        PerceptualDistance(torch.nn.Identity(), [torch.ones(3)], "own", micro_batch_size=0)
    model = package("alex")
    model.version = "0.0"
    with pytest.raises(ValueError, match="version"):
        from_lpips(model)


def test_import_is_light():
    check = (
        "import sys, fastunlearn.metrics.distances; assert not {'lpips', 'torchvision', 'diffusers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
