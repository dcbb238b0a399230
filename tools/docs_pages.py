"""The pages of the docs that code writes: a hook of mkdocs, which adds them when the site is built.

They are the first page, which is the README; a page for each method; every command and flag; every key of every result
file; security and changelog.  :func:`pages` gives all of them, and :func:`filled` the committed pages as the site shows
them, so that tests read what readers do.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import json
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels" / "torch-ext")]

from fastunlearn import record, schema  # noqa: E402
from fastunlearn.cli.main import _parser  # noqa: E402
from fastunlearn.config import type_name  # noqa: E402
from fastunlearn.methods import Method, all_methods  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
#: Files outside of docs/ that have a page in the site.
MOVED = {
    "README.md": "index.md",
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
KEYS_MARK = "<!-- every key -->"


# ---- mkdocs ----------------------------------------------------------------------------------------------------------


def on_config(config: Any) -> Any:
    """Every page that code writes is in the navigation."""
    for entry in config.nav:
        if "Methods" in entry:
            entry["Methods"] = ["methods/index.md", *(f"methods/{method.name}.md" for method in our_methods())]
    for title in ("Contributing", "Changelog"):
        if (ROOT / f"{title.upper()}.md").is_file():
            config.nav.append({title: f"{title.lower()}.md"})
    return config


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    return filled(markdown)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """The roles of docstrings, which Markdown does not know, lose their names."""
    return re.sub(r":(?:func|class|meth|mod|data|attr):<code>~?(?:[\w.]*\.)?(\w+)</code>", r"<code>\1</code>", html)


# ---- all pages -------------------------------------------------------------------------------------------------------


def pages() -> dict[str, str]:
    """Path in the site -> Markdown, of every page that code writes."""
    result = {MOVED[name]: moved(ROOT / name) for name in MOVED if (ROOT / name).is_file()}
    result["methods/index.md"] = methods_index()
    result |= {f"methods/{method.name}.md": method_page(method) for method in our_methods()}
    result["commands.md"] = commands_page()
    return result


def filled(text: str) -> str:
    """A committed page as the site shows it: links that leave docs/ go to their pages, and the keys are listed."""
    for name, path in MOVED.items():
        text = text.replace(f"](../{name}", f"]({path}")
    return text.replace(KEYS_MARK, keys_section()) if KEYS_MARK in text else text


def moved(path: Path) -> str:
    """A file of the repository's root as a page: links into docs/ are shortened, and links to sources are no links."""

    def link(match: re.Match[str]) -> str:
        words, target = match[1], match[2]
        name = target.partition("#")[0]
        if re.match(r"https?:", target) or not name:
            return match[0]
        if target.startswith("docs/"):
            return f"{words}({target.removeprefix('docs/')})"
        if name in MOVED:
            return f"{words}({MOVED[name]}{target[len(name) :]})"
        return words.strip("[]")

    return re.sub(r"(!?\[[^\]]*\])\(([^)]+)\)", link, path.read_text(encoding="utf-8"))


# ---- methods ---------------------------------------------------------------------------------------------------------


def our_methods() -> list[Method]:
    """The methods of this package, without those that installed packages add."""
    return [method for method in all_methods().values() if method.recipe.__module__.startswith("fastunlearn.methods.")]


def methods_index() -> str:
    lines = [
        "# Methods",
        "",
        "`fastunlearn methods` lists them, `fastunlearn methods NAME` shows one. All go with every family of models, "
        "[masks and adapters](../adapters.md) and [several concepts](../concepts.md). Edits in closed form train "
        "nothing.",
        "",
        "| method | what it does | needs | anchor | measured |",
        "|---|---|---|---|---|",
    ]
    for method in our_methods():
        measured = "yes" if measured_lines(method.name) else "not yet"
        summary = f"control: {method.summary}" if method.is_control else method.summary
        link = f"[`{method.name}`]({method.name}.md)"
        lines.append(f"| {link} | {summary} | {method.needs} | {method.anchor} | {measured} |")
    lines += ["", "Measured on the bundled model: [all figures](../results.md)."]
    lines += ["A method of your own is one file: [extending](../extend.md)."]
    return "\n".join(lines) + "\n"


ANCHORS = {
    "none": "takes none",
    "optional": "taken if given",
    "needed": "needed; where none is given nothing takes the concept's place, or its neighbor in the bundled model",
}


def method_page(method: Method) -> str:
    """A method: its source and equation, options, defaults, and what was measured."""
    paper = re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", method.paper)
    lines = [f"# {method.name}", "", f"{method.summary[0].upper()}{method.summary[1:]}.", ""]
    if method.is_reconstruction:
        lines += [
            "!!! warning",
            "    A reconstruction: the paper's full text was not available. Below stands what is ours.",
            "",
        ]
    lines += [f"- source: {paper}", f"- needs: {method.needs}", f"- anchor: {ANCHORS[method.anchor]}"]
    if method.adapter_rank:
        lines.append(
            f"- trains [adapters](../adapters.md) of rank {method.adapter_rank}; `--adapter none`: whole weights"
        )
    lines.append("")
    lines += [
        "On the bundled model:",
        "",
        f"    {example(method)}",
        "",
        "## How it works",
        "",
        markdown_of(method.about),
        "",
    ]
    lines += ["## Options of its own", ""]
    if method.options is None:
        lines.append("It has none.")
    else:
        lines += ["`--set NAME=VALUE`, a map `options:` in YAML, or a keyword of `unlearn`.", ""]
        lines += ["| option | type | default | what |", "|---|---|---|---|"]
        for field in dataclasses.fields(method.options):
            default = "" if field.default == "" else f"`{field.default}`"
            kind = cell(f"{type_name(method.options, field.name)}{limits(field)}")
            lines.append(f"| `{field.name}` | {kind} | {default} | {field.metadata.get('help', '')} |")
    lines += ["", "## Defaults", "", *defaults_lines(method), "", "## Measured", ""]
    lines += measured_lines(method.name) or ["Not measured yet; `python benchmarks/leaderboard.py` measures it."]
    return "\n".join(lines) + "\n"


def example(method: Method) -> str:
    """A command that runs on the bundled model; of a method that needs files, with names for them."""
    fields = dataclasses.fields(method.options) if method.options else ()
    folders = [field.name for field in fields if field.metadata.get("path")]
    options = "".join(f" --set {name}={name.removesuffix('_folder')}s" for name in folders)
    return f"fastunlearn train --forget star --method {method.name}{options} --output run"


def markdown_of(docstring: str) -> str:
    """A docstring as Markdown: roles lose their names, and the first line is set off."""
    first, _, rest = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", docstring).partition("\n")
    return f"**{first}**\n{rest}"


def limits(field: dataclasses.Field[Any]) -> str:
    signs = {"above": ">", "at_least": "≥", "at_most": "≤"}
    return "".join(f" {sign} {field.metadata[name]:g}" for name, sign in signs.items() if name in field.metadata)


#: Settings that nothing which trains no step reads.
_OF_TRAINING = (
    *("steps", "learning_rate", "micro_batch_size", "trajectories", "trajectory_steps"),
    *("lr_scheduler", "stop_residual"),
)


def defaults_lines(method: Method) -> list[str]:
    """Settings down, families across."""
    columns = {}
    for key in method.defaults:
        values = dataclasses.asdict(method.defaults_for(key))
        columns[key] = values | (values.pop("options") or {})
    titles = {"shapes": "the bundled model", "stable-diffusion": "all other models"}
    lines = [f"| | {' | '.join(titles.get(key, key) for key in columns)} |", "|---|" + "---|" * len(columns)]
    is_edit = all(column["steps"] == 0 for column in columns.values())
    for name in next(iter(columns.values())):
        if is_edit and name in _OF_TRAINING:
            continue
        values = [column[name] for column in columns.values()]
        if any(value not in (None, "") for value in values):
            lines.append(f"| `{name}` | {' | '.join('' if value is None else str(value) for value in values)} |")
    return lines


def measured_lines(name: str) -> list[str]:
    """What the results files say of a method; nothing where it was not measured."""
    lines: list[str] = []
    demo, edits, board, attacks = map(results, ("demo", "edits", "leaderboard", "attacks"))
    for one in demo["evaluations"] if demo else ():
        if one["method"] == name:
            low, high = one["integrity"]["retention_ci95"]
            lines += [
                f"In [the demonstration](../results.md#the-demonstration), which forgets {one['concept']}: shown in "
                f"{one['erasure']['shown']:.1%} of the images asked for with it (before: "
                f"{one['erasure']['shown_original']:.1%}), {one['erasure']['valid']:.1%} of them valid; R "
                f"{one['integrity']['retention']:.3f} (95 % interval {low:.3f} to {high:.3f}).",
                "",
            ]
    if edits and name in edits["summary"]:
        lines += ["On concepts that its defaults were not chosen on ([all edits](../edits.md)):", ""]
        lines += ["| concept | shown | shown before | valid | R (95 % interval) |", "|---|---|---|---|---|"]
        for concept, one in edits["concepts"].items():
            row = one["methods"][name]
            low, high = row["retention_ci95"]
            shares = " | ".join(f"{row[key]:.1%}" for key in ("shown", "shown_original", "valid"))
            lines.append(f"| {concept} | {shares} | {row['retention']:.3f} ({low:.3f} to {high:.3f}) |")
        lines.append("")
    attacked = attacks["worlds"].items() if attacks else ()
    for world, part in [(world, part) for world, concepts in attacked for part in concepts.values()]:
        if name not in part["models"]:
            continue
        lines += [
            f"Attacked for {part['concept']} of `{world}`, one training, one seed ([all models](../attacks.md)): "
            "prompts broken, of this model, of the original, and of a model that never saw it:",
            "",
            "| attack | this model | original | gold |",
            "|---|---|---|---|",
        ]
        for attack in part["models"][name]["attacks"]:
            sides = [part["models"].get(model, {"attacks": {}})["attacks"] for model in (name, "original", "gold")]
            found = [side.get(attack) for side in sides]
            shares = " | ".join(f"{one['broken']} of {one['n_prompts']}" if one else "not measured" for one in found)
            lines.append(f"| `{attack}` | {shares} |")
        lines.append("")
    for world, part in board["worlds"].items() if board else ():
        cells = [one for one in part["cells"] if one["method"] == name]
        if not cells:
            continue
        lines += [
            f"Concepts of `{world}` ([all methods](../results.md#every-method-on-every-concept)); a star marks those "
            "that defaults were chosen on:",
            "",
            "| concept | seed | shown | shown before | valid | R (95 % interval) | s |",
            "|---|---|---|---|---|---|---|",
        ]
        for one in cells:
            low, high = one["retention_ci95"]
            star = "*" * (one["concept"] in part["chosen_on"])
            shares = " | ".join(f"{one[key]:.1%}" for key in ("shown", "shown_original", "valid"))
            lines.append(
                f"| {one['concept']}{star} | {one['seed']} | {shares} | {one['retention']:.3f} ({low:.3f} to "
                f"{high:.3f}) | {one['seconds']:.0f} |"
            )
        lines.append("")
    return lines


@functools.cache
def results(name: str) -> Any:
    """The content of a results file; None where there is none yet."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


# ---- commands --------------------------------------------------------------------------------------------------------


def commands() -> dict[str, argparse.ArgumentParser]:
    """Every command by name, of the real parser."""
    (choices,) = (action.choices for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(choices)


def commands_page() -> str:
    lines = [
        "# Every command and flag",
        "",
        "Flags are the names of the settings; `--config FILE` takes the same names in YAML, and flags win over it. "
        "Exit status: 0 done, 2 a mistake that one line explains, 1 a bug of ours.",
    ]
    for name, parser in commands().items():
        lines += ["", f"## {name}", "", str(parser.description), ""]
        actions = [one for one in parser._actions if not isinstance(one, argparse._HelpAction)]
        if actions:
            lines += ["| flag | what |", "|---|---|"]
        for action in actions:
            words = ", ".join(action.option_strings) or action.dest.upper()
            value = f"{{{','.join(map(str, action.choices))}}}" if action.choices else str(action.metavar or "")
            told = f"{words} {value}".strip() if action.option_strings and action.nargs != 0 else words
            text = (action.help or "").replace("%%", "%").replace("<", "&lt;")
            lines.append(f"| `{told}` | {cell(text)} |")
        if parser.epilog:
            lines += ["", *(f"    {line.removeprefix('  ')}" for line in parser.epilog.splitlines()[1:])]
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    """A text that may stand in a table's cell."""
    return text.replace("|", "\\|")


# ---- keys ------------------------------------------------------------------------------------------------------------

FILES: tuple[tuple[str, type[record.Record]], ...] = (
    ("evaluation.json, of `evaluate`", schema.Evaluation),
    ("evaluation.json, of `evaluate-images`", schema.FoldersEvaluation),
    ("attack.json", schema.AttackRecord),
    ("run.json", schema.RunRecord),
    ("compare.json", schema.Comparison),
    ("demo.json", schema.Demo),
)
_EXPLAINED = re.compile(r"((?:``\w+``,\s+)*``\w+``):\s")


def keys_section() -> str:
    """Every result file, and after them the parts that they are made of."""
    lines = [inspect.cleandoc(record.__doc__ or "").split("\n\n")[1], ""]  # what every file begins with
    parts: list[type] = []
    for title, kind in FILES:
        lines += [f"## {title}", "", *about(kind), *keys_table(kind, parts), ""]
    lines += ["## Parts", ""]
    for part in parts:  # grows while it is read
        lines += [f"### {words_of(part)}", "", *about(part), *keys_table(part, parts), ""]
    return "\n".join(lines)


def about(kind: type) -> list[str]:
    """A class's docstring as far as it explains no single key."""
    text = " ".join(_EXPLAINED.split(docstring(kind))[0].split())
    return [text.replace("None", "null"), ""] if text else []


def docstring(kind: type) -> str:
    """What a class says of itself; nothing where dataclasses wrote its signature in that place."""
    text = inspect.cleandoc(vars(kind).get("__doc__") or "")
    return "" if text.startswith(f"{kind.__name__}(") else text


def explained(kind: type) -> dict[str, str]:
    """Key -> what is said of it by its class, by those that this inherits from, or by the module of keys that recur.

    An interval is that of the key before it, and ``x_original`` is x of the original.
    """
    result: dict[str, str] = {}
    for text in (*map(docstring, kind.__mro__), inspect.cleandoc(schema.__doc__ or "")):
        _, *rest = _EXPLAINED.split(text)
        for names, said in zip(rest[::2], rest[1::2], strict=True):
            for name in re.findall(r"``(\w+)``", names):
                result.setdefault(name, " ".join(said.split()).replace("None", "null").rstrip(" .;,"))
    for field in dataclasses.fields(kind):
        subject = field.name.removesuffix("_ci95").removesuffix("ci95")
        if subject != field.name:
            result[field.name] = f"interval of `{subject}`" if subject else "interval of the number before it"
        elif field.name.endswith("_original"):
            result.setdefault(field.name, f"`{field.name.removesuffix('_original')}` of the original's images")
    return result


def keys_table(kind: type, parts: list[type]) -> list[str]:
    """A row for each key; parts that it is made of are added to ``parts``."""
    hints = typing.get_type_hints(kind, include_extras=True)
    told = explained(kind)
    lines = ["| key | what it holds | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(kind):
        holds = holding(hints[field.name], parts)
        if field.metadata.get("omit"):
            holds = f"{holds.removesuffix(', or null')}; absent where there is none"
        lines.append(f"| `{field.name}` | {holds} | {cell(told.get(field.name, ''))} |")
    return lines


def holding(hint: Any, parts: list[type]) -> str:
    """What a key of this type holds, in words."""
    simple = {float: "number", int: "whole number", str: "text", bool: "true or false", Any: "anything"}
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint == record.Share:
        return "share, from 0 to 1"
    if hint in (schema.Interval, schema.Shares):
        return "[low, high]"
    if origin in (types.UnionType, typing.Union):
        (one,) = (part for part in inner if part is not type(None))
        return f"{holding(one, parts)}, or null"
    if origin is tuple:
        return f"list of {holding(inner[0], parts)}"
    if origin is dict:
        return f"by name: {holding(inner[1], parts)}"
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        if hint is schema.Evaluation:
            return "[as in evaluation.json](#evaluationjson-of-evaluate)"
        if hint not in parts:
            parts.append(hint)
        return f"[{words_of(hint)}](#{words_of(hint).replace(' ', '-')})"
    return simple[hint]


def words_of(kind: type) -> str:
    """``ControlRecord`` -> ``control``; ``ComparedPair`` -> ``compared pair``."""
    name = kind.__name__.removesuffix("Record")
    return re.sub(r"(?<!^)(?=[A-Z])", " ", name).lower()
