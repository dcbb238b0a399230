"""The commands.  Parses flags into a config, calls one function, turns errors into one line and exit status 2."""

from __future__ import annotations

import argparse
import dataclasses
import io
import os
import shlex
import shutil
import sys
import textwrap
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
from ..errors import UserError, did_you_mean, explain, is_expected
from ..evaluation.config import CardConfig, CompareConfig, EvaluateConfig, EvaluateImagesConfig
from ..training.config import ApplyConfig, ExportConfig, MaskConfig, TrainConfig
from .completion import SHELLS, commands_of
from .demo import DemoConfig
from .flags import add_flags, build
from .prompts import PromptsConfig, group_of, make_prompts
from .voice import Done, Voice, add_voice, take_voice

Command = Callable[[dict[str, Any], Voice], Done | int]

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
_CARD_EXAMPLES = """examples:
  fastunlearn card --run run --evaluation evaluation --attack attack --base-model stabilityai/stable-diffusion-2-1
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


_COMPLETION_EXAMPLES = """examples:
  source <(fastunlearn completion bash)
  fastunlearn completion zsh > "${fpath[1]}/_fastunlearn"
  fastunlearn completion fish > ~/.config/fish/completions/fastunlearn.fish
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
    voice = take_voice(flags)
    done = command(flags, voice)
    if isinstance(done, int):
        return done
    voice.tell(done)
    return 0


def _train(flags: dict[str, Any], voice: Voice) -> Done | int:
    saved = Path(flags.get("output", "")) / "config.yaml"
    if flags.get("resume") and "output" in flags and flags.get("config") is None:
        if saved.is_file():
            flags["config"] = str(saved)  # `--resume --output RUN` says enough
        elif "forget" not in flags:
            raise UserError(f"`--resume`: {flags['output']} holds no run. Leave the flag out to start one.")
    config = build(TrainConfig, flags)
    again = f"fastunlearn train --resume --output {shlex.quote(config.output)}"
    if config.num_processes is not None and world_of_environment().size == 1 and not config.dry_run:
        return _train_in_processes(config, again, voice)
    from ..distributed import is_lost_peer
    from ..progress import Reporter
    from ..training.trainer import Interrupted
    from ..training.unlearn import unlearn

    world = world_of_environment()
    with voice.console(silent=not world.is_main) as console:
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
        plan = {"dry_run": True, "plan": console.told}
        return Done(lambda: plan, lambda: print("dry run: nothing was computed or written."))

    record, model = result.record, result.model
    assert record is not None

    def document() -> dict[str, Any]:
        from ..schema import read_evaluation

        path = result.folder / "evaluation.json"
        evaluation = read_evaluation(path).to_dict() if path.is_file() else None
        return {"output": config.output, "model": str(model), "run": record.to_dict(), "evaluation": evaluation}

    return Done(document, lambda: console.result(result.folder, model, record.ending))


def _train_in_processes(config: TrainConfig, again: str, voice: Voice) -> int:
    """Start ``--num-processes`` of this command, which see by their environment that they are already started."""
    import tempfile

    from ..config import to_yaml
    from ..distributed import launch

    assert config.num_processes is not None
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "config.yaml"
        settings.write_text(to_yaml(config), encoding="utf-8")
        failure = launch(["train", "--config", str(settings), *voice.flags()], config.num_processes)
    if failure is None:
        return 0
    if failure.status not in (1, 2):  # else the process has said it
        begun = (Path(config.output) / "config.yaml").is_file()
        _fail(f"{failure} Continue with: {again}" if begun else str(failure))
    return 1 if failure.status == 1 else 2


def _mask(flags: dict[str, Any], voice: Voice) -> Done | int:
    config = build(MaskConfig, flags)
    from ..training.saliency import mask

    with voice.console() as console:
        result = mask(config, console)
    said = f"mask: {config.output}, {result.total:,} elements of {len(result.names)} parameters (`train --mask`)"
    found = {"mask": config.output, "elements": result.total, "parameters": list(result.names)}
    return Done(lambda: found, lambda: print(said))


def _apply(flags: dict[str, Any], voice: Voice) -> Done | int:
    config = build(ApplyConfig, flags)
    from ..training.export import apply

    model = apply(config)
    said = f"model: {model}  (loads with diffusers.DiffusionPipeline.from_pretrained)"
    return Done(lambda: {"model": str(model)}, lambda: print(said))


def _export(flags: dict[str, Any], voice: Voice) -> Done | int:
    config = build(ExportConfig, flags)
    from ..training.formats import export_run

    file = export_run(config)
    found = {"format": config.format, "output": str(file)}
    return Done(lambda: found, lambda: print(f"{config.format}: {file}"))


def _evaluate(flags: dict[str, Any], voice: Voice) -> Done | int:
    begun = _begun("evaluate", flags)
    config = build(EvaluateConfig, flags)
    from ..evaluation.evaluate import evaluate

    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    with voice.console() as console:
        try:
            report = evaluate(**settings, reporter=console)
        except KeyboardInterrupt:
            console.close()
            return _stopped("evaluate", config.output, begun)
    if report.result is None:  # another process has the results
        return 0
    folder = Path(config.output)
    evaluations = [result.evaluation.to_dict() for result in report.results]
    document = {"output": config.output, "report": str(folder / "report.html"), "evaluations": evaluations}
    return Done(lambda: document, lambda: console.evaluated(report, folder))


def _attack(flags: dict[str, Any], voice: Voice) -> Done | int:
    begun = _begun("attack", flags)
    config = build(AttackConfig, flags)
    from ..attacks.attack import attack
    from .attacks import attack_table

    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    with voice.console() as console:
        try:
            report = attack(**settings, reporter=console)
        except KeyboardInterrupt:
            console.close()
            return _stopped("attack", config.output, begun)
    record, folder = report.record, Path(config.output)
    if record is not None:
        found = {"output": config.output, "report": str(folder / "report.html"), "attack": record.to_dict()}
        return Done(lambda: found, lambda: attack_table(record, folder))
    if not config.dry_run:  # another process has the results
        return 0
    plan = {"dry_run": True, "plan": console.told}
    return Done(lambda: plan, lambda: print("dry run: nothing was attacked or written."))


def _card(flags: dict[str, Any], voice: Voice) -> Done | int:
    config = build(CardConfig, flags)
    from ..evaluation.cards import card

    file = card(config)
    return Done(lambda: {"card": str(file)}, lambda: print(f"card: {file}"))


def _begun(command: str, flags: dict[str, Any]) -> Path:
    """Where a journal keeps the settings that it was begun with; `--resume --output FOLDER` says enough, then."""
    begun = Path(flags.get("output", "")) / "journal" / f"{command}.yaml"
    if flags.get("resume") and "output" in flags and flags.get("config") is None and begun.is_file():
        flags["config"] = str(begun)
    return begun


def _stopped(command: str, output: str, begun: Path) -> int:
    again = f"fastunlearn {command} --resume --output {shlex.quote(output)}"
    return _fail(f"stopped. Continue with: {again}" if begun.is_file() else "stopped; nothing was recorded yet.")


def _compare(flags: dict[str, Any], voice: Voice) -> Done | int:
    config = build(CompareConfig, flags)
    from ..evaluation.compare import compare_runs
    from .console import comparison_table

    found, folder = compare_runs(config), Path(config.output)

    def say() -> None:
        comparison_table(found)
        print(f"plot: {folder / 'compare.png'}, page: {folder / 'compare.html'}")

    return Done(lambda: {"output": config.output, "comparison": found.to_dict()}, say)


def _evaluate_images(flags: dict[str, Any], voice: Voice) -> Done | int:
    config = build(EvaluateImagesConfig, flags)
    from ..evaluation.evaluate_images import evaluate_image_folders
    from .console import images_table

    with voice.console() as console:
        found = evaluate_image_folders(config, console.comparing)

    def say() -> None:
        for folder, evaluation in found.items():
            images_table(evaluation, folder)

    evaluations = [{"output": str(folder), "evaluation": one.to_dict()} for folder, one in found.items()]
    return Done(lambda: {"output": config.output, "evaluations": evaluations}, say)


def _demo(flags: dict[str, Any], voice: Voice) -> Done | int:
    config = build(DemoConfig, flags)
    from ..reports.sentences import gap_sentence
    from ..training.trainer import Interrupted
    from .console import table
    from .demo import demo

    started = time.monotonic()
    with voice.console(plans=False) as console:
        try:
            found = demo(config, console)
        except Interrupted:
            raise KeyboardInterrupt from None  # a demo is too short to be continued
    seconds = time.monotonic() - started

    def say() -> None:
        table(found.evaluations)
        print(gap_sentence(found.comparison))
        print(f"{seconds:.0f} s in all. Open {Path(config.output) / 'report.html'} in a browser.")
        evaluation = found.evaluations[1]
        attack = ["attack", "--original", config.model, "--unlearned", str(Path(config.output) / evaluation.name)]
        if gold := _gold_of(config.model, evaluation.concept):
            attack += ["--gold", gold]
        print(f"Is it gone, also for somebody who looks for it? fastunlearn {shlex.join(attack)} --output attack")

    return Done(lambda: {"output": config.output, "demo": found.to_dict()}, say)


def _gold_of(model: str, concept: str | None) -> str | None:
    """The bundled model that never saw the concept, where there is one."""
    from ..worlds import world_with_model

    world = world_with_model(model)
    return world.golds.get(concept) if world is not None and concept is not None else None


def _methods(flags: dict[str, Any], voice: Voice) -> Done:
    from ..methods import all_methods
    from .methods import method_facts, method_page, methods_table

    if (name := flags.get("name")) is not None:
        return Done(lambda: method_facts(name), lambda: method_page(name))
    return Done(lambda: [method_facts(one) for one in all_methods()], methods_table)


def _judges(flags: dict[str, Any], voice: Voice) -> Done:
    from ..judges import all_judges
    from .judges import judge_facts, judge_page, judges_table

    if (name := flags.get("name")) is not None:
        return Done(lambda: judge_facts(name), lambda: judge_page(name))
    return Done(lambda: [judge_facts(one) for one in all_judges()], judges_table)


def _prompts(flags: dict[str, Any], voice: Voice) -> Done:
    config = build(PromptsConfig, flags)
    made = make_prompts(config)
    rows = [{"prompt": prompt, "group": group_of(kind), "kind": kind} for kind, prompt in made]

    def say() -> None:
        if config.output is None:
            for kind, prompt in made:
                print(f"{kind:9} {prompt}")
            return
        groups = ", ".join(dict.fromkeys(row["group"] for row in rows))
        print(f"prompts: {config.output}, {len(made)} in the groups {groups} (`--prompts`, `--forget-prompts`)")

    return Done(lambda: {"output": config.output, "prompts": rows}, say)


def _attacks(flags: dict[str, Any], voice: Voice) -> Done:
    from .attacks import attacks_facts, attacks_table

    return Done(attacks_facts, attacks_table)


def _info(flags: dict[str, Any], voice: Voice) -> Done:
    from .info import facts, say

    told = facts()
    return Done(lambda: told, lambda: say(told))


def _completion(flags: dict[str, Any], voice: Voice) -> int:
    from .completion import script

    print(script(flags["shell"], _parser()))
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
    width = min(shutil.get_terminal_size((110, 24)).columns, 110)

    def add(name: str, command: Command, help: str, kind: Any = None, examples: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=examples,
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
                prog, max_help_position=34 if width > 90 else 26, width=width
            ),
        )
        if kind is not None:
            add_flags(sub, kind)
        add_voice(sub, works=kind is not None)
        sub.set_defaults(command=command)
        return sub

    add("demo", _demo, "forget a concept of a bundled model in three ways and compare them", DemoConfig)
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
    add("card", _card, "write a run's model card, with its evaluation and an attack", CardConfig, _CARD_EXAMPLES)
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
    add("info", _info, "show versions, devices, what can run here, and what to install for what")
    completion = commands.add_parser(
        "completion",
        help="print what completes commands and flags in a shell",
        epilog=_COMPLETION_EXAMPLES,
        description="Print what completes commands and flags in a shell.",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    completion.add_argument("shell", choices=SHELLS, help="which shell")
    completion.set_defaults(command=_completion)
    return parser


class _Parser(argparse.ArgumentParser):
    """Errors in one line, with the name that was probably meant."""

    def error(self, message: str) -> NoReturn:
        sys.exit(_fail(f"{message.rstrip('.?')}{'?' if message.endswith('?') else '.'} See `{self.prog} --help`."))

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            # What a command was given and does not know comes back to the first parser, which asks it.
            parsers = commands_of(self)
            command = parsers.get(next((word for word in args or () if word in parsers), ""), self)
            flags = [flag for action in command._actions for flag in action.option_strings]
            meant = "".join(did_you_mean(word.partition("=")[0], flags) for word in unknown[:1] if word[:2] == "--")
            command.error(f"unrecognized arguments: {' '.join(unknown)}.{meant}")
        return known

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            meant = did_you_mean(str(value), action.choices or ())
            raise argparse.ArgumentError(action, f"{error.message}.{meant}") from None


def _fail(message: str) -> int:
    try:
        world = world_of_environment()
    except UserError:
        world = ALONE  # the message is about it
    if not world.is_main and not message.startswith("process "):
        if world.store is not None and not has_joined():
            return 2  # all processes that we started make the same checks: the first one tells
        message = f"process {world.rank}: {message}"
    line = f"fastunlearn: {' '.join(message.split())}"
    if sys.stderr.isatty():  # a terminal would break it within a word
        columns = max(40, shutil.get_terminal_size().columns)
        line = textwrap.fill(line, columns, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    print(line, file=sys.stderr)
    return 2
