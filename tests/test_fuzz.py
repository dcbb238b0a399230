"""A minute of damaged input, the same cases on every machine: nothing but one clear line, nothing left behind."""

import random

import fuzz
import pytest

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore:.*decompression bomb.*")


@pytest.mark.slow
def test_a_minute_of_damaged_input_finds_nothing():
    counts, findings = fuzz.fuzz(seed=0, targets=[*fuzz.TARGETS])
    assert not findings, findings[:5]
    assert counts == {name: cases for name, (_, cases) in fuzz.TARGETS.items()}


@pytest.mark.parametrize("target", sorted(set(fuzz.TARGETS) - {"flags"}))
def test_a_few_cases_of_every_target(target):
    for case in range(150):
        fuzz.run_case(target, 1, case)


def test_the_fuzzer_finds_what_is_wrong(monkeypatch):
    """Else the tests above could pass by seeing nothing."""

    def careless(draw, folder):
        text = fuzz.damaged(b"abc", draw)
        (folder / "x").write_bytes(text)
        if len(text) > 5:
            raise KeyError(text)

    monkeypatch.setitem(fuzz.TARGETS, "careless", (careless, 500))
    counts, findings = fuzz.fuzz(seed=0, targets=["careless"])
    assert 0 < len(findings) < counts["careless"]
    assert all("KeyError" in finding.error for finding in findings)
    with pytest.raises(KeyError):
        fuzz.run_case("careless", 0, findings[0].case)


def test_damage_is_a_function_of_the_draw():
    made = [fuzz.damaged(b"some content", random.Random(number)) for number in range(200)]
    assert made == [fuzz.damaged(b"some content", random.Random(number)) for number in range(200)]
    assert len(set(made)) > 150
    assert fuzz.damaged(b"", random.Random(0)) != b"" or fuzz.damaged(b"", random.Random(1)) != b""
