"""The plugin loader in one process; tests/hooks/ has installed packages."""

from __future__ import annotations

import logging
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pluggy
import pytest

from llavactl import __version__
from llavactl.core import plugin_commands, plugin_points, plugins
from llavactl.core.errors import PluginError


def test_an_exception_is_logged_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="llavactl"), plugins.isolated("p"):
        raise ValueError("a\n  b")
    assert caplog.messages == ["plugin p: ValueError: a b"]


def test_the_message_of_a_plugin_error_is_logged_unchanged(caplog: pytest.LogCaptureFixture) -> None:
    with plugins.isolated("p"):
        raise PluginError("message")
    assert caplog.messages == ["message"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, GeneratorExit])
def test_interrupts_propagate(error: type[BaseException]) -> None:
    with pytest.raises(error), plugins.isolated("p"):
        raise error


def test_the_hook_that_is_interrupted_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A plugin may raise KeyboardInterrupt; and a user who stops a slow hook sees which one it was."""
    point = metadata.EntryPoint("p", __name__.partition(".")[0], "llavactl")
    monkeypatch.setattr(plugins, "entry_points", lambda: (point,))
    with pytest.raises(KeyboardInterrupt), plugins.isolated("p", "register_vision", hint="edit that line"):
        raise KeyboardInterrupt
    (line,) = caplog.messages
    assert line.startswith("plugin p: register_vision (")
    assert line.endswith("KeyboardInterrupt; edit that line")


def test_exceptions_of_the_builtin_plugin_propagate() -> None:
    with pytest.raises(ZeroDivisionError), plugins.isolated(plugins.BUILTIN):
        raise ZeroDivisionError


@pytest.mark.parametrize(("value", "strict"), [("", False), ("0", False), ("1", True), ("yes", True)])
def test_strict(monkeypatch: pytest.MonkeyPatch, value: str, strict: bool) -> None:
    monkeypatch.setenv("LLAVACTL_STRICT_PLUGINS", value)
    assert plugins.strict() == strict
    if strict:
        with pytest.raises(PluginError, match="plugin p: ValueError: x"), plugins.isolated("p"):
            raise ValueError("x")


def test_the_builtin_plugin_comes_first() -> None:
    first = plugins.installed()[0]
    assert (first.name, first.version, first.error) == ("llavactl", __version__, "")


class TestCommands:
    @pytest.fixture(autouse=True)
    def no_points(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(plugins, "entry_points", lambda: self.points)

    points: tuple[Any, ...] = ()

    def test_the_cache_is_not_read_without_plugins(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(plugin_commands, "cache_dir", lambda: pytest.fail("read"))
        assert plugin_commands.commands() == {}

    @pytest.mark.parametrize("content", ["", "not json", "[]", '{"key": 1}', '{"key": null, "commands": 3}'])
    def test_a_broken_cache_is_ignored(self, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
        from importlib.metadata import EntryPoint

        self.points = (EntryPoint("p", "json", "llavactl"),)
        file = plugin_commands.cache_dir() / "plugin-commands.json"
        file.parent.mkdir(parents=True)
        file.write_text(content)
        assert isinstance(plugin_commands.commands(), dict)


@pytest.mark.parametrize("error", [GeneratorExit, type("Own", (BaseException,), {})])
def test_any_exception_during_import_is_logged_in_one_line(
    error: type[BaseException], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_: metadata.EntryPoint) -> None:
        raise error("two\nlines")

    monkeypatch.setattr(plugin_points, "loaded", load)
    plugins._load(pluggy.PluginManager("llavactl"), metadata.EntryPoint("base", "no.such", "llavactl"))
    (line,) = caplog.messages
    assert line.startswith(f"plugin base can't be loaded: {error.__name__}: two lines; ")


@pytest.mark.parametrize(
    ("line", "versions", "warning"),
    [
        ("", 2, ""),
        ('RESULTS_VERSION = "1"', 1, ""),
        ("RESULTS_VERSION = 1", 2, "RESULTS_VERSION is 1, expected a string"),
    ],
)
def test_a_results_version_stays_when_the_plugin_changes(
    line: str, versions: int, warning: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """The version is part of the identity of finished steps and features; without one, it is that of the package."""
    file = tmp_path / "own.py"
    monkeypatch.setenv("LLAVACTL_PLUGIN_FILES", str(file))
    found = set()
    for comment in ("# first", "# second"):
        file.write_text(f"{comment}\n{line}\n")
        sys.modules.pop("own", None)
        plugins.reload()
        found.add(plugins.version_of("own"))
        assert bool(warning) == bool(caplog.messages)
        assert all(warning in message for message in caplog.messages)
    monkeypatch.undo()
    sys.modules.pop("own")
    plugins.reload()
    assert len(found) == versions


def test_what_an_observer_changes_affects_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def change(line: dict[str, Any], recipe: dict[str, Any]) -> None:
        seen.append(line["loss"])
        line["loss"] = "oops"
        recipe["stage1"]["epochs"] = 0

    monkeypatch.setattr(plugins, "implementations", lambda _hook: [("one", change), ("two", change)])
    line, recipe = {"loss": 0.5}, {"stage1": {"epochs": 1}}
    plugins.notify("train_logged", line=line, recipe=recipe)
    assert (seen, line, recipe) == ([0.5, 0.5], {"loss": 0.5}, {"stage1": {"epochs": 1}})
