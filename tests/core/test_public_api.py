"""``llavactl.__all__``, the public API."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import llavactl


def test_names_are_sorted_and_complete() -> None:
    assert list(llavactl.__all__) == sorted(set(llavactl.__all__))
    assert set(dir(llavactl)) == {*llavactl.__all__, "__version__"}


def test_the_stub_has_the_names_with_their_modules() -> None:
    tree = ast.parse(Path(llavactl.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert {alias.asname: node.module for node in imports for alias in node.names} == llavactl._MODULES


@pytest.mark.parametrize("name", llavactl.__all__)
def test_every_name_can_be_imported(name: str) -> None:
    assert getattr(llavactl, name) is not None


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        llavactl.nothing  # noqa: B018


def test_importing_llavactl_imports_no_submodules() -> None:
    code = "import sys, llavactl; print([name for name in sys.modules if name.startswith('llavactl.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
