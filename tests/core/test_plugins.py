"""What the plugin loader promises within one process; tests/hooks/ has real packages."""

from __future__ import annotations

import logging
from importlib import metadata
from typing import Any

import pluggy
import pytest

from llavactl import __version__
from llavactl.core import plugins
from llavactl.core.errors import PluginError


def test_isolated_makes_a_line_of_what_a_plugin_raises(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="llavactl"), plugins.isolated("p"):
        raise ValueError("a\n  b")
    assert caplog.messages == ["plugin p: ValueError: a b"]


def test_isolated_keeps_a_plugin_errors_own_words(caplog: pytest.LogCaptureFixture) -> None:
    with plugins.isolated("p"):
        raise PluginError("as it is")
    assert caplog.messages == ["as it is"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, GeneratorExit])
def test_the_users_interrupt_is_never_a_plugins_fault(error: type[BaseException]) -> None:
    with pytest.raises(error), plugins.isolated("p"):
        raise error


def test_our_own_faults_are_not_excused() -> None:
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

    def test_without_plugins_nothing_is_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(plugins, "cache_dir", lambda: pytest.fail("asked"))
        assert plugins.commands() == {}

    @pytest.mark.parametrize("memory", ["", "not json", "[]", '{"key": 1}', '{"key": null, "commands": 3}'])
    def test_a_broken_memory_is_no_memory(self, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
        from importlib.metadata import EntryPoint

        self.points = (EntryPoint("p", "json", "llavactl"),)
        file = plugins.cache_dir() / "plugin-commands.json"
        file.parent.mkdir(parents=True)
        file.write_text(memory)
        assert isinstance(plugins.commands(), dict)


@pytest.mark.parametrize("error", [GeneratorExit, type("Own", (BaseException,), {})])
def test_an_import_that_raises_anything_is_one_line(
    error: type[BaseException], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_: metadata.EntryPoint) -> None:
        raise error("two\nlines")

    monkeypatch.setattr(metadata.EntryPoint, "load", load)
    plugins._load(pluggy.PluginManager("llavactl"), metadata.EntryPoint("base", "no.such", "llavactl"))
    assert caplog.messages == [f"plugin base can't be loaded: {error.__name__}: two lines"]
