"""Models without weights: of real shapes and types, from their settings alone.  Nothing is computed and nothing read.

The tensors are torch's fake ones: every operation gives the shape and type of its result, and no memory is taken.
What a tokenizer says stays real: denoisers and pipelines ask for the lengths of prompts, which decide shapes.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import UserError, one_line
from ..files.weights import read_index
from .base import Model
from .families import family_of
from .options import ModelOptions
from .placement import Placement, WeightsDtype
from .runtime import import_diffusers, import_transformers


class _Nowhere(Placement):
    """Fake tensors lie nowhere: they take a type but no place."""

    def _place(self, network: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
        pass


class _Known(TorchDispatchMode):
    """Above fake tensors: computes what follows from real ones alone, and makes new integers and truth values real."""

    def __torch_dispatch__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(isinstance(tensor, FakeTensor) for tensor in given):
            if function is torch.ops.aten.index.Tensor:
                args = (args[0], [place for index in args[1] for place in _places(index)])
            return function(*args, **kwargs)
        if not given:  # a new one: of whole numbers it may say where something stands
            made = function(*args, **kwargs)
            if not isinstance(made, torch.Tensor) or made.is_floating_point() or made.is_complex():
                return made
        with unset_fake_temporarily():
            return function(*args, **kwargs)


def _places(index: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """An index without truth values: how many are true decides a shape."""
    if index is None or isinstance(index, FakeTensor) or index.dtype != torch.bool:
        return (index,)
    with unset_fake_temporarily():
        return index.nonzero(as_tuple=True)


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """What a pipeline is made of.  ``networks``: part -> (class, settings); ``others``: tokenizers, scheduler."""

    kind: type[Any]
    family: type[Model]
    source: Path
    name: str
    networks: dict[str, tuple[type[Any], Any]]
    others: dict[str, Any]
    options: ModelOptions = ModelOptions()  # noqa: RUF009 - immutable

    @classmethod
    def of_model(cls, model: Model) -> Blueprint:
        """Of a loaded model."""
        networks: dict[str, tuple[type[Any], Any]] = {}
        others: dict[str, Any] = {}
        for name, part in model.pipeline.components.items():
            if isinstance(part, nn.Module):
                networks[name] = type(part), part.config
            else:
                others[name] = part
        others |= {key: model.pipeline.config[key] for key in _settings(model.pipeline.config) if key not in others}
        kinds = type(model.pipeline), type(model)
        return cls(*kinds, model.source, model.name, networks, others, _of_a_sketch(model.options))

    @classmethod
    def of_folder(cls, source: Path, name: str, options: ModelOptions | None = None) -> Blueprint:
        """Of a diffusers folder, whose weights may be missing.  Raises UserError for one without the settings."""
        diffusers = import_diffusers()
        index = read_index(source)
        kind = str(index.get("_class_name"))
        family = family_of(kind, repr(name))
        others: dict[str, Any] = {**_settings(index), **family.load_options}
        networks: dict[str, tuple[type[Any], Any]] = {}
        for part, what in index.items():
            if not isinstance(what, list) or part in family.load_options:
                continue
            if not all(what):
                others[part] = None
                continue
            try:
                read = _read_part(source / part, *map(str, what))
            except Exception as error:
                raise UserError(
                    f"cannot read the settings of {part} of the model {name!r}: {one_line(error)}"
                ) from error
            if isinstance(read, tuple):
                networks[part] = read
            else:
                others[part] = read
        options = _of_a_sketch(options or ModelOptions())
        return cls(getattr(diffusers, kind), family, source, name, networks, others, options)

    def parameters(self) -> dict[str, int]:
        """How many each network has."""
        sketch = Sketch.of(self)
        parts = sketch.model.pipeline.components
        return {name: sum(p.numel() for p in parts[name].parameters()) for name in self.networks}


@dataclasses.dataclass(frozen=True)
class Sketch:
    """A model of fake tensors.  Its verbs are to be called within :meth:`use`."""

    model: Model
    mode: FakeTensorMode

    @classmethod
    def of(cls, blueprint: Blueprint, weights_dtype: WeightsDtype = "fp32") -> Sketch:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode:
            parts = {name: _built(*what) for name, what in blueprint.networks.items()}
            pipeline = blueprint.kind(**parts, **blueprint.others)
            device = torch.device("cpu")
            placement = _Nowhere(weights_dtype)
            source, name, options = blueprint.source, blueprint.name, blueprint.options
            model = blueprint.family(pipeline, source, name, device, options, placement)
        return cls(model, mode)

    @contextlib.contextmanager
    def use(self) -> Iterator[Model]:
        with self.mode, _Known():
            yield self.model


def _of_a_sketch(options: ModelOptions) -> ModelOptions:
    """What of them decides shapes; attention by whatever backend keeps what torch's own does."""
    return dataclasses.replace(options, attention=None, parts=None)


def _settings(index: Any) -> dict[str, Any]:
    """The pipeline's own settings among its parts."""
    return {
        key: value for key, value in index.items() if not key.startswith("_") and not isinstance(value, list | tuple)
    }


def _read_part(folder: Path, library: str, class_name: str) -> Any:
    """(class, settings) of a network, or the thing itself where it is none."""
    diffusers, transformers = import_diffusers(), import_transformers()
    kind = getattr(transformers if library == "transformers" else diffusers, class_name)
    if issubclass(kind, transformers.PreTrainedModel):
        return kind, kind.config_class.from_pretrained(folder, local_files_only=True)
    if issubclass(kind, nn.Module):
        return kind, kind.load_config(folder, local_files_only=True)
    return kind.from_pretrained(folder, local_files_only=True)


def _built(kind: type[Any], config: Any) -> nn.Module:
    return kind.from_config(config) if hasattr(kind, "load_config") else kind(config)  # diffusers', transformers'


def is_sketch(model: Model) -> bool:
    """Whether the model has shapes and types alone."""
    return isinstance(next(model.denoiser.parameters()), FakeTensor)
