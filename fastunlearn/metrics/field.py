"""The other metrics of the field, through its libraries: FID, KID, CMMD, CLIPScore, DreamSim, SSIM.

A metric first turns each pair into one row of numbers (features of both images, or a distance), which can be written
down, merged and continued later, and at the end all rows into a result.  On the bundled world the same metrics run on
its classifier instead of the nets that would have to be fetched; every result says under ``of`` what it was made with.
FID, KID and CMMD compare sets of images, not pairs, and FID falls with their number: compare values of equal numbers.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import nn

from ..batching import in_fixed_batches
from ..errors import UserError
from ..files.weights import hash_module
from .statistics import clustered_mean, difference

#: The names ``load_metric`` knows, and what each is.
METRICS = {
    "fid": "Frechet distance of Inception features (Heusel et al. 2017), clean-fid's network and resizing",
    "kid": "kernel distance of the same features (Binkowski et al. 2018), unbiased",
    "cmmd": "kernel distance of CLIP features (Jayasumana et al. 2024), times 1000",
    "clip-score": "100 times the cosine of image and prompt in CLIP (Hessel et al. 2021)",
    "dreamsim": "DreamSim distance of the pair (Fu et al. 2023)",
    "ssim": "structural similarity of the pair (Wang et al. 2004), 1 for equal images",
}

_BATCH_SIZE = 32  # of every network pass, the last one padded: an image's features do not depend on its company
_KID_SUBSET, _KID_SUBSETS = 1000, 100
_CMMD_SIGMA, _CMMD_SCALE = 10.0, 1000.0
_CHUNK = 2048  # rows of a kernel matrix held at once

Floats = npt.NDArray[np.float64]


class Metric(Protocol):
    """What the evaluator and ``evaluate-images`` ask of a metric."""

    name: str
    needs_prompts: bool

    def measure(self, original: torch.Tensor, unlearned: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """(B, 3, H, W) uint8 images of both sides on the CPU and B prompts to (B, F) float32 on the CPU."""

    def summarize(self, values: npt.NDArray[np.float32], prompts: Sequence[str]) -> dict[str, Any]:
        """All rows (N, F), in the order of their keys, to results.  Raises UserError for too few."""


def load_metric(name: str, device: str | torch.device = "cpu", *, bundled: bool = False) -> Metric:
    """A metric by name, on the bundled world's nets or on those of the field.

    Raises UserError, in one line, for an unknown name and where its package or its weights cannot be had.
    """
    if name not in METRICS:
        raise UserError(f"unknown metric {name!r}: choose from {', '.join(METRICS)}")
    if name == "ssim":
        return _Paired(name, "torchmetrics", _ssim())
    return _bundled(name, device) if bundled else _of_the_field(name, device)


def _bundled(name: str, device: str | torch.device) -> Metric:
    judge = _Judge(device)
    if name == "clip-score":
        return _PromptMatch(name, f"{judge.name} heads", judge.match)
    if name == "dreamsim":
        return _Paired(name, f"{judge.name} cosine", _cosine_distance(judge.pooled))
    embed = judge.pooled if name == "cmmd" else judge.averaged
    return _Distribution(name, judge.name, embed, _comparison(name, sigma=None))


def _of_the_field(name: str, device: str | torch.device) -> Metric:
    if name == "clip-score":
        clip = _Clip("ViT-B-32", "openai", name, device)
        return _PromptMatch(name, clip.name, clip.match)
    if name == "cmmd":
        clip = _Clip("ViT-L-14-336", "openai", name, device)
        return _Distribution(name, clip.name, clip.embed, _comparison(name, sigma=_CMMD_SIGMA))
    if name == "dreamsim":
        model = _DreamSim(device)
        return _Paired(name, model.name, _cosine_distance(model.embed))
    inception = _Inception(name, device)
    return _Distribution(name, inception.name, inception.embed, _comparison(name, sigma=None))


def _comparison(name: str, sigma: float | None) -> Callable[[Floats, Floats], float]:
    if name == "fid":
        return frechet_distance
    return _kernel_distance() if name == "kid" else functools.partial(rbf_distance, sigma=sigma)


# ---- the three kinds of metrics --------------------------------------------------------------------------------------


class _Distribution:
    """Compares all images of one side with all of the other.  A row is the features of both."""

    needs_prompts = False

    def __init__(
        self,
        name: str,
        of: str,
        embed: Callable[[torch.Tensor], torch.Tensor],
        compare: Callable[[Floats, Floats], float],
    ) -> None:
        self.name, self.of, self._embed, self._compare = name, of, embed, compare

    def measure(self, original: torch.Tensor, unlearned: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        sides = [in_fixed_batches(self._embed, images, _BATCH_SIZE) for images in (original, unlearned)]
        return torch.cat(sides, dim=1)

    def summarize(self, values: npt.NDArray[np.float32], prompts: Sequence[str]) -> dict[str, Any]:
        if len(values) < 2:
            raise UserError(f"the metric {self.name} compares sets of at least 2 images, got {len(values)}")
        before, after = np.split(np.asarray(values, dtype=np.float64), 2, axis=1)
        return {"value": self._compare(before, after), "n_pairs": len(values), "of": self.of}


class _Paired:
    """One number per pair."""

    needs_prompts = False

    def __init__(self, name: str, of: str, compare: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        self.name, self.of, self._compare = name, of, compare

    def measure(self, original: torch.Tensor, unlearned: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return self._compare(original, unlearned)[:, None].float().cpu()

    def summarize(self, values: npt.NDArray[np.float32], prompts: Sequence[str]) -> dict[str, Any]:
        mean = clustered_mean(values[:, 0], list(prompts))
        return {
            "value": mean.mean,
            "ci95": [mean.low, mean.high],
            "interval": mean.method,
            "n_pairs": mean.n,
            "n_prompts": mean.n_clusters,
            "of": self.of,
        }


class _PromptMatch:
    """How well each side shows what the prompt says."""

    needs_prompts = True

    def __init__(self, name: str, of: str, match: Callable[[torch.Tensor, Sequence[str]], torch.Tensor]) -> None:
        self.name, self.of, self._match = name, of, match

    def measure(self, original: torch.Tensor, unlearned: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return torch.stack([self._match(images, prompts) for images in (original, unlearned)], dim=1)

    def summarize(self, values: npt.NDArray[np.float32], prompts: Sequence[str]) -> dict[str, Any]:
        before, after = (clustered_mean(values[:, side], list(prompts)) for side in (0, 1))
        change = difference(values[:, 1], values[:, 0], list(prompts))
        return {
            "value": after.mean,
            "ci95": [after.low, after.high],
            "original": before.mean,
            "change": change.mean,
            "change_ci95": [change.low, change.high],
            "interval": change.method,
            "n_pairs": after.n,
            "n_prompts": after.n_clusters,
            "of": self.of,
        }


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def frechet_distance(features0: npt.ArrayLike, features1: npt.ArrayLike) -> float:
    """|m0 - m1|^2 + tr(S0 + S1 - 2 (S0 S1)^(1/2)) of features (N, F) and (M, F), in float64.

    With S = R^T R from a QR decomposition of the centered features, the trace of the root is the sum of the singular
    values of R0 R1^T: real and not negative, and precise also where there are fewer images than features, which the
    usual eigenvalues of S0 S1 are not.
    """
    first, second = np.asarray(features0, dtype=np.float64), np.asarray(features1, dtype=np.float64)
    means = [features.mean(axis=0) for features in (first, second)]
    roots = [
        np.linalg.qr(features - mean, mode="r") / np.sqrt(len(features) - 1)
        for features, mean in zip((first, second), means, strict=True)
    ]
    overlap = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    distance = np.square(means[0] - means[1]).sum() + sum(np.square(root).sum() for root in roots) - 2 * overlap
    return max(float(distance), 0.0)  # of equal sets, rounding can leave less than nothing


def rbf_distance(features0: npt.ArrayLike, features1: npt.ArrayLike, sigma: float | None = None) -> float:
    """1000 times the squared MMD under exp(-|x - y|^2 / 2 sigma^2), the biased estimate that CMMD uses.

    ``sigma``: None takes the median distance between the first side's features.
    """
    first, second = (torch.as_tensor(np.asarray(f, dtype=np.float64)) for f in (features0, features1))
    if sigma is None:
        sigma = float(torch.nn.functional.pdist(first[:_CHUNK]).median())
        if sigma == 0:
            raise UserError("all images of the original side have the same features: CMMD has no scale to compare on")

    def kernel(x: torch.Tensor, y: torch.Tensor) -> float:
        chunks = [torch.cdist(rows, y, compute_mode="donot_use_mm_for_euclid_dist") for rows in x.split(_CHUNK)]
        return float(sum(torch.exp(chunk.square() / (-2 * sigma**2)).sum() for chunk in chunks)) / (len(x) * len(y))

    return _CMMD_SCALE * (kernel(first, first) + kernel(second, second) - 2 * kernel(first, second))


def _kernel_distance() -> Callable[[Floats, Floats], float]:
    """KID: torchmetrics' unbiased polynomial MMD, over everything or over 100 drawn subsets of 1000."""
    poly_mmd = _package("kid", "torchmetrics.image.kid", "torchmetrics").poly_mmd

    def compare(first: Floats, second: Floats) -> float:
        sides = [torch.from_numpy(side) for side in (first, second)]
        if len(first) <= _KID_SUBSET:
            return float(poly_mmd(*sides))
        draws = torch.Generator().manual_seed(0)
        subsets = [
            poly_mmd(*(side[torch.randperm(len(side), generator=draws)[:_KID_SUBSET]] for side in sides))
            for _ in range(_KID_SUBSETS)
        ]
        return float(torch.stack(subsets).mean())

    return compare


def _cosine_distance(
    embed: Callable[[torch.Tensor], torch.Tensor],
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def compare(original: torch.Tensor, unlearned: torch.Tensor) -> torch.Tensor:
        units = [nn.functional.normalize(in_fixed_batches(embed, side, _BATCH_SIZE)) for side in (original, unlearned)]
        # Half the squared difference of unit vectors is 1 - cos, without cancelling where they are alike.
        return (units[0] - units[1]).square().sum(1) / 2

    return compare


def _ssim() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    library = _package("ssim", "torchmetrics.functional.image", "torchmetrics")

    def compare(original: torch.Tensor, unlearned: torch.Tensor) -> torch.Tensor:
        pairs = [
            library.structural_similarity_index_measure(
                one[None].float(), other[None].float(), data_range=255.0, reduction="none"
            )
            for one, other in zip(unlearned, original, strict=True)
        ]
        return torch.cat(pairs) if pairs else torch.zeros(0)

    return compare


# ---- networks: images (B, 3, H, W) uint8 on the CPU to vectors (B, F) float32 on the CPU ---------------------------


class _Judge:
    """The bundled world's classifier as an embedding."""

    def __init__(self, device: str | torch.device) -> None:
        from ..worlds.shapes import load_classifier

        self.classifier = load_classifier().to(device)
        self.device = device
        self.name = f"shapes-classifier@{hash_module(self.classifier)[:12]}"

    def _last(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier.features(_scaled(images, self.device))[-1]

    @torch.inference_mode()
    def averaged(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 96), the last layer averaged over places, as Inception's are for FID."""
        return self._last(images).mean(dim=(2, 3)).cpu()

    @torch.inference_mode()
    def pooled(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 192), the mean and the largest of each channel."""
        last = self._last(images)
        return torch.cat([last.mean(dim=(2, 3)), last.amax(dim=(2, 3))], dim=1).cpu()

    @torch.inference_mode()
    def match(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """100 times the mean probability of what each prompt names; where it names nothing, of a valid image."""
        from ..worlds.shapes.classifier import HEADS
        from ..worlds.shapes.prompts import attributes

        def probabilities(batch: torch.Tensor) -> torch.Tensor:
            logits = self.classifier(_scaled(batch, self.device))
            return torch.cat([logits[head].softmax(1) for head in HEADS], dim=1).cpu()

        columns = [(head, label) for head, labels in HEADS.items() for label in labels]
        result = in_fixed_batches(probabilities, images, _BATCH_SIZE)
        asked = [list(attributes(prompt).items()) or [("valid", "yes")] for prompt in prompts]
        rows = [[columns.index(named) for named in names] for names in asked]
        return torch.tensor([100 * float(row[indices].mean()) for row, indices in zip(result, rows, strict=True)])


class _Inception:
    """clean-fid's Inception and its resizing."""

    def __init__(self, metric: str, device: str | torch.device) -> None:
        networks = _package(metric, "cleanfid.inception_torchscript", "clean-fid")
        self.resize = _package(metric, "cleanfid.resize", "clean-fid").build_resizer("clean")
        # Not clean-fid's own choice, a shared temporary folder that anybody may write to.
        folder = os.path.join(torch.hub.get_dir(), "checkpoints")
        with _weights(metric, "inception-2015-12-05.pt", folder):
            os.makedirs(folder, exist_ok=True)
            self.network = networks.InceptionV3W(folder, download=True, resize_inside=False).eval().to(device)
        self.device = device
        self.name = f"clean-fid/inception-v3@{hash_module(self.network)[:12]}"

    @torch.inference_mode()
    def embed(self, images: torch.Tensor) -> torch.Tensor:
        resized = np.stack([self.resize(image.permute(1, 2, 0).numpy()) for image in images])
        return self.network(torch.from_numpy(resized).permute(0, 3, 1, 2).to(self.device)).float().cpu()


class _Clip:
    """A CLIP of open_clip with its own preprocessing."""

    def __init__(self, architecture: str, tag: str, metric: str, device: str | torch.device) -> None:
        library = _package(metric, "open_clip", "open_clip_torch")
        with _weights(metric, f"{architecture}/{tag}", "the Hugging Face cache"):
            self.model, self.preprocess = library.create_model_from_pretrained(
                architecture, pretrained=tag, device=device
            )
        self.model.eval()
        self.tokenize = library.get_tokenizer(architecture)
        self.device = device
        self.name = f"open_clip/{architecture}@{hash_module(self.model)[:12]}"
        self._texts: dict[str, torch.Tensor] = {}

    @torch.inference_mode()
    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """(B, F) of length 1."""
        shown = torch.stack([self.preprocess(image) for image in _pil(images)])
        return self.model.encode_image(shown.to(self.device), normalize=True).float().cpu()

    @torch.inference_mode()
    def match(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        for prompt in prompts:
            if prompt not in self._texts:
                encoded = self.model.encode_text(self.tokenize([prompt]).to(self.device), normalize=True)
                self._texts[prompt] = encoded[0].float().cpu()
        texts = torch.stack([self._texts[prompt] for prompt in prompts])
        return 100 * (in_fixed_batches(self.embed, images, _BATCH_SIZE) * texts).sum(1)


class _DreamSim:
    """The ensemble that the dreamsim package recommends."""

    def __init__(self, device: str | torch.device) -> None:
        library = _package("dreamsim", "dreamsim", "dreamsim")
        folder = os.path.join(torch.hub.get_dir(), "dreamsim")
        with _weights("dreamsim", "DreamSim ensemble", folder):
            os.makedirs(os.path.dirname(folder), exist_ok=True)
            self.model, self.preprocess = library.dreamsim(pretrained=True, device=str(device), cache_dir=folder)
        self.device = device
        self.name = f"dreamsim/ensemble@{hash_module(self.model)[:12]}"

    @torch.inference_mode()
    def embed(self, images: torch.Tensor) -> torch.Tensor:
        shown = torch.cat([self.preprocess(image) for image in _pil(images)])
        return self.model.embed(shown.to(self.device)).float().cpu()


# ---- helpers ---------------------------------------------------------------------------------------------------------


def _pil(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in images]


def _scaled(images: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    from ..worlds.shapes.classifier import to_pixel_values

    return to_pixel_values(images.to(device))


def _package(metric: str, module: str, package: str) -> Any:
    from ..models.runtime import mend_torchvision

    try:
        mend_torchvision()  # which all of them import
        return importlib.import_module(module)
    except ImportError as error:
        extra = "dreamsim" if package == "dreamsim" else "metrics"
        raise UserError(
            f"the metric {metric} needs the package {package} ({error}): pip install 'fastunlearn[{extra}]', "
            "or leave the metric out"
        ) from error


@contextlib.contextmanager
def _weights(metric: str, weights: str, index: str) -> Iterator[None]:
    """Turns whatever a library raises when it cannot fetch or read its weights into one line, and mutes it."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # progress bars are on stderr and stay
            yield
    except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(
            f"the metric {metric} needs the weights {weights}, which could not be fetched or read ({reason}): let this "
            f"machine reach their source once, put the intact file into {index}, or leave the metric out"
        ) from error
    finally:
        logging.disable(level)
