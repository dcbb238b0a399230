"""Training divided over processes by DeepSpeed: ZeRO stages 0 to 3, float32 or bfloat16, with or without a mask.

All stages are one design.  DeepSpeed divides the parameters into flat float32 tensors and steps each process' own with
our optimizer; this file finds out which elements of which parameter lie where in them (:class:`_Slice`), and everything
else follows: the mask's bits for the optimizer, the pieces of a checkpoint, the values to export.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from fastunlearn_kernels import MaskedAdamW, pack_bits, unpack_bits
from torch import nn

from .. import distributed
from ..distributed import World, join
from ..errors import UserError, one_line
from .checkpoint import Piece, load_checkpoint
from .engine import ClipScope, Engine
from .selection import Selection

#: What DeepSpeed calls a section's class -> what it is called in the file; of the others the error says it.
_SECTIONS = {
    "DeepSpeedZeroConfig": "zero_optimization",
    "DeepSpeedBF16Config": "bf16",
    "DeepSpeedFP16Config": "fp16",
    "CommsLoggerConfig": "comms_logger",
}


class DeepSpeedEngine(Engine):
    """AdamW under DeepSpeed, changing only what is selected of the module.

    ``settings``: a DeepSpeed configuration, as :func:`.deepspeed_config.read_deepspeed` checks it; its batch sizes
    must agree with ``world``.  All processes make the engine together and call every verb together.
    ``clip_scope="selected"`` hides the gradients outside the mask before they are reduced, so that clipping and
    DeepSpeed's overflow check see the selected elements alone.
    """

    optimizer: _QuietUntilBound

    def __init__(
        self,
        module: nn.Module,
        selection: Selection,
        *,
        settings: Mapping[str, Any],
        world: World,
        learning_rate: float,
        weight_decay: float = 0.0,
        mixed_precision: str = "no",
        clip_scope: ClipScope = "selected",
    ) -> None:
        named = dict(module.named_parameters())
        module.requires_grad_(False)
        self._before = [(part, dict(vars(part))) for part in (*module.modules(), *named.values())]
        self.world, self.learning_rate = world, learning_rate
        self.selection = selection
        self.parameters = {name: named[name].requires_grad_(True) for name in selection.names}
        self.device = next(iter(named.values())).device
        self.accumulation = int(settings["gradient_accumulation_steps"])
        self._micro = 0
        deepspeed = import_deepspeed(self.device)
        join(world, self.device)
        self._hooks = self._hide_unselected() if clip_scope == "selected" else []
        self.optimizer = _QuietUntilBound(
            self.parameters.values(), lr=learning_rate, weight_decay=weight_decay, compact=True
        )
        options = dict(settings)
        self.is_bf16 = bool(options.get("bf16", {}).get("enabled"))
        if mixed_precision == "bf16" and not self.is_bf16:
            options["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        # What DeepSpeed rounds to bfloat16 before it makes its float32 copy.
        originals = (
            {n: self.selection.take(n, p).cpu().clone() for n, p in self.parameters.items()} if self.is_bf16 else {}
        )
        # Until close: stage 3 looks into the environment at every forward.
        self._environment = _complete_environment(world)
        self._linear = nn.functional.linear  # which stage 3 replaces for the whole process
        with contextlib.redirect_stdout(io.StringIO()):
            self.deepspeed, *_ = deepspeed.initialize(
                model=module, model_parameters=list(self.parameters.values()), optimizer=self.optimizer, config=options
            )
        self.module = self.deepspeed
        self.slices = list(self._find_slices())
        self._bind()
        for part in self.slices if self.is_bf16 else []:
            first, last = self.selection.range(part.name, part.start, part.start + part.numel)
            self._put(part, originals[part.name][first:last])

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()  # DeepSpeed's own, by its configuration

    def backward(self, loss: torch.Tensor) -> None:
        if self._micro:  # the one before was not the last of its step
            self.deepspeed.step()
        self._micro += 1
        self.deepspeed.backward(loss)

    def step(self) -> torch.Tensor:
        norm = None
        if self.optimizer is self.deepspeed.optimizer:  # stage 0 in float32 keeps no norm; gradients are reduced by now
            norm = nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        self.deepspeed.step()
        self._micro = 0
        if norm is None:
            norm = self.deepspeed.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=self.device)

    def pieces(self) -> Iterator[Piece]:
        if self._is_replicated and not self.world.is_main:
            return
        for part in self.slices:
            first, last = self.selection.range(part.name, part.start, part.start + part.numel)
            if first == last:
                continue
            state = self.optimizer.state.get(part.flat, {})
            values = {"weight": self._take(part)}
            values |= {kind: self._state(part, state[kind]) for kind in ("exp_avg", "exp_avg_sq") if kind in state}
            yield Piece(part.name, first, values, float(state.get("step", 0.0)))

    def values(self) -> dict[str, torch.Tensor]:
        result = {}
        for name in self.selection.names:
            values = self._gather(name)
            if self.world.is_main:
                result[name] = values.cpu()
        return result

    def restore(self, folder: Path) -> dict[str, Any]:
        wanted = {}
        for part in self.slices:
            wanted[part.name] = self.selection.range(part.name, part.start, part.start + part.numel)
        pieces, content = load_checkpoint(folder, self.selection.lengths, wanted)
        for part in self.slices:
            piece = pieces[part.name]
            self._put(part, piece.values["weight"])
            if "exp_avg" in piece.values:
                state = self.optimizer.init_state(part.flat)
                state["step"].fill_(piece.step)
                for kind in ("exp_avg", "exp_avg_sq"):
                    self._state(part, state[kind]).copy_(piece.values[kind])
        self._refresh_module()
        return content

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self.deepspeed.destroy()
        nn.functional.linear = self._linear
        for name in self._environment:
            os.environ.pop(name, None)
        _let_go(self.deepspeed)
        for part, before in self._before:  # stage 3 hangs verbs of its own on each
            vars(part).clear()
            vars(part).update(before)
        del self.deepspeed, self.module, self.optimizer, self.slices, self._before
        leave()

    # ---- where the elements are --------------------------------------------------------------------------------------

    @property
    def _is_replicated(self) -> bool:
        """Whether every process holds all elements."""
        return self.deepspeed.zero_optimization_stage() == 0

    def _find_slices(self) -> Iterator[_Slice]:
        """This process' elements, in the order of each flat tensor.

        The attributes are DeepSpeed's own bookkeeping (0.19): its public accessors are wrong with round-robin gradients
        and fail at ZeRO-3 where a size is not divisible by the number of processes.
        """
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        inner = self.deepspeed.optimizer
        stage = self.deepspeed.zero_optimization_stage()
        rank = self.world.rank
        if inner is self.optimizer:
            for name, parameter in self.parameters.items():
                yield _Slice(name, 0, parameter.numel(), parameter, 0)
        elif stage == 0:  # bfloat16 weights, a float32 copy of each
            for group, copies in zip(inner.fp16_groups, inner.fp32_groups, strict=True):
                for parameter, copy in zip(group, copies, strict=True):
                    yield _Slice(names[id(parameter)], 0, parameter.numel(), copy, 0)
        elif stage == 3:
            for group, flat in zip(inner.fp16_groups, inner.fp32_partitioned_groups_flat, strict=True):
                offset = 0
                for parameter in group:
                    size = parameter.partition_numel()
                    here = min(max(parameter.ds_numel - rank * size, 0), size)
                    if here:
                        yield _Slice(names[id(parameter)], rank * size, here, flat, offset)
                    offset += size
        elif hasattr(inner, "fp32_groups_flat_partition"):  # BF16_Optimizer
            for group, flat in zip(inner.bf16_groups, inner.fp32_groups_flat_partition, strict=True):
                offsets, offset = [], 0
                for parameter in group:
                    offsets.append(offset)
                    offset += parameter.numel()
                yield from _overlaps(names, group, offsets, flat, rank * flat.numel())
        else:
            for i, flat in enumerate(inner.single_partition_of_fp32_groups):
                group, offsets = inner.round_robin_bit16_groups[i], inner.round_robin_bit16_offsets[i]
                yield from _overlaps(names, group, offsets, flat, rank * int(inner.partition_size[i]))

    def _bind(self) -> None:
        """Tell the optimizer which elements of the flat tensors may change; from here on it steps."""
        self.optimizer.state.clear()
        flats = {id(part.flat): part.flat for part in self.slices}
        for key, flat in flats.items() if self.selection.bits else ():
            mask = torch.zeros(flat.numel(), dtype=torch.bool)
            for part in self.slices:
                if id(part.flat) == key:
                    mask[part.offset : part.offset + part.numel] = self.selection.mask(
                        part.name, part.start, part.start + part.numel
                    )
            self.optimizer.set_grad_mask(flat, pack_bits(mask).to(flat.device))
        self.optimizer.is_bound = True

    def _mask(self, part: _Slice) -> torch.Tensor:
        return self.selection.mask(part.name, part.start, part.start + part.numel).to(part.flat.device)

    def _take(self, part: _Slice) -> torch.Tensor:
        """The selected elements of a slice, (k,) float32."""
        here = part.flat.detach().view(-1)[part.offset : part.offset + part.numel].float()
        return here[self._mask(part)] if part.name in self.selection.bits else here

    def _put(self, part: _Slice, values: torch.Tensor) -> None:
        here = part.flat.detach().view(-1)[part.offset : part.offset + part.numel]
        values = values.to(here.device, here.dtype)
        if part.name in self.selection.bits:
            here[self._mask(part)] = values
        else:
            here.copy_(values)

    def _state(self, part: _Slice, state: torch.Tensor) -> torch.Tensor:
        """A slice's part of an optimizer state, a view; states of a masked flat tensor hold its selected elements."""
        flat = state.view(-1)
        bits = self.optimizer.grad_mask(part.flat)
        if bits is None:
            return flat[part.offset : part.offset + part.numel]
        mask = unpack_bits(bits, part.flat.numel())
        first = int(mask[: part.offset].sum())
        return flat[first : first + int(mask[part.offset : part.offset + part.numel].sum())]

    def _gather(self, name: str) -> torch.Tensor:
        """A parameter's whole vector of trained elements, (k,) float32, in every process."""
        parts = [part for part in self.slices if part.name == name]
        if self._is_replicated:
            return self._take(parts[0])
        # Summed as integers, where all but one process have zeros: exact, also for the sign of a zero.
        vector = torch.zeros(self.selection.lengths[name], dtype=torch.int32, device=self.device)
        for part in parts:
            first, last = self.selection.range(name, part.start, part.start + part.numel)
            vector[first:last] = self._take(part).to(self.device).view(torch.int32)
        return self.world.sum(vector).view(torch.float32)

    def _refresh_module(self) -> None:
        """Bring the weights of the forward in line with the float32 ones that the optimizer steps."""
        if self.optimizer is self.deepspeed.optimizer:
            return  # they are the same
        for name, parameter in self.parameters.items():
            values = self._gather(name)
            if self.deepspeed.zero_optimization_stage() == 3:
                import deepspeed

                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    if self.world.is_main:
                        self.selection.put(name, parameter.data, values)
            else:
                self.selection.put(name, parameter.data, values)

    def _hide_unselected(self) -> list[Any]:
        """Hooks that run before DeepSpeed's own and zero gradients outside the mask: no NaN, no norm from there."""

        def hide(name: str) -> Any:
            bits = self.selection.bits[name].to(self.device)

            def hook(parameter: torch.Tensor) -> None:
                assert parameter.grad is not None
                selected = unpack_bits(bits, self.selection.shapes[name])
                parameter.grad.masked_fill_(selected.logical_not_(), 0.0)

            return hook

        return [
            parameter.register_post_accumulate_grad_hook(hide(name))
            for name, parameter in self.parameters.items()
            if name in self.selection.bits
        ]


@dataclasses.dataclass(frozen=True)
class _Slice:
    """Elements start to start + numel of a parameter, which lie in ``flat`` from ``offset`` on."""

    name: str
    start: int
    numel: int
    flat: torch.Tensor
    offset: int


def _overlaps(
    names: Mapping[int, str], group: list[torch.Tensor], offsets: list[int], flat: torch.Tensor, low: int
) -> Iterator[_Slice]:
    """Where parameters that lie at ``offsets`` of a whole overlap with its part ``flat``, which begins at ``low``."""
    for parameter, offset in zip(group, offsets, strict=True):
        first, last = max(offset, low), min(offset + parameter.numel(), low + flat.numel())
        if first < last:
            yield _Slice(names[id(parameter)], first - offset, last - first, flat, first - low)


class _QuietUntilBound(MaskedAdamW):
    """Steps only once its masks are bound: DeepSpeed steps a new optimizer on zero gradients to make its states, which
    would decay every weight and make states of elements that are not trained."""

    is_bound = False

    def step(self, closure: Any = None, **options: Any) -> Any:
        return super().step(closure, **options) if self.is_bound else None


def import_deepspeed(device: torch.device) -> Any:
    """``deepspeed``, for this kind of device, silent, compiling nothing.  UserError where it is missing."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise UserError(
            f"`--deepspeed` needs DeepSpeed, which cannot be imported ({error}). Install it with "
            "`pip install 'fastunlearn[deepspeed]'`."
        ) from error
    # Else init_distributed compiles a C++ extension that nothing here uses, and two processes may trip over each other.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.utils.logger.setLevel(logging.ERROR)
    # It calls torch by names that a newer torch would rather not hear; neither is a caller's to change.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    return deepspeed


def _let_go(engine: Any) -> None:
    """Take away what the module and DeepSpeed's own modules hold of an engine that is destroyed.

    An engine holds its process groups, a group gloo's threads; one of those that drops a tensor while the interpreter
    ends takes the process with it (SIGABRT).
    """
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [module for module in stack if module is not engine.module]
    for method in vars(PartitionedParameterCoordinator).values():  # one has a cache that holds every engine for good
        if hasattr(method, "cache_clear"):
            method.cache_clear()


def leave() -> None:
    """Take the process group down by DeepSpeed's own verb, which forgets the groups that it has made.

    Else a second training in this process would meet groups that are gone.
    """
    import deepspeed

    if deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()
    distributed.leave()
    gc.collect()  # groups end once nothing refers to them


def check_deepspeed(settings: Mapping[str, Any], device: torch.device) -> None:
    """UserError for what DeepSpeed would refuse in any section, or if it is not there at all.

    DeepSpeed itself reads the whole configuration, as it will when the engine is made.
    """
    import_deepspeed(device)
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    # Without the one size that depends on how many processes there are: they are not there yet.
    of_one = {name: copy.deepcopy(value) for name, value in settings.items() if name != "train_batch_size"}
    try:
        DeepSpeedConfig(of_one)
    except ValidationError as error:
        details = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        section = _SECTIONS.get(error.title)
        raise UserError(f"DeepSpeed refuses {f'`{section}`' if section else 'a section'}: {details}.") from error
    except Exception as error:  # whatever it raises, it raises for the file
        raise UserError(f"DeepSpeed refuses the configuration: {one_line(error)}") from error


def _complete_environment(world: World) -> list[str]:
    """Set what DeepSpeed looks for in the environment, where no launcher has; the names that were missing."""
    known = {"RANK": world.rank, "WORLD_SIZE": world.size, "LOCAL_RANK": world.local_rank}
    missing = {name: str(value) for name, value in known.items() if name not in os.environ}
    os.environ.update(missing)
    return list(missing)
