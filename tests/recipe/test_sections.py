"""Commands require only the sections that they need."""

from __future__ import annotations

from pathlib import Path

import pytest

from llavactl.core.errors import RecipeError
from llavactl.recipe.frame import Outline, Recipe, VisionRecipe
from llavactl.recipe.load import load_frame, load_recipe
from llavactl.testing import run_cli

GENERATES = """\
name: only-data
generate:
  source: {name: scenes, scenes: 3}
  teacher: {name: rules}
  kinds: {conversation: 1}
  out: generated.jsonl
"""


@pytest.fixture
def data_only(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(GENERATES, encoding="utf-8")
    return tmp_path


def test_data_is_generated_without_a_model(data_only: Path) -> None:
    checked = run_cli("recipes", "check", cwd=data_only)
    assert checked.exit_code == 0, checked.stdout
    done = run_cli("data", "generate", "--json", cwd=data_only)
    assert done.exit_code == 0, done.stderr
    assert done.json()["samples"] == 3
    assert (data_only / "generated.jsonl").is_file()
    assert run_cli("data", "stats", "-r", "recipe.yaml", "generated.jsonl", cwd=data_only).exit_code == 0


def test_missing_sections_are_named(data_only: Path) -> None:
    done = run_cli("train", "--stage", "1", cwd=data_only)
    assert done.exit_code == 1
    assert all(name in done.stderr for name in ("vision", "connector", "language"))
    extracted = run_cli("extract", cwd=data_only)
    assert extracted.exit_code == 1
    assert "vision" in extracted.stderr
    assert "connector" not in extracted.stderr


def test_features_are_extracted_without_a_language_model(toy: Path) -> None:
    text = (toy / "recipe.yaml").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith(("connector:", "language:"))]
    (toy / "recipe.yaml").write_text("\n".join(lines), encoding="utf-8")
    done = run_cli("extract", "--json", cwd=toy)
    assert done.exit_code == 0, done.stderr
    assert done.json()["encoded"] == 12


def test_a_complete_recipe_is_always_a_recipe(toy: Path) -> None:
    for frame in (Outline, VisionRecipe, Recipe):
        assert isinstance(load_frame(frame, toy / "recipe.yaml"), Recipe)
    with pytest.raises(RecipeError) as caught:
        load_recipe(toy / "recipe.yaml", ["connector=null"])
    assert [problem.key for problem in caught.value.problems] == ["connector"]


def test_the_option_image_is_passed_only_to_encoders_that_have_it(toy: Path) -> None:
    recipe = load_recipe(toy / "recipe.yaml")
    assert recipe.vision.spec()["image"] == "pad"
    bare = recipe.vision.model_copy(update={"image": None})
    assert "image" not in bare.spec()
