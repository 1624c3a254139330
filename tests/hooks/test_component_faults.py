"""Components of plugins that don't do what their Protocol declares: one line, and the others still work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llavactl.testing import run_cli

SHORT = """
from llavactl import hookimpl

class Short:
    def __init__(self, options):
        pass

    def fraction(self, step):
        return 1.0

@hookimpl
def register_schedules(register):
    register("short", "short_schedule:Short")
"""

RAISING = """
from llavactl import hookimpl

class Raising:
    reload = None

    def __init__(self, options):
        pass

    def recognise(self, folder):
        raise ValueError("no idea")

    def read(self, folder, model):
        pass

    def write(self, model, to):
        pass

@hookimpl
def register_formats(register):
    register("a-raising-format", "raising_format:Raising")
"""


def test_a_method_with_other_parameters_is_refused_where_the_component_is_created(toy: Path) -> None:
    plugin = toy / "short_schedule.py"
    plugin.write_text(SHORT, encoding="utf-8")
    command = ["train", "--stage", "1", "-r", str(toy / "recipe.yaml"), "-o", "stage1.schedule=short"]
    result = run_cli("--plugin", str(plugin), *command, "-o", "features.mode=live")
    assert result.exit_code == 1
    (line,) = (line for line in result.stderr.splitlines() if "fraction" in line)
    assert all(
        part in line for part in ("short_schedule", "fraction(step)", "short_schedule.py:8", "fraction(step, steps)")
    )
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("model_type", ["llava", "unknown"])
def test_a_format_that_raises_leaves_the_folder_to_the_others(tmp_path: Path, model_type: str) -> None:
    plugin = tmp_path / "raising_format.py"
    plugin.write_text(RAISING, encoding="utf-8")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": model_type, "vision_config": {}}), encoding="utf-8")
    result = run_cli("--plugin", str(plugin), "chat", "--model", str(model), "--prompt", "hi")
    assert result.exit_code == 1
    (warning,) = (line for line in result.stderr.splitlines() if "no idea" in line)
    assert all(part in warning for part in ("raising_format", "recognise", "raising_format.py:11"))
    assert ("unknown checkpoint format" in result.stderr) == (model_type == "unknown")
    assert "Traceback" not in result.stderr
