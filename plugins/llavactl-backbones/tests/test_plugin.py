"""Registration, and training from features of every family through the command line."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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


def test_every_component_can_be_imported(saved: Callable[[str], Path]) -> None:
    options: dict[str, dict[str, Any]] = {
        "siglip": {"model": str(saved("siglip"))},
        "dinov2": {"model": str(saved("dinov2")), "image_size": 28},
    }
    assert check_plugin("backbones", options) == []
    assert [entry.summary for entry in registry() if entry.plugin == "backbones" and not entry.summary] == []


@pytest.mark.parametrize("family", RECIPES)
def test_extract_and_train(saved: Callable[[str], Path], family: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Models are named relative to the recipe, also those of the parts of ``fused``."""
    monkeypatch.setenv("LLAVACTL_HOME", str(tmp_path / "home"))
    recipe = toy_recipe(tmp_path / "recipe", photos=6)
    for name in ("dinov2", "siglip") if family == "fused" else (family,):
        shutil.copytree(saved(name), recipe.parent / name)
    lines = [line for line in recipe.read_text().splitlines() if not line.startswith("vision:")]
    recipe.write_text("\n".join([*lines, f"vision: {RECIPES[family]}"]))
    checked = run_cli("recipes", "check", "-r", str(recipe), cwd=tmp_path)
    assert checked.exit_code == 0, checked.stderr
    extracted = run_cli("extract", "-r", str(recipe), "--json", cwd=tmp_path)
    assert extracted.exit_code == 0, extracted.stderr
    trained = run_cli("train", "-r", str(recipe), "--stage", "1", "-o", "stage1.max_steps=2", "--json", cwd=tmp_path)
    assert trained.exit_code == 0, trained.stderr
    assert trained.json()["steps"] == 2
