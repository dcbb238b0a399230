"""The judge of any concept in words: CLIP (Radford et al. 2021, arXiv 2103.00020), zero-shot.

An image shows the concept where the concept fits it better than every alternative.  The alternatives are what
resembles the concept, everyday things, and noise: against one other word alone, garbage would count as whatever it is
less unlike.
Each is written in eight templates, whose embeddings are averaged and made of length 1, as CLIP's authors do.

How good this is depends on the concept: the calibration on the original's own images says it.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..concept_prompts import CATEGORIES, RANDOM, prefixed
from ..concept_prompts.table import Known, known
from ..errors import UserError, one_line
from ..files.images import to_pil
from ..files.weights import hash_module
from .base import Judge, Verdicts
from .factory import JudgeFactory

DEFAULT = "openai/clip-vit-large-patch14"
_NOISE = ("random noise", "a smear of colors", "a plain gray area")
#: Of a style and of a person, beside what resembles them: nobody in particular.
_NOBODY = {
    "style": ("an unknown painter", "a child", "a photographer", "a computer"),
    "person": ("a man", "a woman", "a child", "a crowd of people"),
}


class ClipJudge(Judge):
    """The score is sigmoid(s (c - a - margin)): c the cosine of the image and the concept, a that of the likeliest
    alternative, s CLIP's own scale.  From 0.5 on the concept is ahead of every alternative by the margin."""

    threshold = 0.5

    def __init__(self, device: str | torch.device, option: str) -> None:
        source, settings = _parsed(option)
        self._against, self._category, self._margin = settings
        self.device = device
        with _reading(source):
            self.model, self.preprocess, self.tokenizer = _load(source)
        self.model.to(device).eval()
        self.weights_hash = hash_module(self.model)
        given = "".join(f",{part.strip()}" for part in option.split(",") if "=" in part)
        self.name = f"clip/{Path(source).name}@{self.weights_hash[:12]}{given}"
        self._texts: dict[str, torch.Tensor] = {}

    def check(self, concept: str) -> None:
        names = [name for name, _ in self.alternatives(concept)]
        self.note = f"Zero-shot: “{concept.strip()}” against {', '.join(names)}; margin {self._margin:g}."

    def alternatives(self, concept: str) -> list[tuple[str, str]]:
        """(name, category) of what an image may show in the concept's place.

        Raises UserError where one of those that the user named is the concept.
        """
        word = " ".join(concept.split())
        about = known(word) or Known("")
        category = self._category or about.category
        own = {word.lower(), *(alias.lower() for alias in about.aliases)}
        if same := [name for name in self._against if name.lower() in own]:
            raise UserError(f"`--judge clip:...against=`: {same[0]!r} is the concept itself. Name what resembles it.")
        near = self._against or about.near
        names = [(name, category) for name in (*near, *_NOBODY.get(category, ()))]
        names += [(name, "") for name in (*([] if category == "style" else RANDOM), *_NOISE)]
        return [(name, kind) for name, kind in dict.fromkeys(names) if name.lower() not in own]

    @torch.inference_mode()
    def judge(self, images: torch.Tensor, concept: str) -> Verdicts:
        pixels = self.preprocess(images=to_pil(images), return_tensors="pt")["pixel_values"]
        seen = _unit(_pooled(self.model.get_image_features(pixel_values=pixels.to(self.device))))
        similar = seen @ self._embedded(concept).T
        ahead = similar[:, 0] - similar[:, 1:].amax(1) - self._margin
        return Verdicts(torch.sigmoid(self.model.logit_scale.exp().double().cpu() * ahead))

    def _embedded(self, concept: str) -> torch.Tensor:
        """(1 + A, F) float64 of length 1 on the CPU: the concept first, then the alternatives."""
        if concept not in self._texts:
            word = " ".join(concept.split())
            category = self._category or (known(word) or Known("")).category
            rows = [self._embed(prefixed(name, kind)) for name, kind in [(word, category), *self.alternatives(word)]]
            self._texts[concept] = torch.stack(rows)
        return self._texts[concept]

    def _embed(self, texts: list[str]) -> torch.Tensor:
        tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.device)
        return _unit(_unit(_pooled(self.model.get_text_features(**tokens))).mean(0))


def _unit(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.norm(dim=-1, keepdim=True)


def _pooled(answer: Any) -> torch.Tensor:
    """What transformers returned: the features, or, from 5.x on, an object that holds them; on the CPU.

    In double precision, in which no rounding depends on where in the batch an image stands.
    """
    features: torch.Tensor = getattr(answer, "pooler_output", answer)
    return features.double().cpu()


def _parsed(option: str) -> tuple[str, tuple[tuple[str, ...], str, float]]:
    """MODEL,against=A;B,category=style,margin=0.02: each may be absent.  Raises UserError for anything else."""
    parts = [part.strip() for part in option.split(",") if part.strip()]
    source = parts.pop(0) if parts and "=" not in parts[0] else DEFAULT
    given: dict[str, str] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or key not in ("against", "category", "margin") or not value.strip() or key in given:
            raise UserError(
                f"`--judge clip:{option}`: {part!r} is none of against=NAME;NAME, category=NAME, margin=NUMBER. "
                "Write clip:MODEL,against=NAME;NAME."
            )
        given[key] = value.strip()
    category = given.get("category", "")
    if category and category not in CATEGORIES:
        raise UserError(f"`--judge clip:{option}`: the category must be one of {', '.join(CATEGORIES)}.")
    try:
        margin = float(given.get("margin", 0))
    except ValueError:
        margin = float("nan")
    if not -1 < margin < 1:
        raise UserError(
            f"`--judge clip:{option}`: the margin must be a number between -1 and 1, a difference of cosines."
        )
    against = tuple(" ".join(name.split()) for name in given.get("against", "").split(";") if name.strip())
    return source, (against, category, margin)


def _missing(option: str) -> str:
    """What a local folder lacks; empty for an id of the hub, whose files are fetched when they are read."""
    source, _ = _parsed(option)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1
        return (
            f"the folder {source}, which is not there: name a folder of a CLIP model, or an id of the hub" * looks_local
        )
    names = ("config.json", "preprocessor_config.json", "tokenizer_config.json")
    absent = [name for name in names if not (folder / name).is_file()]
    if not list(folder.glob("model*.safetensors")):
        absent.append("model.safetensors")
    if absent:
        return f"{' and '.join(absent)} in {source}: put the files of a CLIP model of transformers there"
    return ""


def _here() -> str:
    """Whether the default model is in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    cached = isinstance(try_to_load_from_cache(DEFAULT, "model.safetensors"), str)
    return "yes" if cached else "with clip:FOLDER, or where the hub can be reached"


def _load(source: str) -> tuple[Any, Any, Any]:
    from ..models.runtime import mend_torchvision

    mend_torchvision()
    transformers = importlib.import_module("transformers")
    folder = Path(source).expanduser()
    place = str(folder) if folder.is_dir() else source
    options = {"local_files_only": folder.is_dir()}
    kind = transformers.AutoConfig.from_pretrained(place, **options).model_type
    if kind != "clip":
        raise ValueError(f"it is a model of the kind {kind!r}, not clip")
    model, told = transformers.CLIPModel.from_pretrained(
        place, use_safetensors=True, output_loading_info=True, dtype=torch.float32, **options
    )
    if lacking := sorted(told["missing_keys"]):
        raise ValueError(f"its weights lack {len(lacking)} tensors, for example {lacking[0]}")
    preprocess = transformers.CLIPImageProcessor.from_pretrained(place, **options)
    return model, preprocess, transformers.CLIPTokenizer.from_pretrained(place, **options)


@contextlib.contextmanager
def _reading(source: str) -> Iterator[None]:
    """Turns whatever transformers raises for files that it cannot fetch or read into one line, and mutes it."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f"the judge clip needs the model {source}, which could not be fetched or read ({one_line(error)}): let "
            "this machine reach the hub once, or name a folder, `--judge clip:FOLDER`."
        ) from error
    finally:
        logging.disable(level)


CLIP = JudgeFactory(
    "clip",
    purpose="any concept in words, zero-shot against what resembles it",
    needs=f"a CLIP model, from a folder or the hub (default {DEFAULT}, 1.7 GB)",
    license="Apache-2.0, weights by their model card",
    make=ClipJudge,
    option="MODEL,against=NAME;NAME,category=style|object|person,margin=NUMBER; each may be left out",
    about=(
        "An image shows the concept where CLIP puts it before every alternative: those of `against`, by default what\n"
        "the table of `fastunlearn prompts` has as near; everyday things (no style has them); noise.\n"
        "The concept and each alternative are averaged over eight templates of the category, which by default is the\n"
        "table's, else one that fits anything. The margin is a difference of cosines, by default 0: a larger one sees\n"
        "less. Choose it on the original alone: the calibration, which every evaluation reports first, says how often\n"
        "the judge sees the concept where it was asked for and where it was not.\n"
        "It cannot tell whether an image is valid."
    ),
    also=_missing,
    here=_here,
)
