"""A new training stage is one class and one field of ``StageSections``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import llavactl
from llavactl.testing import toy_recipe

CLASS = '''class Stage3(Stage2):
    """Stage 3."""

    init: Literal["stage2", "scratch"] | ModelId = "stage2"


'''
FIELD = '    stage3: Stage3 = Field(Stage3(), description="settings of stage 3")\n'
DATA = "data.stage3=[{name: llava-json, path: records.json, images: images/}]"
TRAINING = ("stage3.max_steps=2", "stage3.batch_size=4", "stage3.precision=float32")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with a copy of the package that has a third stage."""
    package = Path(llavactl.__file__).parent
    shutil.copytree(package, tmp_path / "llavactl", ignore=shutil.ignore_patterns("__pycache__"))
    file = tmp_path / "llavactl" / "recipe" / "stages.py"
    text = file.read_text(encoding="utf-8")
    before, registration, after = text.partition("class StageSections(Section):")
    assert registration
    head, union, middle = before.partition("AnyStage = ")
    fields, constant, rest = after.partition("\n\nSTAGES: ")
    assert constant
    file.write_text(head + CLASS + union + middle + registration + fields + FIELD + constant + rest, encoding="utf-8")
    return tmp_path


def run(package: Path, cwd: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(package), "LLAVACTL_PLUGINS": ""}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


SHOWN = """
import json, sys
from llavactl.testing import run_cli
for arguments in json.loads(sys.argv[1]):
    result = run_cli(*arguments)
    assert result.exit_code == 0, result.stderr
    print(json.dumps(result.stdout))
"""


def test_a_third_stage_is_part_of_recipes_and_commands(package: Path, toy: Path) -> None:
    shown = ["recipes", "show", "--json", "-o", DATA, "-o", "stage3.epochs=2"]
    commands = [["recipes", "check", "-o", DATA], shown, ["recipes", "schema"], ["train", "--help"]]
    outputs = run(package, toy, "-c", SHOWN, json.dumps(commands))
    _, recipe, schema, train_help = map(json.loads, outputs.splitlines())
    assert json.loads(recipe)["stage3"]["epochs"] == 2
    assert json.loads(recipe)["data"]["stage3"][0]["name"] == "llava-json"
    assert "stage3" in json.loads(schema)["properties"]
    assert "1|2|3" in train_help


@pytest.mark.slow
def test_a_third_stage_is_trained_from_the_second(package: Path, tmp_path: Path) -> None:
    folder = toy_recipe(tmp_path / "toy", photos=4).parent
    overrides = [part for override in (DATA, *TRAINING) for part in ("-o", override)]
    report = json.loads(run(package, folder, "-m", "llavactl.cli", "run", "--json", *overrides))
    assert report["model"].endswith("stage3/model")
    description = json.loads((folder / "runs/toy/stage3/model/llavactl.json").read_text(encoding="utf-8"))
    assert description["stage"] == 3
    (folder / "runs/toy/stage2/model/llavactl.json").unlink()
    refused = subprocess.run(
        [sys.executable, "-m", "llavactl.cli", "train", "--stage", "3", *overrides],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(package), "LLAVACTL_PLUGINS": ""},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert refused.returncode == 1
    assert "--stage 2" in refused.stderr
