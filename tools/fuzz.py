"""Feeds damaged input to everything that reads what a user gives, and looks for anything but one clear line.

    python tools/fuzz.py --seed 0                       # a round, about a minute: what CI runs
    python tools/fuzz.py --seconds 600 --seed 7         # `make fuzz`: rounds until the time is over
    python tools/fuzz.py --target prompts --case 123    # one case again, with its traceback

A case is a function of target, seed and number alone.  What is not a UserError or an OSError is a finding, and so is a
file left where a command has refused.  Findings are listed, and the exit status is then 1.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import json
import math
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastunlearn.errors import UserError

Case = Callable[[random.Random, Path], None]

_WORDS = [
    "star",
    "a red ring",
    "",
    " ",
    "\u200b",
    "\0",
    "[/b]",
    "{{x}}",
    "=1+1",
    "<script>",
    "~",
    "..",
    "/",
    "é",
    "物",
    "🙂",
]
_NUMBERS: list[Any] = [
    0,
    1,
    -1,
    2**31,
    2**63,
    2**64,
    1e308,
    1e-308,
    float("nan"),
    float("inf"),
    True,
    None,
    "",
    "1",
    "x",
    [],
    {},
]


# ---- damage ----------------------------------------------------------------------------------------------------------


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Content with one to four things wrong with it."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        if not data:
            data += bytes([draw.randrange(256)])
        at = draw.randrange(len(data))
        match draw.randrange(7):
            case 0:
                data[at] ^= 1 << draw.randrange(8)
            case 1:
                del data[at:]
            case 2:
                del data[at : at + draw.randint(1, 20)]
            case 3:
                data[at:at] = bytes(draw.randrange(256) for _ in range(draw.randint(1, 9)))
            case 4:
                data[at:at] = data[at : at + draw.randint(1, 40)]
            case 5:
                data[at : at + 8] = draw.choice([b"\0" * 8, b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"\n" * 8, b'"' * 8])
            case 6:
                data[at:at] = draw.choice(_WORDS).encode()
    return bytes(data)


def damaged_tree(value: Any, draw: random.Random) -> Any:
    """A JSON or YAML value with something of it replaced, removed, renamed or wrapped."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        key = draw.choice(list(value))
        match draw.randrange(4):
            case 0:
                return {name: one for name, one in value.items() if name != key}
            case 1:
                return {**value, draw.choice(_WORDS): draw.choice(_NUMBERS)}
            case _:
                return {**value, key: damaged_tree(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        return [*value[:at], damaged_tree(value[at], draw), *value[at + 1 :]]
    return draw.choice([*_NUMBERS, *_WORDS, [value], {"x": value}])


# ---- what reads ------------------------------------------------------------------------------------------------------


def prompts(draw: random.Random, folder: Path) -> None:
    from fastunlearn.prompts import PromptGroups, read_prompts

    rows = [{"prompt": draw.choice(_WORDS), "group": draw.choice(_WORDS), "seed": draw.randrange(9)} for _ in range(6)]
    kinds = {
        "p.txt": "\n".join(row["prompt"] for row in rows),
        "p.csv": "prompt,group,seed\n" + "\n".join(",".join(map(str, row.values())) for row in rows),
        "p.tsv": "prompt\tgroup\n" + "\n".join(f"{row['prompt']}\t{row['group']}" for row in rows),
        "p.json": json.dumps(rows if draw.random() < 0.5 else damaged_tree(rows, draw)),
        "p.jsonl": "\n".join(json.dumps(row) for row in rows),
        "p": "a;b",
    }
    name, text = draw.choice(list(kinds.items()))
    path = folder / name
    path.write_bytes(damaged(text.encode(), draw))
    read = read_prompts(str(path))
    PromptGroups.of(read.grouped, draw.choice(_WORDS))


def prompt_texts(draw: random.Random, folder: Path) -> None:
    from fastunlearn.prompts import mentions, read_prompts, substitute

    text = draw.choice([";", "/", " ", "~", ".", ""]).join(draw.choices(_WORDS, k=3))
    with contextlib.chdir(folder):
        for prompt, _ in read_prompts(text).grouped:
            substitute(prompt, draw.choice(_WORDS), draw.choice(_WORDS))
            mentions([prompt], draw.choice(_WORDS))


@functools.cache
def _images() -> list[tuple[str, bytes]]:
    from PIL import Image

    made = []
    for form in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM"):
        for mode in ("RGB", "L"):
            stream = io.BytesIO()
            Image.radial_gradient("L").resize((24, 24)).convert(mode).save(stream, format=form)
            made.append((form.lower(), stream.getvalue()))
    return made


def images(draw: random.Random, folder: Path) -> None:
    from fastunlearn.files.images import read_image

    suffix, content = draw.choice(_images())
    path = folder / f"a.{suffix}"
    path.write_bytes(damaged(content, draw))
    read_image(path)


def settings(draw: random.Random, folder: Path) -> None:
    import yaml

    from fastunlearn.attacks.config import AttackConfig
    from fastunlearn.cli.flags import build
    from fastunlearn.evaluation.config import CompareConfig, EvaluateConfig, EvaluateImagesConfig
    from fastunlearn.training.config import ApplyConfig, MaskConfig, TrainConfig

    kind, required = draw.choice(
        [
            (TrainConfig, {"forget": "star", "output": "run", "steps": 3, "learning_rate": 1e-4, "seed": 1}),
            (MaskConfig, {"forget": "star", "output": "m", "density": 0.5}),
            (ApplyConfig, {"model": "shapes", "delta": "d", "output": "m"}),
            (EvaluateConfig, {"original": "shapes", "unlearned": ["run"], "output": "e", "batch_size": 4}),
            (EvaluateImagesConfig, {"original_images": "a", "unlearned_images": "b", "output": "e"}),
            (AttackConfig, {"original": "shapes", "unlearned": "run", "output": "a", "budget": 80}),
            (CompareConfig, {"runs": ["a", "b"], "output": "c", "margin": 0.1}),
        ]
    )
    content: Any = required
    for _ in range(draw.randint(0, 3)):
        content = damaged_tree(content, draw)
    text = yaml.safe_dump(content, allow_unicode=True).encode("utf-8", "surrogatepass")
    if draw.random() < 0.5:
        text = damaged(text, draw)
    path = folder / "run.yaml"
    path.write_bytes(text)
    build(kind, {"config": str(path)})  # type: ignore[type-var]


def deepspeed_files(draw: random.Random, folder: Path) -> None:
    from fastunlearn.training.deepspeed_config import read_deepspeed

    content: Any = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "bf16": {"enabled": True},
    }
    for _ in range(draw.randint(0, 3)):
        content = damaged_tree(content, draw)
    text = json.dumps(content).encode()
    path = folder / "ds.json"
    path.write_bytes(damaged(text, draw) if draw.random() < 0.5 else text)
    read_deepspeed(
        path,
        world_size=draw.choice([1, 2]),
        micro_batch_size=draw.choice([None, 4]),
        gradient_accumulation_steps=None,
        max_grad_norm=1.0,
        default_micro_batch_size=4,
    )


def records(draw: random.Random, folder: Path) -> None:
    """The record of an output folder, damaged: nothing of a user's may be deleted by it."""
    from fastunlearn.files.run_folder import RECORD, prepare_output

    output = folder / "out"
    prepare_output(output, "train", overwrite=False)
    (output / "metrics.jsonl").touch()
    (output / "thesis.txt").write_text("years of work")
    (output / RECORD).write_bytes(damaged((output / RECORD).read_bytes(), draw))
    try:
        prepare_output(output, "train", overwrite=draw.random() < 0.7, resume=False)
    finally:
        assert (output / "thesis.txt").read_text() == "years of work"


@functools.cache
def _bundled() -> Any:
    from fastunlearn.models.loading import load_model

    return load_model("shapes", "cpu")


@functools.cache
def _tensor_files() -> dict[str, tuple[bytes, dict[str, Any], dict[str, Any]]]:
    """A mask and a delta of the bundled model: their bytes, tensors and content."""
    from fastunlearn_kernels import pack_bits

    from fastunlearn.files.tensors import load_tensors
    from fastunlearn.training.export import DELTA_FORMAT, export_delta
    from fastunlearn.training.selection import MASK_FORMAT, Selection, save_mask

    model = _bundled()
    name = next(iter(dict(model.denoiser.named_parameters())))
    weights = dict(model.denoiser.named_parameters())[name].detach()
    with tempfile.TemporaryDirectory() as scratch:
        mask, delta = Path(scratch) / "mask.safetensors", Path(scratch) / "delta.safetensors"
        save_mask(Selection.of(model.denoiser, [name], {name: pack_bits(weights > 0)}, {"density": "0.5"}), mask, model)
        export_delta(model.source, model.denoiser_folder, delta, {name: weights.flatten() + 1}, {})
        return {
            form: (path.read_bytes(), *load_tensors(path, form, "file"))
            for form, path in ((MASK_FORMAT, mask), (DELTA_FORMAT, delta))
        }


def tensor_files(draw: random.Random, folder: Path) -> None:
    """Masks and deltas, damaged, or forged: whole, with a true checksum, by somebody who means harm."""
    from fastunlearn.files.tensors import save_tensors
    from fastunlearn.training.export import DELTA_FORMAT, apply_delta
    from fastunlearn.training.selection import load_mask

    form, (whole, tensors, content) = draw.choice(list(_tensor_files().items()))
    path = folder / "a.safetensors"
    if draw.random() < 0.3:
        path.write_bytes(damaged(whole, draw))
    else:
        if draw.random() < 0.4:
            name = draw.choice(list(tensors))
            other = draw.choice([tensors[name][:1], tensors[name].float() * float("nan"), tensors[name].flatten()[:0]])
            tensors = {one: value for one, value in tensors.items() if one != name} | {draw.choice([name, "x"]): other}
        else:
            content = damaged_tree(content, draw)
        if not isinstance(content, dict):
            return
        save_tensors(path, tensors, form, {key: value for key, value in content.items() if key != "format"})
    if form == DELTA_FORMAT:
        (folder / "model").mkdir()
        apply_delta(_bundled().source, path, folder / "model")
    else:
        load_mask(path, _bundled())


@functools.cache
def _adapter_file() -> tuple[bytes, Any, str]:
    """An adapter of the bundled model: its file's bytes, what it holds, and the hash of its base."""
    from fastunlearn.models.adapter_files import read_adapter, save_adapter
    from fastunlearn.models.adapters import plan_adapter

    model = _bundled()
    names = [name for name, _ in model.denoiser.named_parameters() if "attn2.to_k" in name]
    base = model.hash_files()
    adapter = plan_adapter(model.denoiser, names, 2)
    adapter = dataclasses.replace(adapter, made={"base": base, "method": "esd", "concept": "star"})
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "a.safetensors"
        import torch

        values = {plain: torch.ones(shape) for _, plain, shape in adapter.parameters()}
        save_adapter(path, model.denoiser_folder, adapter, values)
        return path.read_bytes(), read_adapter(path), base


def adapters(draw: random.Random, folder: Path) -> None:
    """An adapter's file, damaged, or forged: whole, with a true checksum, by somebody who means harm."""
    import torch

    from fastunlearn.models.adapter_files import adapter_for, read_adapter, save_adapter
    from fastunlearn.models.adapters import Adapter

    whole, file, base = _adapter_file()
    path = folder / "a.safetensors"
    if draw.random() < 0.5:
        path.write_bytes(damaged(whole, draw))
    else:
        values, made, rank, part = dict(file.values), dict(file.made), file.rank, file.part
        layers = {layer: (torch.Size(), torch.Size()) for layer in file.layers}
        match draw.randrange(5):
            case 0:
                rank = draw.choice(_NUMBERS)
            case 1:
                made = damaged_tree(made, draw)
            case 2:
                part = draw.choice(["transformer", "unet.x", *_WORDS])
            case 3:
                name = draw.choice(list(values))
                values[name] = draw.choice([values[name][:1], values[name] * float("nan"), values[name].int()])
            case 4:
                layer, word = draw.choice(list(layers)), draw.choice([*_WORDS, "conv_norm_out", "time_embedding"])
                layers = {(word if one == layer else one): shapes for one, shapes in layers.items()}
                values = {name.replace(layer, word): value for name, value in values.items()}
        if not isinstance(made, dict):
            return
        save_adapter(path, part, Adapter(layers, rank, file.alpha, made), values)
    adapter = adapter_for(_bundled(), read_adapter(path), base)
    if adapter.layers.keys() != set(file.layers):
        raise AssertionError("a damaged adapter was read")


def checkpoints(draw: random.Random, folder: Path) -> None:
    """A checkpoint with one damaged file is refused, or it is the same as before."""
    import torch

    from fastunlearn.distributed import World
    from fastunlearn.training.checkpoint import Piece, load_checkpoint, save_checkpoint

    piece = Piece("a", 0, {kind: torch.arange(10.0) for kind in ("weight", "exp_avg", "exp_avg_sq")}, 3.0)
    save_checkpoint(folder / "c", World(), [piece], {"a": 10}, {"step": 3})
    path = draw.choice(sorted((folder / "c").iterdir()))
    path.write_bytes(damaged(path.read_bytes(), draw))
    pieces, state = load_checkpoint(folder / "c", {"a": 10}, {"a": (0, 10)})
    if state != {"step": 3} or not torch.equal(pieces["a"].values["weight"], torch.arange(10.0)):
        raise AssertionError("a damaged checkpoint was read")


def flags(draw: random.Random, folder: Path) -> None:
    """The command line, as far as its plan."""
    from fastunlearn.cli.main import main

    names = [
        "steps",
        "learning-rate",
        "trajectories",
        "micro-batch-size",
        "seed",
        "method",
        "model",
        "anchor",
        "trainable",
    ]
    names += [
        "retain-prompts",
        "forget-prompts",
        "mask-density",
        "weight-decay",
        "max-grad-norm",
        "save",
        "config",
        "mask",
        "adapter",
        "rank",
        "lora",
    ]
    words = ["train", "--dry-run", "--output", str(folder / "run"), "--forget", draw.choice(["star", "red", *_WORDS])]
    words += ["--trajectories", "1", "--trajectory-steps", "2"]
    for name in draw.sample(names, draw.randint(0, 3)):
        value = draw.choice(
            [*_WORDS, "0", "1", "-1", "1e9", "nan", "inf", "ovw", "esd", "shapes", "all", "no", "star;x", "lora"]
        )
        words.append(f"--{name}={value}")
    status, said = _quietly(main, words)
    if status not in (0, 2) or "Traceback" in said or (status == 2 and len(said.strip().splitlines()) != 1):
        raise AssertionError(f"status {status}: {said}")
    if (folder / "run").exists():
        raise AssertionError("a dry run left a folder")


def _quietly(main: Callable[[Sequence[str]], int], words: Sequence[str]) -> tuple[int | str | None, str]:
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        try:
            return main(words), errors.getvalue()
        except SystemExit as stop:
            return stop.code, errors.getvalue()


# ---- the run ---------------------------------------------------------------------------------------------------------

#: Target -> (what it does, how many cases are a round).  A round takes about a minute on 2 cores.
TARGETS: dict[str, tuple[Case, int]] = {
    "prompts": (prompts, 15_000),
    "prompt-texts": (prompt_texts, 10_000),
    "images": (images, 15_000),
    "settings": (settings, 5_000),
    "deepspeed": (deepspeed_files, 15_000),
    "records": (records, 2_000),
    "tensor-files": (tensor_files, 400),
    "adapters": (adapters, 400),
    "checkpoints": (checkpoints, 800),
    "flags": (flags, 300),
}


@dataclasses.dataclass(frozen=True)
class Finding:
    target: str
    case: int
    error: str


def run_case(target: str, seed: int, case: int) -> None:
    """One case; raises what is a finding."""
    draw = random.Random(f"{target}/{seed}/{case}")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            TARGETS[target][0](draw, Path(scratch))
        except (UserError, OSError) as error:
            if "\n" in str(error):
                raise AssertionError(f"more than one line: {error}") from error


def fuzz(
    seed: int, targets: Sequence[str], rounds: float = 1, seconds: float = math.inf
) -> tuple[dict[str, int], list[Finding]]:
    """Rounds of every target, or as many cases as the seconds hold: how many there were, and the findings."""
    counts = dict.fromkeys(targets, 0)
    findings: list[Finding] = []
    end = time.monotonic() + seconds
    while rounds > 0:
        for name in targets:
            for _ in range(math.ceil(TARGETS[name][1] * min(rounds, 1))):
                if time.monotonic() > end:
                    return counts, findings
                try:
                    run_case(name, seed, counts[name])
                except Exception as error:
                    where = traceback.extract_tb(error.__traceback__)[-1]
                    words = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
                    findings.append(Finding(name, counts[name], " ".join(words.split())[:300]))
                counts[name] += 1
        rounds -= 1
    return counts, findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, help="rounds until this time is over (default: one round)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=[*TARGETS], action="append")
    parser.add_argument("--case", type=int, help="run this case of the target alone")
    args = parser.parse_args()
    targets = args.target or [*TARGETS]
    warnings.filterwarnings("ignore", module="PIL")
    if args.case is not None:
        run_case(targets[0], args.seed, args.case)
        return 0
    length = {"rounds": 1} if args.seconds is None else {"rounds": math.inf, "seconds": args.seconds}
    counts, findings = fuzz(args.seed, targets, **length)
    for name, count in counts.items():
        print(f"{name:14} {count:7} cases, {sum(found.target == name for found in findings)} findings")
    for found in findings[:20]:
        print(f"{found.target} --case {found.case}: {found.error}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
