"""The recipes that come with llavactl."""

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
OURS = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))


def test_every_file_is_registered_and_the_reverse() -> None:
    registered = [entry.name for entry in registry().entries["recipes"].values() if entry.plugin == plugins.BUILTIN]
    assert sorted(registered) == OURS


@pytest.mark.parametrize("name", OURS)
def test_it_is_sound_though_its_data_is_elsewhere(name: str) -> None:
    assert check(name) == []


@pytest.mark.parametrize("name", OURS)
def test_it_opens_with_its_command(name: str) -> None:
    first = (ROOT / f"recipes/{name}.yaml").read_text().splitlines()[0]
    assert first == f"# llavactl run -r {name}"


@pytest.mark.parametrize("name", OURS)
def test_its_name_is_its_own(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.run_dir.name == name


@pytest.mark.parametrize("name", OURS)
def test_resolved_it_loads_to_the_same(name: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(dump(load_recipe(name)))
    assert load_recipe(tmp_path / "recipe.yaml") == load_recipe(name)


@pytest.fixture(scope="module")
def v1() -> Recipe:
    return load_recipe("llava-v1-7b")


@pytest.fixture(scope="module")
def v15() -> Recipe:
    return load_recipe("llava-v1.5-7b")


def test_v1_is_the_papers(v1: Recipe) -> None:
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


def test_v15_is_the_papers(v15: Recipe) -> None:
    assert v15.vision.spec()["model"].endswith("-336")
    assert v15.connector.name == "mlp2x-gelu"
    one, two = v15.stage1, v15.stage2
    assert (one.learning_rate, one.batch_size, one.epochs, one.template) == (1e-3, 256, 1, "plain")
    assert (two.learning_rate, two.batch_size, two.epochs, two.template) == (2e-5, 128, 1, None)
    assert (one.image, two.image or v15.vision.image) == ("square", "pad"), "cropped in stage 1, padded in stage 2"
    assert (one.image_order, two.image_order) == ("first", "first")


@pytest.mark.parametrize("name", OURS)
def test_what_all_have_in_common(name: str) -> None:
    recipe = load_recipe(name)
    for stage in (recipe.stage1, recipe.stage2):
        assert (stage.warmup, stage.weight_decay, stage.max_length, stage.precision) == (0.03, 0, 2048, "bfloat16")


def test_the_13b_differs_in_its_language_model_alone(v15: Recipe) -> None:
    ours = load_recipe("llava-v1.5-13b").model_dump(exclude={"name", "run_dir"})
    theirs = v15.model_dump(exclude={"name", "run_dir"})
    assert ours.pop("language")["model"] == "lmsys/vicuna-13b-v1.5"
    assert theirs.pop("language")["model"] == "lmsys/vicuna-7b-v1.5"
    assert ours == theirs


def test_scienceqa_is_the_scripts(v1: Recipe) -> None:
    ours = load_recipe("llava-v1-13b-scienceqa")
    assert (ours.stage2.epochs, ours.stage2.batch_size, ours.stage2.learning_rate) == (12, 128, 2e-5)
    assert ours.language.spec()["model"] == "lmsys/vicuna-13b-v1.3"
    assert (ours.stage1, ours.vision, ours.connector) == (v1.stage1, v1.vision, v1.connector)
    assert [source.name for source in ours.data.stage2] == ["scienceqa"]
    assert [task.spec()["prompt"] for task in ours.eval.tasks] == ["qcm-lea"]


def test_lora_is_the_scripts(v15: Recipe) -> None:
    lora = load_recipe("llava-v1.5-7b-lora")
    two = lora.stage2
    assert two.method == "lora"
    assert (two.lora.r, two.lora.alpha, two.lora.dropout) == (128, 256, 0.05)
    assert (two.learning_rate, two.connector_learning_rate) == (2e-4, 2e-5)
    assert lora.stage1 == v15.stage1


def test_a_wheel_has_them_too(tmp_path: Path) -> None:
    """The layout that pyproject gives a wheel, unpacked; no checkout beside it."""
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
    assert [each["name"] for each in json.loads(listed)] == OURS
    program = f"from llavactl.recipe.load import check; print([check(name) for name in {OURS}])"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str([[]] * len(OURS))
