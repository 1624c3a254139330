"""Installed plugins: broken, slow, printing or conflicting ones affect nothing else and are reported in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

HEAD = "from llavactl import hookimpl\n\n"

GOOD = (
    HEAD
    + """
@hookimpl
def register_connectors(register):
    register("good", "no.such.module:thing", summary="a good one")
"""
)

BROKEN = {
    "import": "import no_such_package_anywhere\n",
    "syntax": "def (:\n",
    "exit": "import sys\nsys.exit(3)\n",
    "signature": HEAD + "@hookimpl\ndef register_vision(registr, more):\n    pass\n",
    "unknown": HEAD + "@hookimpl\ndef register_visions(register):\n    pass\n",
    "half": HEAD
    + "@hookimpl\ndef register_connectors(register):\n    register('partial', 'x:y')\n\n"
    + "@hookimpl\ndef train_started(nope):\n    pass\n",
}
# These fail when a hook is called.
FAILING = {
    "raises": HEAD + "@hookimpl\ndef register_vision(register):\n    raise RuntimeError('two\\nlines')\n",
    "exits": HEAD + "@hookimpl\ndef register_vision(register):\n    raise SystemExit(4)\n",
    "target": HEAD + "@hookimpl\ndef register_vision(register):\n    register('x', 'no-colon')\n",
}


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line]


class TestBroken:
    """All broken plugins at once: one line each, without affecting the others or llavactl."""

    @pytest.fixture(autouse=True)
    def bad(self, site: Any) -> None:
        for how, code in {**BROKEN, **FAILING}.items():
            site.install(f"bad_{how}", code)
        site.install("good", GOOD)

    @pytest.mark.parametrize("command", ["--help", "components"])
    def test_each_is_reported_in_one_line(self, site: Any, command: str) -> None:
        done = site.run(command)
        found = sorted(line.split()[2].rstrip(":") for line in lines(done.stderr))
        assert found == sorted(f"bad_{how}" for how in {**BROKEN, **FAILING})
        assert ("good" in done.stdout) == (command == "components")
        assert "partial" not in done.stdout, "a plugin that can't be loaded registers nothing"

    def test_the_list_of_plugins_has_the_errors(self, site: Any) -> None:
        listed = {each["name"]: each for each in json.loads(site.run("plugins", "list", "--json").stdout)}
        assert (listed["good"]["package"], listed["good"]["version"]) == ("good-plugin", "1.2")
        assert [name for name, each in listed.items() if not each["error"]] == ["llavactl", "good"]
        for how in BROKEN:
            assert listed[f"bad_{how}"]["error"].startswith(f"plugin bad_{how} can't be loaded: ")
        assert "SystemExit: 3" in listed["bad_exit"]["error"]
        assert "no_such_package_anywhere" in listed["bad_import"]["error"]
        assert "registr" in listed["bad_signature"]["error"]
        raised = "bad_raises_plugin/__init__.py:5"
        assert listed["bad_raises"]["error"].startswith(
            f"plugin bad_raises: register_vision ({raised}): RuntimeError: two lines; "
        )

    @pytest.mark.parametrize("how", ["exit", "signature", "raises", "target"])
    def test_strict_mode_raises(self, site: Any, how: str) -> None:
        done = site.run("components", code=1, LLAVACTL_STRICT_PLUGINS="1", LLAVACTL_PLUGINS=f"bad_{how}")
        assert done.stdout == ""
        line, hint = lines(done.stderr)
        assert line.startswith(f"error: plugin bad_{how}")
        assert hint.startswith("hint: ")

    def test_commands_work_with_broken_plugins(self, site: Any) -> None:
        assert site.run("recipes", "check", "llava-v1-7b").stdout == "llava-v1-7b: ok\n"


def test_an_interrupt_during_import_propagates(site: Any) -> None:
    site.install("slow", "import signal\nsignal.raise_signal(signal.SIGINT)\n")
    done = site.run("components", code=130)
    assert "Traceback" not in done.stderr


REGISTERS = HEAD + "@hookimpl\ndef register_commands(register):\n    "


@pytest.mark.parametrize("code", ["{raises}", REGISTERS + "{raises}"], ids=["import", "register"])
@pytest.mark.parametrize("error", ["KeyboardInterrupt", "SystemExit(0)", "GeneratorExit", "BaseException"])
def test_an_exit_that_a_plugin_raises_is_its_fault(site: Any, code: str, error: str) -> None:
    site.install("rude", code.format(raises=f"raise {error}\n"))
    (line,) = lines(site.run("components").stderr)
    assert "plugin rude" in line
    assert "rude_plugin/__init__.py:" in line
    assert not json.loads(site.run("plugins", "check", "rude", "--json", code=1).stdout)["ok"]
    assert all(error.partition("(")[0] not in each for each in lines(site.run("plugins", "list").stderr))


def test_a_slow_plugin_delays_the_help_once(site: Any) -> None:
    slow = "import time\ntime.sleep(1.5)\nprint('imported')\n" + HEAD
    slow += "@hookimpl\ndef register_commands(register):\n    register('nap', 'slow_plugin:nap', summary='sleeps')\n"
    site.install("slow", slow)
    first = site.run("--help")
    assert lines(first.stderr)[0] == "imported"
    (warning,) = lines(first.stderr)[1:]
    assert "plugin slow" in warning
    assert "module:attr" in warning
    second = site.run("--help")
    assert second.stderr == ""
    for shown in (first, second):
        assert "nap sleeps" in " ".join(shown.stdout.split())
        assert "imported" not in shown.stdout
    site.install("slow", slow + "# changed\n")
    assert "imported" in site.run("--help").stderr, "a changed plugin is imported again"


LOUD = """
import logging, os, subprocess, sys, warnings
from llavactl import Options, hookimpl

def shout(what):
    print(what)
    os.write(1, what.encode() + b" raw\\n")
    subprocess.run([sys.executable, "-c", f"print({what!r}, 'child')"])
    logging.basicConfig(stream=sys.stdout, force=True)
    logging.getLogger("loud").error("%s logged", what)

shout("import")

@hookimpl
def register_sources(register):
    shout("registration")
    register("loud", "loud_plugin.source:Loud", options="loud_plugin.source:LoudOptions")

@hookimpl
def register_commands(register):
    register("hello", "loud_plugin.source:hello")
"""
LOUD_SOURCE = """
import click
from llavactl import Options
from loud_plugin import shout

shout("component")

class LoudOptions(Options):
    pass

class Loud:
    def __init__(self, options):
        shout("creation")

    def __iter__(self):
        shout("iteration")
        return iter(())

@click.command()
def hello():
    print("printed")
    click.echo("echoed")
"""


class TestAPluginThatPrints:
    """Whenever and however it prints, stdout contains only the results of the command."""

    @pytest.fixture(autouse=True)
    def loud(self, site: Any) -> None:
        site.install("loud", LOUD, source__py=LOUD_SOURCE)

    def test_a_list_is_one_json_document(self, site: Any) -> None:
        done = site.run("components", "sources", "--json")
        assert "loud" in [each["name"] for each in json.loads(done.stdout)]
        for what in ("import", "registration", "component"):
            for how in (what, f"{what} raw", f"{what} child", f"ERROR:loud:{what} logged"):
                assert how in lines(done.stderr)

    def test_a_report_is_one_json_document(self, site: Any, toys: Path) -> None:
        (site.folder / "recipe.yaml").write_text(
            f"extends: {toys / 'recipe.yaml'}\nname: loud\ndata: {{stage1: [{{name: loud}}]}}\n", encoding="utf-8"
        )
        done = site.run("data", "check", "--json", "--stage", "1", code=1)
        assert json.loads(done.stdout)["records"] == 0
        assert {"creation", "iteration", "iteration raw", "iteration child"} <= set(lines(done.stderr))

    def test_its_own_command_prints_to_stdout(self, site: Any) -> None:
        done = site.run("hello")
        assert lines(done.stdout) == ["printed", "echoed"]


def test_the_help_imports_no_targets(site: Any) -> None:
    code = HEAD + "@hookimpl\ndef register_commands(register):\n    register('boom', 'lazy_plugin.boom:command')\n"
    site.install("lazy", code, boom__py="raise RuntimeError('imported')\n")
    for _ in range(2):
        done = site.run("--help")
        assert "boom" in done.stdout
        assert done.stderr == ""
    used = site.run("boom", code=1)
    (error, hint) = lines(used.stderr)
    assert error.startswith("error: command 'boom' of plugin lazy")
    assert "lazy_plugin.boom:command" in error
    assert hint.startswith("hint: ")


def test_a_plugin_command(site: Any) -> None:
    code = HEAD + "@hookimpl\ndef register_commands(register):\n"
    code += "    register('greet', 'polite_plugin.greet:command', summary='says hello')\n"
    greet = (
        "import click\n@click.command()\n@click.argument('whom')\ndef command(whom):\n    click.echo(f'hello {whom}')\n"
    )
    site.install("polite", code, greet__py=greet)
    shown = site.run("--help").stdout
    assert "Commands of plugins: greet says hello" in " ".join(shown.split())
    assert site.run("greet", "you").stdout == "hello you\n"
    assert site.run("greet", code=2).stdout == ""


def test_a_command_must_be_a_click_command(site: Any) -> None:
    code = HEAD + "@hookimpl\ndef register_commands(register):\n    register('odd', 'odd_plugin:thing')\n\nthing = 3\n"
    site.install("odd", code)
    done = site.run("odd", code=1)
    line, hint = lines(done.stderr)
    assert line.startswith("error: command odd of plugin odd")
    assert "plugins check" in hint
    assert "odd_plugin:thing" in line


def test_a_plugin_cannot_replace_a_builtin_command(site: Any) -> None:
    code = HEAD + "@hookimpl\ndef register_commands(register):\n    register('recipes', 'conflicting_plugin:thing')\n"
    site.install("conflicting", code)
    done = site.run("--help")
    (line,) = lines(done.stderr)
    assert all(part in line for part in ("command 'recipes'", "plugin llavactl", "plugin conflicting"))
    assert "Commands of plugins" not in done.stdout
    assert "llava-v1-7b" in site.run("recipes", "list").stdout


def test_the_first_registration_of_a_name_is_kept(site: Any) -> None:
    register = HEAD + "@hookimpl\ndef register_connectors(register):\n    register('same', 'x:y', summary='of {0}')\n"
    site.install("aaa", register.format("aaa"))
    site.install("bbb", register.format("bbb"))
    done = site.run("components", "--json")
    (line,) = lines(done.stderr)
    assert all(part in line for part in ("connector 'same'", "plugin aaa", "plugin bbb"))
    (same,) = [each for each in json.loads(done.stdout) if each["name"] == "same"]
    assert same["summary"] == "of aaa"
    listed = {each["name"]: each["error"] for each in json.loads(site.run("plugins", "list", "--json").stdout)}
    assert listed["aaa"] == ""
    assert "plugin bbb" in listed["bbb"]


def test_a_builtin_component_cannot_be_replaced(site: Any) -> None:
    site.install("conflicting", HEAD + "@hookimpl\ndef register_connectors(register):\n    register('linear', 'x:y')\n")
    done = site.run("components", "connectors", "--json")
    (line,) = lines(done.stderr)
    assert all(part in line for part in ("connector 'linear'", "plugin llavactl", "plugin conflicting"))
    assert [each["plugin"] for each in json.loads(done.stdout) if each["name"] == "linear"] == ["llavactl"]


def test_two_packages_with_one_plugin_name(site: Any) -> None:
    site.install("twin", GOOD)
    (site.folder / "other_module.py").write_text(GOOD.replace('"good"', '"other"'))
    site.add_entry_point("zweite-3.0", "twin", "other_module")
    done = site.run("components")
    (line,) = lines(done.stderr)
    assert all(part in line for part in ("'twin'", "other_module", "twin_plugin of package twin-plugin"))
    assert "other" in done.stdout


def test_a_plugin_cannot_be_called_llavactl(site: Any) -> None:
    site.install("llavactl", GOOD)
    (line,) = lines(site.run("components").stderr)
    assert "llavactl_plugin" in line


class TestSelection:
    @pytest.fixture(autouse=True)
    def two(self, site: Any) -> None:
        site.install("one", GOOD.replace('"good"', '"first"'))
        site.install("two", GOOD.replace('"good"', '"second"'))

    def names(self, site: Any, **environment: str) -> set[str]:
        return {each["name"] for each in json.loads(site.run("components", "--json", **environment).stdout)}

    def test_an_empty_selection(self, site: Any) -> None:
        assert not {"first", "second"} & self.names(site, LLAVACTL_PLUGINS="")

    def test_a_selection_by_name(self, site: Any) -> None:
        assert "first" in self.names(site, LLAVACTL_PLUGINS=" one ")
        assert "second" not in self.names(site, LLAVACTL_PLUGINS="one")
        assert {"first", "second"} <= self.names(site, LLAVACTL_PLUGINS="two,one")

    def test_no_selection(self, site: Any) -> None:
        program = "import os; del os.environ['LLAVACTL_PLUGINS']\nfrom llavactl.cli import main; main()"
        done = site.python(program, "components", "--json")
        assert {"first", "second"} <= {each["name"] for each in json.loads(done.stdout)}

    def test_an_unknown_plugin_in_the_selection(self, site: Any) -> None:
        done = site.run("components", LLAVACTL_PLUGINS="one,three")
        (line,) = lines(done.stderr)
        assert "LLAVACTL_PLUGINS" in line
        assert "'three'" in line
        strict = site.run("components", code=1, LLAVACTL_PLUGINS="three", LLAVACTL_STRICT_PLUGINS="1")
        assert "'three'" in strict.stderr


RECIPE = """\
# llavactl run -r ours
extends: base.yaml
name: ours
connector: {name: wide, width: 8}
"""
BASE = """\
name: base
vision: {name: clip, model: a/b}
connector: {name: linear}
language: {name: hf, model: c/d}
"""
WITH_RECIPE = (
    HEAD
    + """
from llavactl import Problem

@hookimpl
def register_connectors(register):
    register("wide", "never.imported:thing", options="birds_plugin.options:WideOptions", summary="wider")

@hookimpl
def register_recipes(register):
    register("ours", "birds_plugin:ours.yaml", summary="with a wide connector")
    register("gone", "birds_plugin:gone.yaml")

@hookimpl
def check_recipe(recipe):
    if recipe["connector"]["width"] % 2:
        return [Problem("", "connector.width", "must be even")]
"""
)
OPTIONS = """
from llavactl import Options
from pydantic import Field

class WideOptions(Options):
    width: int = Field(4, ge=2, description="how wide")
"""


class TestRecipeOfAPlugin:
    @pytest.fixture(autouse=True)
    def birds(self, site: Any) -> None:
        site.install("birds", WITH_RECIPE, ours__yaml=RECIPE, base__yaml=BASE, options__py=OPTIONS)

    def test_it_is_listed_and_valid(self, site: Any) -> None:
        assert "ours" in site.run("recipes", "list").stdout
        assert site.run("recipes", "check", "ours").stdout == "ours: ok\n"

    def test_its_options_are_validated(self, site: Any) -> None:
        done = site.run("recipes", "check", "ours", "-o", "connector.width=1", "-o", "connector.wdth=2", code=1)
        unknown, invalid = done.stdout.splitlines()
        assert unknown.startswith("-o connector.wdth=2: connector.wdth: ")
        assert "'width'" in unknown
        assert invalid.startswith("-o connector.width=1: connector.width: ")

    def test_its_check_is_called(self, site: Any) -> None:
        done = site.run("recipes", "check", "ours", "-o", "connector.width=3", code=1)
        assert done.stdout == "-o connector.width=3: connector.width: must be even\n"

    def test_a_copy_is_valid(self, site: Any) -> None:
        site.run("recipes", "copy", "ours", "new/mine.yaml")
        assert site.run("recipes", "check", "-r", "new/mine.yaml").stdout == "new/mine.yaml: ok\n"

    def test_a_missing_recipe_file(self, site: Any) -> None:
        done = site.run("recipes", "show", "gone", code=1)
        assert "recipe 'gone' of plugin birds" in done.stderr
        assert "birds_plugin:gone.yaml" in done.stderr


OBSERVER = (
    HEAD
    + """
from pathlib import Path

@hookimpl
def train_logged(line):
    if line["step"] == 2:
        raise ValueError("no twos")
    with Path("seen.txt").open("a") as file:
        file.write(f"{line['step']}\\n")

@hookimpl
def train_finished(report):
    raise SystemExit(9)
"""
)


def test_exceptions_of_observers_are_logged(site: Any) -> None:
    site.install("watch", OBSERVER)
    site.install("zulu", OBSERVER.replace("no twos", "nothing").replace("seen", "zulu"))
    program = """
import logging
logging.basicConfig(format="%(message)s")
from llavactl.core.plugins import notify
for step in (1, 2, 3):
    notify("train_logged", stage=1, line={"step": step})
notify("train_finished", report={})
notify("train_started", stage=1, folder=None, steps=3)
print("done")
"""
    done = site.python(program)
    assert done.stdout == "done\n"
    assert lines(done.stderr) == [
        "plugin watch: train_logged (watch_plugin/__init__.py:9): ValueError: no twos",
        "plugin zulu: train_logged (zulu_plugin/__init__.py:9): ValueError: nothing",
        "plugin watch: train_finished (watch_plugin/__init__.py:15): SystemExit: 9",
        "plugin zulu: train_finished (zulu_plugin/__init__.py:15): SystemExit: 9",
    ]
    for name in ("seen.txt", "zulu.txt"):
        assert Path(site.folder, name).read_text() == "1\n3\n"
    strict = site.python(program, code=1, LLAVACTL_STRICT_PLUGINS="1")
    assert "PluginError: plugin watch: train_logged" in strict.stderr


def test_an_unusable_home_is_ignored(site: Any) -> None:
    site.home.write_text("a file where the folder should be")
    site.install("good", GOOD)
    assert site.run("--help").stderr == ""
    assert "good" in site.run("components").stdout
