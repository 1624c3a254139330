"""The tree of errors."""

from __future__ import annotations

import inspect

import pytest

from llavactl.core import errors
from llavactl.core.errors import LlavactlError, Problem, RecipeError

KINDS = [each for each in vars(errors).values() if inspect.isclass(each) and issubclass(each, LlavactlError)]


@pytest.mark.parametrize("kind", KINDS)
def test_each_has_a_message_and_a_hint(kind: type[LlavactlError]) -> None:
    error = kind("what", hint="do")
    assert (str(error), error.message, error.hint) == ("what", "what", "do")
    assert kind("what").hint == ""


@pytest.mark.parametrize("kind", KINDS)
def test_the_tree_in_the_docstring_is_the_tree(kind: type[LlavactlError]) -> None:
    assert f" {kind.__name__} " in f"{errors.__doc__} ".replace("\n", " \n")


def test_one_level_of_inheritance() -> None:
    assert all(kind.__bases__ == (LlavactlError,) for kind in KINDS if kind is not LlavactlError)


def test_problems_are_lines() -> None:
    problems = [Problem("a.yaml:3", "stage1.epochs", "is odd"), Problem("a.yaml:1", "", "empty")]
    error = RecipeError.from_problems(problems)
    assert str(error).splitlines() == ["a.yaml:3: stage1.epochs: is odd", "a.yaml:1: empty"]
    assert error.problems == tuple(problems)
