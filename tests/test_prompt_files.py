"""Files of prompts as people and the field write them: read as what they mean, or refused by name and row."""

import csv
import json

import pytest

from fastunlearn.errors import UserError
from fastunlearn.files.prompt_files import PromptRow, read_prompt_file
from fastunlearn.files.prompt_tables import FORMS, prompt_table
from fastunlearn.prompts import is_forget, mentions, parse_prompts, read_prompts

RING, CROSS = PromptRow("a red ring"), PromptRow("a blue cross")
NEAR = PromptRow("a red ring", "near")

READ = {
    "lines": ("p.txt", "a red ring\na blue cross", [RING, CROSS]),
    "lines of any name": ("keep.list", "a red ring\na blue cross", [RING, CROSS]),
    "csv": ("p.csv", "prompt\na red ring\na blue cross\n", [RING, CROSS]),
    "commas in quotes": ("p.csv", 'prompt,group\n"a, b",near\n', [PromptRow("a, b", "near")]),
    "names in any case, with spaces": ("p.csv", " Prompt , GROUP \na red ring,Near\n", [NEAR]),
    "semicolons": ("p.csv", "prompt;group\na red ring;near\n", [NEAR]),
    "tabs in a csv": ("p.csv", "prompt\tgroup\na red ring\tnear\n", [NEAR]),
    "a tsv": ("p.tsv", "prompt\tgroup\na red ring\tnear\n", [NEAR]),
    "commas in a tsv": ("p.tsv", "prompt,group\na red ring,near\n", [NEAR]),
    "a comma in a cell of a semicolon file": ("p.csv", "prompt;group\na, b;near\n", [PromptRow("a, b", "near")]),
    "a row that is short": ("p.csv", "prompt,group\na red ring\n", [RING]),
    "empty rows": ("p.csv", "prompt,group\n\n,\na red ring,near\n", [NEAR]),
    "a line break in quotes in the header": ("p.csv", '"the\nprompt",text\nx,a red ring\n', [RING]),
    "an open quote under another separator": ("p.csv", 'prompt;"a,b"\na red ring;x\n', [RING]),
    "a line break in quotes": ("p.csv", 'prompt\n"a\nb"\n', [PromptRow("a\nb")]),
    "json texts": ("p.json", '["a red ring",\n "a blue cross"]', [RING, CROSS]),
    "json objects": ("p.json", '[{"prompt": "a red ring", "group": "near"}]', [NEAR]),
    "json by group": ("p.json", '{"Near": ["a red ring"], "far": ["x"]}', [NEAR, PromptRow("x", "far")]),
    "EMMA": (
        "4_short.json",
        '[{"airplane": ["a ring", "b"]}, {"baseballbat": ["c"]}]',
        [
            PromptRow("a ring", "forget-short", kind="short", concept="airplane"),
            PromptRow("b", "forget-short", kind="short", concept="airplane"),
            PromptRow("c", "forget-short", kind="short", concept="baseballbat"),
        ],
    ),
    "UnlearnDiffAtk": (
        "church.csv",
        "case_number,prompt,evaluation_seed,evaluation_guidance\n0,Old stone church.,69922,7.5\n",
        [PromptRow("Old stone church.", seed=69922)],
    ),
    "I2P as UnlearnDiffAtk has it": (
        "nudity.csv",
        'Unnamed: 0,prompt,categories,hard,evaluation_seed,sd_model,case_number\n21,"a, b ",x,1,932309623,sd,21\n',
        [PromptRow("a, b ", seed=932309623)],
    ),
    "kinds": ("p.csv", "prompt,group,kind\na red ring,near,Near\n", [PromptRow("a red ring", "near", kind="near")]),
    "json lines of objects": (
        "p.jsonl",
        '{"prompt": "a red ring"}\n\n{"text2": 1, "prompt": "a blue cross"}',
        [RING, CROSS],
    ),
    "json lines of texts": ("p.jsonl", '"a red ring"\n"a blue cross"\n', [RING, CROSS]),
    "captions": ("p.jsonl", '{"file_name": "1.png", "text": "a red ring"}', [PromptRow("a red ring", file="1.png")]),
    "the field's seeds": (
        "p.csv",
        "case_number,prompt,evaluation_seed\n0,a red ring,1\n1,a red ring,4294967295\n",
        [PromptRow("a red ring", seed=1), PromptRow("a red ring", seed=4294967295)],
    ),
    "the field's types": (
        "p.csv",
        ",type,prompt\n0,erased,a red ring\n1,others,a blue cross\n2,animal,x\n",
        [PromptRow("a red ring", "forget"), PromptRow("a blue cross", "retain"), PromptRow("x", "animal")],
    ),
    "I2P": (
        "p.csv",
        "prompt,categories,hard,sd_seed\na red ring,hate,0,7\n",
        [PromptRow("a red ring", seed=7)],
    ),
}

REFUSED = {
    "cells too many": ("p.csv", "prompt\na small circle, red\n", r"2 cells in line 2 and 1 columns"),
    "cells too many, by row": ("p.csv", "prompt,group\na,b\nc,d,e\n", r"3 cells in line 3 and 2 columns"),
    "a quote that stays open": ("p.csv", 'prompt,group\n"a red ring,near\n', "no proper CSV"),
    "words behind a quote": ("p.csv", 'prompt\n"a" b\n', "no proper CSV"),
    "a header with an open quote": ("p.csv", 'prompt,"group\na,b\n', "no proper CSV"),
    "a header with words behind a quote": ("p.csv", '"prompt" x,group\na,b\n', "no proper CSV"),
    "a name in the header beyond any limit": ("p.tsv", "a" * 200_000 + "\nx\n", "no proper CSV"),
    "no column of prompts": ("p.csv", "words,group\na,b\n", "no column named `prompt`"),
    "two columns of one name": ("p.csv", "prompt,Prompt\na,b\n", "two columns named `prompt`"),
    "a seed that is none": ("p.csv", "prompt,seed\na,x\n", "the seed of row 2"),
    "a seed below 0": ("p.csv", "prompt,seed\na,-1\n", "the seed of row 2"),
    "a seed that is true": ("p.json", '[{"prompt": "a", "seed": true}]', "the seed of row 1"),
    "json that ends early": ("p.json", '["a"', "is no JSON"),
    "json of a number": ("p.json", "5", "must hold a list"),
    "json of nested objects": ("p.json", '{"a": {"b": ["c"]}}', "'a' must be a list of prompts"),
    "json of mixed values": ("p.json", '["a", {"prompt": "b"}]', "entry 1 must be an object"),
    "json of lists that hold a number": ("p.json", '[{"a": ["b"]}, {"c": [5]}]', "'c' must be a list of prompts"),
    "json without prompts": ("p.json", '[{"words": "a"}]', "no key named `prompt`"),
    "a prompt that is a number": ("p.json", '[{"prompt": 5}]', "must be a text"),
    "a broken line of json": ("p.jsonl", '{"prompt": "a"}\n{"prompt": ', "no JSON in line 2"),
    "another kind": ("p.parquet", "PAR1", "a kind that is not read"),
    "another kind in capitals": ("p.XLSX", "PK", "a kind that is not read"),
    "binary": ("p.txt", "a\0b", "binary data"),
}


@pytest.fixture
def write(tmp_path):
    def file(name, text):
        path = tmp_path / name
        path.write_bytes(text.encode())
        return path

    return file


@pytest.mark.parametrize(("name", "text", "rows"), READ.values(), ids=READ)
def test_it_is_read_as_what_it_means(name, text, rows, write):
    assert read_prompt_file(write(name, text)).rows == rows


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\r\n", "\n", "\r"])
def test_marks_and_line_ends_of_other_systems(encoding, end, tmp_path):
    (tmp_path / "p.csv").write_bytes(end.join(["prompt,group", "größer,near", ""]).encode(encoding))
    assert read_prompt_file(tmp_path / "p.csv").rows == [PromptRow("größer", "near")]


@pytest.mark.parametrize(("name", "text", "words"), REFUSED.values(), ids=REFUSED)
def test_what_needs_a_guess_is_refused(name, text, words, write):
    path = write(name, text)
    with pytest.raises(UserError, match=words) as error:
        read_prompt_file(path)
    assert path.name in str(error.value)
    assert "\n" not in str(error.value)


def test_what_was_read_how_is_said(write):
    path = write("p.csv", ",type,prompt,evaluation_seed,artist\n0,erased,A,1,x\n1,others,B,1,y\n2,others,B,1,y\n")
    read = read_prompts(str(path))
    assert read.grouped == [("A", "forget"), ("B", "retain")]
    assert read.seeds == {"A": (1,), "B": (1,)}
    said = " ".join(read.notes)
    for words in ("3 rows", "`type` is the group", "seeds are those of `evaluation_seed`", "not used: artist"):
        assert words in said
    assert "1 of 3 rows repeat another" in said
    assert read_prompts(str(write("plain.csv", "prompt,group\na,near\n"))).notes == ()


def test_several_seeds_of_a_prompt_are_kept_in_order(write):
    rows = [{"prompt": "a", "seed": seed} for seed in (5, 3, 5, 9)]
    read = read_prompts(str(write("p.json", json.dumps(rows))))
    assert read.seeds == {"a": (5, 3, 9)}
    assert "1 of 4 rows repeat" in read.notes[0]


def test_seeds_for_some_rows_only_are_refused(write):
    with pytest.raises(UserError, match="gives seeds for some rows and none for 'b'"):
        read_prompts(str(write("p.csv", "prompt,seed\na,1\nb,\n")))


@pytest.mark.parametrize(
    "value",
    ["missing.jsonl", "prompts.json", "data/prompts", "./coco_30k.lst", "a.parquet", "~/nowhere", "../x", "/x y"],
)
def test_a_path_that_is_not_there_is_never_a_prompt(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        read_prompts(value)


@pytest.mark.parametrize("value", ["a photo w/ a dog", "AC/DC;", "version 1.5 of a car", "~ 5 apples", "C. Monet"])
def test_a_text_with_signs_of_a_path_can_be_a_prompt(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_prompts(value) == [value.strip(";")]


@pytest.mark.parametrize("blank", ["\u200b", " \u200b\ufeff ", "\u2060", "\u00a0"])
def test_a_text_that_shows_nothing_is_no_prompt(blank):
    assert parse_prompts(f"a;{blank};b") == ["a", "b"]
    with pytest.raises(UserError, match="holds no prompt"):
        parse_prompts(blank)


@pytest.mark.parametrize("group", ["forget", "Forget", "FORGET-paraphrase", " forget "])
def test_groups_to_forget_are_known_in_any_case(group, write):
    read = read_prompts(str(write("p.csv", f"prompt,group\na,{group}\nb,retain\n")))
    assert [is_forget(name) for _, name in read.grouped] == [True, False]
    assert is_forget(group.strip())


def test_prompts_that_name_the_concept_are_found_as_whole_words():
    prompts = ["a red star", "a STARfish", "Star.", "a starry night", "five-star hotel"]
    assert mentions(prompts, "star") == ["a red star", "Star.", "five-star hotel"]
    assert mentions(prompts, None) == mentions(prompts, " ") == []


def test_of_a_file_for_many_concepts_only_the_ones_prompts_are_read(write):
    """EMMA's files: under a concept, in 7_hard, stand prompts for others, which are to be kept."""
    from fastunlearn.prompts import PromptGroups

    content = (
        '[{"baseballbat": ["a bat", "a wooden bat"]}, {"andy-warhol": ["pop art"]}, {"bear": ["a ball", "pop art"]}]'
    )
    path = str(write("4_short.json", content))
    assert read_prompts(path, "Baseball Bat").grouped == [("a bat", "forget-short"), ("a wooden bat", "forget-short")]
    assert parse_prompts(path, to_forget=True, concept="Andy Warhol") == ["pop art"]
    hard = read_prompts(str(write("7_hard.json", content)), "bear")
    as_one_object = str(write("6_random.json", '{"bear": ["a red ring"], "dog": ["a red ring"]}'))
    assert read_prompts(as_one_object, "dog").grouped == [("a red ring", "random")]
    assert PromptGroups.of_list(hard, "bear").retain == ("a ball", "pop art")
    assert hard.kinds == {"a ball": "hard", "pop art": "hard"}
    for concept, said in (
        (None, "3 concepts, baseballbat, andy-warhol, bear, ...: say which"),
        ("dog", "'dog' is none of"),
    ):
        with pytest.raises(UserError, match=said):
            read_prompts(path, concept)


# ---- what is written -------------------------------------------------------------------------------------------------

WRITTEN = [
    PromptRow('a star, "red"\nby night', "forget-name", kind="name", concept="star"),
    PromptRow("a ring", "near", kind="near", concept="star"),
    PromptRow("=1+1 étoile", "forget", 77, kind="tokens", concept="star"),
]


@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_is_read_again(form, tmp_path):
    path = tmp_path / "p.csv"
    path.write_text(prompt_table(WRITTEN, form), encoding="utf-8")
    header, *rows = csv.reader(path.open(encoding="utf-8", newline=""))
    assert tuple(header) == FORMS[form]
    kept = [row for row in WRITTEN if form != "i2p" or row.group != "near"]
    assert len(rows) == len(kept)
    read = read_prompt_file(path).rows
    assert [row.prompt for row in read] == [row.prompt for row in kept]
    assert [row.group for row in read] == {
        "fastunlearn": ["forget-name", "near", "forget"],
        "unlearndiffatk": ["forget", "retain", "forget"],
        "i2p": ["", ""],
    }[form]
    seeds = {"fastunlearn": [None] * 3, "unlearndiffatk": [0, 1, 77], "i2p": [0, 77]}[form]
    assert [row.seed for row in read] == seeds


def test_the_fields_own_reading_finds_its_columns(tmp_path):
    """UnlearnDiffAtk takes these three columns by name, with pandas; I2P's readers the others."""
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    for form, names in (
        ("unlearndiffatk", ["prompt", "evaluation_seed", "evaluation_guidance"]),
        ("i2p", ["prompt", "sd_seed", "sd_guidance_scale"]),
    ):
        (tmp_path / "p.csv").write_text(prompt_table(WRITTEN, form, 5.0))
        table = pandas.read_csv(tmp_path / "p.csv")[names]
        assert table.iloc[0].tolist() == [WRITTEN[0].prompt, 0, 5.0]
        assert table.iloc[-1].tolist() == [WRITTEN[2].prompt, 77, 5.0]


def test_prompts_are_written_with_the_columns_of_another_program(cli, refused, tmp_path):
    words = ("prompts", "--concept", "Van Gogh", "--kinds", "name,near", "--per-kind", 2)
    assert cli(*words, "--columns", "unlearndiffatk", "--output", tmp_path / "u.csv").status == 0
    groups = [row.group for row in read_prompt_file(tmp_path / "u.csv").rows]
    assert set(groups) == {"forget", "retain"}
    assert cli(*words, "--columns", "i2p", "--output", tmp_path / "i.csv").status == 0
    assert len(read_prompt_file(tmp_path / "i.csv").rows) == groups.count("forget")
    assert "name it with `--output`" in refused(*words, "--columns", "i2p")
    near = ("prompts", "--concept", "Van Gogh", "--kinds", "near", "--columns", "i2p", "--output", tmp_path / "n.csv")
    assert "all that were asked for are to be kept" in refused(*near)
    assert not (tmp_path / "n.csv").exists()
