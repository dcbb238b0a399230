"""What completes commands and flags in a shell: made from the parser itself, by shtab."""

from __future__ import annotations

import argparse

SHELLS = ("bash", "zsh", "fish")


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """The script for ``shell``.  Flags that take one of a few values complete those, and files complete as files."""
    import shtab

    from ..methods import all_methods

    for command in commands_of(parser).values():
        for action in command._actions:
            if action.dest == "method" and action.choices is None:
                action.choices = list(all_methods())
            elif action.metavar in _FILES and action.choices is None:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    return shtab.complete(parser, shell)


#: What a flag that takes a file or a folder is called in the help, by the last word of its name.
_FILES = {
    "YAML",
    "OUTPUT",
    "MODEL",
    "ORIGINAL",
    "UNLEARNED",
    "PLACEBO",
    "GOLD",
    "PROMPTS",
    "MASK",
    "LORA",
    "DELTA",
    "RUN",
}


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser of every command, by its name; none of a parser that is a command's."""
    kinds = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return {name: command for action in kinds for name, command in action.choices.items()}
