"""The color distance: CIELAB as others compute it, and what it sees and does not see."""

import colorsys

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

from fastunlearn import evaluate
from fastunlearn.metrics.color import ColorDistance, _projected, to_lab
from fastunlearn.metrics.distances import check_distance, load_perceptual
from fastunlearn.schema import Evaluation
from fastunlearn.worlds.shapes.world import render, sample_scenes

#: sRGB -> CIELAB (D65, 2 degrees), as published for the primaries.
KNOWN = {
    (255, 255, 255): (100.0, 0.0, 0.0),
    (0, 0, 0): (0.0, 0.0, 0.0),
    (255, 0, 0): (53.24, 80.09, 67.20),
    (0, 255, 0): (87.73, -86.18, 83.18),
    (0, 0, 255): (32.30, 79.19, -107.86),
    (119, 119, 119): (50.03, 0.0, 0.0),
}


@pytest.fixture(scope="module")
def images():
    return render(sample_scenes(8, 0))


def plain(color, size=64):
    return torch.tensor(color, dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, size, size).contiguous()


@pytest.mark.parametrize(("color", "lab"), KNOWN.items())
def test_cielab_is_that_of_the_tables(color, lab):
    cells = to_lab(plain(color, size=100))
    assert cells.shape == (1, 3, 32, 32)
    assert cells[0, :, 3, 4].tolist() == pytest.approx(lab, abs=0.02)


def test_it_is_scikit_images_lab_where_that_is_installed():
    color = pytest.importorskip("skimage.color", reason="scikit-image is not installed")
    images = torch.randint(0, 256, (3, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    theirs = color.rgb2lab(images.permute(0, 2, 3, 1).numpy())
    assert np.allclose(to_lab(images).permute(0, 2, 3, 1).numpy(), theirs, atol=0.02)


def test_one_color_for_another_is_their_delta_e():
    """Where all colors move by one vector, the distance is its length, but for the finite number of directions."""
    gap = np.subtract(KNOWN[255, 0, 0], KNOWN[0, 255, 0])
    found = ColorDistance().distance(plain((255, 0, 0)), plain((0, 255, 0))).item()
    assert found == pytest.approx(np.linalg.norm(gap), rel=0.05)


def test_on_one_direction_it_is_scipys_wasserstein_distance(images):
    mine, theirs = _projected(images[:1])[0], _projected(images[1:2])[0]
    expected = np.mean([wasserstein_distance(a, b) for a, b in zip(mine.numpy(), theirs.numpy(), strict=True)])
    assert ColorDistance().distance(images[:1], images[1:2]).item() == pytest.approx(2 * expected, rel=1e-6)


def test_equal_images_are_at_0_and_order_does_not_matter(images):
    images = images[:6]
    distance = ColorDistance()
    assert check_distance(distance) is distance
    assert distance.distance(images, images).tolist() == [0.0] * 6
    there, back = distance.distance(images[:3], images[3:]), distance.distance(images[3:], images[:3])
    assert torch.equal(there, back)
    assert there.dtype == torch.float32
    assert distance.metric == "color-32-16"


def turned(images, degrees):
    """Images with their hue turned, pixel by pixel."""
    pixels = images.permute(0, 2, 3, 1).reshape(-1, 3).double().div(255).tolist()
    result = []
    for r, g, b in pixels:
        h, s, v = colorsys.rgb_to_hsv(r, g, b)
        result.append(colorsys.hsv_to_rgb((h + degrees / 360) % 1, s, v))
    shaped = torch.tensor(result).mul(255).round().to(torch.uint8)
    return shaped.view(len(images), *images.shape[2:], 3).permute(0, 3, 1, 2).contiguous()


def test_it_sees_what_the_perceptual_distance_does_not(images):
    """A hue turned by 20 degrees weighs more than a shift by 3 pixels; to the other distance it is the reverse."""
    hue, shift = turned(images, 20), torch.roll(images, 3, dims=-1)
    color, other = ColorDistance(), load_perceptual("shapes")
    assert (color.distance(images, hue) > color.distance(images, shift)).float().mean() >= 0.75
    assert (other.distance(images, hue) < other.distance(images, shift)).float().mean() >= 0.75


def test_an_evaluation_says_how_far_colors_moved(tmp_path):
    """A model that turns every hue keeps less of the colors than of the rest; one that shifts keeps them all."""

    def original(prompts, noise):
        return noise.mul(60).add(128).clamp(0, 255).to(torch.uint8).repeat_interleave(8, 2).repeat_interleave(8, 3)

    def hue(prompts, noise):
        return turned(original(prompts, noise), 60)

    def shift(prompts, noise):
        return torch.roll(original(prompts, noise), 3, dims=-1)

    prompts = [f"thing {number}" for number in range(12)]
    report = evaluate(
        original,
        {"hue": hue, "shift": shift},
        prompts=prompts,
        metric="shapes",
        noise_shape=(3, 4, 4),
        output=tmp_path / "e",
    )
    found = {result.name: result.evaluation.integrity for result in report.results}
    assert found["shift"].color.mean == pytest.approx(0.0, abs=1e-5)
    assert found["shift"].color.retention == pytest.approx(1.0, abs=1e-4)
    assert found["shift"].retention < 0.95
    assert found["hue"].color.retention < found["shift"].color.retention - 0.2
    low, high = found["hue"].color.retention_ci95
    assert low <= found["hue"].color.retention <= high
    means = [line["color_distance"] for line in report.results[0].pairs]
    assert np.mean(means) == pytest.approx(found["hue"].color.mean, rel=1e-5)
    assert "Kept of its" in (tmp_path / "e" / "report.html").read_text()
    assert Evaluation.read(tmp_path / "e" / "hue" / "evaluation.json").integrity.color == found["hue"].color
