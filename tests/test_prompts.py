"""Prompts: from texts and files, each once and in order; what is to forget never leaks into what is to keep."""

import pytest

from fastunlearn.prompts import check_disjoint, is_forget, parse_grouped_prompts, parse_prompts, substitute
from fastunlearn.worlds import shapes
from fastunlearn.worlds.shapes import SHAPES_WORLD
from fastunlearn.worlds.shapes.prompts import attributes

CONCEPTS = (*shapes.SHAPES, *shapes.COLORS, *shapes.BACKGROUNDS)


def shapes_prompts(concept, split):
    """(forget, retain) of the world's lists for training or evaluation."""
    if split == "train":
        return SHAPES_WORLD.prompts_to_train(concept)
    pairs = SHAPES_WORLD.prompts_to_evaluate(concept)
    return [p for p, group in pairs if is_forget(group)], [p for p, group in pairs if not is_forget(group)]


@pytest.mark.parametrize(
    ("value", "prompts"),
    [
        pytest.param("a dog", ["a dog"], id="one"),
        pytest.param("a dog;a cat", ["a dog", "a cat"], id="two"),
        pytest.param(" a dog ; ;a cat;", ["a dog", "a cat"], id="blanks"),
        pytest.param("b;a;b", ["b", "a"], id="repeats"),
        pytest.param("notes.txt;a cat", ["notes.txt", "a cat"], id="semicolon means text"),
        pytest.param("version 1.5 of a car", ["version 1.5 of a car"], id="dot in a text"),
        pytest.param("~nobody-of-this-name at home", ["~nobody-of-this-name at home"], id="tilde in a text"),
        pytest.param("x" * 5000, ["x" * 5000], id="longer than file names"),
    ],
)
def test_texts_are_split_at_semicolons(value, prompts):
    assert parse_prompts(value) == prompts


@pytest.mark.parametrize(
    ("name", "content", "pairs"),
    [
        pytest.param("p.txt", b"a dog\n\n a cat \na dog\n", [("a dog", "retain"), ("a cat", "retain")], id="lines"),
        pytest.param("p.txt", b"a dog\r\na cat", [("a dog", "retain"), ("a cat", "retain")], id="windows lines"),
        pytest.param("p.txt", b"a;b\n", [("a;b", "retain")], id="semicolon in a line"),
        pytest.param("p.txt", "\ufeffa dög\n".encode(), [("a dög", "retain")], id="byte order mark"),
        pytest.param("prompts", b"a dog\n", [("a dog", "retain")], id="no suffix"),
        pytest.param("p.csv", b"prompt\na dog\n", [("a dog", "retain")], id="csv without groups"),
        pytest.param("p.CSV", b"prompt\na dog\n", [("a dog", "retain")], id="suffix in capitals"),
        pytest.param(
            "p.csv",
            b'id,prompt,group\n1,"a dog, running",forget\n2,a cat,\n3,,x\n',
            [("a dog, running", "forget"), ("a cat", "retain")],
            id="csv with groups",
        ),
        pytest.param("p.tsv", b"prompt\tgroup\na, b\tfar\n", [("a, b", "far")], id="tsv"),
        pytest.param(
            "p.csv", b"prompt,group\n,empty\na cat,near\n,near\n", [("", "empty"), ("a cat", "near")], id="empty prompt"
        ),
        pytest.param("p.txt", "a\u2028b\n".encode(), [("a\u2028b", "retain")], id="no end of a line"),
        pytest.param("p.csv", b"group,prompt\nfar\nnear,a cat\n", [("a cat", "near")], id="short row"),
    ],
)
def test_files_are_read(name, content, pairs, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    assert parse_grouped_prompts(str(path)) == pairs


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        pytest.param("p.txt", b"", "holds no prompt", id="empty"),
        pytest.param("p.txt", b"\n \n\t\n", "holds no prompt", id="blank lines"),
        pytest.param("p.csv", b"prompt\n", "holds no prompt", id="csv of a header"),
        pytest.param("p.csv", b"", "no column named `prompt`", id="empty csv"),
        pytest.param("p.csv", b"words,group\na,b\n", "no column named `prompt`", id="csv without prompts"),
        pytest.param("p.txt", b"\xff\xfe\x00caf\xe9", "is not UTF-8 text", id="not utf-8"),
        pytest.param("p.csv", b'prompt\n"' + b"x " * 100_000, "is no proper CSV", id="quote never closed"),
        pytest.param("p.csv", b"prompt,group\na,forget\na,retain\n", "'a' is in two groups", id="two groups"),
    ],
)
def test_bad_files_are_refused_by_name(name, content, said, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=said) as error:
        parse_grouped_prompts(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["gone.txt", "gone.csv", "gone.tsv", "gone.TXT"])
def test_a_missing_file_is_not_taken_for_a_prompt(name, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        parse_prompts(str(tmp_path / name))


def test_a_folder_is_not_taken_for_a_prompt(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        parse_prompts(str(tmp_path))


@pytest.mark.parametrize("value", ["", " ", ";", " ; ;"])
def test_a_value_without_a_prompt_is_refused(value):
    with pytest.raises(ValueError, match="holds no prompt"):
        parse_prompts(value)


@pytest.mark.parametrize(
    ("prompt", "concept", "anchor", "expected"),
    [
        ("a red star", "star", "circle", "a red circle"),
        ("A Star, a STAR", "star", "circle", "A circle, a circle"),
        ("a starfish", "star", "circle", "circle"),
        ("a superstar", "star", "circle", "circle"),
        ("a star-shaped box", "star", "circle", "a circle-shaped box"),
        ("a red star on  a rug", "star", "", "a red on a rug"),
        ("star", "star", "", ""),
        ("a house by Van  Gogh", "Van Gogh", "Monet", "Monet"),
        ("a house by van gogh", " Van Gogh ", "Monet", "a house by Monet"),
        ("c++ code", "c++", "python", "python code"),
        ("a star", "star", r"\1 \g<0>", r"a \1 \g<0>"),
        ("a sunflower", "Van Gogh", "a painter", "a painter"),
    ],
)
def test_the_anchor_takes_the_place_of_the_whole_word(prompt, concept, anchor, expected):
    assert substitute(prompt, concept, anchor) == expected


@pytest.mark.parametrize("kept", ["a star", "A  Star ", "a\tSTAR"])
def test_a_forget_prompt_among_the_retain_prompts_is_found_whatever_its_case_and_spacing(kept):
    with pytest.raises(ValueError, match=r"1 forget prompt.*'a star'"):
        check_disjoint(["a star", "star"], ["a ring", kept])


def test_different_prompts_are_disjoint():
    check_disjoint(["a star"], ["a starfish", "star"])


@pytest.mark.parametrize(
    ("concept", "result"),
    [("star", ("shape", "star")), (" Red ", ("color", "red")), ("STRIPED", ("background", "striped"))],
)
def test_a_concept_belongs_to_an_attribute(concept, result):
    assert SHAPES_WORLD.find(concept) == result


@pytest.mark.parametrize("concept", ["dog", "a star", "", "stars"])
def test_an_unknown_concept_is_refused_with_the_known_ones(concept):
    with pytest.raises(ValueError, match=r"does not know.*circle.*red.*plain"):
        SHAPES_WORLD.find(concept)


@pytest.mark.parametrize("concept", CONCEPTS)
def test_the_neighbour_is_another_word_of_the_same_kind(concept):
    neighbour = SHAPES_WORLD.anchor(concept)
    assert neighbour != concept
    assert SHAPES_WORLD.find(neighbour)[0] == SHAPES_WORLD.find(concept)[0]


@pytest.mark.parametrize("split", ["train", "evaluate"])
@pytest.mark.parametrize("concept", CONCEPTS)
def test_forget_prompts_name_the_concept_and_retain_prompts_never_do(concept, split):
    forget, retain = shapes_prompts(concept, split)
    assert forget
    assert all(concept in prompt.split() for prompt in forget)
    assert retain
    assert not any(concept in prompt.split() for prompt in retain)
    assert len(set(forget)) == len(forget)
    assert len(set(retain)) == len(retain)


@pytest.mark.parametrize("concept", CONCEPTS)
def test_no_evaluated_prompt_was_trained_on(concept):
    trained, evaluated = shapes_prompts(concept, "train"), shapes_prompts(concept, "evaluate")
    assert not set(trained[0] + trained[1]) & set(evaluated[0] + evaluated[1])


def test_the_evaluation_covers_every_other_combination_of_shape_and_color():
    named = [attributes(prompt) for prompt in shapes_prompts("star", "evaluate")[1]]
    result = {(one["shape"], one["color"]) for one in named if "shape" in one}
    assert result == {(s, c) for s in shapes.SHAPES for c in shapes.COLORS if s != "star"}


@pytest.mark.parametrize(
    ("prompt", "result"),
    [
        ("a red star on a plain background", {"shape": "star", "color": "red", "background": "plain"}),
        ("an Orange ring", {"shape": "ring", "color": "orange"}),
        ("a starfish in the morning", {}),
        ("", {}),
    ],
)
def test_attributes_are_what_the_prompt_names(prompt, result):
    assert attributes(prompt) == result
