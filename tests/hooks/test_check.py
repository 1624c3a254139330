"""``plugins check`` finds what is wrong with a plugin; each case is one small file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llavactl.testing import run_cli

GOOD = '''
"""A connector that averages all patches."""
import click
from pydantic import Field

from llavactl import Options, hookimpl


@hookimpl
def register_connectors(register):
    register("mean", "{name}:Mean", options="{name}:MeanOptions", summary="average of all patches")


@hookimpl
def register_commands(register):
    register("hello", "{name}:hello", summary="prints hello")


@hookimpl
def plugin_options():
    return "{name}:PluginOptions"


@hookimpl
def train_logged(line, options):
    pass


class PluginOptions(Options):
    every: int = Field(1, description="interval in steps")


class MeanOptions(Options):
    bias: bool = Field(True, description="add a bias")


class Mean:
    def __init__(self, options):
        self.options = options

    def tokens(self, shape):
        return 1

    def build(self, shape, language_width):
        from torch import nn

        class Module(nn.Module):
            def __init__(self, bias):
                super().__init__()
                self.linear = nn.Linear(shape.width, language_width, bias=bias)

            def forward(self, features):
                return self.linear(features.mean(1, keepdim=True))

        return Module(self.options.bias)


@click.command()
def hello():
    """Print hello."""
'''

# Changes of GOOD: id, (old, new), the check that fails, parts of the problem.
BROKEN: list[tuple[str, tuple[str, str], str, list[str]]] = [
    # The module.
    ("raises", ("import click\n", "1 / 0\n"), "import", ["raises.py:3", "ZeroDivisionError"]),
    ("exits", ("import click\n", "import sys; sys.exit(3)\n"), "import", ["exits.py:3", "SystemExit"]),
    ("dies", ("import click\n", "import os; os._exit(7)\n"), "import", ["7"]),
    ("hangs", ("import click\n", "import time; time.sleep(60)\n"), "import", ["hangs.py:3", "2.0 s"]),
    ("syntax", ("import click\n", "def (\n"), "import", ["syntax.py:3", "SyntaxError"]),
    ("missing_package", ("import click\n", "import no_such_package\n"), "import", ["no_such_package"]),
    ("heavy", ("import click\n", "import click\nimport numpy\n"), "light import", ["numpy"]),
    # Hooks.
    ("undecorated", ("@hookimpl\ndef train_logged", "def train_logged"), "hooks", ["train_logged", "@hookimpl"]),
    ("undecorated_typo", ("@hookimpl\ndef train_logged", "def train_loged"), "hooks", ["'train_logged'"]),
    ("unknown_hook", ("def train_logged", "def train_step"), "registration", ["train_step", "unknown_hook.py:24"]),
    ("unknown_parameter", ("(line, options)", "(lines)"), "registration", ["'lines'", "unknown_parameter.py:24"]),
    ("positional", ("(line, options)", "(line, options, /)"), "registration", ["positional-only"]),
    ("generator", ("options):\n    pass", "options):\n    yield"), "registration", ["generator"]),
    ("coroutine", ("def train_logged", "async def train_logged"), "registration", ["async"]),
    ("no_hooks", ("import Options, hookimpl", "import Options\n\n\ndef hookimpl(f): return f\n"), "hooks", ["no hook"]),
    ("hook_raises", ("(register):\n    register(\"mean\"", "(register):\n    1 / 0\n    register(\"mean\""),
     "registration", ["register_connectors", "hook_raises.py:11"]),
    # Registration.
    ("taken_name", ('register("mean"', 'register("linear"'), "registration",
     ["taken_name.py:11", "'linear'", "plugin llavactl"]),
    ("taken_command", ('register("hello"', 'register("train"'), "registration", ["'train'", "plugin llavactl"]),
    ("no_colon", ('"{name}:Mean"', '"{name}.Mean"'), "registration", ["'mean'", "module:attr"]),
    ("object_target", ('"{name}:Mean", options', "object, options"), "registration", ["module:attr"]),
    ("number_as_name", ('register("mean"', "register(3"), "registration", ["name", "3"]),
    ("spaces", ('register("mean"', 'register("My Mean"'), "registration", ["spaces.py:11", "'My Mean'"]),
    ("bad_options_target", ('options="{name}:MeanOptions"', "options=dict"), "registration", ["options"]),
    ("wrong_keyword", ("summary=\"average of all patches\"", "help='mean'"), "registration", ["help"]),
    ("upper_case", ('register("mean"', 'register("mean_pool"'), "name", ["upper_case.py:11", "lower-case"]),
    ("no_summary", (', summary="average of all patches"', ""), "name", ["summary"]),
    # Targets and options.
    ("no_target", ('"{name}:Mean"', '"{name}:Gone"'), "import", ["'mean'", "Gone"]),
    ("no_options_model", ('options="{name}:MeanOptions"', 'options="{name}:Gone"'), "options", ["Gone"]),
    ("not_options", ('options="{name}:MeanOptions"', 'options="{name}:Mean"'), "options", ["llavactl.Options"]),
    ("undescribed", ('Field(True, description="add a bias")', "True"), "options",
     ["bias", "undescribed.py:34", "description"]),
    ("default", ("Field(True, description", "Field('maybe', description"), "options",
     ["bias (", "default.py:34", "true or false"]),
    ("default_of_plugin", ("Field(1, description", "Field('x', description"), "options", ["every (", "plugin.py:30"]),
    ("no_schema", ("bias: bool = Field(True", "bias: __import__('typing').Callable = Field(print"), "options",
     ["bias (", "no_schema.py:34"]),
    ("ignores_keys", ("class MeanOptions(Options):", "class MeanOptions(Options, extra='ignore'):"), "options",
     ["unknown keys"]),
    ("hidden_option", ("bias: bool = Field(True", "name: str = Field('x', description='a name')\n"
     "    bias: bool = Field(True"), "options", ["name:", "recipes"]),
    ("validator_raises", ("class MeanOptions(Options):", "class MeanOptions(Options):\n"
     "    @__import__('pydantic').field_validator('bias')\n    @classmethod\n    def check(cls, value):\n"
     "        raise KeyError(value)\n"), "options", ["check() failed", "validator_raises.py:37"]),
    ("unstable_options", ("bias: bool = Field(True", "time: float = Field(default_factory=__import__('time').time, "
     "description='now', exclude=True)\n    bias: bool = Field(True"), "conformance", ["loaded again"]),
    ("bad_plugin_options", ('return "{name}:PluginOptions"', 'return "{name}:Gone"'), "options", ["Gone"]),
    ("required_plugin_options", ("Field(1, description", "Field(description"), "options", ["every", "no default"]),
    ("arity", ("def __init__(self, options):", "def __init__(self, options, more):"), "signature", ["more"]),
    ("no_arguments", ("def __init__(self, options):\n        self.options = options", "pass"), "signature",
     ["only argument"]),
    ("not_callable", ("class Mean:\n", "class _Mean:\n"), "import", ["Mean"]),
    ("number", ("\n\nclass Mean:\n", "\n\nMean = 3\n\n\nclass Other:\n"), "signature", ["not callable"]),
    ("factory_returns_none", ("\n\nclass Mean:\n", "\n\ndef Mean(options):\n    pass\n\n\nclass Other:\n"),
     "conformance", ["None"]),
    ("factory_raises", ("self.options = options", "raise KeyError('x')"), "conformance", ["KeyError"]),
    # The component.
    ("method_missing", ("def tokens", "def number_of_tokens"), "conformance", ["tokens"]),
    ("method_arity", ("def tokens(self, shape)", "def tokens(self)"), "conformance", ["tokens(shape)"]),
    ("wrong_kind", ("register_connectors", "register_vision"), "conformance", ["identity", "it is a connector"]),
    ("wrong_tokens", ("return 1", "return 2"), "conformance", ["(2, 2, 24)"]),
    ("not_a_module", ("return Module(self.options.bias)", "return abs"), "conformance", []),
    ("no_gradient", ("return self.linear(features.mean(1, keepdim=True))",
     "return self.linear(features.mean(1, keepdim=True)).detach() + self.linear.bias"), "conformance",
     ["linear.weight"]),
    ("wrong_width", ("shape.width, language_width,", "shape.width, language_width + 1,"), "conformance", ["24"]),
    # Commands.
    ("not_click", ("@click.command()\ndef", "def"), "command", ["not a click command"]),
    ("no_help", ('    """Print hello."""', "    pass"), "command", ["help"]),
    # Examples.
    ("example_raises", ("@hookimpl\ndef train_logged", "@hookimpl\ndef check_examples(folder):\n    1 / 0\n\n\n"
     "@hookimpl\ndef train_logged"), "examples", ["ZeroDivisionError"]),
    ("example_raises_in_a_library", ("@hookimpl\ndef train_logged", "@hookimpl\ndef check_examples(folder):\n"
     "    open(folder / 'gone.txt')\n\n\n@hookimpl\ndef train_logged"), "examples", ["_in_a_library.py:26"]),
    ("example_list", ("@hookimpl\ndef train_logged", "@hookimpl\ndef check_examples(folder):\n"
     "    return [1]\n\n\n@hookimpl\ndef train_logged"), "examples", ["[1]"]),
    ("message_raises", ("self.options = options", "raise type('E', (Exception,), {'__str__': lambda self: 1 / 0})"),
     "conformance", ["message_raises.py:39", "E: ", "ZeroDivisionError"]),
    ("example_unknown", ("@hookimpl\ndef train_logged", "@hookimpl\ndef check_examples(folder):\n"
     "    return {'connectors': {'man': {}}}\n\n\n@hookimpl\ndef train_logged"), "examples", ["'man'"]),
    ("example_option", ("@hookimpl\ndef train_logged", "@hookimpl\ndef check_examples(folder):\n"
     "    return {'connectors': {'mean': {'bais': 1}}}\n\n\n@hookimpl\ndef train_logged"), "conformance",
     ["'bias'"]),
]  # fmt: skip


def write(folder: Path, name: str, code: str) -> Path:
    file = folder / f"{name}.py"
    file.write_text(code.replace("{name}", name))
    return file


def certificate(*arguments: str) -> tuple[Any, int]:
    timeout = ("--timeout", "2") if arguments[0].endswith("hangs.py") else ()
    result = run_cli("plugins", "check", *arguments, "--json", *timeout)
    return result.json(), result.exit_code


def test_two_files_of_one_name_are_two_plugins(tmp_path: Path) -> None:
    """In one process, as a notebook calls the commands."""
    for folder, code, ok in (("first", GOOD, True), ("second", GOOD.replace("class Mean:", "class Other:"), False)):
        (tmp_path / folder).mkdir()
        document, _ = certificate(str(write(tmp_path / folder, "same_name", code)))
        assert document["ok"] is ok


def test_a_correct_plugin_has_a_certificate(tmp_path: Path) -> None:
    file = write(tmp_path, "correct", GOOD)
    document, code = certificate(str(file))
    assert [each for each in document["checks"] if not each["ok"]] == []
    assert (document["ok"], code) == (True, 0)
    assert {(each["kind"], each["check"]) for each in document["checks"]} >= {
        ("plugin", "light import"),
        ("connectors", "conformance"),
        ("commands", "command"),
    }
    assert set(document["files"]) == {"correct.py"}
    assert {"torch", "transformers"} <= set(document["versions"])
    file.write_text(file.read_text() + "# changed\n")
    changed, _ = certificate(str(file))
    assert changed["version"] != document["version"]
    assert changed["files"] != document["files"]


@pytest.mark.parametrize(("change", "check", "parts"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_a_fault_is_found(tmp_path: Path, request: Any, change: tuple[str, str], check: str, parts: list[str]) -> None:
    old, new = change
    assert GOOD.count(old) >= 1
    file = write(tmp_path, request.node.callspec.id, GOOD.replace(old, new, 1))
    document, code = certificate(str(file))
    assert (document["ok"], code) == (False, 1)
    failed = [each for each in document["checks"] if each["ok"] is False]
    assert check in [each["check"] for each in failed], failed
    (problem,) = [each["problem"] for each in failed if each["check"] == check]
    assert all(part in problem for part in parts), problem
    assert "\n" not in problem


NEEDS_A_FILE = """
from pathlib import Path
from pydantic import Field
from llavactl import ImageFile, Options, RecipePath, Sample, Turn, hookimpl


@hookimpl
def register_sources(register):
    register("lines", "{name}:lines", options="{name}:LinesOptions", summary="one question per line")


class LinesOptions(Options):
    path: RecipePath = Field(description="text file")


def lines(options):
    for number, line in enumerate(READ):
        turns = (Turn("user", (ImageFile(str(options.path.parent), "a.jpg"), line)), Turn("assistant", ("Yes.",)))
        yield Sample(str(number), turns)
"""
TYPED = NEEDS_A_FILE.replace("READ", "options.path.read_text().splitlines()")


def test_required_options_are_given_or_the_check_is_skipped(tmp_path: Path) -> None:
    file = write(tmp_path, "lines_plugin", TYPED)
    document, code = certificate(str(file))
    (skipped,) = [each for each in document["checks"] if each["ok"] is None]
    assert (skipped["name"], code) == ("lines", 0)
    assert "path" in skipped["problem"]
    (tmp_path / "questions.txt").write_text("What?\n")
    document, code = certificate(str(file), "-o", f"lines.path={tmp_path / 'questions.txt'}")
    assert [each["ok"] for each in document["checks"]] == [True] * len(document["checks"])
    assert "missing file" in [each["check"] for each in document["checks"]]


def test_examples_are_options(tmp_path: Path) -> None:
    example = """

@hookimpl
def check_examples(folder):
    (folder / "q.txt").write_text("What?\\n")
    return {"sources": {"lines": {"path": str(folder / "q.txt")}}}
"""
    document, _ = certificate(str(write(tmp_path, "with_example", TYPED + example)))
    assert [each["ok"] for each in document["checks"]] == [True] * len(document["checks"])


@pytest.mark.parametrize(
    ("read", "part"),
    [
        ("['?'] if options.path.exists() else dict()['y']", "KeyError"),
        ("['?'] if options.path.exists() else []", "not reported"),
    ],
)
def test_missing_files_need_typed_errors(tmp_path: Path, read: str, part: str) -> None:
    name = f"untyped_{part.split()[0].lower()}"
    file = write(tmp_path, name, NEEDS_A_FILE.replace("READ", read))
    (tmp_path / "questions.txt").write_text("What?\n")
    document, _ = certificate(str(file), "-o", f"lines.path={tmp_path / 'questions.txt'}")
    (failed,) = [each for each in document["checks"] if each["ok"] is False]
    assert failed["check"] == "missing file"
    assert part in failed["problem"]


def test_the_table_has_a_line_per_check(tmp_path: Path) -> None:
    file = write(tmp_path, "table", GOOD.replace("return 1", "return 2"))
    result = run_cli("plugins", "check", str(file))
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["connectors", "mean", "signature", "ok"] in rows
    assert any(row[:4] == ["connectors", "mean", "conformance", "failed:"] for row in rows)
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1


def test_a_broken_recipe_is_found(tmp_path: Path, site: Any) -> None:
    code = "from llavactl import hookimpl\n@hookimpl\ndef register_recipes(register):\n"
    for name in ("good", "bad", "gone"):
        code += f"    register('{name}', 'r_plugin:{name}.yaml', summary='a recipe')\n"
    site.install("r", code, good__yaml="extends: llava-v1-7b\nname: good\n", bad__yaml="name: [\n")
    checks = json.loads(site.run("plugins", "check", "r-plugin", "--json", code=1).stdout)["checks"]
    found = {each["name"]: each for each in checks if each["check"] == "recipe"}
    assert found["good"]["ok"]
    assert "bad.yaml:" in found["bad"]["problem"]
    assert "gone.yaml" in found["gone"]["problem"]


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("gone", None, "not installed"),
        ("numpy", None, "no entry point"),
        ("", None, "not installed"),
        ("folder", "", "is a folder"),
        ("data.txt", "text", "not a Python file"),
        ("broken_syntax.py", "def (:\n", "broken_syntax.py:1"),
        ("binary_file.py", "x = '\0'\n", "binary_file"),
    ],
)
def test_what_cannot_be_checked_is_one_line(
    name: str, content: str | None, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    if content:
        (tmp_path / name).write_text(content)
    document, code = certificate(name)
    (check,) = document["checks"]
    assert (document["ok"], code) == (False, 1)
    assert part in check["problem"]
    shown = run_cli("plugins", "check", name)
    (line,) = shown.stderr.splitlines()
    assert (shown.exit_code, shown.stdout) == (1, "")
    assert line.startswith("error: ")
    assert line.endswith(check["problem"])


def test_a_file_that_does_not_exist_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "folder.py").mkdir()
    for name in ("gone.py", "folder.py"):
        assert run_cli("plugins", "check", name, cwd=tmp_path).exit_code == 2


def test_in_strict_mode_a_broken_plugin_is_one_error_of_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAVACTL_STRICT_PLUGINS", "1")
    (tmp_path / "strictly.py").write_text("1 / 0\n")
    checked = run_cli("--plugin", "strictly.py", "recipes", "check", "llava-v1-7b", cwd=tmp_path)
    assert (checked.exit_code, checked.stdout) == (1, "")
    error, hint = checked.stderr.splitlines()
    assert "strictly.py:1" in error
    assert hint.endswith("--plugin strictly.py")


STEP = """
from llavactl import hookimpl


class Optimizer:
    scope = "all"
    moments = ()

    def __init__(self, options):
        pass

    def selects(self, weight):
        return True

    def build(self, groups):
        import torch

        class Own(torch.optim.SGD):
            def step(self, closure=None):
                raise ValueError("no step")

        return Own(groups, lr=0.1)


@hookimpl
def register_optimizers(register):
    register("own", "{name}:Optimizer", summary="fails")
"""


def test_code_that_llavactl_calls_through_a_library_is_named(tmp_path: Path) -> None:
    document, _ = certificate(str(write(tmp_path, "fails_in_step", STEP)))
    (problem,) = [each["problem"] for each in document["checks"] if each["ok"] is False]
    assert "fails_in_step.py:20" in problem
    assert "no step" in problem


def test_faults_of_the_registration_are_printed_once(tmp_path: Path) -> None:
    file = write(tmp_path, "once", GOOD.replace('"mean"', '"Mean Value"'))
    result = run_cli("plugins", "check", str(file))
    assert "Mean Value" in result.stdout
    assert "Mean Value" not in result.stderr


def test_a_class_instead_of_its_name_is_answered_with_the_name(tmp_path: Path) -> None:
    file = write(tmp_path, "named", GOOD.replace('return "{name}:PluginOptions"', "return PluginOptions"))
    (problem,) = [each["problem"] for each in certificate(str(file))[0]["checks"] if each["ok"] is False]
    assert "'named:PluginOptions'" in problem


def test_importing_all_names_is_named_as_what_is_slow(tmp_path: Path) -> None:
    file = write(tmp_path, "star", "from llavactl import *\n" + GOOD)
    document, _ = certificate(str(file), "--timeout", "100")
    (problem,) = [each["problem"] for each in document["checks"] if each["check"] == "light import"]
    assert "import *" in problem
