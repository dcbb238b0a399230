"""Turns what the user says about a concept into prompts: to forget, to keep, and what takes the concept's place."""

from __future__ import annotations

import dataclasses
import functools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from .concepts import Finder, title
from .errors import UserError
from .files.prompt_files import SUFFIXES, PromptRow, is_forget, read_prompt_file


@dataclasses.dataclass(frozen=True)
class PromptList:
    """Prompts, each once, in order.

    ``grouped``: (prompt, group).  ``seeds``: a prompt's seeds, where the file gives them.  ``kinds``: its kind, such as
    ``misspelt``, where the file gives one.  ``notes``: what of the file was read how, for people.
    """

    grouped: list[tuple[str, str]]
    seeds: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    kinds: Mapping[str, str] = dataclasses.field(default_factory=dict)


def read_prompts(value: str, concept: str | Sequence[str] | None = None) -> PromptList:
    """``FILE`` (see :mod:`.files.prompt_files`) or ``TEXT;TEXT``.  A prompt without a group is of ``retain``.

    The prompt may be empty in the group ``empty``: what a model generates without being asked for anything.
    ``concept``: whose prompts, one concept's or several's, to take from a file that has them for many.

    Raises UserError for a file that cannot be read, or is not there, and where there is no prompt.
    """
    if not _names_a_file(value):
        return _once([PromptRow(text) for text in value.split(";")], value, ())
    path = Path(value).expanduser()
    table = read_prompt_file(path)
    return _once(_of_concept(table.rows, value, concept), value, tuple(table.notes))


def _of_concept(rows: Sequence[PromptRow], value: str, concept: str | Sequence[str] | None) -> Sequence[PromptRow]:
    """The rows for the concepts, where rows say for which they are; else all."""
    if not any(row.concept for row in rows):
        return rows

    def plain(name: str) -> str:  # such files write andy-warhol and baseballbat
        return re.sub(r"[\W_]+", "", name).casefold()

    wanted_names = {plain(one) for one in ([concept] if isinstance(concept, str) else concept or ())}
    if mine := [row for row in rows if plain(row.concept) in wanted_names]:
        return mine
    names = list(dict.fromkeys(row.concept for row in rows))
    told = concept if isinstance(concept, str) else title(concept or ())
    wanted = f"{told!r} is none of them" if told else "say which"
    raise UserError(f"{value!r} holds prompts for {len(names)} concepts, {', '.join(names[:4])}, ...: {wanted}.")


def parse_prompts(value: str, *, to_forget: bool = False, concept: str | Sequence[str] | None = None) -> list[str]:
    """The prompts of :func:`read_prompts`.

    Where some of them are of a group to forget and others are not, only those that ``to_forget`` says, so that one
    file can hold both.
    """
    grouped = read_prompts(value, concept).grouped
    wanted = [prompt for prompt, group in grouped if is_forget(group) == to_forget]
    is_mixed = 0 < sum(is_forget(group) for _, group in grouped) < len(grouped)
    return wanted if is_mixed else [prompt for prompt, _ in grouped]


def from_anywhere(value: str) -> str:
    """``FILE`` with its whole path, so that it means the same in any working folder; other texts as they are."""
    return str(Path(value).expanduser().resolve()) if _names_a_file(value) else value


def parse_grouped_prompts(value: str) -> list[tuple[str, str]]:
    """The (prompt, group) of :func:`read_prompts`."""
    return read_prompts(value).grouped


def check_grouped_prompts(given: Sequence[str] | Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Prompts, or (prompt, group), given as a list: each prompt once, its group ``retain`` unless it says another."""
    rows = []
    for item in given:
        prompt, group = (item, "retain") if isinstance(item, str) else item
        if not isinstance(prompt, str) or not isinstance(group, str):
            raise UserError(f"a prompt is a text or a pair of texts (prompt, group), got {item!r}.")
        rows.append(PromptRow(prompt, group))
    return _once(rows, "the list", ()).grouped


def _once(rows: Sequence[PromptRow], value: str, notes: tuple[str, ...]) -> PromptList:
    """Without spaces around, without rows that hold no prompt, and without repeats, which are told."""
    groups: dict[str, str] = {}
    keys: list[tuple[str, int | None]] = []
    kinds: dict[str, str] = {}
    for row in rows:
        prompt, group = row.prompt.strip(), row.group.strip().lower() or "retain"
        # A row without a prompt is none, but where it says that it is meant.
        if _is_blank(prompt):
            if group != "empty":
                continue
            prompt = ""
        if groups.setdefault(prompt, group) != group:
            raise UserError(f"the prompt {prompt!r} is in two groups, {groups[prompt]!r} and {group!r}. Keep one.")
        keys.append((prompt, row.seed))
        if row.kind:
            kinds.setdefault(prompt, row.kind)
    if not groups:
        raise UserError(f"{value!r} holds no prompt. Give a file with one prompt a line, or TEXT;TEXT.")
    seeds: dict[str, tuple[int, ...]] = {}
    for prompt, seed in dict.fromkeys(keys):
        if seed is not None:
            seeds[prompt] = (*seeds.get(prompt, ()), seed)
    if unsaid := [prompt for prompt, seed in keys if seed is None and seeds]:
        raise UserError(f"{value!r} gives seeds for some rows and none for {unsaid[0]!r}. Give all of them seeds.")
    if repeats := len(keys) - len(set(keys)):
        notes = (*notes, f"{value}: {repeats} of {len(keys)} rows repeat another and count once.")
    return PromptList(list(groups.items()), seeds, notes, kinds)


def _is_blank(text: str) -> bool:
    """Whether a text shows nothing: only spaces, and signs without a shape such as the zero-width space."""
    return all(sign.isspace() or unicodedata.category(sign) in ("Cf", "Cc") for sign in text)


def mentions(prompts: Sequence[str], concept: str | None) -> list[str]:
    """Those of the prompts that name the concept, a whole word in any case."""
    word = (concept or "").strip()
    if not word:
        return []
    pattern = re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE)
    return [prompt for prompt in prompts if pattern.search(prompt)]


def substitute(prompt: str, concept: str, anchor: str) -> str:
    """The prompt with the concept, a whole word in any case, replaced by the anchor; the anchor where it is absent."""
    pattern = re.compile(rf"(?<!\w){re.escape(concept.strip())}(?!\w)", re.IGNORECASE)
    if not pattern.search(prompt):
        return anchor
    return " ".join(pattern.sub(lambda _: anchor, prompt).split())


def check_disjoint(forget: Sequence[str], retain: Sequence[str]) -> None:
    """UserError where a prompt is both to forget and to keep, compared without case and spacing."""
    keep = {" ".join(prompt.lower().split()) for prompt in retain}
    both = [prompt for prompt in forget if " ".join(prompt.lower().split()) in keep]
    if both:
        raise UserError(
            f"{len(both)} forget prompt(s) are also retain prompts, for example {both[0]!r}. Take them out of one list."
        )


@dataclasses.dataclass(frozen=True)
class PromptGroups:
    """The prompts of an evaluation.

    ``concept`` is the forgotten word, if there is one to judge erasure by; of several their title.  ``names`` gives a
    prompt's group where that is not simply ``forget`` or ``retain``; ``seeds`` its seeds, where the user gave them.
    ``notes``: how the file was read, for people.  ``concepts``: the forgotten words, one by one.
    """

    forget: tuple[str, ...]
    retain: tuple[str, ...]
    concept: str | None
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    seeds: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    concepts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.concept is not None and not self.concepts:
            object.__setattr__(self, "concepts", (self.concept,))
        if len(self.retain) < 2:
            raise UserError(
                "integrity is measured on at least 2 retain prompts: give more, or mark them so in the column `group`."
            )
        check_disjoint(self.forget, self.retain)

    @classmethod
    def of(cls, grouped: Sequence[tuple[str, str]], concept: str | Sequence[str] | None) -> PromptGroups:
        """From (prompt, group), for a concept or several."""
        return cls.of_list(PromptList(list(grouped)), concept)

    @classmethod
    def of_list(cls, read: PromptList, concept: str | Sequence[str] | None) -> PromptGroups:
        """From what was read from a file or a text."""
        concepts = (concept,) if isinstance(concept, str) else tuple(concept or ())
        grouped = read.grouped
        forget = tuple(prompt for prompt, group in grouped if is_forget(group))
        retain = tuple(prompt for prompt, group in grouped if not is_forget(group))
        return cls(forget, retain, title(concepts) or None, dict(grouped), read.seeds, read.notes, concepts)

    @functools.cached_property
    def asked(self) -> Mapping[str, tuple[str, ...]]:
        """The concepts that each prompt to forget asks for: those of its group's name, else those that it names.

        A group is of a concept if its name ends in it, as ``forget Van Gogh`` does.  Where there is one concept, every
        such prompt asks for it.
        """
        if len(self.concepts) < 2:
            return dict.fromkeys(self.forget, self.concepts)
        finder, known = Finder(self.concepts), {concept.lower(): concept for concept in self.concepts}
        endings = {prompt: self.names.get(prompt, "").lower().partition(" ")[2] for prompt in self.forget}
        return {
            prompt: (known[ending],) if (ending := endings[prompt]) in known else tuple(finder.named(prompt))
            for prompt in self.forget
        }

    def grouped(self) -> list[tuple[str, str]]:
        """(prompt, group), sorted by prompt, so that the order they were given in changes nothing."""
        plain = dict.fromkeys(self.forget, "forget") | dict.fromkeys(self.retain, "retain")
        return sorted({prompt: self.names.get(prompt, group) for prompt, group in plain.items()}.items())


def _names_a_file(value: str) -> bool:
    """Whether the value is a file.  UserError for what looks like one and is none: it was never meant as a prompt."""
    try:
        path = Path(value).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir() and value.strip() not in ("", ".")
    except (OSError, RuntimeError, ValueError):  # a long text is no valid file name, and `~word` perhaps no user
        return False
    if is_file:
        return True
    looks = path.suffix.lower() in SUFFIXES or ("/" in value and not re.search(r"\s", value.strip()))
    if ";" in value or not (looks or value.startswith(("./", "../", "~/", "/"))):
        return False
    if is_folder:
        raise UserError(f"the prompt file {value!r} is a folder. Name a file in it.")
    raise UserError(
        f"the prompt file {value!r} does not exist. Check the path; to mean this text, put a `;` behind it."
    )
