"""Whatever a plugin does wrong, one line names it, and everything else works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

HEAD = """
from llavactl import hookimpl
from torch import nn

@hookimpl
def register_connectors(register):
    register("wrong", "wrong_plugin:make", summary="wrong")

class Connector:
    def tokens(self, shape):
        return shape.patches

    def build(self, shape, width):
        return nn.Linear(shape.width, width)
"""
TOKENS = "    def tokens(self, shape):\n        return 3\n"
BUILD = "    def build(self, shape, width):\n        return {}\n"


def subclass(method: str) -> str:
    """The code of a factory whose connector has another ``method``."""
    return f"class Wrong(Connector):\n{method}\n\ndef make(options):\n    return Wrong()\n"


FACTORIES = {
    "none": "def make(options):\n    return None\n",
    "other_type": "def make(options):\n    return nn.Linear(2, 2)\n",
    "arity": "def make():\n    return Connector()\n",
    "raises": "def make(options):\n    raise KeyError('x')\n",
    "not_callable": "make = 3\n",
    "token_count": subclass(TOKENS),
    "width": subclass(BUILD.format("nn.Linear(shape.width, width + 1)")),
    "build_raises": subclass(BUILD.format("1 / 0")),
    "not_a_module": subclass(BUILD.format("3")),
}


@pytest.mark.parametrize("how", FACTORIES)
def test_a_wrong_component_is_named(site: Any, toy: Path, how: str) -> None:
    site.install("wrong", HEAD + "\n\n" + FACTORIES[how])
    train = ("train", "-r", str(toy / "recipe.yaml"), "--stage", "1", "-o", "features.mode=live")
    failed = site.run(*train, "-o", "connector.name=wrong", code=1)
    errors = [line for line in failed.stderr.splitlines() if line.startswith(("error:", "bug "))]
    assert len(errors) == 1, failed.stderr
    assert "plugin wrong" in errors[0]
    assert failed.stdout == ""


def test_the_same_command_works_without_it(site: Any, toy: Path) -> None:
    site.install("wrong", HEAD + "\n\n" + FACTORIES["raises"])
    train = ("train", "-r", str(toy / "recipe.yaml"), "--stage", "1", "-o", "features.mode=live")
    site.run(*train, "-o", "stage1.max_steps=1")
