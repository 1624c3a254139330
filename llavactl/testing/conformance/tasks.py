"""Checks of tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llavactl.core.protocols import AnswerMatcher, Judged, Scores
from llavactl.core.protocols import Task as TaskProtocol
from llavactl.core.protocols.returned import question_faults, returned_fault, score_faults
from llavactl.core.schema import Answer, Question
from llavactl.testing.conformance.boundary import (
    component_packages,
    conformance_check,
    describe_exception,
    returned_problem,
)

if TYPE_CHECKING:
    from llavactl.core.protocols import Task


@conformance_check("tasks")
def check_task(task: Task | Judged) -> list[str]:
    """Checks that questions are constant, have unique ids and end with a user turn.

    ``score`` must accept answers to all questions and to the first few, and ``judge`` the stored reviews.
    """
    questions = list(task.questions())
    if not all(isinstance(question, Question) for question in questions):
        return [returned_problem("tasks", "questions", questions)]
    ids = [question.id for question in questions]
    problems = [f"questions() {why}" for why in question_faults(questions)]
    if ids != [question.id for question in task.questions()]:
        problems.append("questions() differs between calls")
    problems += [] if task.protocols else ["protocols is empty"]
    problems += [] if questions else ["it has no questions"]
    if isinstance(task, AnswerMatcher) and questions:
        stored = Answer(ids[0], questions[0].reference)
        problems += filter(None, [returned_problem("tasks", "id_of", task.id_of(stored), stored)])
    for protocol in task.protocols:
        problems += [f"{protocol}: {problem}" for problem in _scoring_problems(task, questions, protocol)]
    return problems


def _scoring_problems(task: Task | Judged, questions: Sequence[Question], protocol: str) -> Iterator[str]:
    ids = {question.id for question in questions}
    if isinstance(task, Judged):
        reviews: Any = task.reviews()
        if problem := returned_problem("tasks", "reviews", reviews):
            yield problem
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
    if isinstance(scores, Scores):
        yield from (f"{what}: {why}" for why in score_faults(scores, ids))
    else:
        yield f"{what}: {returned_fault('tasks', 'score', scores)}"
