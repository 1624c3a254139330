"""``llavactl.__all__``: what plugins and scripts may use."""

from __future__ import annotations

import subprocess
import sys

import pytest

import llavactl


def test_it_is_sorted_and_whole() -> None:
    assert list(llavactl.__all__) == sorted(set(llavactl.__all__))
    assert set(dir(llavactl)) == {*llavactl.__all__, "__version__"}


@pytest.mark.parametrize("name", llavactl.__all__)
def test_every_name_leads_somewhere(name: str) -> None:
    assert getattr(llavactl, name) is not None


def test_any_other_name_is_not() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        llavactl.nothing  # noqa: B018


def test_importing_it_imports_nothing_else() -> None:
    code = "import sys, llavactl; print([name for name in sys.modules if name.startswith('llavactl.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
