"""The network of CLIPScore and CMMD: a CLIP of open_clip with its own preprocessing.

OpenAI's weights were trained with QuickGELU.  open_clip builds its plain model names, such as ``ViT-B-32``, with GELU,
which makes another network of the same weights; ask for the names that end in ``-quickgelu``.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from ..files.images import to_pil
from ..files.weights import hash_module
from .libraries import fetching, library_of


class Clip:
    """``metric``: on whose behalf, for error messages.  ``tag``: open_clip's name of the weights."""

    def __init__(self, architecture: str, tag: str, metric: str, device: str | torch.device) -> None:
        library = library_of(metric, "open_clip", "open_clip_torch")
        with fetching(metric, f"{architecture}/{tag}", "the Hugging Face cache"), warnings.catch_warnings():
            # The wrong network for these weights is a bug of ours, not something to measure with.
            warnings.filterwarnings("error", message="QuickGELU mismatch")
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
        """Images (B, 3, H, W) uint8 on the CPU to (B, F) float32 of length 1, on the CPU."""
        shown = torch.stack([self.preprocess(image) for image in to_pil(images)])
        return self.model.encode_image(shown.to(self.device), normalize=True).float().cpu()

    @torch.inference_mode()
    def match(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """100 times the cosine of images (B, 3, H, W) uint8 and their prompts, (B,) float32 on the CPU."""
        for prompt in prompts:
            if prompt not in self._texts:
                encoded = self.model.encode_text(self.tokenize([prompt]).to(self.device), normalize=True)
                self._texts[prompt] = encoded[0].float().cpu()
        texts = torch.stack([self._texts[prompt] for prompt in prompts])
        return 100 * (self.embed(images) * texts).sum(1)
