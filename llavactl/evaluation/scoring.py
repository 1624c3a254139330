"""Scoring: joins answers with questions, scores them under a protocol, and builds the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.core.errors import DataError
from llavactl.core.identity import component_identity
from llavactl.core.protocols import Judged, TeacherScored
from llavactl.core.registry import registry
from llavactl.core.suggest import suggest
from llavactl.evaluation.results import EvalReport
from llavactl.evaluation.significance import intervals

if TYPE_CHECKING:
    from llavactl.core.protocols import Ask, BudgetedTeacher, Scores, Task
    from llavactl.core.schema import Answer, Question
    from llavactl.recipe.frame import Outline


def task_spec(recipe: Outline | None, task: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """``{"name": task, …}``: the options of ``task`` in the recipe, overridden by ``options``."""
    specs = [spec.spec() for spec in recipe.eval.tasks if spec.name == task] if recipe is not None else []
    registry().get("tasks", task)
    return {**(specs[0] if specs else {"name": task}), **options}


def choose_protocol(protocols: Sequence[str], name: str | None) -> str:
    """The protocol ``name``, by default the first of ``protocols``.

    Raises:
        DataError: unknown protocol.
    """
    if name is not None and name not in protocols:
        raise DataError(f"unknown protocol {name!r} for this task", hint=suggest(name, protocols))
    return name or protocols[0]


def select_answers(
    questions: Iterable[Question], answers: Mapping[str, Answer], file: Path | None = None
) -> dict[str, Answer]:
    """The answers to ``questions``, by id and in the order of the questions; other answers are left out.

    Raises:
        DataError: a question has no answer, or the task has no questions; names ``file``, the source of the answers.
    """
    ids = [question.id for question in questions]
    if not ids:
        raise DataError("this task has no questions", hint="check that its question file isn't empty")
    if missing := [question_id for question_id in ids if question_id not in answers]:
        raise DataError(
            f"{f'{file}: ' if file else ''}{len(missing)} of {len(ids)} questions have no answer, the first is "
            f"{missing[0]!r}",
            hint="check that these are answers to this task's questions, and that the file is complete",
        )
    return {question_id: answers[question_id] for question_id in ids}


@dataclass(frozen=True)
class Benchmark:
    """A task with its options (``spec``) and questions, and the protocol; ``limit``: the number of questions to use."""

    task: Task | Judged
    spec: Mapping[str, Any]
    all_questions: Sequence[Question]
    limit: int | None
    protocol: str

    @property
    def name(self) -> str:
        return str(self.spec["name"])

    @property
    def questions(self) -> Sequence[Question]:
        """The questions that are answered and scored."""
        return self.all_questions[: self.limit]

    @property
    def judge(self) -> BudgetedTeacher | None:
        """The teacher that is asked about the answers, if any."""
        return self.task.teacher if isinstance(self.task, TeacherScored) else None

    @property
    def scoring_identity(self) -> list[Any]:
        """Everything that determines how answers are scored, apart from the protocol."""
        references = [[question.id, question.reference, question.category] for question in self.questions]
        return [component_identity("tasks", self.spec), references]

    def score(self, answers: Mapping[str, Answer], file: Path, ask_judge: Ask | None) -> Scores:
        """The scores of ``answers``, which were read from ``file``; a task with a judge requires ``ask_judge``."""
        selected = select_answers(self.questions, answers, file)
        if isinstance(self.task, TeacherScored) and self.judge is not None:
            assert ask_judge is not None
            return self.task.score_with_teacher(selected, ask_judge, self.protocol)
        assert not isinstance(self.task, Judged)
        return self.task.score(selected, self.protocol)

    def report(
        self, scores: Scores, answers: Mapping[str, Answer], file: Path, model: str, judge: str | None
    ) -> EvalReport:
        """The result for ``scores`` of the answers in ``file``; ``model`` and ``judge`` are names for the report."""
        return EvalReport(
            self.name,
            self.protocol,
            model,
            len(self.questions),
            scores.scores,
            scores.failed,
            intervals(self.questions, scores),
            ignored=len(answers) - len(self.questions),
            judge=judge,
            answers=str(file),
        )
