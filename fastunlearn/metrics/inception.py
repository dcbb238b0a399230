"""The network of FID and KID: clean-fid's Inception and its resizing (Parmar et al. 2022, arXiv 2104.11222)."""

from __future__ import annotations

import os

import numpy as np
import torch

from ..files.weights import hash_module
from .libraries import fetching, library_of


class Inception:
    """``metric``: on whose behalf, for error messages."""

    def __init__(self, metric: str, device: str | torch.device) -> None:
        networks = library_of(metric, "cleanfid.inception_torchscript", "clean-fid")
        self.resize = library_of(metric, "cleanfid.resize", "clean-fid").build_resizer("clean")
        # Not clean-fid's own choice, a shared temporary folder that anybody may write to.
        folder = os.path.join(torch.hub.get_dir(), "checkpoints")
        with fetching(metric, "inception-2015-12-05.pt", folder):
            os.makedirs(folder, exist_ok=True)
            self.network = networks.InceptionV3W(folder, download=True, resize_inside=False).eval().to(device)
        self.device = device
        self.name = f"clean-fid/inception-v3@{hash_module(self.network)[:12]}"

    @torch.inference_mode()
    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) uint8 on the CPU to (B, 2048) float32 on the CPU."""
        resized = np.stack([self.resize(image.permute(1, 2, 0).numpy()) for image in images])
        return self.network(torch.from_numpy(resized).permute(0, 3, 1, 2).to(self.device)).float().cpu()
