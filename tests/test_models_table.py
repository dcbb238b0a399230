"""docs/models.md says what was measured, of all that there is, and no more."""

import json

import pytest
from against_diffusers import CASES
from models_table import BACKENDS, PAGE, RESULTS, case_row, page
from test_layouts import LAYOUTS
from test_single_files import KINDS

from fastunlearn.models.families import OURS
from fastunlearn.models.options import ModelOptions

SAMPLED = ("sd1 LCM", "sdxl Turbo", "flux dev", "lumina2")


@pytest.fixture(scope="module")
def results():
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def test_the_page_is_made_of_the_results(results):
    assert PAGE.read_text(encoding="utf-8") == page(results)


def test_every_case_layout_and_kind_of_file_is_in_them(results):
    assert results["cases"].keys() == CASES.keys()
    assert results["layouts"].keys() == LAYOUTS.keys()
    assert results["files"].keys() == KINDS.keys()
    assert {family.family for family in OURS} <= {row["family"] for row in results["cases"].values()}


def test_whatever_was_drawn_is_the_image_of_plain_diffusers(results):
    """A worse figure would be a bug, not a row of the table."""
    for name, row in results["cases"].items():
        for value in (row["own"], row["resolution"], row["negative"], *row["scheduler"].values()):
            refused = isinstance(value, str) and value.startswith("refused: ")
            assert refused or value is None or value <= 1, name
        assert row["own"] in (0, 1), name
    for name, row in {**results["layouts"], **results["files"]}.items():
        assert row["read"] <= 1, name
        assert row.get("left", 0) <= 1, name
        assert row.get("untouched", True), name


def test_the_page_names_every_option():
    text = PAGE.read_text(encoding="utf-8")
    for option in ModelOptions.__dataclass_fields__:
        assert f"--{option.replace('_', '-')}" in text, option
    assert "None of it has been tried with real weights." in text
    assert all(backend in text for backend in BACKENDS)


@pytest.mark.parametrize("case", [c if c == "flux dev" else pytest.param(c, marks=pytest.mark.slow) for c in SAMPLED])
def test_what_the_page_says_is_so(results, case):
    """Rounding may differ by a step between machines."""

    def verdicts(row):
        values = [row["own"], row["resolution"], row["negative"], *row["scheduler"].values()]
        return [value <= 1 if isinstance(value, int) else value for value in values]

    now, then = case_row(CASES[case]), results["cases"][case]
    assert verdicts(now) == verdicts(then)
    for key in ("family", "sampler", "attention"):
        assert now[key] == then[key]
