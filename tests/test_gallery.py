"""The gallery: its words and prompts, its weights in plain diffusers and in the engine, its judge, its training."""

import itertools
import json
import re
from collections import Counter

import numpy as np
import pytest
import torch
from fastunlearn_gallery import captions, prompts
from fastunlearn_gallery.words import BACKGROUNDS, GOLD_OBJECT, GOLD_STYLE, HELD_OUT, KINDS, OBJECTS, STYLES, VOCABULARY
from fitting import Fit, run
from PIL import Image
from row_runs import own_options
from torch import nn

from fastunlearn import plugins, unlearn
from fastunlearn.cli.demo import DemoConfig
from fastunlearn.errors import UserError
from fastunlearn.evaluation.generators import PipelineSource
from fastunlearn.judges import load_judge
from fastunlearn.methods import all_methods, get_method
from fastunlearn.models.loading import load_model
from fastunlearn.models.runtime import import_diffusers
from fastunlearn.models.sampling import SamplerSpec, initial_noise
from fastunlearn.worlds import all_worlds, world_of, world_with_model

WORDS = [word for words in VOCABULARY.values() for word in words]


# ---- words and prompts


def test_a_style_and_an_object_can_be_told_from_each_other():
    assert len(set(WORDS)) == len(WORDS) == len(STYLES) + len(OBJECTS) + len(BACKGROUNDS)
    for attribute, kinds in KINDS.items():
        assert sorted(itertools.chain(*kinds)) == sorted(VOCABULARY[attribute])


def test_no_training_of_the_original_saw_two_pairs_of_every_style():
    assert Counter(style for style, _ in HELD_OUT) == dict.fromkeys(STYLES, 2)
    assert len({word for _, word in HELD_OUT}) == len(HELD_OUT)
    assert GOLD_OBJECT not in {word for _, word in HELD_OUT}


@pytest.mark.parametrize("word", WORDS)
def test_an_evaluation_asks_for_the_concept_and_for_what_lies_near_and_far(word):
    forget, retain = prompts.train_prompts(word)
    asked = prompts.evaluation_prompts(word)
    groups = Counter(group for _, group in asked)
    assert {"forget", "forget-paraphrase", "near", "far", "open", "empty"} == groups.keys()
    assert groups["forget"] >= 10
    assert groups["near"] + groups["far"] >= 30
    assert len({prompt for prompt, _ in asked}) == len(asked)
    assert not {prompt for prompt, _ in asked} & {*forget, *retain}
    for prompt, group in asked:
        assert (word in prompt.split()) == group.startswith("forget"), prompt
    assert not [prompt for prompt in retain if word in prompt.split()]
    assert not [prompt for prompt in forget if word not in prompt.split()]


@pytest.mark.parametrize("word", WORDS)
def test_a_training_sees_the_word_by_itself_as_the_model_was_told_of_it(word):
    known = set(captions.every_caption())
    forget, _ = prompts.train_prompts(word)
    assert forget[1] in known
    assert forget[1].split()[-1] in (word, "background")
    assert set(forget[2:]) <= known


def test_near_is_of_the_concepts_kind():
    near = [prompt for prompt, group in prompts.evaluation_prompts("cat") if group == "near"]
    assert {prompts.attributes(prompt)["object"] for prompt in near} <= {"dog", "fox", "bear", "frog"}
    assert {prompts.attributes(prompt)["style"] for prompt in near} == set(STYLES)


def test_captions_name_what_they_were_made_of():
    for style, word, background in itertools.product(STYLES, OBJECTS, BACKGROUNDS):
        wanted = {"style": style, "object": word, "background": background}
        for template, _ in captions.TEMPLATES:
            named = prompts.attributes(captions.fill(template, style, word, background))
            assert named == {key: wanted[key] for key in named}
    assert captions.full_caption("ink", "octopus", "blue") == "an octopus in the style of ink on a blue background"
    assert sum(share for _, share in captions.TEMPLATES) == pytest.approx(1)


def test_each_word_is_one_token_and_every_caption_is_read_whole():
    from train_gallery import MAX_TOKENS, build_tokenizer

    tokenizer = build_tokenizer()
    every = captions.every_caption()
    for word in {word for caption in every for word in caption.split()}:
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1
    assert max(len(ids) for ids in tokenizer(every).input_ids) <= MAX_TOKENS


# ---- the package


def test_without_the_package_one_line_says_what_to_install(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(plugins, "entry_points", lambda group: [])
    assert list(all_worlds()) == ["shapes"]
    for command in (["demo", "--model", "gallery"], ["train", "--model", "gallery-gold", "--forget", "cat"]):
        assert "pip install fastunlearn-gallery" in refused(*command, "--output", tmp_path / "out")
    with pytest.raises(UserError, match="fastunlearn-gallery"):
        load_model("gallery")


def test_the_package_brings_a_world_with_two_models_and_a_judge():
    world = all_worlds()["gallery"]
    assert world_with_model("gallery") is world_with_model("gallery-gold") is world
    assert world_of(world.folder("gallery")) is world_of(world.folder("gallery-gold")) is world
    assert world.find("Twemoji") == ("style", GOLD_STYLE)
    assert world.golds == {GOLD_STYLE: "gallery-gold", GOLD_OBJECT: "gallery-gold"}
    assert load_judge("gallery").name.startswith("gallery@")
    assert world_of(world_with_model("shapes").folder("shapes")).name == "shapes"


def test_a_word_becomes_its_own_anchor_else_the_first_of_its_kind():
    world = world_with_model("gallery")
    assert [world.anchor(word) for word in ("noto", "Emojione", "ink", "cat", "rocket")] == [
        *("twemoji", "twemoji", "noto", "dog", "cat")
    ]
    assert world.anchor("emojione", without=("ink", "Twemoji")) == "noto"
    assert world.anchor("emojione", without=("noto", "twemoji")) == "fluent"


@pytest.mark.parametrize("method", ["uce", "rece", "speed", "holdfast"])
def test_a_plan_refuses_what_an_edit_cannot_do(method, tmp_path):
    with pytest.raises(UserError, match=r"`--trainable` selects none of them\. Have it select context_emb"):
        unlearn("gallery", "cat", method, output=tmp_path / "run", trainable="text-attention", dry_run=True)


def test_a_worlds_demonstration_compares_methods_that_there_are():
    for world in all_worlds().values():
        given = DemoConfig(model=world.name, methods=",".join(world.demo_methods))
        assert given.compared(()) == DemoConfig().compared(world.demo_methods) == world.demo_methods
    assert all_worlds()["gallery"].demo_methods != all_worlds()["shapes"].demo_methods


# ---- the weights

PROMPTS = ["a fox in the style of noto on a blue background", "a castle in the style of ink on a pink background"]
NO_T5 = {"text_encoder_3": None, "tokenizer_3": None}  # diffusers asks for them, also where the index says null
SPEC = SamplerSpec(num_inference_steps=4, guidance_scale=3.0, micro_batch_size=2)


@pytest.fixture(scope="module")
def gallery():
    return load_model("gallery", "cpu")


def drawn_by_diffusers(pipeline, model):
    """(N, H, W, 3) in [0, 1]: what a plain pipeline draws of PROMPTS from the noise that ``model`` starts from."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PROMPTS,
        latents=initial_noise(PROMPTS, [0, 0], model.latent_shape),
        num_inference_steps=4,
        guidance_scale=3.0,
        max_sequence_length=0,
        output_type="np",
    ).images


def test_an_image_is_that_of_plain_diffusers(gallery):
    from fastunlearn.models.runtime import import_diffusers

    diffusers = import_diffusers()
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(all_worlds()["gallery"].folder("gallery"), **NO_T5)
    ours = PipelineSource(gallery, SPEC).generate([(prompt, 0) for prompt in PROMPTS])
    again = PipelineSource(gallery, SPEC).generate([(prompt, 0) for prompt in PROMPTS])
    theirs = drawn_by_diffusers(pipeline, gallery)
    assert torch.equal(ours, again)
    difference = ours.permute(0, 2, 3, 1).numpy() / 255 - theirs
    assert np.abs(difference).max() <= 1 / 255 + 1e-6


def test_the_judge_sees_what_the_original_generates(gallery):
    """A few images of many words; `quality.json` has 500."""
    wanted = [(STYLES[i % 6], OBJECTS[5 * i % 24], BACKGROUNDS[i % 6]) for i in range(12)]
    wanted = [one for one in wanted if one[:2] not in HELD_OUT]
    keys = [(captions.full_caption(*one), 0) for one in wanted]
    images = PipelineSource(gallery, SamplerSpec(12, 3.0, micro_batch_size=len(keys))).generate(keys)
    seen = load_judge("gallery").judge(images, GOLD_STYLE)
    for index, name in enumerate(("style", "object", "background")):
        right = sum(word == one[index] for word, one in zip(seen.attributes[name], wanted, strict=True))
        assert right >= len(wanted) - 2, (name, seen.attributes[name], wanted)
    assert (seen.valid >= 0.5).sum() >= len(wanted) - 2


def test_the_gold_differs_in_transformer_and_text_encoders_alone():
    world = all_worlds()["gallery"]
    gold, original = world.folder("gallery-gold"), world.folder("gallery")
    differing = {
        path.relative_to(original).parts[0]
        for path in original.rglob("*.safetensors")
        if path.read_bytes() != (gold / path.relative_to(original)).read_bytes()
    }
    assert differing == {"transformer", "text_encoder", "text_encoder_2"}
    with pytest.raises(ValueError, match="gallery-gold"):
        world.folder("gallery-silver")


def test_the_weights_are_half_precision_and_small():
    from fastunlearn_gallery.world import WEIGHTS
    from safetensors import safe_open

    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    assert sum(path.stat().st_size for path in files) < 40e6
    for path in (path for path in files if path.suffix == ".safetensors"):
        with safe_open(path, "pt") as file:
            dtypes = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118 - no mapping
        assert dtypes <= {"F16", "I64"}, path
    for path in (path for path in files if path.suffix == ".json"):
        assert not re.search(r'"/\w+/', path.read_text()), path  # of the machine that made them


def test_both_shipped_tokenizers_read_captions_as_the_code_builds_them():
    """Which of two equally frequent pieces comes first in the vocabulary is chance; what words are read as is not."""
    from train_gallery import build_tokenizer
    from transformers import CLIPTokenizer

    every = captions.every_caption()
    wanted = build_tokenizer()(every).input_ids
    folder = all_worlds()["gallery"].folder("gallery")
    for name in ("tokenizer", "tokenizer_2"):
        assert CLIPTokenizer.from_pretrained(folder / name)(every).input_ids == wanted


def test_the_model_card_quotes_the_measured_quality():
    from fastunlearn_gallery.world import WEIGHTS

    quality = json.loads((WEIGHTS / "quality.json").read_text())
    card = (WEIGHTS / "README.md").read_text()
    assert quality["images"] == 500
    for model, name in itertools.product(("original", "gold"), ("object", "style", "background", "valid")):
        assert f"{quality[model][name]:.1%}".replace("%", " %") in card
    assert min(quality["original"][name] for name in ("object", "style", "background")) >= 0.97
    assert max(quality["gold"][name] for name in ("gold_style", "gold_object")) <= 0.05


# ---- the training tool


def test_one_empty_token_that_counts_256_times_is_256_empty_tokens():
    from train_gallery import JointAttention, _new_generator

    transformer = _new_generator(0, 600)["transformer"]
    for parameter in transformer.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    inputs = {
        "hidden_states": torch.randn(2, 8, 16, 16),
        "timestep": torch.tensor([300.0, 700.0]),
        "pooled_projections": torch.randn(2, 256),
    }
    text, processor = torch.randn(2, 16, 256), JointAttention()
    with torch.no_grad():
        wanted = transformer(encoder_hidden_states=torch.cat([text, torch.zeros(2, 256, 256)], 1), **inputs).sample
        without = transformer(encoder_hidden_states=text, **inputs).sample
        transformer.set_attn_processor(processor)
        torch.testing.assert_close(transformer(encoder_hidden_states=text, **inputs).sample, without)
        processor.repeats = 256
        short = transformer(encoder_hidden_states=torch.cat([text, torch.zeros(2, 1, 256)], 1), **inputs).sample
    torch.testing.assert_close(short, wanted)
    assert (wanted - without).abs().max() > 1e-2


def test_a_training_that_was_stopped_ends_as_one_that_was_not(tmp_path, monkeypatch):
    def train(path, *, steps):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
        inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
        fit = Fit({"net": module}, outer=("0.2",), lr=0.01, outer_lr=1e-2)
        run(
            "test", fit, lambda step: module(inputs + step).square().mean(), steps, 10, path, path.with_suffix(".trunk")
        )
        return fit

    monkeypatch.setattr("fitting.CHECKPOINT_EVERY", 10)
    whole = train(tmp_path / "whole.pt", steps=40)
    assert whole.step == 40
    train(tmp_path / "parts.pt", steps=20)  # what it leaves is past its own cooling: the longer one begins before that
    (tmp_path / "parts.trunk").rename(tmp_path / "again.pt")
    parts = train(tmp_path / "again.pt", steps=40)
    for one, other in zip(whole.mean, parts.mean, strict=True):
        assert torch.equal(one, other)


def test_muon_makes_matrices_nearly_orthogonal():
    from fitting import _orthogonal

    matrices = torch.randn(3, 12, 40, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(_orthogonal(matrices))
    assert values.min() > 0.5
    assert values.max() < 1.4
    torch.testing.assert_close(_orthogonal(matrices.mT), _orthogonal(matrices).mT)


def test_a_package_of_other_bytes_is_refused(tmp_path):
    from gallery_art import SETS, fetch

    for name, version, _ in SETS.values():
        (tmp_path / f"iconify-json-{name}-{version}.tgz").write_bytes(b"something else")
    with pytest.raises(UserError, match="is not the package that was meant"):
        fetch(tmp_path)


def test_every_set_and_every_word_has_a_source():
    from gallery_art import KEYS, PAINT, SETS

    assert tuple(SETS) == STYLES
    assert KEYS.keys() == set(OBJECTS)
    assert tuple(PAINT) == BACKGROUNDS


@pytest.mark.slow
def test_generated_images_show_what_their_prompts_name():
    """The figures of the model card, on images made here and now."""
    from fastunlearn_gallery.world import WEIGHTS, load_classifier
    from train_gallery import asked, generate, load_pipeline, measure_quality

    told = json.loads((WEIGHTS / "quality.json").read_text())["original"]
    wanted = asked(150)
    images = generate(load_pipeline(WEIGHTS), [captions.full_caption(*one) for one in wanted])
    found = measure_quality(load_classifier(), images, wanted)
    for name in ("object", "style", "background"):
        assert found[name] == pytest.approx(told[name], abs=0.06)


#: All but the controls that change nothing, and one whose words are to be unattended: joint attention has no such map.
CHANGING = [name for name in all_methods() if name not in ("placebo", "identity", "mace")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "form"), [*((name, {}) for name in CHANGING), ("esd", {"adapter": "lora", "rank": 4})]
)
def test_every_method_runs_on_the_real_weights_and_loads_in_plain_diffusers(gallery, tmp_path, method, form):
    """Flow, joint attention and adapters, end to end on a model that draws."""
    for name, color in (("images", "red"), ("surrogates", "blue")):
        (tmp_path / name).mkdir()
        Image.new("RGB", gallery.image_size, color).save(tmp_path / name / "a.png")
    settings = {"options": own_options(method, tmp_path)} | form
    if get_method(method).defaults_for("gallery").steps:
        settings |= {"steps": 2, "trajectories": 1, "trajectory_steps": 3, "micro_batch_size": 4}
    run = unlearn("gallery", GOLD_STYLE, method, output=tmp_path / "run", evaluation_prompts="none", **settings)
    keys = [(prompt, 0) for prompt in PROMPTS]
    ours = PipelineSource(load_model(str(run.folder), "cpu"), SPEC).generate(keys)
    assert not torch.equal(ours, PipelineSource(gallery, SPEC).generate(keys))
    whole = run.folder / "model"
    folder = whole if whole.is_dir() else all_worlds()["gallery"].folder("gallery")
    pipeline = import_diffusers().StableDiffusion3Pipeline.from_pretrained(folder, **NO_T5)
    if not whole.is_dir():
        pipeline.load_lora_weights(run.folder / "pytorch_lora_weights.safetensors")
    theirs = drawn_by_diffusers(pipeline, gallery)
    assert np.abs(ours.permute(0, 2, 3, 1).numpy() / 255 - theirs).max() <= 1.5 / 255


def test_a_method_that_needs_cross_attention_is_refused(tmp_path):
    with pytest.raises(UserError, match="no cross-attention whose keys read the text"):
        unlearn("gallery", GOLD_STYLE, "mace", output=tmp_path / "run", dry_run=True)


@pytest.mark.slow
def test_a_closed_form_takes_the_style_away_and_leaves_the_others(tmp_path):
    from fastunlearn import evaluate, unlearn

    run = unlearn("gallery", GOLD_STYLE, "uce", output=tmp_path / "run", evaluation_prompts="none")
    summary = evaluate("gallery", run.folder, forget=GOLD_STYLE).summary
    assert summary["erasure"]["shown_original"] >= 0.8
    assert summary["erasure"]["shown"] <= 0.2
    assert summary["integrity"]["retention"] >= 0.8
