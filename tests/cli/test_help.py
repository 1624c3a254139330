"""``--help`` is fast and imports no heavy packages, with and without plugins."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from llavactl.cli.root import root
from llavactl.core.builtin_plugin import COMMAND_GROUPS, COMMANDS
from llavactl.core.registry import registry
from llavactl.recipe.load import check
from llavactl.testing import run_cli

PACKAGE = Path(__file__).parents[2] / "llavactl"
HEAVY = ("torch", "transformers", "h5py", "numpy", "PIL", "peft", "accelerate", "matplotlib", "rich")
LIMIT = 2.0


def test_every_command_is_listed_in_its_group_with_its_summary() -> None:
    shown = run_cli("--help").stdout
    listed = " ".join(shown.split())
    for group, names in COMMAND_GROUPS.items():
        assert f"\n{group}:\n" in shown
        for name, summary in names.items():
            assert f" {name} {summary}" in listed


def test_every_command_has_a_group() -> None:
    names = [each.name for each in pkgutil.iter_modules([str(PACKAGE / "cli")]) if each.name != "__main__"]
    modules = [f"llavactl.cli.{name}" for name in names]
    found = {name.rpartition(".")[2] for name in modules if hasattr(importlib.import_module(name), "command")}
    assert found == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_summary_is_the_first_line_of_the_help(name: str) -> None:
    command = importlib.import_module(f"llavactl.cli.{name}").command
    assert inspect.cleandoc(command.help).splitlines()[0] == COMMANDS[name]


def commands(command: click.Command) -> Iterator[click.Command]:
    yield command
    for inner in command.commands.values() if isinstance(command, click.Group) else ():
        yield from commands(inner)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_has_a_help_text(name: str) -> None:
    for command in commands(importlib.import_module(f"llavactl.cli.{name}").command):
        assert command.help
        assert command.help[0].isupper()
        for option in command.params:
            if isinstance(option, click.Option):
                assert option.help, f"{command.name} {option.name}"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    result = run_cli(name, "--help")
    assert result.exit_code == 0
    assert f"Usage: llavactl {name}" in result.stdout
    assert result.stderr == ""


EXAMPLES = [
    (shell_line, command)
    for name in COMMANDS
    for command in commands(importlib.import_module(f"llavactl.cli.{name}").command)
    for shell_line in command.examples
] + [(shell_line, root) for shell_line in root.examples]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples(name: str) -> None:
    for command in commands(importlib.import_module(f"llavactl.cli.{name}").command):
        assert command.examples, command.name


@pytest.mark.parametrize(("shell_line", "command"), EXAMPLES, ids=[example[0] for example in EXAMPLES])
def test_an_example_is_valid(shell_line: str, command: click.Command) -> None:
    """It fits into 80 columns, is about its command, and its names exist: recipes, keys, components, options."""
    assert len(f"  {shell_line}") <= 80
    words = shlex.split(shell_line)
    words = words[: words.index(">")] if ">" in words else words
    context = parsed(root, words[words.index("llavactl") + 1 :])
    while (parent := context.parent) is not None and context.command is not command:
        context = parent
    assert context.command is command
    given = parsed(root, words[words.index("llavactl") + 1 :]).params
    source, overrides = given.get("source") or "llava-v1.5-7b", given.get("overrides", ())
    if source != "recipe.yaml" or overrides:
        source = "llava-v1.5-7b" if source == "recipe.yaml" else source
        assert [str(problem) for problem in check(source, overrides) if problem.where.startswith("-o")] == []
        assert source in registry().names("recipes")
    if "task" in given:
        options = registry().get("tasks", given["task"]).options_model().model_fields
        assert {option.partition("=")[0] for option in given["options"]} <= set(options)
    if "form" in given:
        assert given["form"] in registry().names("formats")


def parsed(command: click.Command, words: list[str], parent: click.Context | None = None) -> click.Context:
    """The context of the command that ``words`` call, without running it."""
    context = command.make_context(command.name, list(words), parent=parent)
    if isinstance(command, click.Group) and (rest := [*context._protected_args, *context.args]):
        _, found, rest = command.resolve_command(context, rest)
        assert found is not None
        return parsed(found, rest, context)
    return context


def test_the_help_shows_examples_and_sections() -> None:
    shown = run_cli("train", "--help").stdout
    assert "\nExamples:\n  llavactl train --stage 1\n" in shown
    sections = [line for line in shown.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert sections == ["Options:", "Recipe options:", "General options:", "Examples:"]


@pytest.mark.parametrize("columns", [24, 40, 60])
@pytest.mark.parametrize(
    "path", [(), *((name,) for name in COMMANDS), ("data", "check"), ("recipes", "check")], ids=" ".join
)
def test_the_help_fits_a_narrow_terminal(path: tuple[str, ...], columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a word, or an option with its value in an example, may be longer than a line."""
    monkeypatch.setenv("COLUMNS", str(columns))
    before, _, examples = run_cli(*path, "--help").stdout.partition("\nExamples:\n")
    monkeypatch.setenv("COLUMNS", "80")
    wide, _, wide_examples = run_cli(*path, "--help").stdout.partition("\nExamples:\n")
    assert "".join(before.split()) == "".join(wide.split()), "the same text"
    for line in before.splitlines():
        assert len(line) <= columns or re.fullmatch(r" *(-\w, )?\S+( \S+)?", line), line
        assert line == line.rstrip()
    assert [line for line in before.splitlines() if line and line[0] != " " and not line.endswith(":")] == [
        line for line in before.splitlines() if line.startswith("Usage: ")
    ], "wrapped lines are indented"
    assert all(len(line) <= columns or len(shlex.split(line.removesuffix("\\"))) <= 2 for line in examples.splitlines())
    joined = examples.replace("\\\n", " ").splitlines()
    assert [shlex.split(line) for line in joined] == [shlex.split(line) for line in wide_examples.splitlines()]


@pytest.mark.parametrize("name", ["data", "cache", "recipes", "plugins"])
def test_a_group_shows_the_complete_summaries_of_its_commands(name: str) -> None:
    shown = run_cli(name, "--help").stdout
    assert "..." not in shown.partition("\n")[2]
    for command in importlib.import_module(f"llavactl.cli.{name}").command.commands.values():
        sentence = " ".join(command.help.split()).partition(". ")[0]
        assert sentence in " ".join(shown.split())


def leaves(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from leaves(inner, (*path, name))
    else:
        yield path


WITHOUT_RECIPE = {
    ("components",),
    ("plugins",),
    ("doctor",),
    ("init",),
    ("recipes", "list"),
    ("recipes", "copy"),
    ("recipes", "schema"),
}
LEAVES = [
    leaf
    for name in COMMANDS
    for leaf in leaves(importlib.import_module(f"llavactl.cli.{name}").command, (name,))
    if leaf not in WITHOUT_RECIPE and leaf[:1] not in WITHOUT_RECIPE
]


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_every_verb_has_recipe_options(path: tuple[str, ...]) -> None:
    shown = run_cli(*path, "--help").stdout
    assert "-r, --recipe NAME|PATH" in shown
    assert "-o, --override KEY.PATH=VALUE" in shown
    assert "--json" in shown


def test_packages_that_the_help_imports_import_no_heavy_package() -> None:
    modules = [
        ".".join(("llavactl", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        for folder in ("cli", "recipe", "core")
        for path in sorted((PACKAGE / folder).rglob("*.py"))
        if path.name != "__main__.py"
    ]
    code = f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\n"
    code += f"print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["recipes", "--help"], ["train", "--help"], ["recipes", "list"]])
def test_the_help_does_not_import_the_yaml_parser(arguments: list[str]) -> None:
    code = f"import sys\nfrom llavactl.cli import main\ntry: main({arguments})\nexcept SystemExit: pass\n"
    code += f"print([name for name in {(*HEAVY, 'ruamel')} if name in sys.modules], file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "LLAVACTL_PLUGINS": ""},
    )
    assert done.stderr.strip() == "[]"


PLUGIN = """
from llavactl import hookimpl

@hookimpl
def register_vision(register):
    register("heavy", "torch:nothing", options="torch:nothing", summary="never imported here")

@hookimpl
def register_commands(register):
    register("hello", "torch:nothing", summary="Print a greeting.")
"""


def seconds(code: list[str], environment: dict[str, str]) -> float:
    began = time.perf_counter()
    subprocess.run(code, env=environment, check=True, capture_output=True)
    return time.perf_counter() - began


@pytest.mark.parametrize("with_plugin", [False, True])
def test_the_help_takes_at_most_twice_the_import_time_of_its_libraries(with_plugin: bool, tmp_path: Path) -> None:
    """Compares the minimum of five alternating runs each; repeated on a busy machine."""
    info = tmp_path / "quick_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: quick-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[llavactl]\nquick = quick_plugin\n")
    (tmp_path / "quick_plugin.py").write_text(PLUGIN)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "LLAVACTL_PLUGINS": "quick" if with_plugin else ""}
    help_ = [sys.executable, "-c", "from llavactl.cli import main; main(['--help'])"]
    bare = [sys.executable, "-c", "import click, pluggy, pydantic, yaml"]
    shown = subprocess.run(help_, env=environment, capture_output=True, text=True, check=True).stdout
    assert ("Print a greeting." in shown) == with_plugin
    ratio = 0.0
    for _ in range(3):
        pairs = [(seconds(help_, environment), seconds(bare, environment)) for _ in range(5)]
        ratio = min(pair[0] for pair in pairs) / min(pair[1] for pair in pairs)
        if ratio <= LIMIT:
            return
    pytest.fail(f"--help takes {ratio:.2f} times the import time of its libraries")


MISSING = [
    ["run"],
    ["extract"],
    ["train", "--stage", "1"],
    ["train", "--stage", "1", "--dry-run"],
    ["chat"],
    ["export", "--format", "hf", "--to", "x"],
    ["data", "generate"],
    ["data", "show"],
]


def test_a_missing_recipe_is_reported_without_importing_torch(tmp_path: Path) -> None:
    """Which would take seconds."""
    code = "import sys\nfrom llavactl.testing import run_cli\n"
    code += f"for arguments in {MISSING}:\n    print(run_cli(*arguments).exit_code, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["1 False"] * len(MISSING)
