"""Conformance checks accept correct components and report the problems of others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from llavactl.core.protocols import Scores
from llavactl.core.registry import registry
from llavactl.core.schema import Question, Sample, Turn
from llavactl.images.image_file import ImageFile
from llavactl.testing import (
    check_connector,
    check_source,
    check_task,
    check_vision,
    run_cli,
)

PHOTO = ImageFile("/photos", "a.jpg")


def test_options_of_built_in_components_conform(toys: Path) -> None:
    make = registry().create
    assert check_vision(make("vision", {"name": "clip", "model": str(toys / "clip"), "select": "cls-patch"})) == []
    for name in ("linear", "mlp2x-gelu"):
        assert check_connector(make("connectors", {"name": name, "pixel_shuffle": 2})) == []


class IncompleteTask:
    """Has a duplicate question id, a grade for an unknown question, and requires all answers."""

    protocols = ("any",)

    def questions(self) -> list[Question]:
        return [Question(name, (Turn("user", ("?",)),), "yes") for name in ("a", "b", "c", "a")]

    def score(self, answers: Any, protocol: str) -> Scores:
        return Scores({"n": sum(answers[name].text == "yes" for name in "abc")}, right={"d": True})


def test_problems_of_a_task() -> None:
    duplicate, grade = check_task(IncompleteTask())[:2]
    assert "'a'" in duplicate
    assert "'d'" in grade

    class UniqueQuestions(IncompleteTask):
        def questions(self) -> list[Question]:
            return super().questions()[:3]

    assert "2 of 3 answers" in check_task(UniqueQuestions())[1]


def test_problems_of_a_source() -> None:
    (problem,) = check_source(["text"])  # type: ignore[arg-type]
    assert "item 0" in problem
    unanswered = Sample("a", (Turn("user", (PHOTO,)),))
    (problem,) = check_source([unanswered])
    assert "sample 'a'" in problem


def test_a_record_source_may_contain_unusable_records(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    record = {"id": "1", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "Yes."}]}
    file.write_text(f"{json.dumps(record)}\n{{\n{json.dumps({**record, 'conversations': []})}\n")
    assert check_source(registry().create("sources", {"name": "llava-json", "path": str(file)})) == []


class WrongTokenCount:
    """A connector that declares one token more than it returns."""

    def tokens(self, shape: Any) -> int:
        return int(shape.patches) + 1

    def build(self, shape: Any, language_width: int) -> nn.Module:
        return nn.Linear(shape.width, language_width)


def test_problems_of_a_connector() -> None:
    assert "(2, 17, 24)" in check_connector(WrongTokenCount())[0]


def test_an_unknown_plugin_is_reported() -> None:
    result = run_cli("plugins", "check", "gone")
    assert result.exit_code == 1
    assert "gone" in result.stderr
    assert run_cli("plugins", "check", "llavactl").exit_code == 0
