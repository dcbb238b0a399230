"""A loaded model behind verbs.  A subclass is a family; nothing outside its file knows what differs.

A family of pipelines that is not served here is added by another package through the entry-point group
``fastunlearn.families``; an entry names a subclass of :class:`Model`.
"""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ..batching import chunks, filled, in_fixed_batches
from ..errors import UserError, one_line
from ..files.weights import hash_adapted, hash_pipeline
from ..methods.recipe import NEGATIVE, UNCONDITIONAL
from ..worlds import World, world_of
from . import schedulers
from .adapters import Adapter
from .attention import set_attention
from .options import ModelOptions
from .placement import Placed, Placement, networks

Tensors = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Conditions:
    """Encoded prompts: ``tensors`` maps an argument of the denoiser to (N, ...), row i belonging to prompt i."""

    prompts: tuple[str, ...]
    tensors: Tensors

    def rows(self, index: torch.Tensor | Sequence[int]) -> Tensors:
        """Arguments for a batch; ``index``: (B,) int64 or a list."""
        device = next(iter(self.tensors.values())).device
        index = torch.as_tensor(index, device=device)
        return {name: values[index] for name, values in self.tensors.items()}

    def of(self, prompts: Sequence[str]) -> Tensors:
        """Arguments for a batch of prompts, all of which were encoded."""
        return self.rows([self.prompts.index(prompt) for prompt in prompts])


@dataclasses.dataclass(frozen=True)
class Group:
    """A named choice among a denoiser's parameters: those that match ``only`` (any, where empty) and not ``without``.

    For what a pattern is, see :func:`matches`.
    """

    description: str
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    def holds(self, name: str) -> bool:
        """Whether the parameter ``name`` is of the group."""
        is_wanted = not self.only or any(matches(name, pattern) for pattern in self.only)
        return is_wanted and not any(matches(name, pattern) for pattern in self.without)


def matches(name: str, pattern: str) -> bool:
    """Whether ``pattern`` is a part of a parameter's name between dots (``attn2.to_k``).

    One with ``*`` or ``?`` must match the whole name.
    """
    if "*" in pattern or "?" in pattern:
        return fnmatchcase(name, pattern)
    return f".{pattern}." in f".{name}."


class Model(Placed, ABC):
    """A pipeline on a device: ``encode`` prompts, ``predict``, ``decode`` latents.

    ``denoiser`` is the network that unlearning changes.  ``source`` is the folder that the weights were read from, of
    their ``variant``; ``options``: how they were, and how the model is sampled.  ``adapter_files`` have been merged
    into the weights since: part -> parameters is ``merged``.  ``adapter``: what the denoiser carries while it is
    trained.  Between the verbs latents are (B, C, H, W) and timesteps what the scheduler lists, in float32.

    A family sets: ``family``, its name; ``pipelines``, the diffusers classes that it serves; ``parts``, what these must
    bring; ``denoiser_folder``; ``groups``, what a method may change; ``default_group``, the one of these that stands
    where a method's default names a group that only other families have; ``text_readers``, as ``--trainable`` takes
    them, the matrices that are given what the text encoders say as it is, empty where there is none; ``load_options``
    of ``from_pretrained``; ``is_guided``, False for one whose guidance, if there is any, needs no second prediction;
    ``masks_attention``, True for one that asks diffusers' dispatcher with a mask; ``original_encoders``, where its text
    encoders stand in a single file, if it can be written as one.
    """

    family: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]
    parts: ClassVar[tuple[str, ...]]
    groups: ClassVar[Mapping[str, Group]]
    default_group: ClassVar[str] = "cross-attention"
    text_readers: ClassVar[str] = ""
    denoiser_folder: ClassVar[str] = "transformer"
    load_options: ClassVar[Mapping[str, Any]] = {}
    masks_attention: ClassVar[bool] = False
    original_encoders: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self,
        pipeline: Any,
        source: Path,
        name: str,
        device: torch.device,
        options: ModelOptions | None = None,
        placement: Placement = Placement(),  # noqa: B008 - immutable
    ) -> None:
        self.source, self.name, self.device = source, name, device
        self.options = options or ModelOptions()
        self.adapter_files: tuple[Path, ...] = ()
        self.adapter: Adapter | None = None
        self.merged: Mapping[str, frozenset[str]] = {}
        self.pipeline = schedulers.with_scheduler(pipeline, self.options.scheduler, name)
        self.check()
        self.denoiser: nn.Module = getattr(pipeline, self.denoiser_folder)
        self.placement = placement
        placement.settle(pipeline, device, self.denoiser)
        set_attention(self.denoiser, self.options.backend, name, is_masked=self.masks_attention)
        for network in networks(pipeline):
            network.eval().requires_grad_(False)

    def check(self) -> None:
        """Refuse a pipeline that this family's verbs cannot serve.  Raises UserError."""
        self.check_parts([part for part in self.parts if getattr(self.pipeline, part, None) is not None], self.name)
        if self.sample_size is None:
            raise UserError(
                f"{self.name} does not say its resolution: write the latents' size as `sample_size` into "
                f"{self.denoiser_folder}/config.json."
            )
        self._check_size()
        latent_channels = getattr(self.pipeline.vae.config, "latent_channels", self.latent_shape[0])
        if self.latent_shape[0] != latent_channels:
            raise UserError(
                f"{self.name}'s denoiser takes {self.latent_shape[0]} channels where an image's latents have "
                f"{latent_channels}: models for inpainting or editing are not served. Use a text-to-image model."
            )
        if (text := self.options.negative_prompt) is not None:
            if not self.is_guided:
                raise UserError(
                    f"{self.name} is distilled: its guidance leads away from nothing. Leave `--negative-prompt` out."
                )
            if self.too_long([text]):
                raise UserError(
                    f"the negative prompt has {self.count_tokens(text)} tokens and {self.name} reads "
                    f"{self.max_tokens}. Shorten it."
                )

    @classmethod
    def check_parts(cls, present: Collection[str], name: str) -> None:
        """Refuse a pipeline that lacks one of the parts that the family needs."""
        if missing := [part for part in cls.parts if part not in present]:
            raise UserError(
                f"{name} has no {', '.join(missing)}, without which it generates nothing from a prompt alone. "
                "Use a whole text-to-image pipeline."
            )

    def _check_size(self) -> None:
        """Refuse a resolution that the latents' grid or the denoiser's patches do not divide, or have no places for."""
        if self.options.size is None:
            return
        width, height = self.options.size
        step = self.pixels_per_latent * self.patch
        if width % step or height % step:
            raise UserError(
                f"`--resolution` {width}x{height}: {self.name} makes images whose sides are multiples of {step} "
                f"pixels. Use {_multiple(width, step)}x{_multiple(height, step)}."
            )
        largest = self.largest_size
        if largest is not None and max(width, height) > largest * self.pixels_per_latent:
            raise UserError(
                f"`--resolution` {width}x{height}: {self.name} has places for {largest * self.pixels_per_latent} "
                "pixels a side. Use less."
            )

    @property
    def is_guided(self) -> bool:
        """Whether guidance needs the prediction of what it leads away from."""
        return True

    @property
    def variant(self) -> str | None:
        """Which of the weights were read; None for the usual ones."""
        return self.options.variant

    @functools.cached_property
    def world(self) -> World | None:
        """The bundled world that this is a model of, as it came or unlearned; None for a model of the user's own."""
        return world_of(self.source)

    def hash_files(self) -> str:
        """SHA-256 over every file that this model was read from."""
        return hash_adapted(hash_pipeline(self.source), self.adapter_files)

    @property
    def defaults_keys(self) -> tuple[str, ...]:
        """Whose defaults a method takes, the first that it has: the bundled world's and its like, else the family's."""
        return (self.world.name, *self.world.like) if self.world else (self.family,)

    @property
    def sample_size(self) -> Any:
        """The latents' native size, one number or (H, W); None where the denoiser's settings name none."""
        return getattr(self._config, "sample_size", None)

    @property
    def pixels_per_latent(self) -> int:
        """How many pixels a latent stands for, along a side."""
        return int(self.pipeline.vae_scale_factor)

    @property
    def patch(self) -> int:
        """How many latents a token of the denoiser takes, along a side."""
        return int(getattr(self._config, "patch_size", None) or 1)

    @property
    def largest_size(self) -> int | None:
        """The most latents along a side that the denoiser has positions for; None where there is no limit."""
        positions = getattr(self._config, "pos_embed_max_size", None)
        return positions * self.patch if positions else None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent, at the resolution that was asked for, else the model's native one."""
        if self.options.size is not None:
            width, height = (side // self.pixels_per_latent for side in self.options.size)
        else:
            size = self.sample_size
            height, width = (size, size) if isinstance(size, int) else size
        return self._config.in_channels, height, width

    @property
    def image_size(self) -> tuple[int, int]:
        """(width, height) of the images, in pixels."""
        _, height, width = self.latent_shape
        return width * self.pixels_per_latent, height * self.pixels_per_latent

    @property
    def _config(self) -> Any:
        """The denoiser's settings."""
        return getattr(self.pipeline, self.denoiser_folder).config

    # ---- prompts

    @property
    def reader(self) -> tuple[Any, int]:
        """The tokenizer that reads furthest, and how many tokens it reads, begin and end marks among them.

        Where there are several text encoders, the end of a long prompt may be read by one of them alone.
        """
        return self.pipeline.tokenizer, self.pipeline.tokenizer.model_max_length

    def count_tokens(self, prompt: str) -> int:
        """Tokens of the prompt, not counting begin and end marks, also where the prompt itself spells them."""
        tokenizer, _ = self.reader
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        return sum(token not in tokenizer.all_special_ids for token in ids)

    def tokens(self, prompt: str) -> list[int]:
        """The ids that the reader makes of a prompt, in the order of its states, marks among them, padding not."""
        tokenizer, limit = self.reader
        return list(tokenizer(prompt, truncation=True, max_length=limit).input_ids)

    def words(self, text: str) -> list[int]:
        """The ids of a text within a prompt, without marks."""
        return list(self.reader[0](text, add_special_tokens=False).input_ids)

    @property
    def max_tokens(self) -> int:
        """Tokens of a prompt that the text encoder reads, not counting begin and end marks."""
        tokenizer, limit = self.reader
        return limit - tokenizer.num_special_tokens_to_add()

    def too_long(self, prompts: Sequence[str]) -> list[str]:
        """Those of the prompts, each once, whose end the model does not read."""
        return [prompt for prompt in dict.fromkeys(prompts) if self.count_tokens(prompt) > self.max_tokens]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], batch_size: int | None = None) -> Conditions:
        """Encode each distinct prompt once.

        ``UNCONDITIONAL`` among them stands for :meth:`unconditional`, ``NEGATIVE`` for the user's negative prompt.
        With ``batch_size`` every forward has exactly so many rows, the last one filled up, so that a prompt's states do
        not depend on its company in any bit.
        """
        prompts = tuple(dict.fromkeys(prompts))
        texts = [prompt for prompt in prompts if prompt not in (UNCONDITIONAL, NEGATIVE)]
        rows: dict[str, Tensors] = {}
        for chunk in chunks(texts, batch_size or 64):
            encoded = self.encode_texts(filled(chunk, batch_size or len(chunk)))
            rows |= {text: {name: values[i] for name, values in encoded.items()} for i, text in enumerate(chunk)}
        if UNCONDITIONAL in prompts:
            encoded = self.unconditional(batch_size or 1)
            rows[UNCONDITIONAL] = {name: values[0] for name, values in encoded.items()}
        if NEGATIVE in prompts:
            encoded = self.encode_negative([self.options.negative_prompt or ""] * (batch_size or 1))
            rows[NEGATIVE] = {name: values[0] for name, values in encoded.items()}
        names = next(iter(rows.values()))
        return Conditions(prompts, {name: torch.stack([rows[prompt][name] for prompt in prompts]) for name in names})

    @abstractmethod
    def encode_texts(self, texts: list[str]) -> Tensors:
        """The denoiser's conditions for B texts, (B, ...) each, float32 on the device; a text may be empty.

        The states are called ``STATES``, (B, L, D).  Where the denoiser is told which of them it reads, ``MASK``, (B,
        L), is 1 for these and 0 for the others.
        """

    def unconditional(self, count: int) -> Tensors:
        """``count`` rows of the condition that guidance leads away from, which is not always the prompt ""."""
        return self.encode_negative([""] * count)

    def encode_negative(self, texts: list[str]) -> Tensors:
        """Like :meth:`encode_texts`, of texts that guidance leads away from; some families read these otherwise."""
        return self.encode_texts(texts)

    def guided_from(self, scale: float) -> tuple[str, ...]:
        """What guidance leads away from: one prompt, or none where there is no guidance or it needs no prediction."""
        if scale <= 1 or not self.is_guided:
            return ()
        return (UNCONDITIONAL if self.options.negative_prompt is None else NEGATIVE,)

    def with_guidance(self, conditions: Tensors, scale: float) -> Tensors:
        """The conditions for a denoiser that takes the guidance scale as an input; for others they stay as they are.

        Asking twice is as good as once.
        """
        return conditions

    # ---- the denoiser

    @abstractmethod
    def predict(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Tensors, denoiser: nn.Module | None = None
    ) -> torch.Tensor:
        """What ``scheduler.step`` takes, (B, C, H, W) float32, in whatever the scheduler's ``prediction_type`` is.

        ``latents``: (B, C, H, W) as the scheduler scales them, ``timesteps``: (B,) or a scalar.  ``denoiser``: what to
        call in its place, where an engine has wrapped it.
        """

    def guide(self, predictions: torch.Tensor, scale: float) -> torch.Tensor:
        """The guided prediction (B, C, H, W) from (K, B, C, H, W): first the unconditional, then the prompt's.

        Classifier-free guidance.  It is asked only where :meth:`guided_from` names a prompt.
        """
        return torch.lerp(predictions[0], predictions[1], scale)

    def noised(
        self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(x_t, truth) of the training loss; see :func:`schedulers.noised` for the shapes."""
        return schedulers.noised(self.pipeline.scheduler, clean, noise, timesteps)

    def new_scheduler(self, num_inference_steps: int) -> Any:
        """A fresh copy of the pipeline's scheduler with its timesteps set."""
        scheduler = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)
        options = self.timestep_options(num_inference_steps)
        try:
            scheduler.set_timesteps(**options, device=self.device)
        except ValueError as error:
            raise UserError(
                f"{self.name}'s sampler cannot take {num_inference_steps} steps: {one_line(error)}"
            ) from error
        return scheduler

    def timestep_options(self, num_inference_steps: int) -> dict[str, Any]:
        """Arguments of the scheduler's ``set_timesteps``; some families choose sigmas of their own."""
        return {"num_inference_steps": num_inference_steps}

    # ---- images

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, batch_size: int | None = None) -> torch.Tensor:
        """Latents (B, C, H, W) to images (B, 3, H, W) uint8, rounded to nearest, on the CPU.

        With ``batch_size`` that many are decoded at a time, always as many, so that an image does not depend on its
        company.  Raises UserError for images that are no numbers: as bytes they would pass for black ones.
        """
        if batch_size is not None and batch_size < len(latents):
            return in_fixed_batches(self.decode, latents, batch_size)
        if self.placement.shelf:
            self.placement.shelf.hold(self.pipeline.vae)
        pixels = self.decode_latents(latents.to(self.pipeline.vae.dtype))
        if not pixels.isfinite().all():
            raise UserError(
                f"{self.name} generates images that are NaN or infinite: its weights are damaged, or too large for "
                "this precision. Nothing can be compared with them."
            )
        return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, H, W) to pixels (B, 3, H, W) in [-1, 1], by the VAE's own scale, shift, mean and spread."""
        vae = self.pipeline.vae
        config = vae.config
        mean, spread = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is not None and spread is not None:
            mean, spread = (torch.as_tensor(v, dtype=latents.dtype, device=latents.device) for v in (mean, spread))
            latents = latents * spread.view(1, -1, 1, 1) / config.scaling_factor + mean.view(1, -1, 1, 1)
        else:
            latents = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        return vae.decode(latents, return_dict=False)[0]

    @torch.no_grad()
    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) uint8 to latents (B, C, h, w) float32 on the device: :meth:`decode` read backwards.

        The mean of the VAE's distribution, so the same each time.
        """
        vae = self.pipeline.vae
        config = vae.config
        encoded = vae.encode(pixels.to(self.device, vae.dtype) / 127.5 - 1, return_dict=False)[0]
        latents = (encoded if torch.is_tensor(encoded) else encoded.mode()).float()
        mean, spread = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is not None and spread is not None:
            mean, spread = (torch.as_tensor(v, dtype=latents.dtype, device=latents.device) for v in (mean, spread))
            return (latents - mean.view(1, -1, 1, 1)) * config.scaling_factor / spread.view(1, -1, 1, 1)
        return (latents - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor


def _multiple(pixels: int, step: int) -> int:
    """The multiple of ``step`` that is next to ``pixels``, and not 0."""
    return max(1, round(pixels / step)) * step
