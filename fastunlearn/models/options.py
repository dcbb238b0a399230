"""How a model is loaded and sampled: settings that every command takes by the same names."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal, Self

from ..config import converted, expand_home, setting
from ..errors import UserError

GROUP = "how the model is loaded and sampled"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Which of a model's files are read."""

    variant: str | None = setting("which weights to read, such as fp16 of *.fp16.safetensors", None, group=GROUP)
    parts: str | None = setting(
        "for a model in a single file: a diffusers FOLDER of the same base, for the settings and parts the file lacks",
        None,
        path=True,
        group=GROUP,
    )

    def __post_init__(self) -> None:
        expand_home(self)
        for field in dataclasses.fields(SourceOptions):
            _convert(self, SourceOptions, field.name)
        if self.variant is not None and not re.fullmatch(r"[A-Za-z0-9_-]+", self.variant):
            raise UserError(f"`--variant` {self.variant!r} is no variant's name. Use one such as fp16.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions(SourceOptions):
    """How a model is loaded and sampled; the same for every model that is compared.

    The configs of the commands inherit these fields.
    """

    scheduler: str | None = setting(
        "sampler of diffusers in place of the model's own, built from its settings, such as DDIM", None, group=GROUP
    )
    resolution: str | None = setting("of the images in pixels, N or WxH; default: the model's own", None, group=GROUP)
    negative_prompt: str | None = setting(
        "what guidance leads away from, in the place of the unconditional", None, group=GROUP
    )
    attention: Literal["native", "sdpa", "xformers", "flash"] | None = setting(
        "what computes the denoiser's attention; native and sdpa: torch itself", None, group=GROUP
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in dataclasses.fields(ModelOptions):
            _convert(self, ModelOptions, field.name)
        if self.resolution is not None:
            _size(self.resolution)

    @classmethod
    def of(cls, config: ModelOptions) -> Self:
        """The options alone of settings that inherit them."""
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(ModelOptions)})

    @property
    def size(self) -> tuple[int, int] | None:
        """(width, height) in pixels; None for the model's own."""
        return None if self.resolution is None else _size(self.resolution)

    @property
    def backend(self) -> str:
        """What computes attention; two names mean torch's own."""
        return "native" if self.attention in (None, "sdpa") else str(self.attention)


def check_guided(negative_prompt: str | None, scale: float, name: str) -> None:
    """UserError for a negative prompt where there is no guidance to lead away from it."""
    if negative_prompt is not None and scale <= 1:
        raise UserError(
            f"`--negative-prompt` does nothing without guidance: set `--{name.replace('_', '-')}` above 1, or leave it "
            "out."
        )


def check_precision(attention: str | None, can_be_half: bool, what_to_do: str) -> None:
    """UserError for flash attention, which computes in half precision alone, where anything is float32."""
    if attention == "flash" and not can_be_half:
        raise UserError(f"`--attention flash` computes in half precision alone: {what_to_do}, or leave it out.")


def _convert(config: Any, kind: type[Any], name: str) -> None:
    value = converted(kind, name, getattr(config, name), f"`{name}`")
    object.__setattr__(config, name, value)


def _size(text: str) -> tuple[int, int]:
    """(width, height) of "512" or "768x512"."""
    found = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text.strip().lower())
    if found is None:
        raise UserError(f"`--resolution` must be N or WxH in pixels, such as 512 or 768x512, got {text!r}.")
    return int(found[1]), int(found[2] or found[1])
