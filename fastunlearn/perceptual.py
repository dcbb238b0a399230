"""How different two pictures look: the LPIPS form on any trunk (Zhang et al. 2018, arXiv 1801.03924, equation 1).

A distance is the sum over layers of the spatial mean of ``sum_c w_c * (f0_c / |f0| - f1_c / |f1|)**2``, with the
channel weights of the ``lpips`` package, or uniform ones on the bundled world's classifier.  Values made with
different trunks or picture sizes do not compare; ``PerceptualDistance.metric`` names what was used.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import pickle
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from fastunlearn_kernels import lpips_distance
from torch import nn

if TYPE_CHECKING:
    import lpips

#: The names ``load_perceptual`` knows.
METRICS = ("shapes", "lpips-alex", "lpips-vgg", "lpips-squeeze")

_TRUNK_WEIGHTS = {"alex": "AlexNet_Weights", "vgg": "VGG16_Weights", "squeeze": "SqueezeNet1_1_Weights"}


class PerceptualDistance(nn.Module):
    """A trunk, its channel weights, and the distance they define.

    ``trunk`` maps (B, 3, H, W) float32 in [-1, 1] to a sequence of features (B, C, h, w); ``weights`` holds one (C,)
    tensor a layer; ``name`` says what they are.  Pictures pass in micro-batches of exactly ``micro_batch_size``
    pairs, the last one padded, so that a pair's distance does not depend on its company.
    """

    def __init__(
        self, trunk: nn.Module, weights: Sequence[torch.Tensor], name: str, *, micro_batch_size: int = 32
    ) -> None:
        super().__init__()
        if micro_batch_size < 1:
            raise ValueError(f"micro_batch_size must be at least 1, got {micro_batch_size}")
        self.trunk = trunk
        self.weights = nn.ParameterList(weight.detach().clone().float() for weight in weights)
        self.micro_batch_size = micro_batch_size
        self.eval().requires_grad_(False)
        self._metric = f"{name}@{_fingerprint(self)}"

    @property
    def metric(self) -> str:
        """The name and the first 12 hex digits of the SHA-256 of all weights."""
        return self._metric

    @torch.inference_mode()
    def distance(self, pictures0: torch.Tensor, pictures1: torch.Tensor) -> torch.Tensor:
        """Distances (N,) float32 on the CPU of pictures (N, 3, H, W) uint8 to their partners; 0 means equal features.

        Raises ``ValueError`` for other dtypes or shapes.
        """
        for pictures in (pictures0, pictures1):
            if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] != 3:
                raise ValueError(
                    f"pictures must be uint8 of shape (N, 3, H, W), got {pictures.dtype} {tuple(pictures.shape)}: "
                    "round them to 0..255 first"
                )
        if pictures0.shape != pictures1.shape:
            raise ValueError(
                f"both sides must have one shape, got {tuple(pictures0.shape)} and {tuple(pictures1.shape)}: "
                "compare pictures of one size, pair by pair"
            )
        device, size = self.weights[0].device, self.micro_batch_size
        distances = torch.empty(len(pictures0))
        # Scoring resolves differences far below TF32's precision.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            for start in range(0, len(pictures0), size):
                sides = [pictures[start : start + size].to(device) for pictures in (pictures0, pictures1)]
                count = len(sides[0])
                padded = [torch.cat([side, side[-1:].expand(size - count, -1, -1, -1)]) for side in sides]
                features = self.trunk(torch.cat(padded).float() / 127.5 - 1)
                features0, features1 = (
                    [layer[half] for layer in features] for half in (slice(size), slice(size, None))
                )
                result = lpips_distance(features0, features1, list(self.weights))
                distances[start : start + count] = result[:count].float().cpu()
        return distances


def load_perceptual(name: str, device: str | torch.device = "cpu") -> PerceptualDistance:
    """A distance by name: ``shapes`` (the bundled classifier's features) or ``lpips-alex|vgg|squeeze``.

    The latter take their channel weights from the ``lpips`` package and their trunk's ImageNet weights from
    torchvision, which fetches them once.  Raises ``ValueError`` for an unknown name and when the weights cannot be
    had.
    """
    if name not in METRICS:
        raise ValueError(f"unknown perceptual distance {name!r}: choose one of {', '.join(METRICS)}")
    distance = _shapes_distance() if name == "shapes" else _lpips_distance(name.removeprefix("lpips-"))
    return distance.to(device)


def from_lpips(model: lpips.LPIPS, name: str = "lpips", *, micro_batch_size: int = 32) -> PerceptualDistance:
    """The distance of an ``lpips.LPIPS`` object, version 0.1 (the one that scales its input), with linear layers."""
    if not model.lpips or model.version != "0.1":
        raise ValueError(f"from_lpips needs LPIPS(lpips=True, version='0.1'), got {model.lpips=}, {model.version=}")
    weights = [layer.model[-1].weight.flatten() for layer in model.lins]
    trunk = nn.Sequential(model.scaling_layer, model.net)
    return PerceptualDistance(trunk, weights, name, micro_batch_size=micro_batch_size)


class _ClassifierTrunk(nn.Module):
    def __init__(self) -> None:
        from .shapes import load_classifier

        super().__init__()
        self.classifier = load_classifier()

    def forward(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        return self.classifier.features(pixel_values)


def _shapes_distance() -> PerceptualDistance:
    trunk = _ClassifierTrunk()
    widths = trunk.classifier.widths
    return PerceptualDistance(
        trunk, [torch.full((width,), 1 / len(widths)) for width in widths], "lpips-form/shapes-classifier"
    )


def _lpips_distance(net: str) -> PerceptualDistance:
    from .models import mend_torchvision

    mend_torchvision()
    try:
        lpips = importlib.import_module("lpips")
        models = importlib.import_module("torchvision.models")
    except ImportError as error:
        raise ValueError(f"lpips-{net} needs the packages lpips and torchvision ({error}): install them") from error
    # A random trunk first, whose weights are then replaced: the package itself would unpickle whatever the cache holds.
    # It must not disturb the caller's random numbers, and torchvision's advice on its arguments is not for the user.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
        model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    url = getattr(models, _TRUNK_WEIGHTS[net]).IMAGENET1K_V1.url
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    try:
        state = torch.hub.load_state_dict_from_url(
            url, folder, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
        # The package cuts torchvision's ``features.<index>`` into ``slice<n>.<index>``.
        trunk = {key: state["features." + key.partition(".")[2]] for key in model.net.state_dict()}
        model.net.load_state_dict(trunk)
    except (OSError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(
            f"lpips-{net} needs the ImageNet weights {os.path.basename(url)}, which could not be fetched or read "
            f"({reason}): let this machine reach torchvision's downloads, or put the intact file into {folder}, "
            "or choose another perceptual distance"
        ) from error
    return from_lpips(model, f"lpips/{net}")


def _fingerprint(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
