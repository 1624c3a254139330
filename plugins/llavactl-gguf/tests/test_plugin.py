"""The package as a plugin of llavactl."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from llavactl_gguf.format import Gguf, GgufOptions

from llavactl import ModelError
from llavactl.testing import check_format, check_plugin, run_cli, toy_model, toy_recipe


def test_the_plugin_passes_the_conformance_kit() -> None:
    assert check_plugin("gguf") == []
    checked = run_cli("plugins", "check", "gguf", "--json")
    assert checked.exit_code == 0, checked.stderr


def test_the_format_passes_the_conformance_kit() -> None:
    assert check_format(Gguf(GgufOptions(type="f32")), reads=False) == []


@pytest.mark.parametrize("module", ["llavactl_gguf", "llavactl_gguf.format"])
def test_importing_the_plugin_is_light(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'gguf', 'numpy'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_format_does_not_read(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        Gguf(GgufOptions()).read(tmp_path, tmp_path / "model")


@pytest.mark.parametrize(
    ("override", "named"),
    [("connector.norm=true", "norm"), ("vision.select=cls-patch", "cls-patch"), ("name=toy", None)],
)
def test_recipes_are_checked_before_training(tmp_path: Path, override: str, named: str | None) -> None:
    recipe = toy_recipe(tmp_path)
    recipe.write_text(recipe.read_text() + "export: [{format: gguf, to: out}]\n")
    result = run_cli("recipes", "check", "-r", str(recipe), "-o", override)
    assert result.exit_code == (0 if named is None else 1), result.stderr
    assert named is None or named in result.stdout + result.stderr


def test_the_command_writes_both_files(tmp_path: Path) -> None:
    model = toy_model(tmp_path / "toy", method="lora")
    arguments = ["export", "--model", str(model), "--format", "gguf", "--to", str(tmp_path / "out"), "--no-verify"]
    written = run_cli(*arguments, "-t", "type=q8_0", "--json")
    assert written.exit_code == 0, written.stderr
    assert {"model-q8_0.gguf", "mmproj-f16.gguf", "README.md"} <= {*written.json()["files"]}
    record = json.loads((tmp_path / "out/llavactl_export.json").read_text())
    assert record["options"]["type"] == "q8_0"
    assert record["template"] == "vicuna-v1"
    card = (tmp_path / "out/README.md").read_text()
    assert "llama-server -m model-q8_0.gguf --mmproj mmproj-f16.gguf" in card
    assert all(f"- {sentence}" in card for sentence in record["limitations"])
    assert len(record["limitations"]) == 3
    assert "llavactl export" in card
    refused = run_cli(*arguments, "-t", "type=q3")
    assert refused.exit_code == 1
    assert "type" in refused.stderr
