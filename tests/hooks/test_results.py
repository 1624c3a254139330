"""What hooks return is checked: one line with the hook, the plugin, its line and what was expected."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from llavactl.core.errors import Problem
from llavactl.core.hook_rules import result_fault
from llavactl.core.hookspecs import TrainingRequest
from llavactl.testing import run_cli

HEAD = "from llavactl import Options, Problem, hookimpl\nfrom pydantic import Field\n\n"
TRAIN = ["train", "--stage", "1", "-o", "features.mode=live", "-o", "stage1.max_steps=2"]


def plugin_file(folder: Path, name: str, code: str) -> str:
    (folder / f"{name}.py").write_text(HEAD + code, encoding="utf-8")
    return f"{name}.py"


def faults(stderr: str, name: str) -> list[str]:
    return [line for line in stderr.splitlines() if f"plugin {name}" in line]


@pytest.mark.parametrize(
    ("hook", "result", "valid"),
    [
        ("check_recipe", None, True),
        ("check_recipe", [Problem("", "seed", "no")], True),
        ("check_recipe", "seed: no", False),
        ("check_recipe", ["seed: no"], False),
        ("check_recipe", Problem("", "seed", "no"), False),
        ("check_recipe", False, False),
        ("plugin_options", "a:B", True),
        ("plugin_options", Problem, False),
        ("check_examples", {"sources": {"birds": {"path": "a"}}}, True),
        ("check_examples", {"birds": {"path": "a"}}, False),
        ("check_examples", [], False),
        *(("control_training", request, True) for request in get_args(TrainingRequest)),
        ("control_training", ("stop", "evaluate"), True),
        ("control_training", "halt", False),
        ("control_training", True, False),
        ("train_logged", "anything", True),
    ],
)
def test_the_type_of_a_result(hook: str, result: Any, valid: bool) -> None:
    assert (result_fault(hook, result) == "") == valid


@pytest.mark.parametrize(
    ("name", "result"), [("wrong_text", "'text'"), ("wrong_item", "[1]"), ("wrong_key", "[Problem('', 5, 'no')]")]
)
def test_a_wrong_result_of_check_recipe_is_one_line(toy: Path, name: str, result: str) -> None:
    file = plugin_file(toy, name, f"@hookimpl\ndef check_recipe(recipe):\n    return {result}\n")
    checked = run_cli("--plugin", file, "recipes", "check", cwd=toy)
    assert checked.exit_code == 0, checked.stderr
    (line,) = faults(checked.stderr, name)
    assert "AttributeError" not in line
    assert f"check_recipe ({file}:" in line
    assert "expected" in line


@pytest.mark.parametrize(
    ("name", "result"),
    [
        ("wrong_class", "WatchOptions"),
        ("wrong_module", "'WatchOptions'"),
        ("wrong_name", "'wrong_name:Nope'"),
        ("wrong_model", "'json:dumps'"),
    ],
)
def test_a_wrong_result_of_plugin_options_is_one_line(toy: Path, name: str, result: str) -> None:
    code = f"class WatchOptions(Options):\n    pass\n\n@hookimpl\ndef plugin_options():\n    return {result}\n"
    file = plugin_file(toy, name, code)
    checked = run_cli("--plugin", file, "recipes", "check", "-o", f"plugins.{name}={{}}", cwd=toy)
    assert checked.exit_code == 1
    (line,) = faults(checked.stdout, name)
    assert f"plugin_options ({file}:" in line


def test_a_wrong_request_is_reported_once_with_the_requests_that_exist(toy: Path) -> None:
    file = plugin_file(toy, "wrong_request", "@hookimpl\ndef control_training(lines):\n    return 'halt'\n")
    trained = run_cli("--plugin", file, *TRAIN, cwd=toy)
    assert trained.exit_code == 0, trained.stderr
    line, count = faults(trained.stderr, "wrong_request")
    assert all(part in line for part in (f"control_training ({file}:4)", "'halt'", *get_args(TrainingRequest)))
    assert "failed 3 times" in count  # two steps and a validation


def test_missing_options_of_observers_are_reported_once_with_the_section(toy: Path) -> None:
    """The observers that take options aren't called; others are."""
    code = """
class WatchOptions(Options):
    every: int = Field(description="interval")

@hookimpl
def plugin_options():
    return "needs_options:WatchOptions"

@hookimpl
def train_logged(line, options):
    open("seen.txt", "a").write(str(options.every))

@hookimpl
def train_finished(report):
    open("finished.txt", "w").close()
"""
    file = plugin_file(toy, "needs_options", code)
    trained = run_cli("--plugin", file, *TRAIN, cwd=toy)
    assert trained.exit_code == 0, trained.stderr
    (line,) = faults(trained.stderr, "needs_options")
    assert "plugins: {needs_options: {every: …}}" in line
    assert (toy / "finished.txt").exists()
    assert not (toy / "seen.txt").exists()
    (line,) = faults(run_cli("--plugin", file, "recipes", "check", cwd=toy).stderr, "needs_options")
    assert "every" in line
    complete = run_cli("--plugin", file, "recipes", "check", "-o", "plugins.needs_options.every=3", cwd=toy)
    assert (complete.exit_code, faults(complete.stderr, "needs_options")) == (0, [])
