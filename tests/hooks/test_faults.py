"""Faults of hooks: one line with the hook and the plugin's line, once per run; tracebacks on request."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import pluggy
import pytest

import llavactl
from llavactl.core import hookspecs, plugins
from llavactl.core.errors import PluginError
from llavactl.core.hook_rules import accepted, hook_problems

HEAD = "from llavactl import hookimpl\n\n\n@hookimpl\n"

NOTIFY = """
import logging, sys
logging.basicConfig(format="%(message)s", level=sys.argv[1])
logging.getLogger("pluggy").setLevel("ERROR")
from llavactl.core import plugins
for step in range(3):
    plugins.notify("train_logged", recipe={}, stage=1, line={"step": step})
plugins.log_failures()
plugins.notify("train_logged", recipe={}, stage=1, line={"step": 4})
"""


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line]


class TestAFailingObserver:
    @pytest.fixture(autouse=True)
    def watch(self, site: Any) -> None:
        site.install("watch", HEAD + "def train_logged(line):\n    {}[line['step']]\n")

    def test_it_is_logged_once_per_run_with_hook_and_line(self, site: Any) -> None:
        once, count, next_run = lines(site.python(NOTIFY, "WARNING").stderr)
        assert once == "plugin watch: train_logged (watch_plugin/__init__.py:6): KeyError: 0"
        assert all(part in count for part in ("plugin watch", "train_logged", "3"))
        assert next_run.endswith("KeyError: 4")

    def test_the_traceback_is_shown_on_request(self, site: Any) -> None:
        shown = site.python(NOTIFY, "DEBUG").stderr
        assert shown.count("Traceback") == 2
        assert "{}[line['step']]" in shown


def test_a_command_shows_the_traceback_of_a_hook_with_verbose(site: Any) -> None:
    site.install("loud", HEAD + "def register_vision(register):\n    raise ValueError('broken')\n")
    (line,) = lines(site.run("components").stderr)
    assert line.startswith("llavactl: plugin loud: register_vision (loud_plugin/__init__.py:6): ValueError: broken; ")
    assert line.endswith("LLAVACTL_PLUGINS=")
    shown = site.run("components", "--verbose").stderr
    assert shown.count("Traceback") == 1
    assert "raise ValueError('broken')" in shown


@pytest.mark.parametrize(
    ("code", "parts"),
    [
        ("import json.no_such_module\n", ["p_plugin/__init__.py:1", "json.no_such_module"]),
        ("x = 1\ndef (:\n", ["p_plugin/__init__.py:2", "SyntaxError"]),
        (HEAD + "def train_loged(line):\n    pass\n", ["train_loged", "p_plugin/__init__.py:4", "'train_logged'"]),
        (HEAD + "def train_logged(lines):\n    pass\n", ["p_plugin/__init__.py:4", "'lines'", "stage, line"]),
        (HEAD + "async def train_logged(line):\n    pass\n", ["p_plugin/__init__.py:4", "async"]),
        (HEAD + "def train_logged(line):\n    yield\n", ["p_plugin/__init__.py:4", "generator"]),
        (HEAD + "def train_logged(line, /):\n    pass\n", ["p_plugin/__init__.py:4", "positional-only"]),
        (HEAD + "def train_logged(*, more):\n    pass\n", ["p_plugin/__init__.py:4", "'more'"]),
    ],
)
def test_a_plugin_that_cannot_be_loaded_is_located(site: Any, code: str, parts: list[str]) -> None:
    site.install("p", code)
    (line,) = lines(site.run("components").stderr)
    assert line.startswith("llavactl: plugin p can't be loaded: ")
    assert all(part in line for part in parts), line


def require(site: Any, name: str, requirement: str) -> None:
    metadata = site.folder / f"{name}_plugin-1.2.dist-info" / "METADATA"
    metadata.write_text(f"{metadata.read_text()}Requires-Dist: {requirement}\n")


def test_a_plugin_for_another_version_is_named_with_its_requirement(site: Any) -> None:
    """After an upgrade of llavactl that ignores the requirement, as `pipx upgrade` does."""
    site.install("old", HEAD + "def train_logged(removed):\n    pass\n")
    require(site, "old", "llavactl<0.2")
    (line,) = lines(site.run("components").stderr)
    assert "'removed'" in line
    assert f"requires llavactl<0.2, installed is {llavactl.__version__}" in line


@pytest.mark.parametrize(
    ("requirement", "ok"),
    [
        ("llavactl<0.2", False),
        ("llavactl", True),
        ("llavactl>=0.2", True),
        ("llavactl<0.2; python_version < '3'", True),
        ("click<0.2", True),
    ],
)
def test_the_check_has_the_required_version(site: Any, requirement: str, ok: bool) -> None:
    site.install("old", HEAD + "def train_logged(line):\n    pass\n")
    require(site, "old", requirement)
    checks = json.loads(site.run("plugins", "check", "old", "--json", code=int(not ok)).stdout)["checks"]
    assert [each["check"] for each in checks if each["ok"] is False] == ([] if ok else ["version of llavactl"])


def test_parameters_are_passed_by_name() -> None:
    names = ("line", "stage", "options")
    assert accepted(lambda line: None, names) == ["line"]
    assert accepted(lambda *, options=None, other=1: None, names) == ["options"]
    assert accepted(lambda **everything: None, names) == list(names)


class Changed:
    """A hook specification whose parameter ``report`` will be removed."""

    @hookspecs.hookspec(warn_on_impl_args={"report": DeprecationWarning("`report` is replaced by `result`")})
    def finished(self, result: int, report: int) -> None: ...


def test_an_old_parameter_still_works_and_warns(caplog: pytest.LogCaptureFixture) -> None:
    received = []

    class Old:
        @hookspecs.hookimpl
        def finished(self, report: int) -> None:
            received.append(report)

    class New:
        @hookspecs.hookimpl
        def finished(self, result: int) -> None:
            received.append(result)

    manager = pluggy.PluginManager("llavactl")
    manager.add_hookspecs(Changed)
    for name, plugin in {"new": New(), "old": Old()}.items():
        assert hook_problems(manager, plugin) == []
        plugins._register(manager, plugin, name)
    for implementation in manager.hook.finished.get_hookimpls():
        plugins._by_keyword(implementation, "train_finished")(result=1, report=2)
    assert sorted(received) == [1, 2]
    (warning,) = caplog.messages
    assert warning.startswith("plugin old: ")
    assert f"{Path(__file__).name}:{Old.finished.__code__.co_firstlineno}" in warning
    assert "`result`" in warning


def test_a_stalled_import_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from importlib.metadata import EntryPoint

    points = tuple(EntryPoint(name, "json", "llavactl") for name in ("fine", "stalled"))
    monkeypatch.setattr(plugins, "entry_points", lambda: points)
    monkeypatch.setattr(plugins, "STALLED_S", 0.01)
    with plugins._stalled_import_logged("stalled"):
        for _ in range(500):
            if caplog.messages:
                break
            time.sleep(0.01)
    (line,) = caplog.messages
    assert "plugin stalled" in line
    assert line.endswith("LLAVACTL_PLUGINS=fine")
    caplog.clear()
    monkeypatch.setattr(plugins, "STALLED_S", 60)
    with plugins._stalled_import_logged("fine"):
        pass
    assert caplog.messages == []


def test_strict_mode_raises_every_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVACTL_STRICT_PLUGINS", "1")
    for _ in range(2):
        with pytest.raises(PluginError), plugins.isolated("p", "train_logged", once=True):
            raise ValueError


def test_only_the_first_fault_of_each_hook_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "llavactl"):
        for hook in ("train_logged", "train_started", "train_logged"):
            with plugins.isolated("p", hook, once=True):
                raise ValueError
        assert len(caplog.messages) == 2
        plugins.log_failures()
        plugins.log_failures()
    assert len(caplog.messages) == 3
