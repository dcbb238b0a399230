"""Can the judge tell?  It is asked on the original's own images first, and refused where it cannot."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from toys import NOISE, SETTINGS, MeanDifference, names_in

from fastunlearn import EvaluateImagesConfig, evaluate, evaluate_images
from fastunlearn.errors import UserError
from fastunlearn.evaluation.calibration import LEAST_SENSITIVITY, asking, calibration
from fastunlearn.schema import Evaluation, FoldersEvaluation

FORGET = [f"a bright thing {index}" for index in range(30)]
KEPT = [f"a dark thing {index}" for index in range(30)]
GROUPED = [(prompt, "forget") for prompt in FORGET] + [(prompt, "near") for prompt in KEPT]


def paints(share, dark=0.0):
    """A model that paints so large a share of the bright things bright, and of the dark ones."""

    def model(prompts, noise):
        def is_bright(prompt):
            number = int(prompt.split()[-1])
            return number < 30 * (share if "bright" in prompt else dark)

        level = torch.tensor([200.0 if is_bright(prompt) else 50.0 for prompt in prompts])[:, None, None, None]
        return (level + 5 * noise).round().clamp(0, 255).to(torch.uint8)

    return model


def light(images, concept):
    """A judge of brightness."""
    return images.float().mean(dim=(1, 2, 3)) / 255


# ---- the rule --------------------------------------------------------------------------------------------------------


def of(seen, n_asked, others_seen, n_others):
    shown = np.array(
        [True] * seen + [False] * (n_asked - seen) + [True] * others_seen + [False] * (n_others - others_seen)
    )
    asked = np.arange(len(shown)) < n_asked
    return calibration(shown, asked, ~asked)


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 40), st.integers(1, 40))
def test_the_verdict_is_what_interval_and_test_say(data, n_asked, n_others):
    """Both written out once more: the interval by its formula, the test as a sum of the hypergeometric law."""
    seen, others = data.draw(st.integers(0, n_asked)), data.draw(st.integers(0, n_others))
    found = of(seen, n_asked, others, n_others)
    z = stats.norm.ppf(0.975)
    share = seen / n_asked
    middle = (share + z**2 / (2 * n_asked)) / (1 + z**2 / n_asked)
    half = z / (1 + z**2 / n_asked) * np.sqrt(share * (1 - share) / n_asked + z**2 / (4 * n_asked**2))
    np.testing.assert_allclose(found.asked.ci95, [middle - half, middle + half], atol=1e-9)

    def p(k, total):
        law = stats.hypergeom(n_asked + n_others, total, n_asked)
        return sum(law.pmf(count) for count in range(k, min(total, n_asked) + 1))

    assert found.p_value == pytest.approx(p(seen, seen + others), abs=1e-9)
    if middle + half < LEAST_SENSITIVITY:
        assert found.verdict == "cannot tell"
    elif found.p_value < 0.05:
        assert found.verdict == "tells"
    else:
        assert found.verdict == ("too few images" if p(n_asked, n_asked) >= 0.05 else "cannot tell")


@pytest.mark.parametrize(
    ("counts", "verdict"),
    [
        ((28, 30, 1, 30), "tells"),
        ((30, 30, 30, 30), "cannot tell"),  # sees it everywhere
        ((0, 30, 0, 30), "cannot tell"),
        ((8, 30, 0, 30), "cannot tell"),  # beyond chance, and yet misses most
        ((2, 30, 28, 30), "cannot tell"),  # the wrong way round
        ((15, 30, 3, 30), "tells"),
        ((2, 2, 0, 2), "too few images"),
        ((0, 4, 0, 2), "cannot tell"),
    ],
)
def test_known_verdicts(counts, verdict):
    assert of(*counts).verdict == verdict


def test_without_images_of_both_kinds_there_is_no_calibration():
    nothing = np.zeros(3, dtype=bool)
    assert calibration(nothing, ~nothing, nothing) is None
    assert calibration(nothing, nothing, ~nothing) is None


def test_asked_are_the_prompts_that_name_the_concept_where_any_does():
    prompts = ["by Van Gogh", "by Vam Gogh", "swirling stars", "by Monet", "like van gogh, but by Monet"]
    to_forget = np.array([True, True, True, False, False])
    asked, unasked = asking(prompts, to_forget, "Van Gogh")
    assert asked.tolist() == [True, False, False, False, False]
    assert unasked.tolist() == [False, False, False, True, False]
    asked, unasked = asking(prompts, to_forget, "nudity")
    assert asked.tolist() == to_forget.tolist()
    assert unasked.tolist() == (~to_forget).tolist()


# ---- in an evaluation ------------------------------------------------------------------------------------------------


def test_a_judge_that_can_tell_is_told_first_and_its_numbers_are_counted(tmp_path):
    settings = {"judge": light, "forget": "bright", "output": tmp_path / "out", **SETTINGS}
    evaluate(paints(28 / 30), paints(0.1), GROUPED, **settings)
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert list(content).index("calibration") < min(list(content).index(name) for name in ("integrity", "erasure"))
    found = Evaluation.read(tmp_path / "out" / "evaluation.json").calibration
    assert (found.asked.n_images, found.asked.shown, found.verdict) == (30, 28 / 30, "tells")
    assert (found.unasked.n_images, found.unasked.shown) == (30, 0.0)
    page = (tmp_path / "out" / "report.html").read_text()
    said = "sees “bright” on the original's own images in 28 of 30"
    text = page.replace("&#39;", "'")
    assert 0 < text.index(said) < text.index('class="verdicts"')


@pytest.mark.parametrize(
    ("original", "said"),
    [
        (paints(1.0, dark=1.0), "in 24 of 24 that ask for it and in 24 of 24 that do not"),
        (paints(0.0), "in 0 of 24 that ask for it and in 0 of 24"),
        (paints(0.2), "in [45] of 24 that ask for it and in 0 of 24"),
    ],
)
def test_a_judge_that_cannot_tell_is_refused_before_another_model_generates(original, said, tmp_path):
    def never(prompts, noise):
        raise AssertionError("generated")

    settings = {"judge": light, "forget": "bright", **SETTINGS}
    with pytest.raises(UserError, match=f"function light cannot tell 'bright'.*{said}.*`--trust-judge`"):
        evaluate(original, never, GROUPED, output=tmp_path / "out", **settings)
    assert not list(tmp_path.iterdir()), "so that it can be started again with another judge"


def test_who_insists_is_warned_in_every_page(tmp_path, capsys):
    from fastunlearn.cli.console import table

    settings = {"judge": light, "forget": "bright", "trust_judge": True, "output": tmp_path / "out", **SETTINGS}
    report = evaluate(paints(0.0), paints(0.0), GROUPED, **settings)
    assert report.results[0].evaluation.calibration.verdict == "cannot tell"
    assert 'class="poor">The judge function light' in (tmp_path / "out" / "report.html").read_text()
    table([report.results[0].evaluation])
    assert "it cannot tell, and what it says below of “bright” means nothing" in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_judge_that_some_images_speak_for_and_all_against_is_refused_at_the_end_and_nothing_is_lost(tmp_path):
    """What is generated stays: with the flag the evaluation ends from its records alone."""
    calls = []

    def unlearned(prompts, noise):
        calls.append(len(prompts))
        return paints(0.5)(prompts, noise)

    def fading(images, concept):
        return light(images, concept) * (0.5 if calls else 1)

    settings = {"judge": fading, "forget": "bright", "output": tmp_path / "out", **SETTINGS}
    with pytest.raises(UserError, match=r"cannot tell .* 0 of 30 .*insist with `--trust-judge --resume`"):
        evaluate(paints(1.0), unlearned, GROUPED, **settings)
    assert "journal" in names_in(tmp_path / "out")
    done = len(calls)
    evaluate(paints(1.0), unlearned, GROUPED, resume=True, trust_judge=True, **settings)
    assert sum(calls[done:]) < len(GROUPED) / 2, "only what the report shows"
    assert Evaluation.read(tmp_path / "out" / "evaluation.json").calibration.verdict == "cannot tell"


def test_the_calibration_generates_nothing_more():
    counts = []
    for trust in (False, True):
        calls = []

        def original(prompts, noise, calls=calls):
            calls.append(len(prompts))
            return paints(1.0)(prompts, noise)

        evaluate(original, paints(0.0), GROUPED, judge=light, forget="bright", trust_judge=trust, **SETTINGS)
        counts.append(len(calls))
    assert counts[0] == counts[1]


def test_the_bundled_judge_can_tell(bundled):
    from fastunlearn.evaluation.plan import world_groups

    groups = world_groups(bundled.world, "star")
    chosen = [(prompt, "forget") for prompt in groups.forget[:8]] + [(prompt, "far") for prompt in groups.retain[:8]]
    settings = {"num_inference_steps": 8, "batch_size": 16, "control_pairs": 2, "forget": "star"}
    found = evaluate(bundled, {"same": bundled}, chosen, **settings).results[0].evaluation.calibration
    assert found.verdict == "tells"


# ---- two folders of images -------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    """Images of two toy models, with the table of their prompts."""
    rows = ["file,prompt,group"]
    for side, model in (("before", paints(1.0)), ("after", paints(0.1))):
        (tmp_path / side).mkdir()
        generator = torch.Generator().manual_seed(0)
        for index, (prompt, group) in enumerate(GROUPED):
            image = model([prompt], torch.randn(1, *NOISE, generator=generator))[0]
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / side / f"{index}.png")
            if side == "before":
                rows.append(f"{index}.png,{prompt},{group}")
    (tmp_path / "prompts.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def config(folder, **changes):
    given = {"original_images": "before", "unlearned_images": "after", "prompts": "prompts.csv", "output": "out"}
    paths = {name: str(folder / value) for name, value in given.items()}
    return EvaluateImagesConfig(**paths | {"forget": "bright"} | changes)


def test_two_folders_are_judged_like_two_models(folders):
    result = evaluate_images(config(folders), metric=MeanDifference(), judge=light)
    again = FoldersEvaluation.read(folders / "out" / "evaluation.json")
    assert again == result
    assert (result.calibration.verdict, result.calibration.asked.shown) == ("tells", 1.0)
    assert (result.erasure.shown, result.erasure.shown_original, result.erasure.n_images) == (0.1, 1.0, 30)
    assert (result.groups["forget"].shown, result.groups["near"].shown) == (0.1, None)
    lines = [json.loads(line) for line in (folders / "out" / "pairs.jsonl").read_text().splitlines()]
    assert sum(line["shown"] for line in lines if line["group"] == "forget") == 3
    assert sum(line["original"]["shown"] for line in lines) == 30
    page = (folders / "out" / "report.html").read_text()
    assert "30 of 30" in page
    assert "3 of 30 images show it" in page


def test_two_folders_and_a_judge_that_cannot_tell(folders):
    swapped = {"original_images": str(folders / "after"), "unlearned_images": str(folders / "before")}
    with pytest.raises(UserError, match=r"cannot tell 'bright'.*3 of 30"):
        evaluate_images(config(folders, **swapped), metric=MeanDifference(), judge=light)
    assert not (folders / "out").exists()
    result = evaluate_images(config(folders, trust_judge=True, **swapped), metric=MeanDifference(), judge=light)
    assert result.calibration.verdict == "cannot tell"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"forget": None}, "looks for a concept: name it with `--forget`"),
        ({"prompts": None}, "who asks for the concept: give `--prompts FILE`"),
        ({"judge": "nobody"}, "unknown judge 'nobody'"),
        ({"judge": "imagenet"}, "ImageNet has no class 'bright'"),
    ],
)
def test_a_judge_of_two_folders_that_lacks_something(folders, changes, said):
    judge = {} if "judge" in changes else {"judge": light}
    with pytest.raises(UserError, match=said):
        evaluate_images(config(folders, **changes), metric=MeanDifference(), **judge)
    assert not (folders / "out").exists()
