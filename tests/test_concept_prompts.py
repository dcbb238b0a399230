"""Prompts made from a concept: what each kind promises, for any word."""

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastunlearn.concept_prompts import KEPT_KINDS, KINDS, concept_prompts
from fastunlearn.concept_prompts.table import TABLE, known
from fastunlearn.errors import UserError

WORDS = st.text(st.characters(whitelist_categories=("Lu", "Ll", "Lo", "Nd", "Zs", "Po")), min_size=1, max_size=24)


def of_kind(kind, made):
    return [prompt for one, prompt in made if one == kind]


def edits(a, b):
    """Least number of letters put in, taken out, exchanged, or swapped with the next (Damerau, Levenshtein)."""
    table = [[max(i, j) if not i or not j else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i, j in itertools.product(range(1, len(a) + 1), range(1, len(b) + 1)):
        other = a[i - 1] != b[j - 1]
        table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + other)
        if i > 1 and j > 1 and a[i - 1] == b[j - 2] and a[i - 2] == b[j - 1]:
            table[i][j] = min(table[i][j], table[i - 2][j - 2] + 1)
    return table[-1][-1]


@settings(max_examples=60, deadline=None)
@given(WORDS, st.integers(1, 12), st.integers(0, 5))
def test_any_word_gives_the_same_different_prompts_each_time(word, per_kind, seed):
    if not word.split():
        with pytest.raises(UserError, match="empty"):
            concept_prompts(word)
        return
    made = concept_prompts(word, per_kind=per_kind, seed=seed)
    assert made == concept_prompts(word, per_kind=per_kind, seed=seed)
    prompts = [prompt for _, prompt in made]
    assert len(set(prompts)) == len(prompts)
    assert all(prompt.strip() == prompt != "" for prompt in prompts)
    assert all(len(of_kind(kind, made)) <= per_kind for kind in KINDS)
    name = " ".join(word.split())
    assert all(name in prompt for kind in ("name", "prefix", "short", "long") for prompt in of_kind(kind, made))


@pytest.mark.parametrize("concept", TABLE)
def test_a_concept_of_the_table_has_prompts_of_every_kind_and_names_itself_only_where_it_should(concept):
    made = concept_prompts(concept, per_kind=100)
    names = [concept, *TABLE[concept].aliases]
    for kind, prompt in made:
        names_it = any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", prompt, re.IGNORECASE) for name in names)
        if kind in ("implicit", *KEPT_KINDS):
            assert not names_it, (kind, prompt)
        if kind in ("name", "prefix", "short", "long"):
            assert names_it, (kind, prompt)
    missing = set(KINDS) - {kind for kind, _ in made}
    assert missing <= {"language"}, "a breed's name is in no other language of the table"
    assert known(TABLE[concept].aliases[0].upper()).near == TABLE[concept].near


def test_a_misspelt_name_is_one_slip_away():
    for prompt in of_kind("misspelt", concept_prompts("Van Gogh", ["misspelt"], per_kind=100)):
        wrong = prompt.removeprefix("a painting by ")
        assert edits(wrong.lower(), "van gogh") == 1, wrong


def test_another_seed_chooses_others_and_more_holds_fewer():
    few = concept_prompts("Van Gogh", ["short", "long"], per_kind=4, seed=1)
    assert few != concept_prompts("Van Gogh", ["short", "long"], per_kind=4, seed=2)
    assert set(few) <= set(concept_prompts("Van Gogh", ["short", "long"], per_kind=40, seed=1))


def test_what_the_caller_knows_is_used_and_an_article_is_where_it_belongs():
    made = concept_prompts(
        "okapi", category="object", aliases=["forest giraffe"], hints=["striped legs"], near=["zebra"], per_kind=50
    )
    assert "a photo of an okapi" in of_kind("prefix", made)
    assert "forest giraffe" in of_kind("variant", made)
    assert of_kind("implicit", made) == ["striped legs"]
    assert "a photo of a zebra" in of_kind("near", made)
    assert "a photo of the Eiffel Tower" in of_kind("prefix", concept_prompts("the Eiffel Tower", category="object"))
    assert not any("cat" in prompt.split() for prompt in of_kind("random", concept_prompts("cat", per_kind=50)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"concept": " "}, "is empty"),
        ({"concept": "okapi", "kinds": ["rhymes"]}, "unknown kind of prompts 'rhymes'. There are: name"),
        ({"concept": "okapi", "kinds": ["implicit"]}, "give `--hints`"),
        ({"concept": "okapi", "kinds": ["near"]}, "give `--near`"),
        ({"concept": "okapi", "kinds": ["language"]}, "--category style"),
        ({"concept": "okapi", "category": "animal"}, "unknown category 'animal'"),
        ({"concept": "okapi", "per_kind": 0}, "at least 1"),
        ({"concept": "okapi", "hints": ["an Okapi in a zoo"]}, "names 'okapi'"),
    ],
)
def test_what_cannot_be_made_is_one_line(arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        concept_prompts(**arguments)
