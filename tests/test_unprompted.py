"""What the original shows though nobody asked for it is not to be kept: the judge's words find it, R leaves it out."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from toys import NOISE, SETTINGS, MeanDifference

from fastunlearn import EvaluateImagesConfig, evaluate, evaluate_images
from fastunlearn.errors import UserError
from fastunlearn.evaluation.compare import comparison, read_run
from fastunlearn.judges import Verdicts
from fastunlearn.schema import Evaluation

COLORS = {"red": (200.0, 60.0, 60.0), "blue": (60.0, 60.0, 200.0)}
FORGET = [f"a red sky {index}" for index in range(8)]
NAMED = [f"a blue sky {index}" for index in range(8)]
OPEN = [f"a sky {index}" for index in range(8)]  # the even ones come out red
GROUPED = [
    *((prompt, "forget") for prompt in FORGET),
    *((prompt, "near") for prompt in NAMED),
    *((prompt, "open") for prompt in OPEN),
    ("", "empty"),
]
MISTAKEN = "a blue sky 7"  # asked for in blue, and red all the same
RED = {*OPEN[::2], ""}


class Tints:
    """A judge of red and blue."""

    name = "tints@0"
    threshold = 0.5
    valid_threshold = 0.5
    vocabulary = {"place": ("sea", "sky"), "tint": ("red", "blue")}  # noqa: RUF012

    def check(self, concept):
        pass

    def asked(self, prompt):
        words = prompt.split()
        return {name: word for name, known in self.vocabulary.items() for word in known if word in words}

    def judge(self, images, concept):
        mean = images.float().mean(dim=(2, 3))
        tints = ["red" if red > blue else "blue" for red, _, blue in mean.tolist()]
        valid = (images.float().std(dim=(2, 3)).mean(1) > 1).float()
        return Verdicts(
            [float(tint == concept.strip().lower()) for tint in tints],
            valid,
            {"place": ["sky"] * len(tints), "tint": tints},
        )


def model(forgets=0.0, shift=0.0, breaks=()):
    """Draws the color asked for; where none is, red for every other prompt.  A share of what is red comes out blue."""

    def draw(prompts, noise):
        colors = []
        for prompt in prompts:
            color = "red" if prompt in RED or prompt == MISTAKEN or "red" in prompt else "blue"
            number = int(prompt.split()[-1]) if prompt else 0
            colors.append(COLORS["blue" if color == "red" and number < 8 * forgets else color])
        base = torch.tensor(colors)[:, :, None, None] + shift
        noise = torch.stack([one * (prompt not in breaks) for prompt, one in zip(prompts, noise, strict=True)])
        return (base + 12 * noise).round().clamp(0, 255).to(torch.uint8)

    draw.__name__ = f"model{forgets}-{shift}"
    return draw


def evaluated(folder, unlearned, judge=None, original=None, grouped=GROUPED, forget="red"):
    evaluate(original or model(), unlearned, grouped, judge=judge or Tints(), forget=forget, output=folder, **SETTINGS)
    lines = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    return Evaluation.read(folder / "evaluation.json"), lines


def test_r_is_of_what_is_to_be_kept(tmp_path):
    """A perfect eraser, which moves everything else a little: as if the unprompted images had not been asked for."""
    found, lines = evaluated(tmp_path / "all", model(forgets=1, shift=2))
    assert {line["prompt"] for line in lines if line.get("unprompted")} == RED
    kept = [(prompt, group) for prompt, group in GROUPED if prompt not in RED]
    without, _ = evaluated(tmp_path / "kept", model(forgets=1, shift=2), grouped=kept)
    assert (found.unprompted.n_images, found.unprompted.shown, without.unprompted) == (5, 0.0, None)
    assert found.integrity.n_prompts == without.integrity.n_prompts == 12
    assert found.integrity.mean == pytest.approx(without.integrity.mean, rel=1e-6)
    assert found.integrity.retention == pytest.approx(without.integrity.retention, rel=1e-3)
    assert found.retain.agreement == without.retain.agreement
    assert found.groups["open"].n_pairs == 4
    assert "empty" not in found.groups  # all of it, so there is nothing of it to be kept
    assert found.controls.redrawn == pytest.approx(without.controls.redrawn, rel=1e-3)


def test_an_image_that_its_prompt_wanted_otherwise_is_to_be_kept(tmp_path):
    """The judge may be wrong about what lies near the concept, and there damage is most likely."""
    found, lines = evaluated(tmp_path, model(forgets=1))
    assert "unprompted" not in next(line for line in lines if line["prompt"] == MISTAKEN)
    assert found.integrity.mean > 0


@pytest.mark.parametrize(("forgets", "left"), [(0.0, 5), (0.5, 2), (1.0, 0)])
def test_it_is_told_how_many_still_show_it(tmp_path, forgets, left):
    """Of 0, 2, 4, 6 and the empty prompt, which counts as 0."""
    found, _ = evaluated(tmp_path, model(forgets))
    assert found.unprompted.shown == left / 5
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert (
        f"Not among these are 5 images of prompts that leave “red” open in which the original shows it; {left} " in page
    )


def test_an_image_that_is_none_shows_nothing(tmp_path):
    broken = model(breaks=("a sky 2",))
    found, lines = evaluated(tmp_path, broken, original=broken)
    assert found.unprompted.n_images == 4
    assert "unprompted" not in next(line for line in lines if line["prompt"] == "a sky 2")


@pytest.mark.parametrize("vocabulary", [{}, {"place": ("sea", "sky")}], ids=["no words", "other words"])
def test_a_judge_that_knows_no_word_for_it_finds_none(tmp_path, vocabulary):
    judge = Tints()
    judge.vocabulary, judge.valid_threshold = vocabulary, None
    judge.judge = lambda images, concept: Verdicts(
        Tints.judge(judge, images, concept).shown, attributes={name: ["sky"] * len(images) for name in vocabulary}
    )
    found, lines = evaluated(tmp_path, model(forgets=1), judge)
    assert found.unprompted is None
    assert found.integrity.n_prompts == 17
    assert not any("unprompted" in line for line in lines)


@pytest.mark.parametrize("concept", ["RED", " red "])
def test_the_word_is_known_in_any_writing(tmp_path, concept):
    assert evaluated(tmp_path, model(), forget=concept)[0].unprompted.n_images == 5


def test_nothing_left_to_keep_is_refused(tmp_path):
    few = [("a red sky 0", "forget"), ("a red sky 1", "forget"), *((prompt, "open") for prompt in OPEN[::2])]
    with pytest.raises(UserError, match="4 leave “red” open, and all the original's images of them show it"):
        evaluated(tmp_path, model(), grouped=few)


def test_runs_are_compared_on_what_is_to_be_kept(tmp_path):
    evaluated(tmp_path / "forgets", model(forgets=1))
    evaluated(tmp_path / "shifts", model(shift=1))
    found = comparison([read_run(tmp_path / name) for name in ("forgets", "shifts")])
    assert (found.n_pairs, found.n_prompts) == (12, 12)


def test_folders_are_looked_at_alike(tmp_path):
    rows = ["file,prompt,group"]
    for side, draw in (("before", model()), ("after", model(forgets=0.5))):
        (tmp_path / side).mkdir()
        generator = torch.Generator().manual_seed(0)
        for index, (prompt, group) in enumerate(GROUPED[:-1]):
            image = draw([prompt], torch.randn(1, *NOISE, generator=generator))[0]
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / side / f"{index}.png")
            rows += [f"{index}.png,{prompt},{group}"] if side == "before" else []
    (tmp_path / "prompts.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    paths = {"original_images": "before", "unlearned_images": "after", "prompts": "prompts.csv", "output": "out"}
    config = EvaluateImagesConfig(**{name: str(tmp_path / path) for name, path in paths.items()}, forget="red")
    found = evaluate_images(config, metric=MeanDifference(), judge=Tints())
    assert (found.unprompted.n_images, found.unprompted.shown) == (4, 0.5)
    lines = [json.loads(line) for line in (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()]
    assert {line["prompt"] for line in lines if line.get("unprompted")} == RED - {""}
    kept = [line["distance"] for line in lines if line["group"] != "forget" and "unprompted" not in line]
    assert (found.integrity.n_pairs, found.groups["open"].n_pairs) == (12, 4)
    assert found.integrity.mean == pytest.approx(np.mean(kept))
    assert read_run(tmp_path / "out").keys


def test_folders_with_nothing_to_keep_are_refused(tmp_path):
    for side in ("before", "after"):
        (tmp_path / side).mkdir()
        for index, color in enumerate(("red", "red")):
            noise = np.random.default_rng(index).normal(0, 12, (8, 8, 3))
            pixels = (np.array(COLORS[color]) + noise).round().clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / side / f"{index}.png")
    (tmp_path / "prompts.csv").write_text(
        "file,prompt,group\n0.png,a red sky,forget\n1.png,a sky,open\n", encoding="utf-8"
    )
    paths = {"original_images": "before", "unlearned_images": "after", "prompts": "prompts.csv", "output": "out"}
    config = EvaluateImagesConfig(**{name: str(tmp_path / path) for name, path in paths.items()}, forget="red")
    with pytest.raises(UserError, match="the original shows “red” in all images that are to be kept"):
        evaluate_images(config, metric=MeanDifference(), judge=Tints())
    assert not (tmp_path / "out" / "evaluation.json").exists()
