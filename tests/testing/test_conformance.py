"""The kit passes what is right and names what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from llavactl.core.protocols import Scores
from llavactl.core.registry import registry
from llavactl.core.schema import Question, Sample, Turn
from llavactl.images.image_file import ImageFile
from llavactl.testing import (
    check_connector,
    check_language,
    check_plugin,
    check_source,
    check_task,
    check_vision,
    run_cli,
)

PHOTO = ImageFile("/photos", "a.jpg")


def test_built_in_components_pass(toys: Path) -> None:
    make = registry().create
    assert check_vision(make("vision", {"name": "clip", "model": str(toys / "clip")})) == []
    assert check_vision(make("vision", {"name": "clip", "model": str(toys / "clip"), "select": "cls-patch"})) == []
    assert check_language(make("languages", {"name": "hf", "model": str(toys / "language")})) == []
    for name in ("linear", "mlp2x-gelu"):
        assert check_connector(make("connectors", {"name": name})) == []
        assert check_connector(make("connectors", {"name": name, "pixel_shuffle": 2})) == []
    assert check_source(make("sources", {"name": "scenes", "scenes": 4})) == []
    assert check_task(make("tasks", {"name": "scenes", "scenes": 4})) == []
    assert check_plugin("llavactl") == []


class Hasty:
    """A task that needs an answer to everything, whose second question has the first one's id."""

    protocols = ("any",)

    def questions(self) -> list[Question]:
        return [Question(name, (Turn("user", ("?",)),), "yes") for name in ("a", "b", "c", "a")]

    def score(self, answers: Any, protocol: str) -> Scores:
        return Scores({"n": sum(answers[name].text == "yes" for name in "abc")}, right={"d": True})


def test_a_task_that_is_wrong_is_told_how() -> None:
    faults = check_task(Hasty())
    assert faults[0] == "question 'a' is there twice"
    assert "a grade for 'd'" in faults[1]

    class Sparing(Hasty):
        def questions(self) -> list[Question]:
            return super().questions()[:3]

    assert "2 of 3 answers give no scores" in check_task(Sparing())[1]


def test_a_source_that_is_wrong_is_told_how() -> None:
    assert check_source(["text"]) == ["item 0 is a str, not a Sample"]  # type: ignore[arg-type]
    silent = Sample("a", (Turn("user", (PHOTO,)),))
    assert "not user, assistant" in check_source([silent])[0]


class Lying:
    """A connector that promises one token more than it makes."""

    def tokens(self, shape: Any) -> int:
        return int(shape.patches) + 1

    def build(self, shape: Any, language_width: int) -> nn.Module:
        return nn.Linear(shape.width, language_width)


def test_a_connector_that_is_wrong_is_told_how() -> None:
    assert "(2, 17, 24)" in check_connector(Lying())[0]
    torch.manual_seed(0)


def test_an_unknown_plugin_is_a_fault() -> None:
    result = run_cli("plugins", "check", "gone")
    assert result.exit_code == 1
    assert "is not installed" in result.stdout
    assert run_cli("plugins", "check", "llavactl").exit_code == 0
