"""Attributes of components are checked against their Protocol where they are created; properties aren't evaluated."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from llavactl.core.protocols import CAPABILITIES, KINDS
from llavactl.core.protocols.members import value_fault
from llavactl.core.registry import component_fault


class Rule:
    scope: Any = "element"
    moments: Any = ("exp_avg",)

    def selects(self, weight: Any) -> bool:
        return True

    def build(self, groups: Any) -> Any:
        return groups


def with_attribute(name: str, value: Any) -> Rule:
    return type("Changed", (Rule,), {name: value})()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scope", "everything"),
        ("scope", None),
        ("moments", ["exp_avg"]),
        ("moments", "exp_avg"),
        ("moments", (1,)),
        ("moments", lambda self: ()),
        ("selects", True),
        ("build", "optimizer"),
    ],
)
def test_an_attribute_of_another_type_is_a_fault(name: str, value: Any) -> None:
    component = with_attribute(name, value)
    assert name in component_fault("optimizers", component)
    if not callable(value):
        assert repr(value) in component_fault("optimizers", component)


def test_values_are_checked_in_the_class_and_in_the_instance() -> None:
    rule = Rule()
    assert component_fault("optimizers", rule) == ""
    rule.scope = "some"
    assert "'some'" in component_fault("optimizers", rule)


@pytest.mark.parametrize("kind_of_property", [property, cached_property])
def test_a_property_is_not_evaluated(kind_of_property: Any) -> None:
    def fails(self: Any) -> str:
        raise AssertionError

    component: Any = with_attribute("scope", kind_of_property(fails))
    if kind_of_property is cached_property:
        vars(type(component))["scope"].__set_name__(type(component), "scope")
    assert component_fault("optimizers", component) == ""


@pytest.mark.parametrize(
    "protocol", dict.fromkeys(each for kind, protocol in KINDS.items() for each in (protocol, *CAPABILITIES[kind]))
)
def test_every_declared_attribute_has_a_check(protocol: Any) -> None:
    names = [name for each in protocol.__mro__ for name in vars(each).get("__annotations__", {})]
    strange = type("Strange", (), dict.fromkeys(names, Path))()
    assert [name for name in names if value_fault(strange, name, protocol) == ""] == []
