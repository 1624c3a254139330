"""The description of a model folder names the plugins of its components."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llavactl.core import model_description, plugin_files, plugins
from llavactl.core.errors import ModelError
from llavactl.core.model_description import component_plugins, read_description, require_component
from llavactl.core.paths import read_json, write_json
from llavactl.testing import run_cli

CODE = """
from llavactl import hookimpl

@hookimpl
def register_connectors(register):
    register("own", "{module}:Own", summary="x")

@hookimpl
def register_templates(register):
    register("own", "{module}:Own", summary="x")
"""

COMPONENTS = {"vision": {"name": "clip"}, "connector": {"name": "own"}, "language": {"name": "hf"}, "template": "own"}


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    file = tmp_path / "own_parts.py"
    file.write_text(CODE.replace("{module}", file.stem))
    monkeypatch.setenv(plugin_files.VARIABLE, str(file))
    plugins.reload()
    yield file
    monkeypatch.undo()
    plugins.reload()


def folder_with(tmp_path: Path, changes: dict[str, Any]) -> Path:
    folder = tmp_path / "model"
    required = dict.fromkeys(model_description.ModelDescription.__required_keys__)
    values = {**required, "format": model_description.FORMAT, "method": "connector", **COMPONENTS, **changes}
    folder.mkdir()
    write_json(folder / model_description.DESCRIPTION, values)
    return folder


def test_the_plugins_of_components_are_recorded(loaded: Path) -> None:
    recorded = component_plugins(COMPONENTS)
    assert recorded.keys() == {"connectors", "templates"}
    for origin in recorded.values():
        assert origin["plugin"] == loaded.stem
        assert origin["version"] == plugin_files.version(loaded)
        assert Path(origin["package"]).name == loaded.name
    read_description(folder_with(loaded.parent, {"plugins": recorded}))


@pytest.mark.parametrize(
    ("origin", "parts"),
    [
        (
            {"plugin": "birds", "package": "llavactl-birds", "version": "1.2"},
            ["birds", "1.2", "install llavactl-birds"],
        ),
        ({"plugin": "own", "package": "own.py", "version": "1a"}, ["own", "1a", "--plugin own.py"]),
        (None, ["--plugin", "install"]),
    ],
)
def test_a_missing_plugin_is_named(tmp_path: Path, origin: Any, parts: list[str]) -> None:
    folder = folder_with(tmp_path, {"plugins": {"connectors": origin, "templates": origin}} if origin else {})
    with pytest.raises(ModelError) as raised:
        read_description(folder)
    assert all(part in raised.value.hint for part in parts)
    assert model_description.DESCRIPTION in raised.value.message
    described = read_json(folder / model_description.DESCRIPTION)
    with pytest.raises(ModelError) as raised:
        require_component(folder, described, "template")
    assert all(part in raised.value.hint for part in parts)


@pytest.mark.parametrize("kind", ["connectors", "optimizers", "sources"])
def test_an_unknown_component_may_be_that_of_a_plugin(kind: str) -> None:
    from llavactl.core.errors import RecipeError
    from llavactl.core.registry import registry

    with pytest.raises(RecipeError) as raised:
        registry().get(kind, "own")
    assert "--plugin" in raised.value.hint


def test_training_records_the_plugin(tmp_path: Path) -> None:
    from llavactl.testing import toy_recipe

    file = tmp_path / "own_schedule.py"
    file.write_text(CONNECTOR)
    toy_recipe(tmp_path)
    run_cli("extract", cwd=tmp_path)
    arguments = ("train", "--stage", "1", "-o", "connector.name=own-mean", "-o", "stage1.max_steps=1")
    done = run_cli("--plugin", str(file), *arguments, cwd=tmp_path)
    assert done.exit_code == 0, done.stderr
    model = tmp_path / "runs/toy/stage1/model"
    assert read_json(model / "llavactl.json")["plugins"]["connectors"]["plugin"] == file.stem
    failed = run_cli("chat", "--model", str(model), "--prompt", "hello", cwd=tmp_path)
    assert failed.exit_code == 1
    assert file.name in failed.stderr


CONNECTOR = """
from llavactl import hookimpl

@hookimpl
def register_connectors(register):
    register("own-mean", "own_schedule:Mean", summary="x")

class Mean:
    def __init__(self, options):
        pass

    def tokens(self, shape):
        return shape.patches

    def build(self, shape, language_width):
        from torch import nn

        return nn.Linear(shape.width, language_width)
"""
