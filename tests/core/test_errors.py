"""The exception tree."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from llavactl.core import errors
from llavactl.core.errors import LlavactlError, Problem, RecipeError

KINDS = [kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, LlavactlError)]


@pytest.mark.parametrize("kind", KINDS)
def test_message_and_hint(kind: type[LlavactlError]) -> None:
    error = kind("what", hint="do")
    assert (str(error), error.message, error.hint) == ("what", "what", "do")
    assert error.with_hint() == "what; do"
    assert kind("what").hint == ""
    assert kind("what").with_hint() == "what"


@pytest.mark.parametrize("kind", KINDS)
def test_the_docstring_lists_every_class(kind: type[LlavactlError]) -> None:
    assert f" {kind.__name__} " in f"{errors.__doc__} ".replace("\n", " \n")


def test_single_inheritance() -> None:
    others = [kind for kind in KINDS if kind is not LlavactlError]
    assert all(len(kind.__bases__) == 1 and issubclass(kind.__bases__[0], LlavactlError) for kind in others)


def test_problems_are_one_line_each() -> None:
    problems = [Problem("a.yaml:3", "stage1.epochs", "is odd"), Problem("a.yaml:1", "", "empty")]
    error = RecipeError.from_problems(problems)
    assert str(error).splitlines() == ["a.yaml:3: stage1.epochs: is odd", "a.yaml:1: empty"]
    assert error.problems == tuple(problems)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("message", "hint", "kind_of_fault"),
    [(ValueError("x"), "", TypeError), (None, "", TypeError), ("x", 17, TypeError), (" \n", "", ValueError)],
)
def test_messages_and_hints_are_text(kind: type[LlavactlError], message: Any, hint: Any, kind_of_fault: Any) -> None:
    """Those of plugins are printed as they are."""
    with pytest.raises(kind_of_fault, match=kind.__name__):
        kind(message, hint=hint)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("arguments", "message"), [(("x",), "x"), ((), "Odd"), ((ValueError("y"),), "y")])
def test_a_subclass_without_a_call_of_init_has_a_message(kind: Any, arguments: Any, message: str) -> None:
    odd = type("Odd", (kind,), {"__init__": lambda _self, *_arguments: None})(*arguments)
    assert (odd.message, odd.hint, odd.with_hint()) == (message, "", message)
    assert getattr(odd, "problems", ()) == ()
