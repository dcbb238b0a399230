"""What is said of attacks on several concepts: sums over prompts, of models that were attacked for all of them."""

import shutil
import sys
from pathlib import Path

import pytest

from fastunlearn.metrics.statistics import clustered_share

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import attacks
import leaderboard_figure
import readme


def attacked(concept, **broken):
    """A concept's results: by model how many of 4 prompts every attack broke."""
    one = {"n_prompts": 4, "share_ci95": [0.0, 1.0]}
    labels = attacks.LABELS
    models = {
        name: {"attacks": {label: {**one, "broken": count} for label in labels}} for name, count in broken.items()
    }
    return {"concept": concept, "judge": "j", "budgets": dict.fromkeys(labels, 9), "models": models}


BOARD = {
    "worlds": {
        "shapes": {
            "star": attacked("star", original=4, gold=0, uce=3, esd=1),
            "ring": attacked("ring", original=4, gold=1, uce=2),
        }
    }
}


def test_a_sentence_sums_over_the_concepts():
    text = readme.attacked_section(BOARD["worlds"]["shapes"].values())
    assert "(star and ring): `uce` 5 of 8; the original 8 of 8, a model that never saw it 1 of 8" in text
    assert "esd" not in text  # it was attacked for one of the two


def test_a_point_is_a_share_of_all_prompts():
    found = leaderboard_figure.broken(BOARD)
    expected = clustered_share([True] * 5 + [False] * 3, list("abcdefgh"))
    assert found["uce"]["relearn"].mean == pytest.approx(5 / 8)
    assert (found["uce"]["relearn"].low, found["uce"]["relearn"].high) == pytest.approx((expected.low, expected.high))


def test_every_concept_has_a_table(tmp_path, monkeypatch):
    page = tmp_path / "attacks.md"
    page.write_text(f"before\n{attacks.BEGIN}\nold\n{attacks.END}\nafter\n", encoding="utf-8")
    monkeypatch.setattr(attacks, "PAGE", page)
    attacks.write_tables(BOARD)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert text.index("“star” on `shapes`") < text.index("“ring” on `shapes`")
    assert "| `uce` | 2 of 4 (0% to 100%)" in text


def test_a_concept_without_a_gold_needs_one(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    world = attacks.get_world("shapes")
    with pytest.raises(SystemExit, match="no gold of ring"):
        attacks.model_of("gold", world, "ring", tmp_path, None)
    shutil.copytree(world.folder("shapes"), tmp_path / "pipeline")
    (tmp_path / "parts" / "unet").mkdir(parents=True)
    (tmp_path / "parts" / "unet" / "config.json").write_text("{}")
    made = Path(attacks.model_of("gold", world, "ring", tmp_path / "made", tmp_path / "parts"))
    assert (made / "unet" / "config.json").read_text() == "{}"
    assert (made / "vae" / "config.json").read_bytes() == (world.folder("shapes") / "vae" / "config.json").read_bytes()
