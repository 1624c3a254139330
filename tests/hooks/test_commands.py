"""How a plugin's command ends, logs and prints, and what a recipe is to it: docs/reference/plugins.md."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

import llavactl
from llavactl.cli.root import FIRST_PARTY_COMMANDS
from llavactl.testing import run_cli

from .conftest import Site

CODE = """
import json, logging, sys
from asyncio import CancelledError
import click
from llavactl import DataError, hookimpl, load_recipe, registry

@hookimpl
def register_commands(register):
    register("ending", "ending:ending", summary="ends in a way of choice")
    register("recipe-types", "ending:types", summary="types of a recipe's values")

@click.command()
@click.argument("how")
def ending(how):
    click.echo("a result")
    logging.getLogger("llavactl.ending").info("a log line")
    if how == "number":
        return 3
    raise {
        "error": DataError("no such data", hint="add data"),
        "usage": click.UsageError("wrong arguments"),
        "no text": click.ClickException(ValueError("no such data")),
        "exit": SystemExit(0),
        "interrupt": KeyboardInterrupt,
        "close": GeneratorExit,
        "cancel": CancelledError,
    }[how]

@click.command()
def types():
    recipe = load_recipe()
    (source,) = recipe.data.stage1
    component = registry().create("sources", source.spec())
    document = recipe.model_dump(mode="json")
    values = (recipe.data.stage1, recipe.run_dir, source.path, recipe.generate, document["data"]["stage1"])
    print(json.dumps({
        "types": [type(value).__name__.removeprefix("Posix").removeprefix("Windows") for value in values],
        "absolute": recipe.run_dir.is_absolute(),
        "samples": len(list(component)),
        "same": document["vision"]["layer"] == recipe.vision.spec()["layer"] == -2,
        "plugins": recipe.plugins,
    }))
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "ending.py"
    path.write_text(CODE)
    return str(path)


@pytest.mark.parametrize(
    ("how", "status", "shown"),
    [
        ("number", 3, []),
        ("error", 1, ["error: no such data", "hint: add data"]),
        ("usage", 2, ["error: wrong arguments"]),
        ("exit", 1, ["plugin ending"]),
        ("interrupt", 1, ["error: command ending of plugin ending: ending (", "KeyboardInterrupt"]),
        ("close", 1, ["error: command ending of plugin ending: ending (", "GeneratorExit"]),
        ("cancel", 1, ["error: command ending of plugin ending: ending (", "CancelledError"]),
        ("no text", 1, ["error: no such data"]),
    ],
)
def test_a_command_ends(file: str, how: str, status: int, shown: list[str]) -> None:
    done = run_cli("--plugin", file, "ending", how)
    assert (done.exit_code, done.stdout) == (status, "a result\n")
    assert all(text in done.stderr for text in ["a log line", *shown])


def test_quiet_goes_before_the_command(file: str) -> None:
    assert "a log line" not in run_cli("--plugin", file, "-q", "ending", "number").stderr
    assert run_cli("--plugin", file, "ending", "number", "-q").exit_code == 2


def test_a_recipe_has_the_types_of_the_reference(file: str, toy: Path) -> None:
    assert json.loads(run_cli("--plugin", file, "recipe-types", cwd=toy).stdout) == {
        "types": ["tuple", "Path", "str", "NoneType", "list"],
        "absolute": True,
        "samples": 12,
        "same": True,
        "plugins": {},
    }


@pytest.mark.parametrize("name", FIRST_PARTY_COMMANDS)
def test_a_command_of_a_missing_first_party_plugin_names_its_package(site: Site, name: str) -> None:
    result = site.run(name, "--port", "0", code=1, LLAVACTL_PLUGINS="")
    assert result.stdout == ""
    error, hint = result.stderr.splitlines()
    assert f"llavactl {name}" in error
    assert f"plugins/{FIRST_PARTY_COMMANDS[name]}" in hint


def test_the_commands_of_first_party_plugins_are_known() -> None:
    registered = {}
    for module in (Path(llavactl.__file__).parents[1] / "plugins").glob("*/*/__init__.py"):
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name == "register_commands":
                calls = (call for call in ast.walk(node) if isinstance(call, ast.Call))
                registered |= {ast.literal_eval(call.args[0]): module.parents[1].name for call in calls if call.args}
    assert {name: package.partition("[")[0] for name, package in FIRST_PARTY_COMMANDS.items()} == registered
