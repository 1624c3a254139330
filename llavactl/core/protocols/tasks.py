"""Evaluation tasks and their scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from typing_extensions import Protocol, runtime_checkable

from llavactl.core.protocols.teachers import Ask, BudgetedTeacher
from llavactl.core.schema import Answer, Json, Question
from llavactl.core.typed import Typed


@dataclass(frozen=True)
class Scores(Typed):
    """``scores`` by their published names, rates in percent; ``failed`` is the number of unparsable answers.

    - ``right``: whether the answer to each question is correct. Needed for confidence intervals and paired tests.
    - ``grades``: a grade from 0 to 1 per question, for answers that can be partly correct.
    - ``about``: the question ids behind each score, if they differ from the questions of the category of that name.
    """

    scores: Mapping[str, Json]
    failed: int = 0
    right: Mapping[str, bool] = field(default_factory=dict)
    about: Mapping[str, Sequence[str]] = field(default_factory=dict)
    grades: Mapping[str, float] = field(default_factory=dict)

    @property
    def by_question(self) -> dict[str, float]:
        """The grade of each question: 0 or 1 if answers are only right or wrong; empty if the task has neither."""
        return dict(self.grades) or {name: float(right) for name, right in self.right.items()}


@runtime_checkable
class Task(Protocol):
    """A benchmark: its questions, and scores for answers.

    Implement ``Judged`` instead if a judge compares the answers with reference answers, ``TeacherScored`` as well if
    requests to a teacher are needed, and ``AnswerMatcher`` if published answer files don't use the ids of the
    questions.
    """

    protocols: tuple[str, ...]
    """Names of the scoring protocols, the default first."""

    def questions(self) -> Iterable[Question]: ...

    def score(self, answers: Mapping[str, Answer], protocol: str) -> Scores:
        """Scores of ``answers``, by question id; they may cover only the first questions (``--limit``)."""


@runtime_checkable
class AnswerMatcher(Protocol):
    """A task whose published answer files identify questions by other means than their ids."""

    def id_of(self, answer: Answer) -> str:
        """The question id of a stored ``answer``; by default the answer's own id."""


@runtime_checkable
class Judged(Protocol):
    """A task whose scores are computed from a judge's reviews of the answers.

    Implement ``TeacherScored`` as well to ask the judge, and ``AnswerChecker`` if stored reviews can be matched with
    answers.
    """

    protocols: tuple[str, ...]

    def questions(self) -> Iterable[Question]: ...

    def reviews(self) -> Sequence[Mapping[str, str]]:
        """Stored reviews by question id, one mapping per run of the judge; () if none are stored."""

    def judge(self, reviews: Sequence[Mapping[str, str]], protocol: str) -> Scores:
        """Scores of such ``reviews``."""


@runtime_checkable
class AnswerChecker(Protocol):
    """A judged task that can check whether its stored reviews belong to given answers."""

    def check_answers(self, answers: Mapping[str, Answer]) -> None:
        """Raises DataError if the reviews are about other answers."""


@runtime_checkable
class TeacherScored(Protocol):
    """A ``Task`` or ``Judged`` whose scores need requests to a teacher, such as a judge."""

    teacher: BudgetedTeacher | None
    """None: the task is scored without a teacher."""

    def score_with_teacher(self, answers: Mapping[str, Answer], ask: Ask, protocol: str) -> Scores:
        """Scores of ``answers`` with the replies of a teacher; ``ask`` may be called several times.

        Request ids must be unique within a call of ``ask``. The same request is never paid for twice.
        """
