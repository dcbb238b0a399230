"""Models that are plain functions, so that an evaluation takes milliseconds, and a distance for them."""

import hashlib

import numpy as np
import torch

from fastunlearn.errors import UserError
from fastunlearn.files.run_folder import RECORD
from fastunlearn.judges import Verdicts
from fastunlearn.schema import RunRecord

NOISE = (3, 8, 8)


def names_in(folder):
    """The names in an output folder, but for the record that makes it ours."""
    return {path.name for path in folder.iterdir()} - {RECORD}


def draw(prompts, noise):
    """Each prompt's own color, and the noise on top."""
    colors = [list(hashlib.sha256(prompt.encode()).digest()[:3]) for prompt in prompts]
    base = torch.tensor(colors, dtype=torch.float32)[:, :, None, None] * 0.6 + 50
    return (base + 12 * noise).round().clamp(0, 255).to(torch.uint8)


def shifted(amount, name="shifted"):
    """The original with every image brighter, some more than others."""

    def function(prompts, noise):
        strength = torch.tensor([len(prompt) % 5 for prompt in prompts])[:, None, None, None]
        return (draw(prompts, noise).int() + amount * strength).clamp(0, 255).to(torch.uint8)

    function.__name__ = name
    return function


def deaf(prompts, noise):
    """Draws the same whatever is asked."""
    return draw(["whatever"] * len(prompts), noise)


class MeanDifference:
    """A distance with the parts of a ``PerceptualDistance`` that an evaluation uses."""

    metric = "mean-difference@0"

    def distance(self, images0, images1):
        return (images0.float() - images1.float()).abs().mean(dim=(1, 2, 3)) / 255


class Brightness:
    """A metric of two features a pair."""

    name = "brightness"
    of = "pixels"
    needs_prompts = False

    def measure(self, original, unlearned, prompts):
        assert len(original) == len(unlearned) == len(prompts)
        return torch.stack([original.float().mean(dim=(1, 2, 3)), unlearned.float().mean(dim=(1, 2, 3))], dim=1)

    def aggregate(self, values, prompts):
        assert len(values) == len(prompts)
        return {"original": float(np.mean(values[:, 0])), "unlearned": float(np.mean(values[:, 1]))}


class Reader:
    """A judge of toy images: sees the concept in bright ones, and nothing valid in what has no noise."""

    name = "reader@0"
    threshold = 0.6
    valid_threshold = 0.5
    vocabulary = {"tint": ("red", "green", "blue")}  # noqa: RUF012

    def check(self, concept):
        if concept == "unknown":
            raise UserError("the reader does not know 'unknown'.")

    def asked(self, prompt):
        return {"tint": "red"} if "xx" in prompt else {}

    def judge(self, images, concept):
        mean = images.float().mean(dim=(2, 3))
        return Verdicts(
            shown=mean.mean(1) / 255,
            valid=(images.float().std(dim=(1, 2, 3)) > 1).float(),
            attributes={"tint": [self.vocabulary["tint"][index] for index in mean.argmax(1).tolist()]},
        )


def run_record(**changes):
    """The record of a run that never was."""
    content = {
        "method": "esd",
        "concept": "star",
        "model": "shapes",
        "versions": {"torch": "2"},
        "device": "cpu",
        "threads": 1,
        "hashes": {"original": "a", "unlearned": "b"},
        "trainable_parameters": 1,
        "total_parameters": 2,
        "rows": 3,
        "unet_evaluations": {"bank": 4, "loop": 5},
        "seconds": {"training_s": 1.5},
    }
    return RunRecord(**content | changes)


SETTINGS = {"metric": MeanDifference(), "noise_shape": NOISE, "batch_size": 4}
PROMPTS = [f"thing number {index} {'x' * (index % 7)}" for index in range(13)]


def first_two():
    """A judge that sees the concept in the first images that it is shown, the original's, and never again."""
    looks = []

    def judge(images, concept):
        looks.append(1)
        return [float(len(looks) <= 2)] * len(images)

    return judge
