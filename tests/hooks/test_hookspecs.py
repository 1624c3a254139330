"""Every hook is documented, typed and called."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from llavactl.core import errors, hookspecs, plugins, registry
from llavactl.core.protocols import KINDS

ROOT = Path(hookspecs.__file__).parents[1]
HOOKS = {
    name: hook
    for name, hook in vars(hookspecs).items()
    if inspect.isfunction(hook) and getattr(hook, "llavactl_spec", None) is not None
}


def test_one_register_hook_per_kind() -> None:
    kinds = {name.removeprefix("register_") for name in HOOKS if name.startswith("register_")}
    assert kinds == {*KINDS, "commands", "recipes"}


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_have_docstrings_and_types(name: str) -> None:
    doc = inspect.getdoc(HOOKS[name])
    assert doc
    assert doc.endswith(".")
    hints = get_type_hints(HOOKS[name], {**vars(hookspecs), **vars(errors), **vars(registry)})
    assert set(hints) == {*inspect.signature(HOOKS[name]).parameters, "return"}


def called() -> dict[str, list[str]]:
    """The files that call each hook."""
    found: dict[str, list[str]] = {}
    for file in ROOT.rglob("*.py"):
        for match in re.finditer(r'(?:notify|implementations)\(\s*"(\w+)"', file.read_text()):
            found.setdefault(match[1], []).append(str(file))
    return found


@pytest.mark.parametrize("name", [name for name in HOOKS if not name.startswith("register_")])
def test_every_hook_is_called(name: str) -> None:
    text = "".join(file.read_text() for file in ROOT.rglob("*.py") if file.name != "hookspecs.py")
    assert name in called() or re.search(rf'"{name}"', text), f"nothing in llavactl calls {name}"


def test_only_hooks_are_called() -> None:
    assert set(called()) <= set(HOOKS)


def test_the_registry_calls_every_register_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def implementations(hook: str) -> list[Any]:
        calls.append(hook)
        return []

    monkeypatch.setattr(plugins, "implementations", implementations)
    registry.registry.__wrapped__()
    assert set(calls) == {name for name in HOOKS if name.startswith("register_")}


def test_an_implementation_may_take_a_subset_of_the_parameters() -> None:
    received = []

    class Plugin:
        @hookspecs.hookimpl
        def train_started(self, steps: int) -> None:
            received.append(steps)

    manager = plugins.manager()
    plugin = Plugin()
    manager.register(plugin, "few")
    try:
        plugins.notify("train_started", stage=1, folder=Path(), steps=7)
    finally:
        manager.unregister(plugin)
    assert received == [7]
