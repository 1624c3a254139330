"""``--quiet`` and ``--verbose``, before and after the command."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest

from llavactl.testing import run_cli, toy_recipe

LINE = re.compile(r"llavactl \d\d:\d\d:\d\d\.\d{3}: ")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_recipe(tmp_path_factory.mktemp("toy"), photos=12).parent


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restores the variable that --quiet sets for huggingface_hub."""
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")


TRAIN = ("train", "--stage", "1", "-o", "features.mode=live", "-o", "stage1.max_steps=2")


@pytest.mark.parametrize("arguments", [("-q", *TRAIN), (*TRAIN, "-q"), (*TRAIN, "--quiet"), ("-v", *TRAIN, "-q")])
def test_quiet_prints_only_the_result(arguments: tuple[str, ...], toy: Path) -> None:
    done = run_cli(*arguments, "--json", "--resume", "never", cwd=toy)
    assert done.exit_code == 0
    assert done.stderr == ""
    assert json.loads(done.stdout)["steps"] == 2


def test_quiet_keeps_warnings_and_errors(tmp_path: Path) -> None:
    toy = toy_recipe(tmp_path, photos=4).parent
    done = run_cli(*TRAIN, "-q", cwd=toy)
    assert done.exit_code == 0
    (warning,) = done.stderr.splitlines()
    assert "held out for validation: none" in warning
    failed = run_cli("train", "--stage", "1", "-q", "-r", "no-such-recipe", cwd=toy)
    assert failed.exit_code == 1
    assert failed.stderr.startswith("error: ")
    assert "Traceback" not in failed.stderr


@pytest.mark.parametrize("arguments", [("-v", *TRAIN), (*TRAIN, "--verbose"), ("-q", *TRAIN, "-v")])
def test_verbose_logs_details_with_the_time(arguments: tuple[str, ...], toy: Path) -> None:
    done = run_cli(*arguments, "--resume", "never", cwd=toy)
    assert done.exit_code == 0
    lines = done.stderr.splitlines()
    assert lines
    assert all(LINE.match(line) for line in lines)
    for detail in (str(toy / "recipe.yaml"), "cpu", "float32"):
        assert any(detail in line for line in lines), detail


def test_the_level_of_a_command_does_not_outlive_it(toy: Path) -> None:
    run_cli("recipes", "list", "-v")
    assert logging.getLogger("llavactl").level == logging.DEBUG
    run_cli("recipes", "list")
    assert logging.getLogger("llavactl").level == logging.INFO


def test_verbose_shows_the_traceback_of_an_error(tmp_path: Path) -> None:
    done = run_cli("recipes", "show", "-v", cwd=tmp_path)
    assert done.exit_code == 1
    assert "Traceback" in done.stderr
    *_, error, hint = done.stderr.splitlines()
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
