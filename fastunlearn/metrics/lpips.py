"""How different two images look: the LPIPS form on any trunk (Zhang et al. 2018, arXiv 1801.03924, equation 1).

A distance is the sum over layers of the spatial mean of ``sum_c w_c * (f0_c / |f0| - f1_c / |f1|)**2``, with the
channel weights of the ``lpips`` package, or uniform ones on a bundled world's own network.  Values made with
different trunks or image sizes do not compare; ``PerceptualDistance.metric`` names what was used.  How distances are
found by name is in :mod:`~fastunlearn.metrics.distances`.
"""

from __future__ import annotations

import importlib
import os
import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import safetensors
import torch
from fastunlearn_kernels import lpips_distance
from torch import nn

from ..batching import filled_tensor
from ..errors import UserError
from ..files.weights import hash_module
from ..worlds import Network

if TYPE_CHECKING:
    import lpips

_TRUNK_WEIGHTS = {"alex": "AlexNet_Weights", "vgg": "VGG16_Weights", "squeeze": "SqueezeNet1_1_Weights"}


class PerceptualDistance(nn.Module):
    """A trunk, its channel weights, and the distance they define.

    ``trunk`` maps (B, 3, H, W) float32 in [-1, 1] to a sequence of features (B, C, h, w); ``weights`` holds one (C,)
    tensor per layer; ``name`` says what they are.  Images pass in micro-batches of exactly ``micro_batch_size``
    pairs, the last one padded, so that a pair's distance does not depend on its company.

    Each image passes through the trunk in a batch of its own side, in channels_last, so that its features do not
    depend on what it is compared with.  Nine tenths of the time on a CPU are oneDNN's convolutions, near the rate of
    its matrix products: compiled and frozen trunks did not pay, nor did bfloat16 in three parts; Winograd's F(4, 3)
    would gain a tenth and lose a digit.  ``trunk_precision="bf16"`` makes the convolutions in bfloat16, in less than
    half the time where the CPU has it, and is part of the metric's name: such values do not compare with others.
    """

    trunk_precision: Literal["no", "bf16"] = "no"

    def __init__(
        self, trunk: nn.Module, weights: Sequence[torch.Tensor], name: str, *, micro_batch_size: int = 32
    ) -> None:
        super().__init__()
        if micro_batch_size < 1:
            raise UserError(f"micro_batch_size must be at least 1, got {micro_batch_size}")
        self.trunk = trunk
        self.weights = nn.ParameterList(weight.detach().clone().float() for weight in weights)
        self.micro_batch_size = micro_batch_size
        self.eval().requires_grad_(False)
        self._metric = f"{name}@{hash_module(self)[:12]}"
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the stubs lack this form

    @property
    def metric(self) -> str:
        """The name and the first 12 hex digits of the SHA-256 of all weights; ``+bf16`` with such a trunk."""
        return self._metric if self.trunk_precision == "no" else f"{self._metric}+{self.trunk_precision}"

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.weights[0].device

    def distance(self, images0: torch.Tensor, images1: torch.Tensor) -> torch.Tensor:
        """Distances (N,) float32 on the CPU of images (N, 3, H, W) uint8 to their partners; 0 means equal features.

        Raises ``UserError`` for other dtypes or shapes.
        """
        return self.distances(images0, [images1])[0]

    @torch.inference_mode()
    def distances(self, images0: torch.Tensor, others: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The distances of images to each of several partners; the trunk passes over the former once."""
        for images in (images0, *others):
            if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
                raise UserError(
                    f"images must be uint8 of shape (N, 3, H, W), got {images.dtype} {tuple(images.shape)}: "
                    "round them to 0..255 first"
                )
            if images.shape != images0.shape:
                raise UserError(
                    f"both sides must have one shape, got {tuple(images0.shape)} and {tuple(images.shape)}: "
                    "compare images of one size, pair by pair"
                )
        device, size, weights = self.device, self.micro_batch_size, list(self.weights)
        distances = [torch.empty(len(images0)) for _ in others]
        # Scoring resolves differences far below TF32's precision.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            for start in range(0, len(images0), size):
                count = min(size, len(images0) - start)
                features0 = self._features(images0[start : start + count].to(device))
                for images, result in zip(others, distances, strict=True):
                    features1 = self._features(images[start : start + count].to(device))
                    result[start : start + count] = lpips_distance(features0, features1, weights)[:count].cpu()
        return distances

    def _features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Of at most ``micro_batch_size`` images, in a pass of exactly so many."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.trunk_precision == "bf16"):
            return list(self.trunk(_to_pixel_values(filled_tensor(images, self.micro_batch_size))))


def lpips_distance_of(
    net: str, trunk_weights: str | Path | None = None, *, micro_batch_size: int = 32
) -> PerceptualDistance:
    """The distance of the ``lpips`` package on its trunk ``alex``, ``vgg`` or ``squeeze``, on the CPU.

    Channel weights come from the package.  The trunk's weights come from the safetensors file ``trunk_weights``, which
    has torchvision's names (``features.0.weight``, ...; others are ignored), or without one from torchvision, which
    fetches its ImageNet weights once.  Raises ``UserError`` when the weights cannot be had or do not fit.
    """
    return from_lpips(_lpips_model(net, trunk_weights), f"lpips/{net}", micro_batch_size=micro_batch_size)


def network_distance(network: Network, *, micro_batch_size: int = 32) -> PerceptualDistance:
    """The LPIPS form on a world's own network, with uniform channel weights, on the CPU."""
    weights = [torch.full((width,), 1 / len(network.widths)) for width in network.widths]
    return PerceptualDistance(network.trunk, weights, f"lpips-form/{network.name}", micro_batch_size=micro_batch_size)


def from_lpips(model: lpips.LPIPS, name: str = "lpips", *, micro_batch_size: int = 32) -> PerceptualDistance:
    """The distance of an ``lpips.LPIPS`` object, version 0.1 (the one that scales its input), with linear layers."""
    if not model.lpips or model.version != "0.1":
        raise UserError(f"from_lpips needs LPIPS(lpips=True, version='0.1'), got {model.lpips=}, {model.version=}")
    weights = [layer.model[-1].weight.flatten() for layer in model.lins]
    trunk = nn.Sequential(_Scaling(model.scaling_layer.shift, model.scaling_layer.scale), model.net)
    return PerceptualDistance(trunk, weights, name, micro_batch_size=micro_batch_size)


class _Scaling(nn.Module):
    """The package's (pixel_values - shift) / scale in one pass over the images."""

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self, shift: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(-self.shift / self.scale, pixel_values, 1 / self.scale)


def _to_pixel_values(images: torch.Tensor) -> torch.Tensor:
    """uint8 [0, 255] to float32 [-1, 1] in channels_last, with one copy."""
    return images.to(torch.float32, memory_format=torch.channels_last).div_(127.5).sub_(1)


def _lpips_model(net: str, trunk_weights: str | Path | None) -> lpips.LPIPS:
    """The package's model with its trunk's weights put in."""
    from ..models.runtime import mend_torchvision

    mend_torchvision()
    try:
        lpips = importlib.import_module("lpips")
        models = importlib.import_module("torchvision.models")
    except ImportError as error:
        raise UserError(f"lpips-{net} needs the packages lpips and torchvision ({error}): install them") from error
    # A random trunk first, whose weights are then replaced: the package itself would unpickle whatever the cache holds.
    # It must not disturb the caller's random numbers, and torchvision's advice on its arguments is not for the user.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
        model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    if trunk_weights is not None:
        _load_trunk(model.net, _read_trunk_weights(Path(trunk_weights), net), f"the file {trunk_weights}", net)
    else:
        _fetch_trunk(model.net, getattr(models, _TRUNK_WEIGHTS[net]).IMAGENET1K_V1.url, net)
    return model


def _fetch_trunk(trunk: nn.Module, url: str, net: str) -> None:
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    try:
        state = torch.hub.load_state_dict_from_url(
            url, folder, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
        _load_trunk(trunk, state, os.path.basename(url), net)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(
            f"lpips-{net} needs the ImageNet weights {os.path.basename(url)}, which could not be fetched or read "
            f"({reason}): let this machine reach torchvision's downloads, put the intact file into {folder}, "
            "give a safetensors file with `--trunk-weights`, or take another distance by `--metric` "
            "(`fastunlearn info` lists them)"
        ) from error


def _read_trunk_weights(path: Path, net: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else str(error).splitlines()[0]
        raise UserError(
            f"cannot read the trunk weights {path} ({reason}): give a safetensors file of torchvision's {net} weights"
        ) from error


def _load_trunk(trunk: nn.Module, state: Mapping[str, torch.Tensor], source: str, net: str) -> None:
    """Put torchvision's ``features.<index>.*`` where the package has them: in ``slice<n>.<index>.*``."""
    result = {}
    for key, own in trunk.state_dict().items():
        name = "features." + key.partition(".")[2]
        given = state.get(name)
        if given is None or given.shape != own.shape:
            got = "is missing" if given is None else f"has the shape {tuple(given.shape)}"
            raise UserError(
                f"{source} does not hold the trunk {net}: `{name}` {got} and must be {tuple(own.shape)}. "
                "Give the weights of that network, with torchvision's names"
            )
        if not torch.isfinite(given).all():
            raise UserError(f"{source} is damaged: `{name}` holds NaN or infinity. Fetch it again")
        result[key] = given.float()
    trunk.load_state_dict(result)
