"""The selection of plugins: every fault has a way out."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pluggy
import pytest

from llavactl.core import plugin_files, plugin_points, plugins
from llavactl.core.errors import PluginError


def point(name: str, value: str = "json", **distribution: Any) -> metadata.EntryPoint:
    made = metadata.EntryPoint(name, value, plugin_points.GROUP)
    vars(made)["dist"] = SimpleNamespace(name=f"{name}-package", version="1", requires=[], **distribution)
    return made


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> metadata.EntryPoint:
    """A file in the working directory."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "own_file_plugin.py"
    file.write_text("")
    monkeypatch.setattr(plugin_files, "_modules", {})
    return plugin_files.entry_point(file, plugin_points.GROUP)


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("no_such_module_anywhere", ["No module named", "--force-reinstall p-package"]),
        ("json:nothing", ["json:nothing", "entry point p of p-package", "pyproject.toml"]),
        ("json:dumps.more", ["'more'", "pyproject.toml"]),
        ("not a module!", ["'not a module!'", "pyproject.toml"]),
        ("", ["''", "pyproject.toml"]),
    ],
)
def test_a_wrong_entry_point_is_one_line_with_a_way_out(
    value: str, parts: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    points = (point("p", value), point("other"))
    monkeypatch.setattr(plugins, "entry_points", lambda: points)
    plugins._load(pluggy.PluginManager("llavactl"), points[0])
    (line,) = caplog.messages
    assert line.startswith("plugin p can't be loaded: ")
    assert all(part in line for part in parts), line
    assert line.endswith("or set LLAVACTL_PLUGINS=other")


def test_a_file_is_named_by_its_path(own: metadata.EntryPoint) -> None:
    points = [own, point("installed")]
    assert plugin_points.check_command("installed", points) == "llavactl plugins check installed"
    assert plugin_points.check_command(own.name, points) == "llavactl plugins check own_file_plugin.py"
    assert plugin_points.without("installed", points) == "set LLAVACTL_PLUGINS=own_file_plugin"
    assert plugin_points.without(own.name, points) == "leave out --plugin own_file_plugin.py"
    assert plugin_points.without("x", [point("a b")]) == "set LLAVACTL_PLUGINS='a b'"
    assert plugin_points.without("x", [point("x")]) == "set LLAVACTL_PLUGINS="


def test_a_file_that_is_not_selected_is_no_fault(own: metadata.EntryPoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugin_files.VARIABLE, str(Path("own_file_plugin.py").absolute()))
    monkeypatch.setenv(plugin_points.SELECTION, "gone")
    selection = plugin_points.selected()
    assert selection.points == ()
    assert [(name, "remove it" in fault.hint) for name, fault in selection.faults] == [("gone", True)]
    (line,) = selection.left_out
    assert "LLAVACTL_PLUGINS=gone,own_file_plugin" in line


@pytest.mark.parametrize(
    ("requirement", "conflict"), [("llavactl<0.1", True), ("llavactl>=0.1", False), ("!!! none", False)]
)
def test_the_required_version(requirement: str, conflict: bool) -> None:
    required = point("p")
    vars(required)["dist"].requires = [requirement]
    assert bool(plugin_points.version_conflict(required)) == conflict
    _, remedy = plugin_points.load_fault(required, ValueError())
    assert ("pip install --upgrade p-package" in remedy) == conflict


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (ModuleNotFoundError("x", name="no_such_dependency.part"), "pip install no_such_dependency`"),
        (ModuleNotFoundError("x", name="llavactl.gone"), "p-package"),
        (PluginError("wrong hook", hint="edit the module"), "edit the module"),
        (ZeroDivisionError(), "authors of p-package"),
        (SystemExit(3), "authors of p-package"),
    ],
)
def test_a_failed_import_has_a_remedy(error: BaseException, part: str) -> None:
    what, remedy = plugin_points.load_fault(point("p"), error)
    assert part in remedy
    assert remedy not in what


def test_the_line_of_a_failed_import_is_to_be_edited() -> None:
    package = __name__.partition(".")[0]
    try:
        raise ValueError("wrong")
    except ValueError as error:
        what, remedy = plugin_points.load_fault(point("p", package), error)
    assert f"{Path(__file__).name}:" in what
    assert remedy == "edit that line"


def test_what_is_not_a_plugin_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("")
    whys = {
        name: plugin_points.not_available(name, [point("birds")])
        for name in (str(tmp_path), str(tmp_path / "data.txt"), "numpy", "brids", "a/b")
    }
    assert len({why.message.replace(name, "") for name, why in whys.items()}) == 4
    assert all(why.hint for why in whys.values())
    assert "did you mean 'birds'" in whys["brids"].hint
