"""README and docs: links lead somewhere, commands parse, code compiles, some of it runs, and nothing is left unsaid."""

import ast
import dataclasses
import functools
import importlib
import inspect
import posixpath
import re
import shlex
import sys

import docs_pages
import pytest
from docs_pages import FILES, ROOT, commands, explained, filled, keys_table, our_methods, pages

from fastunlearn.attacks import parse_attacks
from fastunlearn.attacks.config import AttackConfig
from fastunlearn.cli.demo import DemoConfig
from fastunlearn.cli.flags import build
from fastunlearn.cli.main import _parser, main
from fastunlearn.cli.prompts import PromptsConfig
from fastunlearn.evaluation.config import CompareConfig, EvaluateConfig, EvaluateImagesConfig
from fastunlearn.judges import all_judges
from fastunlearn.methods import all_methods, get_method
from fastunlearn.metrics.base import all_metrics
from fastunlearn.metrics.distances import all_distances
from fastunlearn.training.config import ApplyConfig, ExportConfig, MaskConfig, TrainConfig

CONFIGS = {
    "train": TrainConfig,
    "mask": MaskConfig,
    "apply": ApplyConfig,
    "export": ExportConfig,
    "evaluate": EvaluateConfig,
    "evaluate-images": EvaluateImagesConfig,
    "attack": AttackConfig,
    "compare": CompareConfig,
    "prompts": PromptsConfig,
    "demo": DemoConfig,
}
#: Flags that prose names and that are of other programs: torchrun, deepspeed, diffusers' and the authors' scripts.
FOREIGN = {"--erase_from", "--editable", "--local_rank"}
RUNNABLE = "<!-- runnable -->"
#: A line that starts the program: by itself, by a launcher, or within `<(...)`. A shell's > or ) ends it.
PROGRAM = re.compile(r"(?:^|-m |--module |<\()(?:[\w./-]*/)?fastunlearn ([^)>]+)")

COMMITTED = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
SITE = {name: filled(text) for name, text in COMMITTED.items()} | pages()


@dataclasses.dataclass(frozen=True)
class Block:
    """A code block: its page, its language ("" for an indented one), its text, and whether a test runs it."""

    page: str
    line: int
    language: str
    text: str
    runs: bool

    def __str__(self):
        return f"{self.page}:{self.line}"


def blocks_of(page, text):
    """The code blocks of a page: fenced ones, and indented ones after an empty line."""
    lines = text.split("\n")
    result, index, marked = [], 0, False
    while index < len(lines):
        line = lines[index]
        if line.strip() == RUNNABLE:
            marked = True
        elif line.startswith("```"):
            end = next(i for i in range(index + 1, len(lines)) if lines[i].startswith("```"))
            result.append(Block(page, index + 1, line[3:], "\n".join(lines[index + 1 : end]), marked))
            index, marked = end, False
        elif line.startswith("    ") and (not index or not lines[index - 1].strip()):
            end = index
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            result.append(Block(page, index + 1, "", "\n".join(one[4:] for one in lines[index:end]), marked))
            index, marked = end - 1, False
        elif line.strip():
            marked = False
        index += 1
    return result


def prose_of(text):
    """A page without its code blocks."""
    kept, fenced = [], False
    for line in text.split("\n"):
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith("    "):
            kept.append(line)
    return "\n".join(kept)


def commands_in(block):
    """The words of every `fastunlearn` command line of a block, behind the program's name."""
    for line in block.text.replace("\\\n", " ").split("\n"):
        if match := PROGRAM.search(line):
            yield shlex.split(match[1], comments=True)


BLOCKS = [block for page, text in SITE.items() for block in blocks_of(page, text)]
COMMANDS = [(str(block), words) for block in BLOCKS if block.language in ("", "sh") for words in commands_in(block)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
#: The landing page is the README, which has no marks: what it shows is run from the quickstart.
RUNNING = [block for block in BLOCKS if block.runs]


def test_the_reading_of_pages_sees_what_is_there():
    """Else the tests below could pass by seeing nothing."""
    assert len(COMMANDS) > 100
    assert {words[0] for _, words in COMMANDS} >= CONFIGS.keys()
    assert len(PYTHON) >= 6
    assert {block.page for block in RUNNING} >= {"quickstart.md", "kernels.md", "faq.md"}
    assert any(words[:2] == ["methods", "esd"] for _, words in COMMANDS)
    yaml = Block(
        "x.md", 1, "", "name: fastunlearn\ntorchrun -m fastunlearn train --forget x > log\nbin/fastunlearn info", False
    )
    assert list(commands_in(yaml)) == [["train", "--forget", "x"], ["info"]]
    sample = blocks_of("x.md", "a\n\n    one\n\n    two\n\nb\n    no block\n\n```python\nthree\n```\n")
    assert [(block.language, block.text.strip()) for block in sample] == [("", "one\n\ntwo"), ("python", "three")]


# ---- README ----------------------------------------------------------------------------------------------------------


def test_the_readme_is_short_and_names_its_limits():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 130
    assert all(f"`{method.name}`" in text for method in our_methods())
    for words in ("No real weights", "no GPU figures", "reconstructions", "blind to hue", "Forgotten is not gone"):
        assert words in text


# ---- links -----------------------------------------------------------------------------------------------------------


def anchors_of(text):
    """The anchors of a page's headings, as Python-Markdown makes them."""
    result = set()
    for line in prose_of(text).split("\n"):
        if match := re.match(r"#+ (.*)", line):
            words = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", match[1])
            anchor = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", words).strip().lower())
            result.add(anchor if anchor not in result else f"{anchor}_1")
    return result


def links_of(text):
    return [(match[1], match[2] or "") for match in re.finditer(r"\]\(([^)#\s]*)(#[^)\s]*)?\)", prose_of(text))]


@pytest.mark.parametrize("page", SITE)
def test_links_of_the_site_lead_somewhere(page):
    for target, anchor in links_of(SITE[page]):
        if re.match(r"https?:", target):
            continue
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target)) if target else page
        assert path in SITE or (ROOT / "docs" / path).is_file(), f"{page}: {target}"
        if anchor and path in SITE:
            assert anchor[1:] in anchors_of(SITE[path]), f"{page}: {target}{anchor}"


@pytest.mark.parametrize("path", ["README.md", "SECURITY.md", *(f"docs/{name}" for name in COMMITTED)])
def test_links_lead_somewhere_in_the_repository_too(path):
    """But for pages that are made when the site is built."""
    made = {f"docs/{name}" for name in pages()}
    for target, _ in links_of((ROOT / path).read_text(encoding="utf-8")):
        if target and not re.match(r"https?:", target):
            name = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
            assert (ROOT / name).exists() or name in made, f"{path}: {target}"


# ---- commands --------------------------------------------------------------------------------------------------------


parser = functools.cache(_parser)


def parsed(words):
    """The flags of a command line, by the real parser; ``...`` stands for others, and N for a number."""
    return vars(parser().parse_args(["2" if word == "N" else word for word in words if word != "..."]))


@pytest.mark.parametrize(("where", "words"), COMMANDS, ids=[f"{where} {words[0]}" for where, words in COMMANDS])
def test_every_command_of_the_docs_is_one(where, words):
    flags = parsed(words)
    flags.pop("command")
    if words[0] not in CONFIGS:
        names = {"methods": all_methods(), "judges": all_judges()}.get(words[0], {})
        assert flags.get("name") in (None, *names), where
        return
    if "..." in words or "config" in flags or flags.get("resume"):
        return
    config = build(CONFIGS[words[0]], flags)
    if method := flags.get("method"):
        found = get_method(method)
        found.with_options(found.defaults_for("stable-diffusion"), config.options)
        assert found.anchor != "none" or config.anchor is None, where
    if judge := flags.get("judge"):
        assert judge.partition(":")[0] in all_judges(), where
    if attacks := flags.get("attacks"):
        parse_attacks(attacks)
    if metrics := flags.get("metrics"):
        assert set(metrics.split(",")) <= all_metrics().keys(), where
    if metric := flags.get("metric"):
        assert metric in all_distances(), where


def test_commands_within_sentences_are_commands_too():
    seen = 0
    for text in SITE.values():
        for words in re.findall(r"`fastunlearn ([a-z][^`]*)`", prose_of(text)):
            parsed(shlex.split(words.replace("\\|", "|")))
            seen += 1
    assert seen > 20


def test_every_flag_that_the_prose_names_exists():
    known = {flag for one in commands().values() for flag in one._option_string_actions} | FOREIGN
    known |= set(parser()._option_string_actions)
    for page, text in SITE.items():
        for code in re.findall(r"`([^`]+)`", prose_of(text)):
            if not re.match(r"(pip|make|python|torchrun|deepspeed|chromium) ", code):
                unknown = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code)) - known
                assert not unknown, f"{page}: {unknown}"


def test_every_flag_is_listed():
    text = SITE["commands.md"]
    for name, one in commands().items():
        section = text.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        assert all(
            f"`{flag}" in section for flag in one._option_string_actions if flag.startswith("--") and flag != "--help"
        )


# ---- Python ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_of_the_docs_compiles_and_names_what_exists(block):
    tree = ast.parse(block.text)
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] in ("fastunlearn", "fastunlearn_kernels"):
            module = importlib.import_module(node.module)
            names |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
            accepted = inspect.signature(names[node.func.id]).parameters
            known = set(accepted)
            if node.func.id == "unlearn":
                known |= {field.name for field in dataclasses.fields(TrainConfig)}
            unknown = {word.arg for word in node.keywords} - known
            assert not unknown, f"{block}: {node.func.id} has no {unknown}"
            assert any(p.kind is p.VAR_POSITIONAL for p in accepted.values()) or len(node.args) <= len(accepted)


@pytest.mark.slow
@pytest.mark.parametrize("page", dict.fromkeys(block.page for block in RUNNING))
def test_what_is_marked_runs(page, tmp_path, monkeypatch):
    """The marked blocks of a page one after the other, in an empty folder, on the bundled model."""
    monkeypatch.chdir(tmp_path)
    for block in RUNNING:
        if block.page != page:
            continue
        if block.language == "python":
            exec(compile(block.text, str(block), "exec"), {})
        else:
            ours = list(commands_in(block))
            assert ours, f"{block} runs nothing"
            for words in ours:
                assert main(words) == 0, f"{block}: {words}"


# ---- what code writes ------------------------------------------------------------------------------------------------


def parts_of_files():
    parts = []
    for _, kind in FILES:
        keys_table(kind, parts)
    for part in parts:
        keys_table(part, parts)
    return [*(kind for _, kind in FILES), *parts]


@pytest.mark.parametrize("kind", parts_of_files(), ids=lambda kind: kind.__name__)
def test_every_key_of_every_file_is_explained(kind):
    unsaid = [field.name for field in dataclasses.fields(kind) if field.name not in explained(kind)]
    assert not unsaid
    assert all(text.strip(" .") for text in explained(kind).values())


def test_what_every_file_begins_with_is_said():
    assert "Each file begins with ``schema``, ``kind``" in SITE["files.md"]


def test_an_attack_on_a_method_alone_leaves_the_others_unmeasured(monkeypatch):
    attack = {"broken": 3, "n_prompts": 16}
    part = {"concept": "cat", "models": {"uce": {"attacks": {"seeds": attack}}, "gold": {"attacks": {}}}}
    found = {"attacks": {"worlds": {"gallery": {"cat": part}}}}
    monkeypatch.setattr(docs_pages, "results", found.get)
    assert "| `seeds` | 3 of 16 | not measured | not measured |" in docs_pages.measured_lines("uce")


def test_every_method_has_a_page_that_says_what_is_measured():
    for method in our_methods():
        page = SITE[f"methods/{method.name}.md"]
        assert f"## Measured\n\n{(docs_pages.measured_lines(method.name) or ['Not measured yet'])[0]}" in page
        assert all(f"| `{field.name}` |" in page for field in dataclasses.fields(method.options or _NoOptions))
    assert "the demonstration" in SITE["methods/esd.md"]
    assert "| heart |" in SITE["methods/uce.md"]


@dataclasses.dataclass
class _NoOptions:
    pass


@pytest.mark.slow
def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("mkdocs", reason="the site is built with `pip install '.[docs]'`")
    import subprocess

    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    built = {path.relative_to(tmp_path).with_suffix(".md").as_posix() for path in tmp_path.rglob("*.html")}
    assert built >= SITE.keys()
    loaded = re.compile(r"<(?:script|link|img|iframe|source)[^>]*\s(?:src|href)=\"?(?:https?:)?//[^\s\">]+")
    for path in tmp_path.rglob("*.html"):
        assert not loaded.findall(path.read_text(encoding="utf-8")), path
