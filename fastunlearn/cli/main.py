"""The commands.  Parses flags into a config, calls one function, turns errors into one line and exit status 2."""

from __future__ import annotations

import argparse
import dataclasses
import io
import os
import shlex
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__
from ..attacks.config import AttackConfig

# Heavy modules are imported inside the commands: `--help` and mistakes answer at once.
from ..distributed import ALONE, has_joined, world_of_environment
from ..errors import UserError, explain, is_expected
from ..evaluation.config import CompareConfig, EvaluateConfig, EvaluateImagesConfig
from ..training.config import ApplyConfig, ExportConfig, MaskConfig, TrainConfig
from .demo import DemoConfig
from .flags import add_flags, build
from .prompts import PromptsConfig, group_of, make_prompts

Command = Callable[[dict[str, Any]], int]

_DESCRIPTION = "Make a text-to-image diffusion model forget a concept, and prove that everything else is unchanged."
_BUG = (
    f"fastunlearn {__version__}: this is a bug of fastunlearn, not a mistake of yours. Please report the lines "
    "above, with the command and what `fastunlearn info` prints, to the project's issues."
)
_EPILOG = """exit status: 0 done, 2 a mistake that one line explains, 1 a bug of ours.
FASTUNLEARN_TRACEBACK=1 in the environment shows the traceback of every error.
"""
_TRAIN_EXAMPLES = """examples:
  fastunlearn train --forget star --output run
  fastunlearn train --model ./stable-diffusion-v1-5 --method esd --forget "Van Gogh" --output run
  fastunlearn train --model ./stable-diffusion-v1-5 --method ovw --forget "Van Gogh" --anchor "a painter" \\
                    --retain-prompts "a photo of a dog;a painting by Monet" --output run
  fastunlearn train --model ./stable-diffusion-v1-5 --method salun --forget "Van Gogh" --mask-density 0.5 \\
                    --retain-prompts prompts.txt --save delta --output run
  fastunlearn train --model ./FLUX.1-dev --method esd --forget "Van Gogh" --adapter lora --rank 16 --output run
  fastunlearn train --forget star --method esd --set negative_guidance=3 --output run
  fastunlearn train --resume --output run
"""
_MASK_EXAMPLES = """examples:
  fastunlearn mask --model ./stable-diffusion-v1-5 --forget "Van Gogh" --density 0.1 --output gogh.mask.safetensors
  fastunlearn train --model ./stable-diffusion-v1-5 --method esd --forget "Van Gogh" \\
                    --mask gogh.mask.safetensors --output run
"""
_APPLY_EXAMPLES = """examples:
  fastunlearn apply --model ./stable-diffusion-v1-5 --delta run/delta.safetensors --output unlearned
"""
_EXPORT_EXAMPLES = """examples:
  fastunlearn train --model ./sdxl --method esd --forget "Van Gogh" --adapter lora --rank 16 --output run
  fastunlearn export --run run --format kohya-lora --output no-gogh.safetensors
  fastunlearn export --run run --format diffusers --output unlearned
"""
_EVALUATE_EXAMPLES = """examples:
  fastunlearn evaluate --original shapes --unlearned run --output evaluation
  fastunlearn evaluate --original shapes --unlearned run1 --unlearned run2 --placebo run3 --output evaluation
  fastunlearn evaluate --resume --output evaluation
  fastunlearn evaluate --original ./sd15 --unlearned run --prompts prompts.csv --metric lpips-alex --output evaluation
  fastunlearn evaluate --original ./sd15 --unlearned run --prompts prompts.csv --judge imagenet --output evaluation
"""
_ATTACK_EXAMPLES = """examples:
  fastunlearn attack --original shapes --unlearned run --gold shapes-gold-star --output attack
  fastunlearn attack --original ./sd15 --unlearned run --judge clip --attacks seeds,embedding --dry-run --output attack
  fastunlearn attack --resume --output attack
"""
_COMPARE_EXAMPLES = """examples:
  fastunlearn compare evaluation-esd evaluation-ovw --output comparison
  fastunlearn compare evaluation/esd evaluation/ovw evaluation/saddle --margin 0.02 --output comparison
"""
_EVALUATE_IMAGES_EXAMPLES = """examples:
  fastunlearn evaluate-images --original-images before --unlearned-images after --output evaluation
  fastunlearn evaluate-images --original-images before --unlearned-images after --metrics fid,ssim --output evaluation
  fastunlearn evaluate-images --original-images before --unlearned-images after --prompts prompts.csv \\
                              --judge nsfw --forget nudity --output evaluation
"""
_PROMPTS_EXAMPLES = """examples:
  fastunlearn prompts --concept "Van Gogh" --output prompts.csv
  fastunlearn prompts --concept "Van Gogh" --kinds name,prefix,misspelt,near,random --per-kind 20 --output prompts.csv
  fastunlearn prompts --concept okapi --category object --near "zebra;giraffe" --hints "striped legs" --output okapi.csv
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status.

    0: done.  2: something the user can mend, after one line on stderr that says what to do.  1: a bug of ours, after
    its traceback.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", module="PIL")  # on damaged images, which we refuse or read
    for stream in (sys.stdout, sys.stderr):  # what a terminal's encoding lacks is shown by its code
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    arguments = _without_local_rank(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(_parser().parse_args(arguments))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except KeyboardInterrupt:
        return _fail(
            "stopped; every file written so far is whole. Run the command again; where its output folder is no longer "
            "empty, with `--overwrite` (or, for train, `--resume`)."
        )
    except Exception as error:
        if is_expected(error) and not os.environ.get("FASTUNLEARN_TRACEBACK"):
            return _fail(explain(error))
        traceback.print_exc()
        if not is_expected(error):
            print(_BUG, file=sys.stderr)
        return 2 if is_expected(error) else 1


def _without_local_rank(arguments: Sequence[str]) -> list[str]:
    """The deepspeed launcher puts ``--local_rank=N`` before our own words; the environment says the same."""
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        if word in ("--local_rank", "--local-rank"):
            os.environ.setdefault("LOCAL_RANK", next(words, "0"))
        elif word.startswith(("--local_rank=", "--local-rank=")):
            os.environ.setdefault("LOCAL_RANK", word.split("=", 1)[1])
        else:
            kept.append(word)
    return kept


def _run(args: argparse.Namespace) -> int:
    chosen = os.environ.get("FASTUNLEARN_KERNELS") or os.environ.get("FASTUNLEARN_KERNELS_LEVEL")
    if chosen and args.command is not _info:
        from fastunlearn_kernels.launch import check_choice

        try:
            check_choice()
        except RuntimeError as error:
            raise UserError(str(error)) from error
    flags = {name: value for name, value in vars(args).items() if name != "command"}
    command: Command = args.command
    return command(flags)


def _train(flags: dict[str, Any]) -> int:
    saved = Path(flags.get("output", "")) / "config.yaml"
    if flags.get("resume") and "output" in flags and flags.get("config") is None:
        if saved.is_file():
            flags["config"] = str(saved)  # `--resume --output RUN` says enough
        elif "forget" not in flags:
            raise UserError(f"`--resume`: {flags['output']} holds no run. Leave the flag out to start one.")
    config = build(TrainConfig, flags)
    again = f"fastunlearn train --resume --output {shlex.quote(config.output)}"
    if config.num_processes is not None and world_of_environment().size == 1 and not config.dry_run:
        return _train_in_processes(config, again)
    from ..distributed import is_lost_peer
    from ..progress import Reporter
    from ..training.trainer import Interrupted
    from ..training.unlearn import unlearn
    from .console import Console

    world = world_of_environment()
    with Console(quiet=not world.is_main) as console:
        try:
            result = unlearn(config, reporter=console if world.is_main else Reporter())
        except Interrupted as stop:
            console.close()
            return _fail(f"{stop}; the state is saved. Continue with: {again}") if world.is_main else 2
        except RuntimeError as error:
            console.close()
            if world.size == 1 or not is_lost_peer(error):
                raise
            return _fail(
                f"process {world.rank}: another process of this run has died, so this one stops too ({error})."
            )
        except KeyboardInterrupt:
            console.close()
            begun = (Path(config.output) / "config.yaml").is_file()
            return _fail(f"stopped. Continue with: {again}" if begun else "stopped before anything was written.")
    if not world.is_main:
        return 0
    if result.model is None:
        print("dry run: nothing was computed or written.")
    else:
        console.result(result.folder, result.model, result.record.ending if result.record else None)
    return 0


def _train_in_processes(config: TrainConfig, again: str) -> int:
    """Start ``--num-processes`` of this command, which see by their environment that they are already started."""
    import tempfile

    from ..config import to_yaml
    from ..distributed import launch

    assert config.num_processes is not None
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "config.yaml"
        settings.write_text(to_yaml(config), encoding="utf-8")
        failure = launch(["train", "--config", str(settings)], config.num_processes)
    if failure is None:
        return 0
    if failure.status not in (1, 2):  # else the process has said it
        begun = (Path(config.output) / "config.yaml").is_file()
        _fail(f"{failure} Continue with: {again}" if begun else str(failure))
    return 1 if failure.status == 1 else 2


def _mask(flags: dict[str, Any]) -> int:
    config = build(MaskConfig, flags)
    from ..training.saliency import mask
    from .console import Console

    with Console():
        result = mask(config)
    print(f"mask: {config.output}, {result.total:,} elements of {len(result.names)} parameters (`train --mask`)")
    return 0


def _apply(flags: dict[str, Any]) -> int:
    config = build(ApplyConfig, flags)
    from ..training.export import apply

    print(f"model: {apply(config)}  (loads with diffusers.DiffusionPipeline.from_pretrained)")
    return 0


def _export(flags: dict[str, Any]) -> int:
    config = build(ExportConfig, flags)
    from ..training.formats import export_run

    print(f"{config.format}: {export_run(config)}")
    return 0


def _evaluate(flags: dict[str, Any]) -> int:
    begun = _begun("evaluate", flags)
    config = build(EvaluateConfig, flags)
    from ..evaluation.evaluate import evaluate
    from .console import Console

    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    with Console() as console:
        try:
            report = evaluate(**settings, reporter=console)
        except KeyboardInterrupt:
            console.close()
            return _stopped("evaluate", config.output, begun)
    if report.result is not None:
        console.evaluated(report, Path(config.output))
    return 0


def _attack(flags: dict[str, Any]) -> int:
    begun = _begun("attack", flags)
    config = build(AttackConfig, flags)
    from ..attacks.attack import attack
    from .attacks import attack_table
    from .console import Console

    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    with Console() as console:
        try:
            report = attack(**settings, reporter=console)
        except KeyboardInterrupt:
            console.close()
            return _stopped("attack", config.output, begun)
    if report.record is not None:
        attack_table(report.record, Path(config.output))
    elif config.dry_run:
        print("dry run: nothing was attacked or written.")
    return 0


def _begun(command: str, flags: dict[str, Any]) -> Path:
    """Where a journal keeps the settings that it was begun with; `--resume --output FOLDER` says enough, then."""
    begun = Path(flags.get("output", "")) / "journal" / f"{command}.yaml"
    if flags.get("resume") and "output" in flags and flags.get("config") is None and begun.is_file():
        flags["config"] = str(begun)
    return begun


def _stopped(command: str, output: str, begun: Path) -> int:
    again = f"fastunlearn {command} --resume --output {shlex.quote(output)}"
    return _fail(f"stopped. Continue with: {again}" if begun.is_file() else "stopped; nothing was recorded yet.")


def _compare(flags: dict[str, Any]) -> int:
    config = build(CompareConfig, flags)
    from ..evaluation.compare import compare_runs
    from .console import comparison_table

    comparison_table(compare_runs(config))
    print(f"plot: {Path(config.output) / 'compare.png'}, page: {Path(config.output) / 'compare.html'}")
    return 0


def _evaluate_images(flags: dict[str, Any]) -> int:
    config = build(EvaluateImagesConfig, flags)
    from ..evaluation.evaluate_images import evaluate_image_folders
    from .console import Console, images_table

    with Console() as console:
        found = evaluate_image_folders(config, console.comparing)
    for folder, evaluation in found.items():
        images_table(evaluation, folder)
    return 0


def _demo(flags: dict[str, Any]) -> int:
    config = build(DemoConfig, flags)
    from ..reports.sentences import gap_sentence
    from ..training.trainer import Interrupted
    from .console import Console, table
    from .demo import demo

    started = time.monotonic()
    with Console(plans=False) as console:
        try:
            found = demo(config, console)
        except Interrupted:
            raise KeyboardInterrupt from None  # a demo is too short to be continued
    table(found.evaluations)
    print(gap_sentence(found.comparison))
    print(f"{time.monotonic() - started:.0f} s in all. Open {Path(config.output) / 'report.html'} in a browser.")
    evaluation = found.evaluations[1]
    attack = ["attack", "--original", config.model, "--unlearned", str(Path(config.output) / evaluation.name)]
    if gold := _gold_of(config.model, evaluation.concept):
        attack += ["--gold", gold]
    print(f"Is it gone, also for somebody who looks for it? fastunlearn {shlex.join(attack)} --output attack")
    return 0


def _gold_of(model: str, concept: str | None) -> str | None:
    """The bundled model that never saw the concept, where there is one."""
    from ..worlds import world_with_model

    world = world_with_model(model)
    return world.golds.get(concept) if world is not None and concept is not None else None


def _methods(flags: dict[str, Any]) -> int:
    from .methods import method_page, methods_table

    if (name := flags.get("name")) is not None:
        method_page(name)
    else:
        methods_table()
    return 0


def _judges(flags: dict[str, Any]) -> int:
    from .judges import judge_page, judges_table

    if (name := flags.get("name")) is not None:
        judge_page(name)
    else:
        judges_table()
    return 0


def _prompts(flags: dict[str, Any]) -> int:
    config = build(PromptsConfig, flags)
    made = make_prompts(config)
    if config.output is None:
        for kind, prompt in made:
            print(f"{kind:9} {prompt}")
        return 0
    kinds = list(dict.fromkeys(kind for kind, _ in made))
    groups = ", ".join(dict.fromkeys(map(group_of, kinds)))
    print(f"prompts: {config.output}, {len(made)} in the groups {groups} (`--prompts`, `--forget-prompts`)")
    return 0


def _attacks(flags: dict[str, Any]) -> int:
    from .attacks import attacks_table

    attacks_table()
    return 0


def _info(flags: dict[str, Any]) -> int:
    from .console import info

    info()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fastunlearn",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastunlearn {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(
        name: str, command: Callable[[dict[str, Any]], int], help: str, kind: Any = None, examples: str = ""
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=examples,
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=110),
        )
        if kind is not None:
            add_flags(sub, kind)
        sub.set_defaults(command=command)
        return sub

    add("demo", _demo, 'forget "star" in the bundled model three ways and compare them', DemoConfig)
    add("train", _train, "make a model forget a concept", TrainConfig, _TRAIN_EXAMPLES)
    add("mask", _mask, "find the weights that matter most for a concept", MaskConfig, _MASK_EXAMPLES)
    add("apply", _apply, "rebuild an unlearned model from its original and a delta", ApplyConfig, _APPLY_EXAMPLES)
    add("export", _export, "write a run's model or adapter as other programs read it", ExportConfig, _EXPORT_EXAMPLES)
    add("evaluate", _evaluate, "measure what an unlearned model forgot and kept", EvaluateConfig, _EVALUATE_EXAMPLES)
    add(
        "evaluate-images",
        _evaluate_images,
        "compare two folders of images, made by any tool, pair by pair",
        EvaluateImagesConfig,
        _EVALUATE_IMAGES_EXAMPLES,
    )
    add("attack", _attack, "try to bring the concept back, with controls", AttackConfig, _ATTACK_EXAMPLES)
    add("attacks", _attacks, "list the attacks: what each does, what it looks for, whose it is, what it costs")
    add("compare", _compare, "tell which of several evaluated models keeps more", CompareConfig, _COMPARE_EXAMPLES)
    add(
        "prompts",
        _prompts,
        "write prompts that ask for a concept in many ways, and for what lies next to it",
        PromptsConfig,
        _PROMPTS_EXAMPLES,
    )
    judges = add("judges", _judges, "list who can say whether an image shows a concept, or show one: needs, options")
    judges.add_argument("name", metavar="NAME", nargs="?", help="the judge to show")
    methods = add("methods", _methods, "list the methods, or show one: paper, equation, needs, options, defaults")
    methods.add_argument("name", metavar="NAME", nargs="?", help="the method to show")
    add("info", _info, "show versions, devices, and which kernels and metrics can run here")
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        sys.exit(_fail(f"{message}. See `{self.prog} --help`."))


def _fail(message: str) -> int:
    try:
        world = world_of_environment()
    except UserError:
        world = ALONE  # the message is about it
    if not world.is_main and not message.startswith("process "):
        if world.store is not None and not has_joined():
            return 2  # all processes that we started make the same checks: the first one tells
        message = f"process {world.rank}: {message}"
    print(f"fastunlearn: {' '.join(message.split())}", file=sys.stderr)
    return 2
