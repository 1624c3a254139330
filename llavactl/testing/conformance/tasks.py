"""Checks of tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llavactl.core.protocols import AnswerMatcher, BudgetedTeacher, Judged, Scores, TeacherScored
from llavactl.core.protocols import Task as TaskProtocol
from llavactl.core.schema import Answer, Question
from llavactl.testing.conformance.boundary import (
    component_packages,
    conformance_check,
    describe_exception,
    json_problem,
    wrong_type,
)

if TYPE_CHECKING:
    from llavactl.core.protocols import Task


@conformance_check("tasks")
def check_task(task: Task | Judged) -> list[str]:
    """Checks that questions are constant, have unique ids and end with a user turn.

    ``score`` must accept answers to all questions and to the first few, and ``judge`` the stored reviews.
    """
    protocols: Any = task.protocols
    if not isinstance(protocols, tuple) or not all(isinstance(name, str) for name in protocols):
        return [wrong_type("protocols", protocols, "a tuple of strings")]
    questions = list(task.questions())
    if wrong := [item for item in questions if not isinstance(item, Question)]:
        return [wrong_type("questions(): item", wrong[0], "a Question")]
    ids = [question.id for question in questions]
    problems = [f"duplicate question id {name!r}" for name, count in Counter(ids).items() if count > 1]
    if ids != [question.id for question in task.questions()]:
        problems.append("questions() differs between calls")
    unasked = [question.id for question in questions if not question.turns or question.turns[-1].role != "user"]
    problems += [f"question {name!r} does not end with a user turn" for name in unasked]
    problems += [] if protocols else ["protocols is empty"]
    problems += [] if questions else ["it has no questions"]
    if isinstance(task, TeacherScored) and not isinstance(task.teacher, BudgetedTeacher | None):
        problems.append(wrong_type("teacher", task.teacher, "a BudgetedTeacher or None"))
    if isinstance(task, AnswerMatcher) and questions:
        found: Any = task.id_of(Answer(ids[0], questions[0].reference))
        problems += [] if isinstance(found, str) else [wrong_type("id_of()", found, "a string")]
    for protocol in protocols:
        problems += [f"{protocol}: {problem}" for problem in _scoring_problems(task, questions, protocol)]
    return problems


def _scoring_problems(task: Task | Judged, questions: Sequence[Question], protocol: str) -> Iterator[str]:
    ids = {question.id for question in questions}
    if isinstance(task, Judged):
        reviews: Any = task.reviews()
        if not isinstance(reviews, Sequence) or not all(isinstance(run, Mapping) for run in reviews):
            yield wrong_type("reviews()", reviews, "a sequence of mappings")
        elif reviews:
            yield from _score_problems("judge()", lambda: task.judge(reviews, protocol), ids, task)
    if isinstance(task, TaskProtocol):
        for subset in (questions, questions[: len(questions) // 2 + 1]):
            answers = {question.id: Answer(question.id, question.reference) for question in subset}
            what = f"score() for {len(subset)} of {len(questions)} answers"

            def scored(answers: Mapping[str, Answer] = answers) -> Scores:
                return task.score(answers, protocol)

            yield from _score_problems(what, scored, ids, task)


def _score_problems(what: str, scored: Callable[[], Any], ids: set[str], task: object) -> Iterator[str]:
    try:
        scores = scored()
    except Exception as error:  # noqa: BLE001 - a plugin may raise anything
        yield f"{what}: {describe_exception(error, component_packages(task))}"
        return
    if not isinstance(scores, Scores):
        yield wrong_type(what, scores, "Scores")
        return
    if why := json_problem(f"{what}: scores", scores.scores):
        yield why
    if unknown := [name for name in (*scores.right, *scores.grades) if name not in ids]:
        yield f"{what}: a grade for the unknown question {unknown[0]!r}"
