"""The bundled world: images, captions, tokenizer, weights and their quality."""

import json

import pytest
import torch
from train_shapes import build_tokenizer, measure_quality

from fastunlearn.models.loading import load_model
from fastunlearn.models.runtime import import_diffusers
from fastunlearn.worlds import get_world, shapes
from fastunlearn.worlds.classifier import to_pixel_values
from fastunlearn.worlds.shapes.captions import every_caption, full_caption, sample_captions
from fastunlearn.worlds.shapes.classifier import HEADS, training_batch
from fastunlearn.worlds.shapes.prompts import attributes
from fastunlearn.worlds.shapes.world import SIZE, render, sample_scenes


def test_images_are_a_function_of_the_seed():
    first, again, other = (render(sample_scenes(40, seed)) for seed in (1, 1, 2))
    assert first.dtype == torch.uint8
    assert first.shape == (40, 3, SIZE, SIZE)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_image_does_not_depend_on_its_batch():
    scenes = sample_scenes(64, 3)
    index = torch.tensor([5, 0, 63])
    assert torch.equal(render(scenes)[index], render(scenes[index]))


@pytest.mark.parametrize("count", [64, 320, 641])
def test_attributes_are_drawn_evenly(count):
    scenes = sample_scenes(count, 0)
    cells = scenes.shape * 100 + scenes.color * 10 + scenes.background
    _, counts = cells.unique(return_counts=True)
    assert len(counts) == min(count, 320)
    assert counts.max() - counts.min() <= 1
    assert scenes.background.unique().numel() == len(shapes.BACKGROUNDS)


def test_scenes_can_leave_a_shape_out():
    kept = [name for name in shapes.SHAPES if name != "star"]
    assert shapes.SHAPES.index("star") not in sample_scenes(200, 0, shapes=kept).shape.tolist()


def test_every_shape_is_inside_its_image_and_in_its_color():
    scenes = sample_scenes(320, 0)
    images = render(scenes).float() / 255
    saturation = images.amax(1) - images.amin(1)
    painted = saturation > 0.2
    border = torch.ones(SIZE, SIZE, dtype=torch.bool)
    border[2:-2, 2:-2] = False
    assert not painted[:, border].any()
    share = painted.float().mean(dim=(1, 2))
    assert share.min() > 0.03
    assert share.max() < 0.4
    mean_color = (images * painted[:, None]).sum((2, 3)) / painted.sum((1, 2))[:, None]
    assert (mean_color - scenes.rgb).abs().max() < 0.15


def test_captions_name_what_the_image_shows():
    scenes = sample_scenes(500, 0)
    captions = sample_captions(scenes, torch.Generator().manual_seed(0))
    assert 20 < sum(caption == "" for caption in captions) < 90
    truth = zip(scenes.shape.tolist(), scenes.color.tolist(), scenes.background.tolist(), strict=True)
    for caption, (shape, color, background) in zip(captions, truth, strict=True):
        wanted = {
            "shape": shapes.SHAPES[shape],
            "color": shapes.COLORS[color],
            "background": shapes.BACKGROUNDS[background],
        }
        named = attributes(caption)
        assert named == {key: wanted[key] for key in named}
    assert full_caption("orange", "star", "plain") == "an orange star on a plain background"


def test_each_word_of_the_world_is_one_token():
    tokenizer = build_tokenizer()
    words = {word for caption in every_caption() for word in caption.split()}
    assert all(len(tokenizer(word, add_special_tokens=False).input_ids) == 1 for word in words)
    assert max(len(tokenizer(caption).input_ids) for caption in every_caption()) <= tokenizer.model_max_length
    assert len(tokenizer("Van Gogh", add_special_tokens=False).input_ids) > 1
    assert tokenizer("  ", add_special_tokens=False).input_ids == []


def test_the_shipped_tokenizer_is_the_one_the_code_builds():
    shipped = json.loads((shapes.pipeline_folder("shapes") / "tokenizer" / "tokenizer.json").read_text())
    assert shipped["model"]["vocab"] == build_tokenizer().get_vocab()


@pytest.mark.parametrize("concept", ["star", "red", "striped"])
def test_an_evaluation_keeps_at_least_50_prompts(concept):
    retain = [prompt for prompt, group in shapes.SHAPES_WORLD.prompts_to_evaluate(concept) if group == "retain"]
    assert len(retain) == 56 if concept == "star" else len(retain) >= 50


def test_an_anchor_is_a_sibling():
    assert shapes.SHAPES_WORLD.anchor("star") == "circle"
    assert shapes.SHAPES_WORLD.anchor("circle") == "square"
    assert shapes.SHAPES_WORLD.anchor("Red") == "orange"


def test_plain_diffusers_loads_the_pipeline():
    diffusers = import_diffusers()
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(shapes.pipeline_folder("shapes"))
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    image = pipeline("a red star", num_inference_steps=2, generator=generator, output_type="np").images
    assert image.shape == (1, SIZE, SIZE, 3)


def test_weights_are_small_half_precision_safetensors():
    from safetensors import safe_open

    files = [path for path in shapes.WEIGHTS.rglob("*") if path.is_file()]
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    assert sum(path.stat().st_size for path in (shapes.WEIGHTS / "pipeline").rglob("*") if path.is_file()) < 12e6
    for path in weights:
        with safe_open(path, "pt") as file:
            dtypes = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118 - no mapping
        assert dtypes <= {"F16", "I64"}, path


def test_gold_changes_only_unet_and_text_encoder():
    gold, original = shapes.pipeline_folder("shapes-gold-star"), shapes.pipeline_folder("shapes")
    for path in sorted(path.relative_to(original) for path in original.rglob("*") if path.is_file()):
        same = (gold / path).read_bytes() == (original / path).read_bytes()
        assert same == (path.suffix != ".safetensors" or path.parts[0] == "vae"), path


def test_an_unknown_bundled_model_is_an_error():
    with pytest.raises(ValueError, match="shapes-gold-star"):
        shapes.pipeline_folder("shapes-gold-moon")


def test_classifier_is_right_on_fresh_images():
    classifier = shapes.load_classifier()
    scenes = sample_scenes(320, seed=987)
    shown = classifier.predict(render(scenes))
    assert (shown["shape"] == scenes.shape).float().mean() >= 0.99
    assert (shown["color"] == scenes.color).float().mean() >= 0.99
    assert (shown["background"] == scenes.background).float().mean() >= 0.99
    assert shown["valid"].float().mean() >= 0.97


def test_classifier_knows_garbage():
    classifier = shapes.load_classifier()
    noise = torch.randint(0, 256, (32, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    flat = torch.full((4, 3, SIZE, SIZE), 128, dtype=torch.uint8)
    pixels, _, valid = training_batch(512, seed=654_321)
    spoilt = ((pixels[~valid] + 1) * 127.5).round().to(torch.uint8)
    assert classifier.predict(noise)["valid"].sum() == 0
    assert classifier.predict(flat)["valid"].sum() == 0
    assert classifier.predict(spoilt)["valid"].float().mean() < 0.05
    assert set(classifier.predict(noise)) == set(HEADS)


def test_pixel_values_span_minus_one_to_one():
    assert to_pixel_values(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


def test_the_model_card_quotes_the_measured_quality():
    quality = json.loads((shapes.WEIGHTS / "quality.json").read_text())
    assert quality["images"] == 500
    assert quality["original"]["shape"] >= 0.98
    assert quality["original"]["color"] >= 0.98
    assert quality["original"]["background"] >= 0.95
    assert quality["gold"]["star"] <= 0.02
    assert quality["gold"]["shape_without_star"] >= 0.98
    card = (shapes.WEIGHTS / "README.md").read_text()
    assert f"{quality['original']['shape']:.1%}".replace("%", " %") in card


@pytest.mark.slow
def test_generated_images_show_what_their_prompts_name():
    """The issue's bar, on 500 images made here and now."""
    quality = measure_quality(load_model("shapes", "cpu"), shapes.WEIGHTS)
    assert quality["shape"] >= 0.98
    assert quality["color"] >= 0.98
    assert quality["background"] >= 0.95


@pytest.mark.parametrize("world", ["shapes", "gallery"])
def test_a_training_keeps_what_prompts_make_that_leave_the_concept_open(world):
    world = get_world(world)
    known = world.attributes
    for attribute, words in world.vocabulary.items():
        for word in words:
            retain, asked = world.train_prompts(word)[1], world.evaluation_prompts(word)
            kept = [prompt for prompt in retain if attribute not in known(prompt)]
            assert len(kept) >= 12
            assert len(set(retain)) == len(retain)
            assert not {*kept} & {prompt for prompt, _ in asked}
            others = {name for name in world.vocabulary if name != attribute}
            assert all(others & known(prompt).keys() for prompt in kept)
