"""The answers of a run's evaluations, joined with the questions of their tasks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from llavactl import Answer, DataError, LlavactlError, Task, registry

PER_PAGE = 12

Filter = Literal["all", "right", "wrong"]


class Gallery:
    """Evaluated tasks in ``run_dir``; ``specs`` are the tasks of the recipe."""

    def __init__(self, run_dir: Path, specs: Sequence[Mapping[str, Any]]) -> None:
        self.run_dir, self.specs = run_dir, {str(spec["name"]): spec for spec in specs}
        self._rows: dict[tuple[str, int], list[dict[str, Any]]] = {}

    def tasks(self) -> list[str]:
        """Tasks with a result."""
        return [name for name in self.specs if self._result_file(name).is_file()]

    def rows(self, task: str, show: Filter) -> list[dict[str, Any]]:
        """The questions of ``task`` with images, answer, expected answer and whether it is right (None: unknown).

        Raises:
            DataError: there is no result, or its answers can't be read.
        """
        if task not in self.tasks():
            raise DataError(f"{task}: no result in {self.run_dir / 'eval'}")
        key = task, self._result_file(task).stat().st_mtime_ns
        if key not in self._rows:
            self._rows[key] = self._read(task)
        return [row for row in self._rows[key] if show == "all" or row["right"] is (show == "right")]

    def _read(self, task: str) -> list[dict[str, Any]]:
        try:
            result = json.loads(self._result_file(task).read_text(encoding="utf-8"))
            lines = Path(result["answers"]).read_text(encoding="utf-8").split("\n")
            answers = {
                str(record["id"]): Answer(str(record["id"]), record["text"])
                for record in map(json.loads, filter(None, lines))
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"the answers of {task} can't be read: {error}", hint="run `llavactl eval` again"
            ) from error
        component = registry().create("tasks", self.specs[task])
        questions = [question for question in component.questions() if question.id in answers]
        answers = {question.id: answers[question.id] for question in questions}
        grades = _grades(component, answers, result.get("protocol"))
        return [
            {
                "id": question.id,
                "images": [image for turn in question.turns for image in turn.images],
                "question": question.turns[-1].text,
                "answer": answers[question.id].text,
                "expected": question.reference,
                "right": grades[question.id] >= 1 if question.id in grades else None,
            }
            for question in questions
        ]

    def _result_file(self, task: str) -> Path:
        return self.run_dir / "eval" / f"{task}.json"


def _grades(task: Any, answers: Mapping[str, Answer], protocol: Any) -> Mapping[str, float]:
    """The grade of each answer; {} for a task that is scored by a judge."""
    if not isinstance(task, Task) or getattr(task, "teacher", None) is not None:
        return {}
    try:
        return task.score(answers, protocol if protocol in task.protocols else task.protocols[0]).by_question
    except LlavactlError:
        return {}
