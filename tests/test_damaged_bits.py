"""One bit of a file that we wrote is turned: whoever reads the file says so, or has what was written.

The files are those of real runs.  Where a turned bit says nothing, as in the name of a key that a file may lack, it may
stay unseen.
"""

import random
import shutil

import numpy as np
import pytest
import torch

from fastunlearn import evaluate, unlearn
from fastunlearn.errors import UserError
from fastunlearn.evaluation.compare import read_run
from fastunlearn.evaluation.image_cache import ImageCache
from fastunlearn.evaluation.journal import Journal, PairScores
from fastunlearn.files.weights import hash_pipeline
from fastunlearn.models.adapter_files import read_adapter
from fastunlearn.models.loading import load_model
from fastunlearn.schema import RunRecord
from fastunlearn.training.ancestors import ancestors_of
from fastunlearn.training.export import apply_delta
from fastunlearn.training.selection import load_mask

TURNS = 200
TINY = {"trajectories": 1, "trajectory_steps": 4, "micro_batch_size": 4, "evaluation_prompts": "none", "steps": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Runs with a mask and a delta, with an adapter, and with a whole model; an evaluation."""
    folder = tmp_path_factory.mktemp("made")
    unlearn("shapes", "star", method="salun", output=folder / "masked", mask_density=0.1, save="delta", **TINY)
    unlearn("shapes", "star", method="esd", output=folder / "adapter", adapter="lora", rank=1, **TINY)
    unlearn("shapes", "star", method="uce", output=folder / "run", evaluation_prompts="none")
    settings = {"num_inference_steps": 2, "control_pairs": 1, "batch_size": 4}
    evaluate("shapes", folder / "run", ["a ring", "a cross"], forget="star", output=folder / "evaluation", **settings)
    return folder


def journal(folder):
    """Three pairs of an evaluation that was stopped."""
    one = Journal(folder, 0, 1)
    one.begin({"original": "a"}, "", [["prompt"]], resume=False)
    values = np.arange(3, dtype=np.float32)
    rows = {"fid": np.ones((1, 3, 4), dtype=np.float32)}
    keys = [("a ring", seed) for seed in range(3)]
    one.append(PairScores(keys, values, values[None], np.stack([values, values]), None, rows))
    one.close()


def batches(folder):
    return [(part.keys, part.distances.tolist(), part.rows["fid"].tolist()) for part in Journal(folder, 0, 1).batches()]


def applied(path, bundled, scratch):
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    apply_delta(bundled.source, path, scratch)
    return hash_pipeline(scratch)


def mask_in(path, bundled):
    selection = load_mask(path, bundled)
    return selection.made, {name: bits.tolist() for name, bits in selection.bits.items()}


def values_of(adapter):
    return {name: value.tolist() for name, value in adapter.values.items()}, adapter.made, adapter.rank, adapter.alpha


def run_behind(folder):
    model = load_model(str(folder), "cpu")
    return [one.method for one in ancestors_of(model, hash_pipeline(model.source))]


@pytest.mark.slow
def test_a_turned_bit_is_found_or_changes_nothing(made, bundled, tmp_path):
    journal(tmp_path / "stopped")
    cache, image = ImageCache(tmp_path / "cache", 10**6), torch.arange(48, dtype=torch.uint8).view(3, 4, 4)
    cache.store("ab" * 32, image)

    def cached():
        found = cache.load("ab" * 32)
        if found is None:
            raise UserError("it is drawn again")
        return found.tolist()

    adapter = made / "adapter" / "pytorch_lora_weights.safetensors"
    evaluation, model = made / "evaluation", made / "run" / "model"
    read = {
        made / "masked" / "mask.safetensors": lambda path: mask_in(path, bundled),
        made / "masked" / "delta.safetensors": lambda path: applied(path, bundled, tmp_path / "applied"),
        adapter: lambda path: values_of(read_adapter(path)),
        made / "run" / "run.json": lambda path: RunRecord.read(path).to_dict(),
        evaluation / "evaluation.json": lambda path: read_run(path.parent).evaluation.to_dict(),
        evaluation / "pairs.jsonl": lambda path: read_run(path.parent).keys,
        model / "unet" / "diffusion_pytorch_model.safetensors": lambda path: run_behind(path.parents[1]),
        model / "text_encoder" / "model.safetensors": lambda path: run_behind(path.parents[1]),
        model / "unet" / "config.json": lambda path: run_behind(path.parents[1]),
        next((tmp_path / "stopped" / "journal").glob("*.jsonl")): lambda path: batches(path.parents[1]),
        next((tmp_path / "stopped" / "journal").glob("*fid*")): lambda path: batches(path.parents[1]),
        next((tmp_path / "cache").glob("??/*.image")): lambda path: cached(),
    }
    draw, found, same = random.Random(0), 0, 0
    for turn in range(TURNS):
        path = list(read)[turn % len(read)]
        whole, wanted = path.read_bytes(), read[path](path)
        bit = draw.randrange(8 * len(whole))
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            got = read[path](path)
        except UserError:
            found += 1
        else:
            assert got == wanted, f"{path.name}: bit {bit} was turned, and what was read is another"
            same += 1
        path.write_bytes(whole)
    assert found + same == TURNS
    assert same <= TURNS // 50
