"""``extends``: recipes with a parent."""

from __future__ import annotations

from pathlib import Path

import pytest

from llavactl.core.errors import RecipeError
from llavactl.recipe.load import check, load_recipe

PARENT = """\
name: parent
vision: {name: clip, model: a/b, layer: -3}
connector: {name: mlp2x-gelu, pixel_shuffle: 2}
language: {name: hf, model: c/d, template: plain}
data: {stage1: [{name: llava-json, path: x.json}]}
stage1: {epochs: 3, batch_size: 64}
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    (folder / "base").mkdir(parents=True)
    (folder / "base/parent.yaml").write_text(PARENT)
    monkeypatch.chdir(folder)
    return folder


def child(text: str, file: str = "recipe.yaml") -> Path:
    Path(file).write_text(text)
    return Path(file)


def test_the_child_overrides_the_parent(here: Path) -> None:
    child(
        "extends: base/parent.yaml\nname: child\nstage1: {epochs: 1}\nvision: {layer: -2}\nconnector: {name: linear}\n"
    )
    recipe = load_recipe()
    assert recipe.name == "child"
    assert (recipe.stage1.epochs, recipe.stage1.batch_size) == (1, 64)
    assert recipe.vision.spec()["layer"] == -2
    assert recipe.vision.spec()["model"] == "a/b"
    assert recipe.connector.spec() == {"name": "linear", "pixel_shuffle": 1, "norm": False}, (
        "another component replaces the parent's"
    )
    assert recipe.language.template == "plain"
    assert recipe.run_dir == here / "runs/child"


def test_each_files_paths_are_relative_to_it(here: Path) -> None:
    child("extends: base/parent.yaml\ndata: {stage2: [{name: llava-json, path: y.json}]}\n")
    recipe = load_recipe()
    assert recipe.name == "parent"
    assert recipe.data.stage1[0].spec()["path"] == str(here / "base/x.json")
    assert recipe.data.stage2[0].spec()["path"] == str(here / "y.json")


def test_paths_of_a_registered_parent_are_relative_to_the_child(here: Path) -> None:
    (here / "sub").mkdir()
    child("extends: llava-v1.5-7b\nname: mine\n", "sub/recipe.yaml")
    recipe = load_recipe("sub/recipe.yaml")
    assert recipe.data.stage1[0].spec()["images"].startswith(str(here / "sub/data"))
    assert recipe.run_dir == here / "sub/runs/mine"


def test_a_recipe_with_another_name_does_not_inherit_run_dir(here: Path) -> None:
    (here / "base/parent.yaml").write_text(PARENT + "run_dir: out\n")
    child("extends: base/parent.yaml\n")
    assert load_recipe().run_dir == here / "base/out"
    child("extends: base/parent.yaml\nname: child\n")
    assert load_recipe().run_dir == here / "runs/child"


def test_grandparents(here: Path) -> None:
    (here / "base/middle.yaml").write_text("extends: parent.yaml\nstage1: {epochs: 2}\n")
    child("extends: base/middle.yaml\nseed: 4\n")
    recipe = load_recipe()
    assert (recipe.stage1.epochs, recipe.stage1.batch_size, recipe.seed) == (2, 64, 4)


def test_problems_have_the_line_of_the_file_that_defines_the_key(here: Path) -> None:
    (here / "base/parent.yaml").write_text(
        PARENT.replace("epochs: 3", "epochs: x").replace("pixel_shuffle: 2", "pixel_shuffle: x")
    )
    child("extends: base/parent.yaml\nconnector: {pixel_shuffle: y}\nseed: z\n")
    assert [(problem.where, problem.key) for problem in check()] == [
        ("base/parent.yaml:6", "stage1.epochs"),
        ("recipe.yaml:2", "connector.pixel_shuffle"),
        ("recipe.yaml:3", "seed"),
    ]


@pytest.mark.parametrize(
    ("extends", "term"),
    [
        ("llava-v1.5-7", "did you mean 'llava-v1.5-7b'?"),
        ("none.yaml", "none.yaml"),
        ("base/", "base"),
        ("3", "name or path"),
        ("[a, b]", "name or path"),
        ("''", "name or path"),
        ("recipe.yaml", "recipe.yaml → recipe.yaml"),
    ],
)
def test_invalid_parents(extends: str, term: str) -> None:
    child(f"name: child\nextends: {extends}\n")
    (problem,) = check()
    assert (problem.where, problem.key) == ("recipe.yaml:2", "extends")
    assert term in problem.why


def test_a_cycle_lists_its_files(here: Path) -> None:
    child("extends: base/b.yaml\n", "a.yaml")
    (here / "base/b.yaml").write_text("# b\nextends: ../a.yaml\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe("a.yaml")
    assert "a.yaml → base/b.yaml → a.yaml" in str(caught.value)


def test_a_broken_parent_is_reported_with_its_file(here: Path) -> None:
    (here / "base/parent.yaml").write_text("a: [1\n")
    child("extends: base/parent.yaml\n")
    (problem,) = check()
    assert problem.where == "base/parent.yaml:2"
