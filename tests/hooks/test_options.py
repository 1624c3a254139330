"""The recipe's section ``plugins``: options of observers and commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

CODE = """
from llavactl import hookimpl

@hookimpl
def plugin_options():
    return "watch_plugin.options:WatchOptions"

@hookimpl
def train_logged(line, options, recipe):
    with open("seen.txt", "a") as file:
        print(line["step"], options.every, options.file.name, recipe["name"], file=file)

@hookimpl
def register_commands(register):
    register("shown", "watch_plugin.options:shown")
"""
OPTIONS = """
import click
from pydantic import Field
from llavactl import Options, RecipePath

class WatchOptions(Options):
    every: int = Field(10, ge=1, description="interval")
    file: RecipePath = Field("log.txt", description="output file", validate_default=True)

@click.command()
def shown():
    from llavactl import load_recipe
    click.echo(load_recipe(None, []).plugins["watch"]["every"])
"""
RECIPE = """
name: mine
vision: {name: clip, model: a/b}
connector: {name: linear}
language: {name: hf, model: c/d}
plugins:
  watch:
    every: 5
    file: steps.txt
"""


@pytest.fixture
def watch(site: Any) -> Any:
    site.install("watch", CODE, options__py=OPTIONS)
    site.install("plain", "")
    Path(site.folder, "recipe.yaml").write_text(RECIPE)
    return site


def problems(site: Any, *overrides: str) -> list[str]:
    arguments = [word for override in overrides for word in ("-o", override)]
    return list(site.run("recipes", "check", *arguments, code=None).stdout.splitlines())


def test_a_valid_section(watch: Any) -> None:
    assert problems(watch) == ["recipe.yaml: ok"]
    assert watch.run("shown").stdout == "5\n"
    shown = watch.run("recipes", "show", "-o", "plugins.watch={}").stdout
    assert "every: 10" in shown
    assert f"file: {watch.folder / 'log.txt'}" in shown


@pytest.mark.parametrize(
    ("override", "start", "parts"),
    [
        ("plugins.watch.evry=3", "-o plugins.watch.evry=3: plugins.watch.evry: ", ["'every'"]),
        ("plugins.watch.every=0", "-o plugins.watch.every=0: plugins.watch.every: ", ["≥ 1"]),
        ("plugins.wtch={}", "-o plugins.wtch={}: plugins.wtch: ", ["plugin wtch is not", "'watch'"]),
        ("plugins.plain.x=1", "-o plugins.plain.x=1: plugins.plain: ", ["no options"]),
        ("plugins.watch=3", "-o plugins.watch=3: plugins.watch: ", ["a mapping"]),
        ("plugins=[]", "-o plugins=[]: plugins: ", ["a mapping"]),
    ],
)
def test_an_invalid_section_is_a_problem_with_its_line(watch: Any, override: str, start: str, parts: list[str]) -> None:
    (problem,) = problems(watch, override)
    assert problem.startswith(start)
    assert all(part in problem for part in parts), problem


def test_a_section_of_a_plugin_that_is_not_installed_has_its_line(watch: Any) -> None:
    done = watch.run("recipes", "check", code=1, LLAVACTL_PLUGINS="plain")
    assert done.stdout.startswith("recipe.yaml:7: plugins.watch: plugin watch is not selected by LLAVACTL_PLUGINS")


@pytest.mark.parametrize("target", ["no.such:Options", "json:dumps", "nonsense"])
def test_a_broken_options_model_is_a_problem(watch: Any, target: str) -> None:
    watch.install("watch", CODE.replace("watch_plugin.options:WatchOptions", target))
    (problem,) = problems(watch)
    assert problem.startswith("recipe.yaml:7: plugins.watch: plugin watch: plugin_options")


@pytest.mark.parametrize("error", ["KeyboardInterrupt", "SystemExit(0)", "GeneratorExit", "BaseException"])
def test_an_exit_that_the_hook_or_its_target_raises_is_a_problem(watch: Any, error: str) -> None:
    watch.install("watch", CODE.replace('return "watch', f'raise {error}\n    return "watch'))
    (problem,) = problems(watch)
    assert "plugin watch: plugin_options (watch_plugin/__init__.py:" in problem
    watch.install("watch", CODE, options__py=f"raise {error}")
    (problem,) = problems(watch)
    assert f"watch_plugin/options.py:1: {error.partition('(')[0]}" in problem


def test_a_signal_while_the_options_are_imported_is_no_fault_of_the_plugin(watch: Any) -> None:
    watch.install("watch", CODE, options__py="import signal; signal.raise_signal(signal.SIGINT)")
    watch.run("recipes", "check", code=130)


def test_observers_receive_options_and_recipe(watch: Any) -> None:
    program = """
from llavactl import load_recipe
from llavactl.core.plugins import notify
recipe = load_recipe(None, [])
notify("train_logged", recipe=recipe.model_dump(mode="json"), stage=1, line={"step": 1})
notify("train_logged", recipe={}, stage=1, line={"step": 2})
"""
    (watch.folder / "recipe.yaml").write_text(RECIPE)
    watch.python(program.replace("recipe={}", 'recipe={"name": "other"}'))
    assert (watch.folder / "seen.txt").read_text() == "1 5 steps.txt mine\n2 10 log.txt other\n"


def test_the_schema_has_the_sections_of_plugins(watch: Any) -> None:
    schema = json.loads(watch.run("recipes", "schema").stdout)["properties"]["plugins"]
    assert set(schema["properties"]["watch"]["properties"]) == {"every", "file"}
    assert schema["additionalProperties"] is False


def test_a_training_run_calls_the_observer_with_its_options(watch: Any, toy: Path) -> None:
    with (toy / "recipe.yaml").open("a") as file:
        file.write("plugins: {watch: {every: 7}}\n")
    recipe = str(toy / "recipe.yaml")
    watch.run("train", "-r", recipe, "--stage", "1", "-o", "features.mode=live", "-o", "stage1.max_steps=2")
    seen = [line.split() for line in (watch.folder / "seen.txt").read_text().splitlines()]
    assert {(every, name) for _, every, _, name in seen} == {("7", "toy")}
    assert {"1", "2"} <= {step for step, *_ in seen}
    again = ("train", "-r", recipe, "--stage", "1", "-o", "features.mode=live", "-o", "stage1.max_steps=2")
    watch.run(*again, "-o", "plugins.watch.every=8")
    assert len((watch.folder / "seen.txt").read_text().splitlines()) == len(seen), "options don't repeat a stage"
