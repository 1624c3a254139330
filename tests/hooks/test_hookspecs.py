"""Every hook is documented, typed and called by somebody."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from llavactl.core import errors, hookspecs, plugins
from llavactl.core.protocols import KINDS

ROOT = Path(hookspecs.__file__).parents[1]
HOOKS = {
    name: hook
    for name, hook in vars(hookspecs).items()
    if inspect.isfunction(hook) and getattr(hook, "llavactl_spec", None) is not None
}


def test_there_is_one_registering_hook_a_kind() -> None:
    registering = {name.removeprefix("register_") for name in HOOKS if name.startswith("register_")}
    assert registering == {*KINDS, "commands", "recipes"}


@pytest.mark.parametrize("name", HOOKS)
def test_it_has_a_docstring_and_types(name: str) -> None:
    doc = inspect.getdoc(HOOKS[name])
    assert doc
    assert doc.endswith(".")
    hints = get_type_hints(HOOKS[name], {**vars(hookspecs), **vars(errors)})
    assert set(hints) == {*inspect.signature(HOOKS[name]).parameters, "return"}


def called() -> dict[str, list[str]]:
    """Hooks that the source calls, with what each call hands over."""
    found: dict[str, list[str]] = {}
    for file in ROOT.rglob("*.py"):
        for match in re.finditer(r'(?:notify|implementations)\(\s*"(\w+)"', file.read_text()):
            found.setdefault(match[1], []).append(str(file))
    return found


@pytest.mark.parametrize("name", [name for name in HOOKS if not name.startswith("register_")])
def test_somebody_calls_it(name: str) -> None:
    text = "".join(file.read_text() for file in ROOT.rglob("*.py") if file.name != "hookspecs.py")
    assert name in called() or re.search(rf'"{name}"', text), f"nothing in llavactl calls {name}"


def test_nothing_else_is_called() -> None:
    assert set(called()) <= set(HOOKS)


def test_every_registering_hook_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from llavactl.core import registry

    asked: list[str] = []

    def implementations(hook: str) -> list[Any]:
        asked.append(hook)
        return []

    monkeypatch.setattr(plugins, "implementations", implementations)
    registry.registry.__wrapped__()
    assert set(asked) == {name for name in HOOKS if name.startswith("register_")}


def test_an_implementation_may_take_fewer_arguments() -> None:
    seen = []

    class Plugin:
        @hookspecs.hookimpl
        def train_started(self, steps: int) -> None:
            seen.append(steps)

    manager = plugins.manager()
    plugin = Plugin()
    manager.register(plugin, "few")
    try:
        plugins.notify("train_started", stage=1, folder=Path(), steps=7)
    finally:
        manager.unregister(plugin)
    assert seen == [7]
