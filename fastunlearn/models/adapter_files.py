"""The file of an adapter, as diffusers writes and reads it (``load_lora_weights``), and as our runs hold it.

Tensors are called ``unet.LAYER.lora_A.weight`` and ``unet.LAYER.lora_B.weight``, or ``transformer. ...``.  The metadata
has one key, diffusers' own: a JSON object with the settings of peft under ``unet.``, which diffusers reads, and under
``fastunlearn.`` the hash of the base's files, method, concept, rank, alpha, and a checksum, which it leaves alone.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..files.atomic import whole_file
from ..files.tensors import checksum, refused
from ..record import read_json
from .adapters import KINDS, Adapter, can_carry, factor_shapes
from .base import Model

FILE = "pytorch_lora_weights.safetensors"  # what diffusers looks for in a folder
_KEY = "lora_adapter_metadata"
_OURS = "fastunlearn."
_FORMAT = "fastunlearn-adapter-1"
_WHAT = "adapter of `fastunlearn train --adapter lora`"


def save_adapter(path: Path, part: str, adapter: Adapter, values: Mapping[str, torch.Tensor]) -> None:
    """Write an adapter of the part ``unet`` or ``transformer``; whole or not at all, the same bytes for the same.

    ``values``: by name without peft's name of the adapter.
    """
    from safetensors.torch import save_file

    tensors = {f"{part}.{plain}": values[plain].detach().cpu().contiguous() for _, plain, _ in adapter.parameters()}
    alpha = int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha
    peft = {"peft_type": "LORA", "r": adapter.rank, "lora_alpha": alpha, "target_modules": sorted(adapter.layers)}
    ours = {"format": _FORMAT, "rank": adapter.rank, "alpha": alpha, **adapter.made}
    header = {f"{part}.{key}": value for key, value in peft.items()}
    header |= {f"{_OURS}{key}": value for key, value in ours.items()}
    header[f"{_OURS}sha256"] = checksum(tensors, header)
    with whole_file(path) as unfinished:
        save_file(tensors, unfinished, metadata={_KEY: json.dumps(header, sort_keys=True)})


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """What a file of ours holds.  ``values``: by name without the part's and without peft's name of the adapter."""

    path: Path
    part: str
    rank: int
    alpha: float
    made: Mapping[str, str]
    values: Mapping[str, torch.Tensor]

    @property
    def layers(self) -> list[str]:
        """The layers that it adapts."""
        return list(dict.fromkeys(name.rsplit(".", 2)[0] for name in self.values))


def read_adapter(path: Path) -> AdapterFile:
    """Read what :func:`save_adapter` wrote.

    Raises UserError for a file of another kind and for one in which any bit has changed.
    """
    from safetensors import safe_open

    with refused(path, _WHAT):
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            header = json.loads((file.metadata() or {}).get(_KEY, "{}"))
        if not isinstance(header, dict) or header.get(f"{_OURS}format") != _FORMAT:
            found = header.get(f"{_OURS}format") if isinstance(header, dict) else None
            raise ValueError(f"its format is {found!r}, not {_FORMAT!r}")
        if header.pop(f"{_OURS}sha256", None) != checksum(tensors, header):
            raise ValueError("its content has changed since it was written. Make it again")
        ours = {key.removeprefix(_OURS): value for key, value in header.items() if key.startswith(_OURS)}
        rank, alpha = ours["rank"], ours["alpha"]
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ValueError(f"its rank is {rank!r}")
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < 1e9:
            raise ValueError(f"its alpha is {alpha!r}")
        parts = {name.partition(".")[0] for name in tensors}
        if len(parts) != 1:
            raise ValueError(f"it is for {', '.join(sorted(parts)) or 'nothing'}, where one part is wanted")
        made = {key: str(ours[key]) for key in ("base", "method", "concept")}
        for name, values in tensors.items():
            if not name.endswith(tuple(f".{kind}.weight" for kind in KINDS)):
                raise ValueError(f"{name} is no tensor of an adapter")
            if not values.is_floating_point() or not torch.isfinite(values).all():
                raise ValueError(f"{name} has values that are no numbers")
    part = parts.pop()
    return AdapterFile(path, part, rank, float(alpha), made, {k.partition(".")[2]: v for k, v in tensors.items()})


def adapter_for(model: Model, file: AdapterFile, base_hash: str) -> Adapter:
    """The adapter in a file, for this model.  UserError where it is one for another base, part, layer or rank."""
    if file.made["base"] != base_hash:
        raise UserError(
            f"the adapter {file.path} belongs to another base: its hash is {file.made['base'][:12]}, that of "
            f"{model.name} is {base_hash[:12]}. Use it on the model that the run started from."
        )
    modules = dict(model.denoiser.named_modules())
    layers = {}
    for layer in file.layers:
        if file.part != model.denoiser_folder or layer not in modules or not can_carry(modules[layer]):
            raise UserError(f"the adapter {file.path} changes {file.part}.{layer}, which {model.name} does not have.")
        wanted = factor_shapes(modules[layer], file.rank)
        for kind, shape in zip(KINDS, wanted, strict=True):
            values = file.values.get(f"{layer}.{kind}.weight")
            if values is None or values.shape != shape:
                found = "missing" if values is None else tuple(values.shape)
                raise UserError(
                    f"the adapter {file.path} is damaged: {layer}.{kind} is {found}, of rank {file.rank} it would be "
                    f"{tuple(shape)}."
                )
        layers[layer] = wanted
    return Adapter(layers, file.rank, file.alpha, file.made)


def base_in(metadata: Mapping[str, str] | None) -> str | None:
    """The hash of the base in a file's metadata, if the file is one of ours."""
    try:
        header = json.loads((metadata or {}).get(_KEY, "{}"))
    except ValueError:
        return None
    base = header.get(f"{_OURS}base") if isinstance(header, dict) else None
    return base if isinstance(base, str) else None


def is_adapter_run(folder: Path) -> bool:
    """Whether the folder is a run that left an adapter in place of a model."""
    return (folder / FILE).is_file() and not (folder / "model_index.json").is_file()


def base_of(run: Path) -> tuple[str, dict[str, Any]]:
    """The model that a run with an adapter started from, as for ``load_model``, and its options ``parts``, ``variant``.

    Raises UserError for a folder that does not say.
    """
    path = run / "run.json"
    if not path.is_file():
        raise UserError(
            f"{run} holds an adapter and no run.json, which says what it is for. Name the run's folder, or load the "
            "adapter's base with `--lora FILE`."
        )
    content: Any = read_json(path, "train")
    adapter = content.get("adapter") if isinstance(content, dict) else None
    base = adapter.get("base") if isinstance(adapter, dict) else None
    if not isinstance(base, str) or not base or "\0" in base:
        raise UserError(f"{path} does not say what base its adapter is for. Train it again.")
    assert isinstance(adapter, dict)
    options = {key: adapter.get(key) for key in ("parts", "variant")}
    if not all(value is None or isinstance(value, str) for value in options.values()):
        raise UserError(f"{path} does not say how the base of its adapter is read. Train it again.")
    return base, options
