"""Copying a recipe to an editable file."""

from __future__ import annotations

from pathlib import Path

import pytest

from llavactl.core.errors import RecipeError
from llavactl.core.registry import Registration, registry
from llavactl.recipe.copying import copy
from llavactl.recipe.load import load_recipe
from llavactl.recipe.resolve import find


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_the_copy_is_identical_with_comments(here: Path) -> None:
    assert copy("llava-v1.5-7b") == Path("recipe.yaml")
    assert (here / "recipe.yaml").read_text() == find("llava-v1.5-7b").file.read_text()
    assert load_recipe() == load_recipe("llava-v1.5-7b")


def test_a_copy_with_a_parent_works(here: Path) -> None:
    copy("llava-v1.5-7b-lora", here / "sub" / "mine.yaml")
    recipe = load_recipe("sub/mine.yaml")
    assert recipe.stage2.method == "lora"
    assert recipe.data.stage1[0].spec()["path"].startswith(str(here / "sub/data"))


def test_the_destination_may_be_a_folder(here: Path) -> None:
    (here / "sub").mkdir()
    assert copy("llava-v1-7b", Path("sub")) == Path("sub/recipe.yaml")


def test_a_file_is_overwritten_only_with_force(here: Path) -> None:
    (here / "recipe.yaml").write_text("mine")
    with pytest.raises(RecipeError, match=r"recipe\.yaml") as caught:
        copy("llava-v1-7b")
    assert "--force" in caught.value.hint
    assert (here / "recipe.yaml").read_text() == "mine"
    copy("llava-v1-7b", force=True)
    assert load_recipe().name == "llava-v1-7b"


def test_a_destination_that_is_not_writable(here: Path) -> None:
    (here / "file").touch()
    with pytest.raises(RecipeError, match=r"file/recipe\.yaml"):
        copy("llava-v1-7b", Path("file/recipe.yaml"))


@pytest.mark.parametrize("quote", ["", "'", '"'])
def test_a_relative_parent_becomes_absolute_in_the_copy(
    quote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "a package"
    package.mkdir()
    (package / "base.yaml").write_text(find("llava-v1-7b").file.read_text())
    (package / "own.yaml").write_text(f"# own\nextends: {quote}base.yaml{quote}  # the parent\nname: own\n")
    monkeypatch.setitem(registry().entries["recipes"], "own", Registration("recipes", "own", "x:y", None, "", "plugin"))
    monkeypatch.setattr(Registration, "path", lambda self: package / "own.yaml")
    assert load_recipe("own").name == "own"
    copy("own")
    assert "  # the parent" in Path("recipe.yaml").read_text()
    assert load_recipe().name == "own"
