"""llavactl touches only what a component's Protocols declare: a plugin that implements them works everywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llavactl
from llavactl.core.protocols import ALTERNATIVES, CAPABILITIES, KINDS, Encoder
from llavactl.core.protocols.members import members
from llavactl.core.registry import Registry, registry
from llavactl.testing import run_cli


def guarded(component: Any, protocols: tuple[type, ...], undeclared: list[str]) -> Any:
    """``component`` with the members only that those ``protocols`` declare which it implements.

    Any other attribute raises an error, and is added to ``undeclared``.
    """
    names = {name for protocol in protocols if isinstance(component, protocol) for name in members(protocol)}

    def declared(name: str) -> property:
        return property(lambda _: _guarded_result(getattr(component, name), name, undeclared))

    def missing(_self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        undeclared.append(f"{type(component).__name__}.{name}")
        raise AssertionError(undeclared[-1])

    namespace: dict[str, Any] = {name: declared(name) for name in names if not name.startswith("__")}
    if "__iter__" in names:
        namespace["__iter__"] = lambda _: iter(component)
    namespace |= {
        "__getattr__": missing,
        "__module__": type(component).__module__,  # a message names the plugin
        "__reduce__": lambda _: (_same, (component,)),  # for other processes
    }
    return type(type(component).__name__, (), namespace)()


def _guarded_result(member: Any, name: str, undeclared: list[str]) -> Any:
    """``member``; the encoder that a vision backbone's ``load`` returns is guarded as well."""
    if name != "load":
        return member

    def load(*arguments: Any) -> Any:
        loaded = member(*arguments)
        return guarded(loaded, (Encoder,), undeclared) if isinstance(loaded, Encoder) else loaded

    return load


def _same(component: Any) -> Any:
    return component


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], set[str]]:
    """Guards every component that the registry creates: the undeclared attributes and the kinds, as they come up."""
    undeclared: list[str] = []
    kinds: set[str] = set()
    create: Callable[..., Any] = Registry.create

    def guarded_create(self: Registry, kind: str, *arguments: Any, **options: Any) -> Any:
        kinds.add(kind)
        protocol = KINDS[kind]
        known = (protocol, ALTERNATIVES.get(protocol, protocol), *CAPABILITIES[kind])
        return guarded(create(self, kind, *arguments, **options), known, undeclared)

    monkeypatch.setattr(Registry, "create", guarded_create)
    return undeclared, kinds


RECIPE = """\
extends: recipe.yaml
generate:
  source: {name: scenes, scenes: 4, content: captions}
  teacher: {name: rules}
  kinds: {conversation: 1}
  out: generated/instruct.jsonl
eval: {tasks: [{name: scenes, scenes: 4}]}
export: [{format: hf, to: out/hf}, {format: llava, to: out/llava, verify: false}]
stage2: {schedule: linear}
run_dir: run
"""


def test_a_pipeline_touches_declared_members_only(toy: Path, guard: tuple[list[str], set[str]]) -> None:
    (toy / "all.yaml").write_text(RECIPE)
    undeclared, kinds = guard
    done = run_cli("run", "-r", "all.yaml", "--json", cwd=toy)
    assert undeclared == []
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    verified, unverified = report["export"]
    assert verified["verified"]["faults"] == []
    assert unverified["format"] == "llava"
    chat = llavactl.Chat(llavactl.load_model(toy / "out/hf"))
    pieces = list(chat.ask("What is this?", toy / "images/photo-000.jpg", max_new_tokens=2))
    assert "".join(pieces).strip() == chat.turns[-1].text
    for command in ("check", "stats"):
        assert run_cli("data", command, "-r", "all.yaml", cwd=toy).exit_code == 0
    assert undeclared == []
    assert kinds == set(KINDS)


@pytest.mark.parametrize("access", [lambda each: each.options, lambda each: hasattr(each, "options")])
def test_an_undeclared_attribute_is_detected(access: Callable[[Any], Any], guard: tuple[list[str], set[str]]) -> None:
    connector = registry().create("connectors", "linear")
    assert isinstance(connector, KINDS["connectors"])
    assert not isinstance(connector, CAPABILITIES["vision"])
    with pytest.raises(AssertionError):
        access(connector)
    assert [name.partition(".")[2] for name in guard[0]] == ["options"]
