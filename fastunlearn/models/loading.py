"""Loads a text-to-image pipeline and hides what differs between families: encoding, prediction, decoding.

Nothing outside this file knows a family.  Weights come from safetensors only, never from pickle or remote code.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..batching import chunks, filled
from ..errors import UserError, one_line
from ..files.weights import hash_module
from ..worlds import World, all_worlds, world_of, world_with_model

_SUPPORTED = {"StableDiffusionPipeline": "stable-diffusion", "StableDiffusionXLPipeline": "stable-diffusion-xl"}


def mend_torchvision() -> None:
    """Make ``import torchvision`` work beside a CPU build of torch.

    The registry's torchvision is built for CUDA; without its compiled operators the import stops at
    ``operator torchvision::nms does not exist``, and with it transformers, diffusers and lpips.  Declaring the two
    operators' schemas is enough, since nothing here calls them.  Does nothing where torchvision imports as it is.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
    except ImportError:
        pass  # optional: only lpips needs it, and says so itself


def import_diffusers() -> ModuleType:
    """``diffusers``, importable also beside a CPU build of torch, and silent."""
    mend_torchvision()
    diffusers = importlib.import_module("diffusers")
    # What it logs as an error, it also raises: our one line says it.
    diffusers.utils.logging.set_verbosity(diffusers.utils.logging.CRITICAL)
    diffusers.utils.logging.disable_progress_bar()
    transformers = importlib.import_module("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return diffusers


@dataclasses.dataclass(frozen=True)
class Conditions:
    """Encoded prompts: ``tensors`` maps an argument of the denoiser to (N, ...), row i belonging to prompt i."""

    prompts: tuple[str, ...]
    tensors: dict[str, torch.Tensor]

    def rows(self, index: torch.Tensor | Sequence[int]) -> dict[str, torch.Tensor]:
        """Arguments for a batch; ``index``: (B,) int64 or a list."""
        index = torch.as_tensor(index, device=self.tensors["encoder_hidden_states"].device)
        return {name: values[index] for name, values in self.tensors.items()}

    def of(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Arguments for a batch of prompts, all of which were encoded."""
        return self.rows([self.prompts.index(prompt) for prompt in prompts])


class Model:
    """A pipeline on a device: ``encode`` prompts, ``predict`` noise, ``decode`` latents.

    ``denoiser`` is the network that unlearning changes.  ``source`` is the folder that the weights were read from.
    """

    def __init__(self, pipeline: Any, source: Path, name: str, device: torch.device) -> None:
        self.pipeline = pipeline.to(device, torch.float32)
        self.source, self.name, self.device = source, name, device
        self.family = _SUPPORTED[type(pipeline).__name__]
        self.denoiser: nn.Module = pipeline.unet
        self.denoiser_folder = "unet"
        for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)):
            if part is not None:
                part.eval().requires_grad_(False)

    @functools.cached_property
    def world(self) -> World | None:
        """The bundled world that this is a model of, as it came or unlearned; None for a model of the user's own."""
        return world_of(self.source)

    @property
    def defaults_key(self) -> str:
        """Whose defaults a method takes: the bundled world's, else the family's."""
        return self.world.name if self.world else self.family

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent at the model's native resolution."""
        config: Any = self.denoiser.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return config.in_channels, height, width

    def count_tokens(self, prompt: str) -> int:
        """Tokens of the prompt, not counting begin and end marks, also where the prompt itself spells them."""
        tokenizer = self.pipeline.tokenizer
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        return sum(token not in tokenizer.all_special_ids for token in ids)

    @property
    def max_tokens(self) -> int:
        """Tokens of a prompt that the text encoder reads, not counting begin and end marks."""
        return self.pipeline.tokenizer.model_max_length - 2

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], batch_size: int | None = None) -> Conditions:
        """Encode each distinct prompt once.

        With ``batch_size`` every forward has exactly so many rows, the last one filled up, so that a prompt's states do
        not depend on its company in any bit.
        """
        prompts = tuple(dict.fromkeys(prompts))
        embeds: dict[str, list[torch.Tensor]] = {}
        for chunk in chunks(prompts, batch_size or 64):
            for name, values in self._encode(filled(chunk, batch_size or len(chunk))).items():
                embeds.setdefault(name, []).append(values[: len(chunk)])
        return Conditions(prompts, {name: torch.cat(values) for name, values in embeds.items()})

    def _encode(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        encoded = self.pipeline.encode_prompt(
            prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        tensors = {"encoder_hidden_states": encoded[0]}
        if self.family == "stable-diffusion-xl":
            _, height, width = self.latent_shape
            scale = self.pipeline.vae_scale_factor
            size = [height * scale, width * scale]
            time_ids = torch.tensor([[*size, 0, 0, *size]], dtype=encoded[2].dtype, device=self.device)
            tensors |= {"text_embeds": encoded[2], "time_ids": time_ids.expand(len(prompts), -1)}
        return tensors

    @property
    def dtype(self) -> torch.dtype:
        """Of the denoiser's weights: float32, but where an engine keeps them in bfloat16."""
        return next(self.denoiser.parameters()).dtype

    def predict(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditions: dict[str, torch.Tensor],
        denoiser: nn.Module | None = None,
    ) -> torch.Tensor:
        """The denoiser's output, (B, C, H, W) float32, in whatever its ``prediction_type`` is.

        ``latents``: (B, C, H, W) as the scheduler scales them, ``timesteps``: (B,) or a scalar.  ``denoiser``: what to
        call in its place, where an engine has wrapped it.
        """
        inputs = {name: values.to(self.dtype) for name, values in conditions.items()}
        hidden = inputs.pop("encoder_hidden_states")
        network = self.denoiser if denoiser is None else denoiser
        prediction = network(
            latents.to(self.dtype),
            timesteps,
            encoder_hidden_states=hidden,
            added_cond_kwargs=inputs or None,
            return_dict=False,
        )
        return prediction[0].float()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, H, W) to images (B, 3, H, W) uint8, rounded to nearest, on the CPU.

        Raises UserError for images that are no numbers: as bytes they would pass for black ones.
        """
        vae = self.pipeline.vae
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        pixels = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor + shift, return_dict=False)[0]
        if not pixels.isfinite().all():
            raise UserError(
                f"{self.name} generates images that are NaN or infinite: its weights are damaged, or too large for "
                "this precision. Nothing can be compared with them."
            )
        return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()

    def new_scheduler(self, num_inference_steps: int) -> Any:
        """A fresh copy of the pipeline's scheduler with its timesteps set."""
        scheduler = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)
        try:
            scheduler.set_timesteps(num_inference_steps, device=self.device)
        except ValueError as error:
            raise UserError(
                f"{self.name}'s sampler cannot take {num_inference_steps} steps: {one_line(error)}"
            ) from error
        return scheduler


def load_model(name: str, device: str | torch.device = "auto") -> Model:
    """Load ``shapes`` (the bundled model), ``shapes-gold-star``, a diffusers folder or a hub id, in float32.

    Raises UserError, in one line, for anything that cannot be loaded: unknown name, unsupported family, pickled,
    truncated or missing weights.
    """
    device = resolve_device(device)
    source = resolve_source(name)
    family = _pipeline_class(source, name)
    _check_weight_files(source)
    diffusers = import_diffusers()
    try:
        pipeline = getattr(diffusers, family).from_pretrained(
            source, use_safetensors=True, local_files_only=True, **_no_safety_checker(family)
        )
    except Exception as error:
        raise UserError(f"cannot load the model {name!r}: {_first_line(error)}") from error
    _check_complete(pipeline, source)
    return Model(pipeline, source, name, device)


def resolve_device(device: str | torch.device) -> torch.device:
    """``auto`` is a CUDA device where there is one.  UserError for a device that this machine lacks."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("`--device cuda` needs a CUDA device and this machine has none. Use `--device cpu`.")
    return device


def wrap_pipeline(pipeline: Any, name: str) -> Model:
    """A loaded diffusers pipeline as a :class:`Model`, on its device; put in evaluation mode and float32.

    Raises UserError for a family that is not supported.
    """
    if type(pipeline).__name__ not in _SUPPORTED:
        raise UserError(
            f"{name} is a {type(pipeline).__name__}, a family not supported. Supported: {', '.join(_SUPPORTED)}; or "
            "pass a function (prompts, noise) -> images."
        )
    return Model(pipeline, Path(pipeline.name_or_path or "."), name, pipeline.device)


def sampler_config(model: Model) -> dict[str, Any]:
    """The scheduler's class and all its settings, for comparing two models' samplers."""
    config = json.loads(model.pipeline.scheduler.to_json_string())
    return {key: value for key, value in config.items() if key != "_diffusers_version"}


def content_of(pipeline: Any) -> str:
    """SHA-256 over everything in a loaded pipeline that decides its images: weights, settings, tokenizers."""
    digest = hashlib.sha256()
    for name, part in sorted(pipeline.components.items()):
        digest.update(f"{name}\n".encode())
        if isinstance(part, nn.Module):
            digest.update(hash_module(part).encode())
        if hasattr(part, "get_vocab"):
            digest.update(json.dumps(part.get_vocab(), sort_keys=True).encode())
        if hasattr(part, "config"):
            config = part.config.to_dict() if hasattr(part.config, "to_dict") else dict(part.config)
            digest.update(repr(sorted((str(key), str(value)) for key, value in config.items())).encode())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """What a result was computed with, for the records of a run and of an evaluation."""
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "diffusers": import_diffusers().__version__,
    }


def resolve_source(name: str) -> Path:
    """The folder of a model's files, fetched where it is a hub id.  UserError for an unknown name."""
    if world := world_with_model(name):
        return world.folder(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        known = ", ".join(model for world in all_worlds().values() for model in world.models)
        raise UserError(f"unknown model {name!r}: it is no folder. Use {known}, a diffusers folder or a hub id.")
    diffusers = import_diffusers()
    try:
        return Path(diffusers.DiffusionPipeline.download(name, use_safetensors=True))
    except Exception as error:
        raise UserError(
            f"cannot fetch the model {name!r} from the hub: {_first_line(error)} "
            "Check the name and the network, or pass a local diffusers folder."
        ) from error


def _pipeline_class(source: Path, name: str) -> str:
    index = source / "model_index.json"
    if (source / "delta.safetensors").is_file() and not index.is_file():
        raise UserError(
            f"{name!r} is a run saved as a delta. Rebuild its model with `fastunlearn apply` and pass that."
        )
    if not index.is_file():
        raise UserError(f"{name!r} is no diffusers pipeline: it has no model_index.json. Pass the pipeline's folder.")
    try:
        family = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} is damaged: {_first_line(error)}") from error
    if family not in _SUPPORTED:
        raise UserError(f"{name!r} is a {family}, a family not supported. Supported: {', '.join(_SUPPORTED)}.")
    return family


def _check_weight_files(source: Path) -> None:
    from safetensors import safe_open

    for folder in sorted(path for path in source.iterdir() if path.is_dir()):
        files = sorted(folder.glob("*.safetensors"))
        pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.ckpt"), *folder.glob("*.pt")])
        if pickled and not files:
            raise UserError(
                f"{pickled[0]} is pickled, which can run code when read, so it is not. Save the pipeline with "
                "`save_pretrained(folder, safe_serialization=True)` and pass that folder."
            )
        for path in files:
            try:
                with safe_open(path, "pt") as weights:
                    weights.keys()
            except Exception as error:
                raise UserError(f"{path} is truncated or damaged: {_first_line(error)} Fetch it again.") from error


def _check_complete(pipeline: Any, source: Path) -> None:
    """ValueError where a part's files hold fewer tensors than the part: what is missing would be random numbers."""
    from safetensors import safe_open

    for part, module in pipeline.components.items():
        files = sorted((source / part).glob("*.safetensors"))
        if not isinstance(module, nn.Module) or not files:
            continue
        stored: set[str] = set()
        for path in files:
            with safe_open(path, "pt") as weights:
                stored.update(weights.keys())
        # Counted, not compared by name: older files use other names, which diffusers translates.
        wanted = len(list(module.parameters()))
        if len(stored) < wanted:
            raise UserError(f"{source / part} is incomplete: {len(stored)} of {wanted} tensors. Fetch it again.")


def _no_safety_checker(family: str) -> dict[str, Any]:
    """The checker blacks images out, which would be mistaken for damage: it is never part of a comparison."""
    if family == "StableDiffusionPipeline":
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return {}


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    line = text[0] if text else type(error).__name__
    return line if line.endswith(".") else line + "."
