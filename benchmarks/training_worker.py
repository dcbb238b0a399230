"""One process of a training that is timed from outside: ``bench_training.py`` starts it, alone or under torchrun.

Process 0 makes a step each time it is told to, over a socket, and says so when it is done; the others take every step
with it.  At the end each writes its peak memory and the bytes of its optimizer's states.
"""

from __future__ import annotations

import json
import sys
from multiprocessing.connection import Client
from pathlib import Path

import torch
from fastunlearn_kernels import pack_bits

from fastunlearn.distributed import World, world_of_environment
from fastunlearn.methods.recipe import Recipe, Row
from fastunlearn.methods.rules import Sum
from fastunlearn.models.loading import load_model
from fastunlearn.training.bank import build_bank, plan_bank
from fastunlearn.training.deepspeed_config import read_deepspeed
from fastunlearn.training.engine import TorchEngine
from fastunlearn.training.engine_deepspeed import DeepSpeedEngine
from fastunlearn.training.selection import Selection
from fastunlearn.training.trainer import Schedule, Trainer

ROWS = 8  # a step, over all processes
PROMPTS = ["a red star on a plain background", "a blue star on a striped background"]


def mask_bits(model, density):
    """A random mask: what it costs does not depend on which elements it selects."""
    generator = torch.Generator().manual_seed(0)
    named = model.denoiser.named_parameters()
    return {name: pack_bits(torch.rand(p.shape, generator=generator) < density) for name, p in named}


def make_trainer(case, world: World, folder: Path) -> Trainer:
    model = load_model("shapes", "cpu")
    recipe = Recipe([Row("forget", p, p, {p.replace("star", "ring"): 1.0}) for p in PROMPTS], Sum())
    plan = plan_bank(model, recipe, trajectories=2, num_inference_steps=8, guidance_scale=3.0, seed=0)
    bank = build_bank(model, recipe, plan)
    names = [name for name, _ in model.denoiser.named_parameters()]
    bits = None if case["density"] is None else mask_bits(model, case["density"])
    selection = Selection.of(model.denoiser, names, bits)
    if case["stage"] is None:
        engine: TorchEngine | DeepSpeedEngine = TorchEngine(model.denoiser, selection, learning_rate=1e-5)
    else:
        path = folder / f"ds-{world.rank}.json"
        buckets = {"reduce_bucket_size": 1_000_000}  # as large as the model's own largest tensors need
        path.write_text(
            json.dumps({"train_batch_size": ROWS, "zero_optimization": {"stage": case["stage"], **buckets}})
        )
        settings = read_deepspeed(
            path,
            world_size=world.size,
            micro_batch_size=None,
            gradient_accumulation_steps=None,
            max_grad_norm=1.0,
            default_micro_batch_size=1,
        )
        engine = DeepSpeedEngine(model.denoiser, selection, settings=settings, world=world, learning_rate=1e-5)
    schedule = Schedule(10**6, ROWS // world.size, seed=0, log_every=10**6, checkpoint_every=0)
    return Trainer(model, bank, Sum(), engine, schedule, folder)


def optimizer_bytes(engine) -> int:
    """States, float32 copies of weights that DeepSpeed keeps, and masks, of this process."""
    tensors = [value for state in engine.optimizer.state.values() for value in state.values()]
    for selection in engine.optimizer._selections.values():
        tensors += [selection.bits, selection.flat_bits, selection.ranks]
    parameters = {p.untyped_storage().data_ptr() for p in engine.parameters.values()}
    if isinstance(engine, DeepSpeedEngine):
        flats = {id(part.flat): part.flat for part in engine.slices}.values()
        tensors += [flat for flat in flats if flat.untyped_storage().data_ptr() not in parameters]
    return sum(tensor.nbytes for tensor in tensors)


def main() -> None:
    folder, case = Path(sys.argv[1]), json.loads(sys.argv[2])
    world = world_of_environment()
    torch.set_num_threads(case["threads"])
    trainer = make_trainer(case, world, folder)
    steps = Client(str(folder / "socket"), "AF_UNIX") if world.is_main else None
    more = torch.ones(1)
    while True:
        if steps is not None and steps.recv() == "stop":
            more.zero_()
        if world.size > 1:
            torch.distributed.broadcast(more, 0)
        if not more:
            break
        trainer._train_step()
        trainer.step += 1
        if steps is not None:
            steps.send("done")
    # Not getrusage's ru_maxrss, in which a new process starts at the peak of the one that started it.
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    record = {"peak_memory_bytes": peak, "optimizer_bytes": optimizer_bytes(trainer.engine)}
    (folder / f"memory-{world.rank}.json").write_text(json.dumps(record))
    trainer.engine.close()


if __name__ == "__main__":
    main()
