"""Given pictures as training rows: read, encoded, and what would lead from a latent to one of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch

from ..errors import UserError
from ..files.images import find_images, read_image
from ..models.base import Model


def find_pictures(folder: str) -> dict[str, Path]:
    """The images in a folder, by name.  Raises UserError for no folder and for one without an image."""
    return {name: path.resolve() for name, path in find_images(Path(folder).expanduser()).items()}


def check_pictures(model: Model, pictures: Mapping[str, Path]) -> None:
    """UserError for an image that cannot be read, or that is not of the size that the model generates."""
    for path in pictures.values():
        height, width, _ = read_image(path).pixels.shape
        if (width, height) != model.image_size:
            wanted = " x ".join(map(str, model.image_size))
            raise UserError(
                f"the image {path} has {width} x {height} pixels and {model.name} generates {wanted}. Scale it to that."
            )


def digests(pictures: Mapping[str, Path]) -> dict[str, str]:
    """The SHA-256 of each file, so that a run knows its pictures again."""
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in pictures.items()}


def encode_pictures(model: Model, pictures: Mapping[str, Path]) -> dict[str, torch.Tensor]:
    """The latents (C, H, W) of each picture, float32 on the device, as the sampler's last latents are scaled."""
    check_pictures(model, pictures)
    result = {}
    for name, path in pictures.items():
        pixels = torch.tensor(read_image(path).pixels).permute(2, 0, 1)[None]
        result[name] = model.encode_images(pixels)[0]
    return result


def noise_share(model: Model, timesteps: torch.Tensor) -> torch.Tensor:
    """s_t, the factor of the noise in x_t, (T,) float32: 1 at pure noise, near 0 at the image."""
    one = torch.ones(len(timesteps), *model.latent_shape, device=timesteps.device)
    return model.noised(torch.zeros_like(one), one, timesteps)[0][:, 0, 0, 0]


def prediction_towards(
    model: Model, picture: torch.Tensor, latents: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the denoiser would answer at ``latents`` (T, C, H, W) if they were ``picture`` (C, H, W) with noise.

    The noise is what x_t is made of beside the picture, ``n = (x_t - a_t picture) / s_t``, and the answer is the truth
    for it: n itself, the velocity, or whatever the scheduler says that the model predicts.
    """
    clean, _ = model.noised(picture, torch.zeros_like(latents), timesteps)
    noise = (latents - clean) / noise_share(model, timesteps).view(-1, 1, 1, 1)
    return model.noised(picture, noise, timesteps)[1]
