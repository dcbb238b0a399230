"""What generates images: a pipeline or a function, asked alike, from the same noise, in batches of one size."""

from __future__ import annotations

import collections
import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..batching import chunks, filled
from ..errors import UserError
from ..files.weights import hash_part
from ..models.base import Model
from ..models.loading import content_of, load_frozen, own_settings, wrap_pipeline
from ..models.options import ModelOptions
from ..models.placement import Placement
from ..models.runtime import versions
from ..models.sampling import SamplerSpec, decode, denoise, initial_noise
from ..models.schedulers import check_deterministic, sampler_config
from ..worlds import World

#: Maps B prompts and their noise (B, C, H, W), float32 on the CPU, to images (B, 3, H, W) uint8.
Generator = Callable[[list[str], torch.Tensor], Any]
Key = tuple[str, int]  # prompt, seed


class Source(ABC):
    """Generates images for (prompt, seed) keys.

    ``noise_shape``: (C, H, W) of the initial noise.  ``batch_size``: rows of every batch.  ``state``: everything that
    decides the images, to be hashed; None where that cannot be known.  ``settings``: what the results' record says.
    """

    def __init__(self, name: str, noise_shape: tuple[int, int, int], batch_size: int) -> None:
        self.name, self.noise_shape, self.batch_size = name, noise_shape, batch_size

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def world(self) -> World | None:
        """The bundled world whose images these are, if they are of one."""
        return None

    @property
    def takes_turns(self) -> bool:
        """Whether its networks share the device one after the other, so that nothing else may run meanwhile."""
        return False

    @abstractmethod
    def content(self) -> str:
        """A hash of what generates, or a name for it where there is nothing to hash."""

    @abstractmethod
    def state(self) -> dict[str, Any] | None: ...

    @abstractmethod
    def settings(self) -> dict[str, Any]: ...

    @abstractmethod
    def begin(self, prompts: list[str], noise: torch.Tensor) -> Any:
        """Start a batch of exactly ``batch_size`` rows."""

    @abstractmethod
    def finish(self, begun: Any) -> torch.Tensor:
        """The batch's images, (B, 3, H, W) uint8 on the CPU."""

    def start(self, keys: Sequence[Key]) -> Callable[[], torch.Tensor]:
        """Start at most ``batch_size`` keys; what is returned gives their images.

        A batch is filled up with its last key: results of a network may change in the last bit with the size of a
        batch, not with a row's place in it.
        """
        padded = filled(keys, self.batch_size)
        prompts = [prompt for prompt, _ in padded]
        begun = self.begin(prompts, initial_noise(prompts, [seed for _, seed in padded], self.noise_shape))
        return lambda: self.finish(begun)[: len(keys)]

    def generate(self, keys: Sequence[Key]) -> torch.Tensor:
        """Images (N, 3, H, W) uint8 of any number of keys."""
        return torch.cat([self.start(part)() for part in chunks(keys, self.batch_size)])


class PipelineSource(Source):
    """A diffusers pipeline with its sampler's settings; those of one text encoder can share its states."""

    def __init__(self, model: Model, spec: SamplerSpec, *, saved: bool = True) -> None:
        super().__init__(model.name, model.latent_shape, spec.micro_batch_size)
        self.model, self.spec = model, spec
        self._saved = saved  # the folder holds what is in memory
        self.text = TextStates(model, spec.micro_batch_size)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def world(self) -> World | None:
        return self.model.world

    @functools.cache  # noqa: B019  (as long-lived as the process)
    def content(self) -> str:
        return self.model.hash_files() if self._saved else content_of(self.model.pipeline)

    def state(self) -> dict[str, Any]:
        return {"content": self.content(), "noise": self.noise_shape, **self.settings(), **environment(self.device)}

    def settings(self) -> dict[str, Any]:
        sampler = sampler_config(self.model)
        return {
            "sampler": sampler["_class_name"],
            "sampler_config": sampler,
            "steps": self.spec.num_inference_steps,
            "guidance_scale": self.spec.guidance_scale,
            "resolution": "{}x{}".format(*self.model.image_size),
            "negative_prompt": self.model.options.negative_prompt,
            "attention": self.model.options.backend,
            "dtype": self._dtype,
            "micro_batch_size": self.batch_size,
            **({"decode_batch_size": size} if (size := self.spec.decode_batch_size) is not None else {}),
        }

    @property
    def _dtype(self) -> str:
        if self.model.placement.is_lean:
            return "bfloat16 weights and autocast"
        return "bfloat16 autocast" if self.spec.mixed_precision == "bf16" else "float32"

    @property
    def takes_turns(self) -> bool:
        return self.model.placement.shelf is not None

    def check_sampler(self) -> None:
        """ValueError for a sampler that draws noise of its own, or more steps than it was made for."""
        check_deterministic(self.model.pipeline.scheduler)
        self.model.new_scheduler(self.spec.num_inference_steps)

    def share_text(self, other: PipelineSource) -> None:
        """Use the other's text states if both have the same text encoder and tokenizer."""
        if self.batch_size == other.batch_size and _same_text(self, other):
            self.text = other.text

    def begin(self, prompts: list[str], noise: torch.Tensor) -> torch.Tensor:
        guided_from = self.model.guided_from(self.spec.guidance_scale)
        branches = [self.text.of([one] * len(prompts)) for one in guided_from]
        branches.append(self.text.of(prompts))
        return denoise(self.model, branches, noise, self.spec)

    def finish(self, begun: torch.Tensor) -> torch.Tensor:
        return decode(self.model, begun, self.spec)


class FunctionSource(Source):
    """Any function from prompts and noise to images."""

    def __init__(self, function: Generator, name: str, noise_shape: tuple[int, int, int], batch_size: int) -> None:
        super().__init__(name, noise_shape, batch_size)
        self.function = function

    def content(self) -> str:
        return f"function {self.name}"

    def state(self) -> None:
        return None

    def settings(self) -> dict[str, Any]:
        return {"sampler": "function", "noise_shape": list(self.noise_shape), "micro_batch_size": self.batch_size}

    def begin(self, prompts: list[str], noise: torch.Tensor) -> Any:
        return len(prompts), self.function(prompts, noise)

    def finish(self, begun: Any) -> torch.Tensor:
        count, generated = begun
        images = torch.as_tensor(generated) if isinstance(generated, torch.Tensor | np.ndarray) else None
        if images is None or images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            got = type(generated).__name__ if images is None else f"{images.dtype} {tuple(images.shape)}"
            raise UserError(
                f"the function {self.name} must return images (B, 3, H, W) as uint8, got {got}: check for NaN, round "
                "to 0..255 and convert."
            )
        if len(images) != count:
            raise UserError(f"the function {self.name} got {count} prompts and returned {len(images)} images.")
        return images.cpu()


class TextStates:
    """The text states of the prompts asked for lately, each encoded once, in batches of one size."""

    def __init__(self, model: Model, batch_size: int) -> None:
        self.model, self.batch_size = model, batch_size
        self._rows: collections.OrderedDict[str, dict[str, torch.Tensor]] = collections.OrderedDict()

    def of(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """The denoiser's conditions for a batch of prompts, (B, ...) each."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._rows]
        if missing:
            encoded = self.model.encode(missing, self.batch_size)
            for index, prompt in enumerate(missing):
                self._rows[prompt] = {name: values[index] for name, values in encoded.tensors.items()}
        for prompt in dict.fromkeys(prompts):
            self._rows.move_to_end(prompt)
        rows = [self._rows[prompt] for prompt in prompts]
        while len(self._rows) > 8 * self.batch_size:
            self._rows.popitem(last=False)
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def as_source(
    given: Any,
    spec: SamplerSpec,
    *,
    name: str | None = None,
    device: str | torch.device = "auto",
    noise_shape: Any = None,
    options: ModelOptions | None = None,
    lora: str | Path | None = None,
    placement: Placement = Placement(),  # noqa: B008 - immutable
) -> Source:
    """A source from a name or folder (as for ``load_model``), a ``Model``, a diffusers pipeline or a function.

    ``noise_shape``: (C, H, W) of the noise that functions get.  ``options``: how a model is loaded and sampled, but for
    one that is a ``Model`` already; a function has its own say.  ``lora``, ``placement``: a file that a model by name
    carries, and where its networks lie.

    Raises UserError, TypeError for anything else.
    """
    if isinstance(given, str | Path):
        return PipelineSource(load_frozen(str(given), device, options, lora=lora, placement=placement), spec)
    if lora is not None:
        raise UserError("`lora` is for a model by name: load it into the pipeline.")
    if isinstance(given, Source):
        return given
    if placement != Placement():
        raise UserError("`weights_dtype` and `offload` are for models by name, which are loaded so.")
    if isinstance(given, Model):
        return PipelineSource(given, spec)
    name = name or str(getattr(given, "__name__", type(given).__name__))
    if hasattr(given, "components") and hasattr(given, "scheduler"):
        return PipelineSource(wrap_pipeline(given, name, options), spec, saved=False)
    if callable(given):
        if noise_shape is None:
            raise UserError(f"`noise_shape` is missing: say which noise (C, H, W) the function {name} gets.")
        return FunctionSource(given, name, tuple(noise_shape), spec.micro_batch_size)
    raise TypeError(
        f"a model is a folder, a name, a diffusers pipeline or a function (prompts, noise) -> images, got {given!r}."
    )


def check_comparable(original: Source, unlearned: Source, name: str) -> None:
    """ValueError unless both start from noise of one shape and, as pipelines, are of one family and sampler: else a
    difference would not be unlearning's."""
    if isinstance(original, PipelineSource) and isinstance(unlearned, PipelineSource):
        if original.model.family != unlearned.model.family:
            raise UserError(
                f"{name} is of the family {unlearned.model.family}, the original of {original.model.family}."
            )
        ours, theirs = sampler_config(original.model), sampler_config(unlearned.model)
        if ours != theirs:
            differing = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
            raise UserError(
                f"{name} has another sampler than the original ({', '.join(differing)} differ), so their images "
                "cannot be compared. Give both the same scheduler/scheduler_config.json."
            )
        for key in ("attention", "negative_prompt"):
            if (theirs := unlearned.settings()[key]) != (mine := original.settings()[key]):
                raise UserError(
                    f"{name} was loaded with {key} = {theirs!r}, the original with {mine!r}. Load both alike."
                )
    if original.noise_shape != unlearned.noise_shape:
        raise UserError(
            f"{name} starts from noise {unlearned.noise_shape}, the original from {original.noise_shape}: models of "
            "one resolution can be compared."
        )


def environment(device: torch.device) -> dict[str, Any]:
    """What of the machine can change the last bit of an image."""
    if device.type == "cpu":
        machine = {"cpu": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    else:
        machine = {"gpu": torch.cuda.get_device_name(device)}
    return {"device": device.type, **machine, "versions": versions()}


def other_batch_size(source: Source) -> Source:
    """The same, generating in batches of another size; what differs then is rounding."""
    size = 2 if source.batch_size == 1 else min(8, max(1, source.batch_size // 2))
    if isinstance(source, PipelineSource):
        spec = dataclasses.replace(source.spec, micro_batch_size=size)
        return PipelineSource(source.model, spec, saved=source._saved)
    assert isinstance(source, FunctionSource)
    return FunctionSource(source.function, source.name, source.noise_shape, size)


def other_precision(source: Source) -> PipelineSource | None:
    """A pipeline in bfloat16, or one that is in bfloat16 in float32; None for what has no precision to choose."""
    if not isinstance(source, PipelineSource) or source.model.placement.is_lean:
        return None
    if source.model.options.backend == "flash":  # it has no float32
        return None
    precision = "no" if source.spec.mixed_precision == "bf16" else "bf16"
    size = min(8, source.batch_size)
    spec = dataclasses.replace(source.spec, mixed_precision=precision, micro_batch_size=size)
    return PipelineSource(source.model, spec, saved=source._saved)


def _same_text(one: PipelineSource, other: PipelineSource) -> bool:
    pipelines = [source.model.pipeline for source in (one, other)]
    if own_settings(pipelines[0]) != own_settings(pipelines[1]):  # they may say what the unconditional is
        return False
    if any(part.startswith("text_encoder") for source in (one, other) for part in source.model.merged):
        return False  # their files do not say what they are now
    names = {name for pipeline in pipelines for name in pipeline.components}
    parts = sorted(name for name in names if name.startswith(("text_encoder", "tokenizer")))
    if all(getattr(pipelines[0], part, None) is getattr(pipelines[1], part, None) for part in parts):
        return True
    if not (one._saved and other._saved):
        return False
    sides = [source.model.source for source in (one, other)]
    return all(len({hash_part(side, part) if (side / part).is_dir() else "" for side in sides}) == 1 for part in parts)
