"""Where in a plugin's code an exception was raised, and the files of its packages."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from llavactl.core.errors import DataError
from llavactl.core.plugin_code import located_fault, package_files, packages_of, places, raised_at, root_package

CODE = """\
import json


def calls(function):
    return function()


def divides():
    return calls(lambda: 1 / 0)


def reads():
    return json.loads("{")


def stops():
    yield next(iter(()))


def chains():
    try:
        divides()
    except ZeroDivisionError as error:
        raise ValueError("chained") from error
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    folder = tmp_path / "located"
    folder.mkdir()
    (folder / "__init__.py").write_text(CODE)
    (folder / "broken.py").write_text("x = 1\ndef (\n")
    (folder / "data.csv").write_text("a\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("located")
    del importlib.sys.modules["located"]  # type: ignore[attr-defined]


def raised(function: Any) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - any
        function()
    return caught.value


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda code: code.divides(), 9),
        (lambda code: code.reads(), 13),  # raised in a library
        (lambda code: code.calls(lambda: 1 / 0), 5),  # raised in another module, which the code called
        (lambda code: list(code.stops()), 17),  # only in the cause
        (lambda code: code.chains(), 9),
        (lambda code: importlib.import_module("located.broken"), 2),
    ],
)
def test_the_innermost_line_in_the_packages(code: Any, call: Any, line: int) -> None:
    error = raised(lambda: call(code))
    place = raised_at(error, ["other", "located"])
    assert place is not None
    assert place.where.endswith(f":{line}")
    assert Path(place.where.rpartition(":")[0]).name in ("__init__.py", "broken.py")
    assert located_fault(error, ["located"]).startswith(f"{place.where}: {type(error).__name__}: ")


def test_functions_are_in_the_order_of_their_calls(code: Any) -> None:
    assert [place.function for place in places(raised(code.divides), ["located"])] == ["divides", "calls", "<lambda>"]


def test_code_outside_of_the_packages_has_no_place(code: Any) -> None:
    error = raised(code.divides)
    assert raised_at(error, ["other"]) is None
    assert located_fault(error, []) == "ZeroDivisionError: division by zero"
    assert located_fault(DataError("no rows", hint="add some"), []) == "no rows; add some"


def test_a_cycle_of_causes_ends() -> None:
    first, second = ValueError(), ValueError()
    first.__cause__, second.__cause__ = second, first
    assert places(first, ["located"]) == []


@pytest.mark.parametrize(
    ("package", "pattern", "names"),
    [
        ("located", "*", ["located/__init__.py", "located/broken.py", "located/data.csv"]),
        ("located", "*.py", ["located/__init__.py", "located/broken.py"]),
        ("this", "*.py", ["this.py"]),
        ("no_such_package", "*", []),
    ],
)
@pytest.mark.usefixtures("code")
def test_the_files_of_a_package(package: str, pattern: str, names: list[str]) -> None:
    assert [name for name, _ in package_files(package, pattern)] == names


def test_packages() -> None:
    assert root_package("a.b:c.d") == "a"
    assert packages_of("llavactl") == ["llavactl"]
    assert packages_of("no such plugin") == []
