"""What a run needs of memory, phase by phase, counted before it starts: bytes of one process, device and host.

Weights, gradients, states and the bank are counts.  What the networks need while they work is the peak of one forward,
or forward and backward, of the model's own code on fake tensors of the real sizes, which takes no memory and reads no
weights.  The allocator's slack, kernels' workspaces and the metrics' own networks come on top: leave a tenth free.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any
from unittest import mock

import torch
from torch import nn

from ..models.adapters import plan_adapter, put_on
from ..models.base import Model
from ..models.placement import WeightsDtype, networks, text_encoders
from ..models.sketch import Blueprint, Sketch
from .meter import Meter
from .shares import MemoryEstimate, estimate_memory, present

ENCODED_AT_ONCE = 64  # prompts, as `Model.encode` takes them
_GATHERED = 10**9  # DeepSpeed's `stage3_max_live_parameters`
_GUIDANCE = 3.0  # any above 1
COMPARED = 2  # models that an evaluation holds: the original and the unlearned one


@dataclasses.dataclass(frozen=True)
class Phase(MemoryEstimate):
    """The peak of one phase of a run.  ``name``: encoding, bank, mask, training, edit, export or evaluation.

    ``total``: elements of the denoiser; ``trainable``: of the tensors that train.
    """

    name: str
    total: int = 0
    trainable: int = 0

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())


@dataclasses.dataclass(frozen=True)
class Workload:
    """What decides a run's memory, beside the model.

    ``trained``: names of the parameters of which something changes; with ``rank`` these stay, and low-rank adapters on
    them train.  ``selected``: elements that change, None for all.  ``bank_batch_size``: trajectories per forward, each
    asked for ``branches`` conditions in ``bank_precision``.  ``rows``: of the bank; an edit mostly has none.
    ``prompts``: encoded ones.  ``gradients``: sets of gradients that are alive at once.  ``is_held``: whether the
    weights are held to where they started.
    """

    trained: tuple[str, ...]
    selected: int | None = None
    is_masked: bool = False
    makes_mask: bool = False
    is_edit: bool = False
    rank: int | None = None
    micro_batch_size: int = 1
    bank_batch_size: int | None = None
    trajectories: int = 64
    branches: int = 2
    rows: int = 0
    prompts: int = 2
    gradients: int = 1
    is_held: bool = False
    mixed_precision: str = "no"
    bank_precision: str = "no"
    weights_dtype: WeightsDtype = "fp32"
    gradient_checkpointing: bool = False
    offload: bool = False
    overlaps: bool = False  # images are decoded while the next ones are generated, as on a GPU
    evaluation_batch_size: int = 32
    decode_batch_size: int | None = None
    world_size: int = 1
    deepspeed: Mapping[str, Any] | None = None

    @property
    def engine_is_bf16(self) -> bool:
        """Whether DeepSpeed makes all weights bfloat16, what trains too."""
        return bool((self.deepspeed or {}).get("bf16", {}).get("enabled"))


def phases_of(work: Workload) -> list[str]:
    """The phases of a run, in order."""
    middle = ["edit"] if work.is_edit else ["bank", *(["mask"] if work.makes_mask else []), "training"]
    return ["encoding", *middle, "export", "evaluation"]


def count_phases(blueprint: Blueprint, work: Workload, only: Collection[str] = ()) -> list[Phase]:
    """Every phase of a run, in order, or those of ``only``."""
    wanted = [name for name in phases_of(work) if not only or name in only]
    as_loaded = functools.cache(lambda: _Counter(blueprint, work))
    trained = functools.cache(lambda: _Counter(blueprint, work, in_engine=True)) if work.engine_is_bf16 else as_loaded
    return [getattr(trained() if name in ("training", "export") else as_loaded(), name)() for name in wanted]


def count_training(blueprint: Blueprint, work: Workload, world_sizes: Iterable[int]) -> list[Phase]:
    """The training phase over so many processes each."""
    counter = _Counter(blueprint, work, in_engine=work.engine_is_bf16)
    phases = []
    for size in world_sizes:
        counter.work = dataclasses.replace(work, world_size=size)
        phases.append(counter.training())
    return phases


class _Counter:
    """One model of fake tensors and what is asked of it; ``in_engine``: with the weights that DeepSpeed makes of it."""

    def __init__(self, blueprint: Blueprint, work: Workload, *, in_engine: bool = False) -> None:
        self.work, self.source, self.in_engine = work, blueprint.source, in_engine
        self.sketch = Sketch.of(blueprint, "bf16" if in_engine else work.weights_dtype)
        model = self.model = self.sketch.model
        with self.sketch.use():
            self._prompt = _longest(model)
            self._encoded = model.encode([self._prompt]).rows([0])
            self.total = _elements(model.denoiser)
            kept = () if work.rank or in_engine else work.trained
            model.settle_denoiser(kept)
            # What the evaluation holds has nothing that trains.
            self.evaluated = _bytes(model.denoiser) - sum(
                _rounded(model, name) for name in kept if work.weights_dtype == "bf16"
            )
            if work.rank:
                _add_adapter(model, work.trained, work.rank)
            if work.gradient_checkpointing:
                model.checkpoint_gradients()
        named = model.denoiser.named_parameters()
        trained = () if work.rank else work.trained
        self.parameters = [parameter for name, parameter in named if name in trained or ".lora_" in name]
        model.denoiser.requires_grad_(False)
        self.trainable = sum(parameter.numel() for parameter in self.parameters)
        self.selected = self.trainable if work.selected is None or work.rank else work.selected
        self.weights = _bytes(model.denoiser)

    # ---- the phases

    def encoding(self) -> Phase:
        texts = text_encoders(self.model.pipeline)
        device = {"text encoders": max(map(_bytes, texts)) if self.work.offload else sum(map(_bytes, texts))}
        device |= {"activations": self._encode(self._texts_at_once(self.work.prompts)), "conditions": self._conditions}
        return self._phase("encoding", device, others=texts)

    def bank(self) -> Phase:
        trajectories = min(self.work.bank_batch_size or 64, self.work.trajectories)
        device = {"denoiser": self.weights, "bank": self._bank, "conditions": self._conditions}
        device["activations"] = self._forward(trajectories, self.work.branches, self.work.bank_precision)
        return self._phase("bank", device, others=[self.model.denoiser])

    def mask(self) -> Phase:
        """SalUn's: the gradients of all rows are summed beside the bank of what it looks at."""
        device = {"denoiser": self.weights, "bank": self._bank, "conditions": self._conditions}
        device["saliency"] = 4 * self.trainable
        device["activations"] = self._step(2 * self.work.micro_batch_size, self.work.mixed_precision)
        return self._phase("mask", device, others=[self.model.denoiser])

    def training(self) -> Phase:
        held = self._engine(self._student)
        return self._phase("training", held.device, held.host, others=[self.model.denoiser])

    def edit(self) -> Phase:
        device = {"denoiser": self.weights, "new weights": 4 * self.selected, "activations": self._forward(1, 1)}
        if self.work.rows:  # it trains on images of its own, by whole new weights
            trajectories = min(self.work.bank_batch_size or 64, self.work.trajectories)
            sampled = self._forward(trajectories, self.work.branches)
            trained = self._step(self.work.micro_batch_size, self.work.mixed_precision)
            device |= {"bank": self._bank, "activations": max(sampled, trained)}
        return self._phase("edit", device, others=[self.model.denoiser])

    def export(self) -> Phase:
        """The files are laid over on the host, one at a time; the trained values wait there."""
        if self.work.is_edit:
            held = MemoryEstimate({"denoiser": self.weights}, {})
        else:
            held = self._engine(0)
            held.device.pop("gradients", None)
        host = held.host | {"a file of weights": self._file, "trained values": 4 * self.selected}
        return self._phase("export", held.device, host, others=[self.model.denoiser])

    def evaluation(self) -> Phase:
        work, pipeline = self.work, self.model.pipeline
        size = work.evaluation_batch_size
        texts = text_encoders(pipeline)
        branches = 1 + len(self.model.guided_from(_GUIDANCE))
        generate, decode = self._forward(size, branches, work.mixed_precision), self._decode()
        encode = self._encode(size)
        whole = sum(map(_bytes, networks(pipeline))) - self.weights + self.evaluated
        if work.offload:
            largest = {
                "text encoders": (max(map(_bytes, texts)), encode),
                "denoiser": (self.evaluated, generate),
                "VAE": (_bytes(pipeline.vae), decode),
            }
            name, (weights, activations) = max(largest.items(), key=lambda item: sum(item[1]))
            device = {name: weights, "activations": activations}
            host = {"waiting": COMPARED * whole - weights}
        else:
            device = {f"{COMPARED} models": COMPARED * whole}
            device["activations"] = max(encode, generate + decode if work.overlaps else max(generate, decode))
            host = {}
        device["conditions"] = (8 * size + 1) * self._condition
        return Phase(present(device), present(host), "evaluation", self.total, self.trainable)

    def _phase(
        self, name: str, device: Mapping[str, int], host: Mapping[str, int] | None = None, *, others: list[nn.Module]
    ) -> Phase:
        """With the networks but ``others``, which wait on the host where parts take turns."""
        left = [network for network in networks(self.model.pipeline) if network not in others]
        is_rounded = self.in_engine and self.work.weights_dtype == "fp32"  # here, as it is not in the run
        waiting = sum(4 * _elements(network) if is_rounded else _bytes(network) for network in left)
        on_device, on_host = dict(device), dict(host or {})
        (on_host if self.work.offload else on_device)["other parts"] = waiting
        return Phase(present(on_device), present(on_host), name, self.total, self.trainable)

    @property
    def _divides_gradients(self) -> bool:
        return bool((self.work.deepspeed or {}).get("zero_optimization", {}).get("stage", 0) >= 2)

    def _engine(self, activations: int) -> MemoryEstimate:
        """The student and its optimizer, with ``activations`` bytes beside gradients."""
        work = self.work
        stage = (work.deepspeed or {}).get("zero_optimization", {}).get("stage", 0)
        held = estimate_memory(
            total=self.total,
            trainable=self.trainable,
            selected=self.selected,
            is_masked=work.is_masked,
            world_size=work.world_size,
            deepspeed=work.deepspeed,
            other_parts=0,
            activations=activations,
            bank=self._bank,
            weights=self.weights,
            gradients=work.gradients,
            is_held=work.is_held,
        )
        held.device["conditions"] = self._conditions
        if stage == 3 and work.world_size > 1:
            item = 2 if work.engine_is_bf16 else 4
            held.device["gathered weights"] = item * min(self.total, _GATHERED)
        return held

    # ---- measured on fake tensors

    def _peak(self, work: Callable[[Model], Any], precision: str = "no", *, with_gradient: bool = False) -> int:
        model = self.model
        known = [
            tensor for network in networks(model.pipeline) for tensor in (*network.parameters(), *network.buffers())
        ]
        for parameter in self.parameters:
            parameter.requires_grad_(with_gradient)
        with (
            self.sketch.use(),
            torch.set_grad_enabled(with_gradient),
            torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
            Meter(known) as meter,
        ):
            work(model)
        for parameter in self.parameters:
            parameter.grad = None
        return meter.peak

    @functools.cached_property
    def _student(self) -> int:
        """Of its step, beside gradients: these are counted, and where they are divided each goes as it is made."""
        peak = self._step(
            self.work.micro_batch_size, self.work.mixed_precision, without_gradients=self._divides_gradients
        )
        gradients = 0 if self._divides_gradients else sum(parameter.nbytes for parameter in self.parameters)
        return max(peak - gradients, 0)

    @property
    def _condition(self) -> int:
        return sum(tensor.nbytes for tensor in self._encoded.values())

    @property
    def _conditions(self) -> int:
        return self.work.prompts * self._condition

    @property
    def _latent(self) -> int:
        return 4 * math.prod(self.model.latent_shape)

    @property
    def _bank(self) -> int:
        return self.work.rows * (1 + self.work.branches) * self._latent

    @property
    def _file(self) -> int:
        """The denoiser's largest file, or all its weights where there is none to look at."""
        files = (self.source / self.model.denoiser_folder).glob("*.safetensors")
        return max((path.stat().st_size for path in files), default=4 * self.total)

    def _texts_at_once(self, prompts: int) -> int:
        return min(prompts, ENCODED_AT_ONCE) if self.work.bank_batch_size is None else self.work.bank_batch_size

    def _encode(self, rows: int) -> int:
        """Of prompts of unlike lengths: where they are padded to the longest, that takes a mask."""
        return self._peak(lambda model: model.encode_texts([self._prompt, *[""] * (rows - 1)]))

    def _inputs(self, model: Model, rows: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        conditions = {name: torch.cat([values] * rows) for name, values in self._encoded.items()}
        return torch.zeros(rows, *model.latent_shape), torch.zeros(rows), conditions

    def _forward(self, size: int, branches: int, precision: str = "no") -> int:
        """Of a sampler's step as `sample` does it: all branches in one forward, the point before still alive."""

        def step(model: Model) -> None:
            each = [self._inputs(model, size)[2] for _ in range(branches)]
            conditions = {name: torch.cat([branch[name] for branch in each]) for name in each[0]}
            conditions = model.with_guidance(conditions, _GUIDANCE)
            latents = torch.zeros(size, *model.latent_shape)
            before = [torch.zeros_like(latents), torch.zeros_like(latents), latents.repeat(branches, 1, 1, 1)]
            predictions = model.predict(latents.repeat(branches, 1, 1, 1), torch.zeros(()), conditions)
            predictions = predictions.view(branches, *latents.shape)
            if branches > 1 and model.guided_from(_GUIDANCE):
                model.guide(predictions, _GUIDANCE)
            del before

        return self._peak(step, precision)

    def _step(self, rows: int, precision: str, *, without_gradients: bool = False) -> int:
        """Of the student's forward and backward, the gradients among it, or without those that are ready."""

        def step(model: Model) -> None:
            latents, timesteps, conditions = self._inputs(model, rows)
            prediction = model.predict(latents, timesteps, conditions)
            (prediction - torch.zeros_like(prediction)).square().mean().backward()

        def forget(parameter: torch.Tensor) -> None:
            parameter.grad = None

        for parameter in self.parameters:
            parameter.requires_grad_(True)
        forgotten = self.parameters if without_gradients else []
        hooks = [parameter.register_post_accumulate_grad_hook(forget) for parameter in forgotten]
        try:
            return self._peak(step, precision, with_gradient=True)
        finally:
            for hook in hooks:
                hook.remove()

    def _decode(self) -> int:
        work = self.work
        rows = min(work.decode_batch_size or work.evaluation_batch_size, work.evaluation_batch_size)

        def decode(model: Model) -> None:
            pixels = model.decode_latents(torch.zeros(rows, *model.latent_shape))
            ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

        return self._peak(decode, work.mixed_precision)


def _add_adapter(model: Model, names: tuple[str, ...], rank: int) -> None:
    """A low-rank adapter on the layers whose weights are among the denoiser's parameters ``names``."""
    with mock.patch.object(nn.Module, "_apply", lambda module, *_, **__: module):  # fake tensors lie nowhere
        put_on(model, plan_adapter(model.denoiser, names, rank))


def _longest(model: Model) -> str:
    """A prompt of as many tokens as the model reads: where prompts are not padded to one length, none takes more."""
    words = model.max_tokens
    tokens = model.count_tokens("a " * words)
    return "a " * (words * words // tokens if tokens > words else words)


def _rounded(model: Model, name: str) -> int:
    """What the weights lose in bytes where this parameter does not train."""
    parameter = model.denoiser.get_parameter(name)
    layer = model.denoiser.get_submodule(name.rpartition(".")[0])
    return 2 * parameter.numel() if isinstance(layer, nn.Linear | nn.Conv2d) else 0


def _elements(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _bytes(network: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
