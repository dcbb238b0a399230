"""A judge of another package: how much of an image is of the color that the concept names.

`fastunlearn evaluate --judge main-color --forget red ...` asks it.
"""

import hashlib

import torch

from fastunlearn.errors import UserError
from fastunlearn.judges import Judge, Verdicts

COLORS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 70, 220), "gray": (128, 128, 128)}


class MainColor(Judge):
    threshold = 0.3

    def __init__(self, device="cpu", option=""):
        self.vocabulary = {"main": tuple(COLORS)}
        self.table = torch.tensor(list(COLORS.values()), dtype=torch.float32)
        self.reach = float(option or 90)
        self.name = f"main-color@{hashlib.sha256(repr((COLORS, self.reach)).encode()).hexdigest()[:12]}"

    def check(self, concept):
        if concept not in COLORS:
            raise UserError(f"the judge main-color knows {', '.join(COLORS)}, not {concept!r}. Name one of them.")

    def asked(self, prompt):
        named = [word for word in prompt.split() if word in COLORS]
        return {"main": named[0]} if named else {}

    def judge(self, images, concept):
        pixels = images.permute(0, 2, 3, 1).flatten(1, 2).float()
        near = torch.cdist(pixels, self.table.expand(len(images), -1, -1)) < self.reach
        shares = near.float().mean(1)
        return Verdicts(
            shares[:, list(COLORS).index(concept)],
            attributes={"main": [list(COLORS)[index] for index in shares.argmax(1).tolist()]},
        )
