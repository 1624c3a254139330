"""The built-in recipes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from llavactl.core import plugins
from llavactl.core.registry import registry
from llavactl.recipe.frame import Recipe
from llavactl.recipe.load import check, dump, load_recipe

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))


def test_the_registered_recipes_are_the_files() -> None:
    registered = [entry.name for entry in registry().entries["recipes"].values() if entry.plugin == plugins.BUILTIN]
    assert sorted(registered) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_it_is_valid_without_its_data(name: str) -> None:
    assert check(name) == []


@pytest.mark.parametrize("name", NAMES)
def test_it_starts_with_its_command(name: str) -> None:
    first = (ROOT / f"recipes/{name}.yaml").read_text().splitlines()[0]
    assert first == f"# llavactl run -r {name}"


@pytest.mark.parametrize("name", NAMES)
def test_its_name_is_its_file_name(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.run_dir.name == name


@pytest.mark.parametrize("name", NAMES)
def test_the_resolved_recipe_is_equal(name: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(dump(load_recipe(name)))
    assert load_recipe(tmp_path / "recipe.yaml") == load_recipe(name)


@pytest.fixture(scope="module")
def v1() -> Recipe:
    return load_recipe("llava-v1-7b")


@pytest.fixture(scope="module")
def v15() -> Recipe:
    return load_recipe("llava-v1.5-7b")


def test_v1_has_the_values_of_the_paper(v1: Recipe) -> None:
    assert v1.vision.spec() == {
        "name": "clip",
        "model": "openai/clip-vit-large-patch14",
        "layer": -2,
        "select": "patch",
        "image": "square",
    }
    assert v1.connector.name == "linear"
    one, two = v1.stage1, v1.stage2
    assert (one.learning_rate, one.batch_size, one.epochs) == (2e-3, 128, 1)
    assert (two.learning_rate, two.batch_size, two.epochs) == (2e-5, 32, 3)
    assert (one.image_order, two.image_order) == ("random", "random")


def test_v15_has_the_values_of_the_paper(v15: Recipe) -> None:
    assert v15.vision.spec()["model"].endswith("-336")
    assert v15.connector.name == "mlp2x-gelu"
    one, two = v15.stage1, v15.stage2
    assert (one.learning_rate, one.batch_size, one.epochs, one.template) == (1e-3, 256, 1, "plain")
    assert (two.learning_rate, two.batch_size, two.epochs, two.template) == (2e-5, 128, 1, None)
    assert (one.image, two.image or v15.vision.image) == ("square", "pad"), "cropped in stage 1, padded in stage 2"
    assert (one.image_order, two.image_order) == ("first", "first")


@pytest.mark.parametrize("name", NAMES)
def test_common_values(name: str) -> None:
    recipe = load_recipe(name)
    for stage in (recipe.stage1, recipe.stage2):
        assert (stage.warmup, stage.weight_decay, stage.max_length, stage.precision) == (0.03, 0, 2048, "bfloat16")


def test_the_13b_differs_only_in_its_language_model(v15: Recipe) -> None:
    large = load_recipe("llava-v1.5-13b").model_dump(exclude={"name", "run_dir"})
    small = v15.model_dump(exclude={"name", "run_dir"})
    assert large.pop("language")["model"] == "lmsys/vicuna-13b-v1.5"
    assert small.pop("language")["model"] == "lmsys/vicuna-7b-v1.5"
    assert large == small


def test_scienceqa_has_the_values_of_the_script(v1: Recipe) -> None:
    recipe = load_recipe("llava-v1-13b-scienceqa")
    assert (recipe.stage2.epochs, recipe.stage2.batch_size, recipe.stage2.learning_rate) == (12, 128, 2e-5)
    assert recipe.language.spec()["model"] == "lmsys/vicuna-13b-v1.3"
    assert (recipe.stage1, recipe.vision, recipe.connector) == (v1.stage1, v1.vision, v1.connector)
    assert [source.name for source in recipe.data.stage2] == ["scienceqa"]
    assert [task.spec()["prompt"] for task in recipe.eval.tasks] == ["qcm-lea"]


def test_lora_has_the_values_of_the_script(v15: Recipe) -> None:
    lora = load_recipe("llava-v1.5-7b-lora")
    two = lora.stage2
    assert two.method == "lora"
    assert (two.lora.r, two.lora.alpha, two.lora.dropout) == (128, 256, 0.05)
    assert (two.learning_rate, two.connector_learning_rate) == (2e-4, 2e-5)
    assert lora.stage1 == v15.stage1


def test_qlora_differs_from_lora_only_in_method_and_memory() -> None:
    lora, qlora = (load_recipe(f"llava-v1.5-7b-{method}") for method in ("lora", "qlora"))
    assert qlora.stage2.method == "qlora"
    excluded = {
        "stage1": {"micro_batch_tokens"},
        "stage2": {"method", "micro_batch_tokens"},
        "name": True,
        "run_dir": True,
    }
    assert qlora.model_dump(exclude=excluded) == lora.model_dump(exclude=excluded)


def test_a_wheel_contains_the_recipes(tmp_path: Path) -> None:
    """In the folder layout of an installed wheel, without a checkout."""
    included = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    site = tmp_path / "site"
    for package in included["packages"]:
        shutil.copytree(ROOT / package, site / package, ignore=shutil.ignore_patterns("__pycache__"))
    for source, target in included["force-include"].items():
        shutil.copytree(ROOT / source, site / target)
    program = "import llavactl, llavactl.cli; print(llavactl.__file__); "
    program += "llavactl.cli.main(['recipes', 'list', '--json'])"
    environment = {**os.environ, "PYTHONPATH": str(site), "LLAVACTL_PLUGINS": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    where, _, listed = done.stdout.partition("\n")
    assert where.startswith(str(site))
    assert [each["name"] for each in json.loads(listed)] == NAMES
    program = f"from llavactl.recipe.load import check; print([check(name) for name in {NAMES}])"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str([[]] * len(NAMES))
