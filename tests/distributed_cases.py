"""Run by two processes (torchrun): every stage of DeepSpeed against one process of torch, on a tiny module.

Not collected by pytest: ``test_distributed.py`` starts it once, since starting costs seconds, and reads its records.
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch
from fastunlearn_kernels import pack_bits
from torch import nn

from fastunlearn.distributed import join, leave, world_of_environment
from fastunlearn.training import engine_deepspeed
from fastunlearn.training.deepspeed_config import read_deepspeed
from fastunlearn.training.engine import TorchEngine
from fastunlearn.training.engine_deepspeed import DeepSpeedEngine
from fastunlearn.training.export import overlay
from fastunlearn.training.selection import Selection
from fastunlearn.training.shares import bytes_sent

NAMES = ["a.weight", "a.bias", "b.weight", "b.bias", "c.weight", "c.bias"]
LR, DECAY, STEPS, ROWS = 1e-2, 0.1, 4, 8
BF16 = {"bf16": {"enabled": True}}


def zero(stage, **options):
    return {"zero_optimization": {"stage": stage, "reduce_bucket_size": 500, **options}}


CASES = {
    "zero 0": {},
    "zero 1": zero(1),
    "zero 2": zero(2),
    "zero 3": zero(3),
    "zero 2 round-robin": zero(2, round_robin_gradients=True),
    "zero 2 offload": zero(2, offload_optimizer={"device": "cpu"}),
    "zero 3 offload": zero(3, offload_optimizer={"device": "cpu"}),
    "zero 3 sub-groups": zero(3, sub_group_size=60),
    "bf16 zero 0": BF16,
    "bf16 zero 1": BF16 | zero(1),
    "bf16 zero 2": BF16 | zero(2),
    "bf16 zero 3": BF16 | zero(3),
    "BF16_Optimizer": BF16 | {"data_types": {"grad_accum_dtype": "fp32"}} | zero(1),
}


class Net(nn.Module):
    """Odd sizes, none divisible by two processes alone, and a layer that is frozen."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.frozen, self.b, self.c = nn.Linear(7, 13), nn.Linear(13, 13), nn.Linear(13, 11), nn.Linear(11, 5)

    def forward(self, x):
        x = x.to(self.a.weight.dtype)
        return self.c(torch.tanh(self.b(self.frozen(torch.tanh(self.a(x)))))).float()


def masks(density=0.4):
    generator = torch.Generator().manual_seed(1)
    selected = {n: torch.rand(p.shape, generator=generator) < density for n, p in Net().named_parameters()}
    selected["b.bias"][:] = False  # a tensor of which nothing is selected
    return {name: pack_bits(selected[name]) for name in NAMES}


def train(engine, first, last):
    """Rows are dealt as the trainer deals them; returns the norms before clipping."""
    norms = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(100 + step)
        x, y = torch.randn(ROWS, 7, generator=generator), torch.randn(ROWS, 5, generator=generator)
        parts = engine.accumulation * engine.world.size
        for micro in range(engine.accumulation):
            part = micro * engine.world.size + engine.world.rank
            with engine.autocast():
                predicted = engine.module(x[part::parts])
            engine.backward((predicted - y[part::parts]).square().mean())
        norms.append(float(engine.step()))
    return norms


def settings(folder, name, world, clip, accumulation=1):
    path = folder / "ds.json"
    content = {"train_batch_size": ROWS, "gradient_accumulation_steps": accumulation, **CASES[name]}
    if world.is_main:
        path.write_text(json.dumps(content))
    world.barrier()
    return read_deepspeed(
        path,
        world_size=world.size,
        micro_batch_size=None,
        gradient_accumulation_steps=None,
        max_grad_norm=clip,
        default_micro_batch_size=1,
    )


def deepspeed_engine(folder, name, world, *, bits, clip, scope="selected", accumulation=1):
    module = Net()
    return DeepSpeedEngine(
        module,
        Selection.of(module, NAMES, bits),
        settings=settings(folder, name, world, clip, accumulation),
        world=world,
        learning_rate=LR,
        weight_decay=DECAY,
        clip_scope=scope,
    )


def torch_engine(*, bits, clip, scope="selected"):
    module = Net()
    selection = Selection.of(module, NAMES, bits)
    return TorchEngine(module, selection, learning_rate=LR, weight_decay=DECAY, max_grad_norm=clip, clip_scope=scope)


def whole(engine, values):
    """The parameters with the trained elements laid over the original ones, as an export does it."""
    result = {}
    for name, parameter in Net().named_parameters():
        result[name] = parameter.detach().clone()
        if name in values:
            engine.selection.put(name, result[name], values[name])
    return result


@dataclasses.dataclass
class Record:
    name: str
    outside_changed: int  # elements outside the mask whose bits differ, in the export and in the flat masters
    selected_moved: float  # share of the selected elements that changed
    furthest: float  # from one process of torch
    norm_error: float
    optimizer: str


def flat_changes(engine, original):
    """Elements outside the mask that differ in this process' own float32 tensors."""
    changed = 0
    for part in engine.slices:
        here = part.flat.detach().view(-1)[part.offset : part.offset + part.numel].float()
        before = original[part.name].flatten()[part.start : part.start + part.numel]
        before = before.bfloat16().float() if engine.is_bf16 else before
        outside = ~engine.selection.mask(part.name, part.start, part.start + part.numel)
        changed += int((here != before)[outside].sum())
    return changed


def check_case(folder, name, world, *, label="", **options):
    reference = torch_engine(**{k: v for k, v in options.items() if k != "accumulation"})
    expected_norms = train(reference, 0, STEPS)
    expected = reference.values()
    original = {n: p.detach().clone() for n, p in Net().named_parameters()}
    engine = deepspeed_engine(folder, name, world, **options)
    norms = train(engine, 0, STEPS)
    values = engine.values()
    changed = torch.tensor([flat_changes(engine, original)])
    world.sum(changed)
    record = None
    if world.is_main:
        trained, moved, selected, furthest = whole(engine, values), 0, 0, 0.0
        outside = int(changed)
        for key, before in original.items():
            known = key in engine.selection.shapes
            inside = engine.selection.mask(key).view(before.shape) if known else torch.zeros_like(before).bool()
            outside += int((trained[key].view(torch.int32) != before.view(torch.int32))[~inside].sum())
            moved += int((trained[key] != before)[inside].sum())
            selected += int(inside.sum())
            if known:
                furthest = max(furthest, float((values[key] - expected[key]).abs().max()))
        error = max(abs(a - b) / b for a, b in zip(norms, expected_norms, strict=True))
        kind = type(engine.deepspeed.optimizer).__name__
        record = Record(name + label, outside, moved / selected, furthest, error, kind)
    engine.close()
    return record


def check_resume(folder, name, other, world, bits):
    """Two steps, a checkpoint, two more: in one go, by resuming, and by resuming in another stage."""
    engine = deepspeed_engine(folder, name, world, bits=bits, clip=0.5)
    train(engine, 0, 2)
    engine.save(folder / f"checkpoint {name}", {"step": 2})
    train(engine, 2, 4)
    expected = engine.values()
    engine.close()
    result = []
    for stage in (name, other):
        engine = deepspeed_engine(folder, stage, world, bits=bits, clip=0.5)
        assert engine.load(folder / f"checkpoint {name}") == {"step": 2}
        train(engine, 2, 4)
        result.append(engine.values())
        engine.close()
    if not world.is_main:
        return None
    alone = torch_engine(bits=bits, clip=0.5)  # a checkpoint of two processes, read by one
    alone.load(folder / f"checkpoint {name}")
    train(alone, 2, 4)
    distance = [
        max(float((values[n] - expected[n]).abs().max()) for n in expected) for values in (*result, alone.values())
    ]
    equal = all(torch.equal(result[0][n].view(torch.int32), expected[n].view(torch.int32)) for n in expected)
    return {"name": name, "bitwise": equal, "other_stage": distance[1], "one_process": distance[2]}


def check_export(folder, world):
    """An export of ZeRO-3 is a safetensors file of the original's other bytes."""
    from safetensors.torch import load_file, save_file

    bits = masks()
    engine = deepspeed_engine(folder, "zero 3", world, bits=bits, clip=1.0)
    train(engine, 0, 2)
    values = engine.values()
    record = None
    if world.is_main:
        original = {n: p.detach().clone().half() for n, p in Net().named_parameters()}
        (folder / "net").mkdir()
        save_file(original, folder / "net" / "model.safetensors")
        overlay(folder / "net", values, engine.selection.bits)
        trained = load_file(folder / "net" / "model.safetensors")
        wanted = {n: t.half() for n, t in whole(engine, values).items()}
        record = {name: torch.equal(trained[name], wanted[name]) for name in trained}
    engine.close()
    return record


#: Collective of torch -> which of its tensors is whole, and how often a ring sends it.
SENT = {"all_reduce": (0, 2), "all_gather_into_tensor": (0, 1), "reduce_scatter_tensor": (1, 1)}
OTHERS = ("all_gather", "reduce_scatter", "reduce", "broadcast", "all_to_all_single", "gather", "scatter")
seen = []  # (collective, sizes of its tensors)


def spy_on_collectives():
    """Note what is asked of torch's collectives; before DeepSpeed is imported, which keeps some of them."""
    for collective in (*SENT, *OTHERS):
        genuine = getattr(torch.distributed, collective)

        def spy(*tensors, collective=collective, genuine=genuine, **options):
            given = (*tensors, *options.values())
            seen.append((collective, [one.numel() for one in given if isinstance(one, torch.Tensor)]))
            return genuine(*tensors, **options)

        setattr(torch.distributed, collective, spy)


def check_wire(folder, name, world):
    """What the collectives of a step send, and what is counted."""
    zeroed = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}
    kept = CASES[name]
    if name.endswith("3"):  # else it keeps this small module whole
        CASES[name] = {"zero_optimization": kept["zero_optimization"] | zeroed}
    engine = deepspeed_engine(folder, name, world, bits=None, clip=1e9)
    CASES[name] = kept
    train(engine, 0, 2)
    seen.clear()
    train(engine, 2, 3)
    asked = list(seen)
    total = sum(p.numel() for p in Net().parameters())
    trainable = sum(p.numel() for n, p in Net().named_parameters() if n in NAMES)
    stage = {"zero_optimization": {"stage": int(name[-1])}}
    counted = bytes_sent(total=total, trainable=trainable, world_size=world.size, deepspeed=stage)
    sent = 0
    for collective, sizes in asked:
        which, often = SENT[collective]  # another one would be a surprise
        sent += 4 * often * sizes[which] * (world.size - 1) / world.size
    engine.close()
    return {"name": name, "sent": sent, "counted": counted}


def main(folder):
    torch.set_num_threads(1)
    spy_on_collectives()
    world = world_of_environment()
    join(world, torch.device("cpu"))
    engine_deepspeed.leave = lambda: None  # one process group for all engines
    bits, cases = masks(), []
    for name in CASES:
        for clip in (0.05, 1e9):
            cases.append(check_case(folder, name, world, bits=bits, clip=clip, label=f", clip {clip:g}"))
    for name in ("zero 0", "zero 1", "zero 3"):
        cases.append(check_case(folder, name, world, bits=None, clip=0.05, label=", no mask"))
        cases.append(check_case(folder, name, world, bits=bits, clip=0.05, scope="all", label=", clip all"))
        cases.append(check_case(folder, name, world, bits=bits, clip=0.05, accumulation=2, label=", two micro batches"))
    stages = [("zero 0", "zero 2"), ("zero 1", "zero 3"), ("zero 2", "zero 0"), ("zero 3", "zero 1")]
    resumed = [check_resume(folder, name, other, world, bits) for name, other in stages]
    resumed.append(check_resume(folder, "bf16 zero 2", "bf16 zero 3", world, bits))
    exported = check_export(folder, world)
    wire = [check_wire(folder, f"zero {stage}", world) for stage in range(4)]
    if world.is_main:
        records = {"cases": [dataclasses.asdict(c) for c in cases], "resumed": resumed, "exported": exported}
        records["wire"] = wire
        (folder / "records.json").write_text(json.dumps(records))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
