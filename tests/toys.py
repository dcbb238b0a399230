"""Models that are plain functions, so that an evaluation takes milliseconds, and a distance for them."""

import hashlib

import numpy as np
import torch

from fastunlearn.files.run_folder import RECORD

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

    def measure(self, original, unlearned, prompts):
        assert len(original) == len(unlearned) == len(prompts)
        return torch.stack([original.float().mean(dim=(1, 2, 3)), unlearned.float().mean(dim=(1, 2, 3))], dim=1)

    def summarize(self, values, prompts):
        assert len(values) == len(prompts)
        return {"original": float(np.mean(values[:, 0])), "unlearned": float(np.mean(values[:, 1]))}


SETTINGS = {"metric": MeanDifference(), "noise_shape": NOISE, "batch_size": 4}
PROMPTS = [f"thing number {index} {'x' * (index % 7)}" for index in range(13)]
