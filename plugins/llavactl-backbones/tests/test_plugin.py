"""Registration, and training from features of every family through the command line."""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llavactl_backbones.small_models import examples

from llavactl import registry
from llavactl.testing import check_plugin, run_cli, toy_recipe

HEAVY = ["torch", "transformers", "timm", "numpy", "PIL", "pydantic"]

RECIPES = {
    "siglip": "{name: siglip, model: siglip}",
    "siglip2": "{name: siglip2, model: siglip2}",
    "siglip2-naflex": "{name: siglip2-naflex, model: siglip2-naflex, max_num_patches: 16}",
    "dinov2": "{name: dinov2, model: dinov2, image_size: 28}",
    "dinov2-registers": "{name: dinov2, model: dinov2-registers, image_size: 28, select: cls-patch}",
    "dinov3": "{name: dinov3, model: dinov3, image_size: 24}",
    "fused": "{name: fused, parts: [{name: dinov2, model: dinov2, image_size: 28}, {name: siglip, model: siglip}]}",
}


def test_the_entry_point_imports_nothing_heavy() -> None:
    code = f"import llavactl_backbones, sys; print([name for name in {HEAVY} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.timm
def test_every_component_conforms() -> None:
    """With the models of ``check_examples``, which `llavactl plugins check` uses as well."""
    assert check_plugin("backbones") == []
    with tempfile.TemporaryDirectory() as folder:
        checked = set(examples(Path(folder)))
    registered = {entry.name for entry in registry() if entry.plugin == "backbones"}
    assert registered - checked == (set() if importlib.util.find_spec("timm") else {"timm", "perception-encoder"})


def with_vision(recipe: Path, vision: str) -> Path:
    """``recipe`` with another vision backbone."""
    lines = [line for line in recipe.read_text().splitlines() if not line.startswith("vision:")]
    recipe.write_text("\n".join([*lines, f"vision: {vision}"]))
    return recipe


@pytest.mark.parametrize(
    "family",
    [name if name in ("siglip2-naflex", "fused") else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES],
)
def test_extract_and_train(saved: Callable[[str], Path], family: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Models are named relative to the recipe, also those of the parts of ``fused``."""
    monkeypatch.setenv("LLAVACTL_HOME", str(tmp_path / "home"))
    recipe = with_vision(toy_recipe(tmp_path / "recipe", photos=6), RECIPES[family])
    for name in ("dinov2", "siglip") if family == "fused" else (family,):
        shutil.copytree(saved(name), recipe.parent / name)
    checked = run_cli("recipes", "check", "-r", str(recipe), cwd=tmp_path)
    assert checked.exit_code == 0, checked.stderr
    extracted = run_cli("extract", "-r", str(recipe), "--json", cwd=tmp_path)
    assert extracted.exit_code == 0, extracted.stderr
    trained = run_cli("train", "-r", str(recipe), "--stage", "1", "-o", "stage1.max_steps=2", "--json", cwd=tmp_path)
    assert trained.exit_code == 0, trained.stderr
    assert trained.json()["steps"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "vision",
    [
        "{name: siglip, model: siglip}",
        "{name: dinov2, model: dinov2, image_size: 56}",
        "{name: dinov2, model: dinov2, image_size: 60, image: square}",
        "{name: dinov2, model: dinov2-registers, image_size: 28, select: cls-patch}",
    ],
)
def test_export(saved: Callable[[str], Path], vision: str, tmp_path: Path, monkeypatch: Any) -> None:
    """transformers computes the same logits from the export, at another image size than the checkpoint's too."""
    monkeypatch.setenv("LLAVACTL_HOME", str(tmp_path / "home"))
    recipe = with_vision(toy_recipe(tmp_path / "recipe", photos=4), vision)
    for name in ("siglip", "dinov2", "dinov2-registers"):
        shutil.copytree(saved(name), recipe.parent / name)
    short = ["-o", "stage1.max_steps=1", "-o", "stage2.max_steps=1", "-o", "export=[{format: hf, to: out}]"]
    finished = run_cli("run", "-r", str(recipe), *short, "--json", cwd=tmp_path)
    assert finished.exit_code == 0, finished.stderr
    (exported,) = finished.json()["export"]
    assert exported["verified"]["compared"]["pixels"]["value"] == 0
    assert exported["verified"]["faults"] == []


def test_what_cannot_be_exported_is_refused_before_training(saved: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = with_vision(toy_recipe(tmp_path / "recipe", photos=4), RECIPES["siglip2-naflex"])
    shutil.copytree(saved("siglip2-naflex"), recipe.parent / "siglip2-naflex")
    checked = run_cli("recipes", "check", "-r", str(recipe), "-o", "export=[{format: hf, to: out}]", "--json")
    assert checked.exit_code == 1
    assert [problem["key"] for problem in checked.json()["problems"]] == ["export.0.format"]
