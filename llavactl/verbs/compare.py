"""``llavactl eval TASK --compare``: paired comparison of candidates from stored answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.core.errors import DataError
from llavactl.core.protocols import Judged, Scores
from llavactl.core.registry import registry
from llavactl.core.schema import Question
from llavactl.evaluation import runner, tasks
from llavactl.evaluation.answers import read_answers, refuse_echoes
from llavactl.evaluation.significance import Difference, paired
from llavactl.report.inputs import read_document

if TYPE_CHECKING:
    from llavactl.recipe.frame import Outline


@dataclass(frozen=True)
class Candidate:
    """The scores of a run folder or an answer file."""

    name: str
    scores: Mapping[str, Any]
    failed: int


@dataclass(frozen=True)
class CompareReport:
    """Candidates on the same ``n`` questions, and the difference of every pair."""

    task: str
    protocol: str
    n: int
    candidates: tuple[Candidate, ...]
    pairs: tuple[Difference, ...]


def compare(
    recipe: Outline | None,
    task: str,
    options: Mapping[str, Any],
    paths: Sequence[Path],
    *,
    protocol: str | None = None,
    limit: int | None = None,
) -> CompareReport:
    """Scores ``paths``, run folders that evaluated ``task`` or answer files, and compares them in pairs.

    Raises:
        DataError: fewer than two different paths, unreadable answers, or a task without right and wrong answers.
    """
    if len(paths) < 2 or len(set(paths)) < len(paths):
        raise DataError(
            "--compare: expected two or more different run folders or answer files", hint="--compare A --compare B"
        )
    component = registry().create("tasks", tasks.describe(recipe, task, options), flag="-t ")
    if isinstance(component, Judged):
        raise DataError(f"{task}: a judged task has no right or wrong answers to compare in pairs")
    protocol = runner.choose(component.protocols, protocol)
    questions = list(component.questions())[:limit]
    results = {path: _score(path, task, component, questions, protocol) for path in paths}
    candidates = tuple(Candidate(str(path), result.scores, result.failed) for path, result in results.items())
    grades = {str(path): _grades(result, task) for path, result in results.items()}
    pairs = tuple(paired(a, b, grades[a], grades[b]) for a, b in combinations(grades, 2))
    return CompareReport(task, protocol, len(questions), candidates, pairs)


def _score(path: Path, task: str, component: Any, questions: Sequence[Question], protocol: str) -> Scores:
    file = _answers(path, task)
    answers = read_answers(file, component)
    if not path.is_dir():
        refuse_echoes(file, questions, answers)
    return runner.score(component, questions, answers, protocol, file)


def _answers(path: Path, task: str) -> Path:
    """The answers of ``path``: an answer file, MME's folder of answer files, or the answers stored in a run folder."""
    if not path.is_dir() or (not (path / "eval").is_dir() and any(path.glob("*.txt"))):
        return path
    stored = read_document(path / "eval" / f"{task}.json").get("answers")
    if not isinstance(stored, str):
        raise DataError(f"{path}: no evaluation of {task}", hint=f"run `llavactl eval {task} -r {path}/recipe.yaml`")
    # The run may have been moved, together with its answers.
    return path / "eval" / "answers" / Path(stored).name


def _grades(result: Scores, task: str) -> Mapping[str, float]:
    """The grade of every answer, by question id."""
    if grades := result.grades or {name: float(right) for name, right in result.right.items()}:
        return grades
    raise DataError(f"{task}: the task doesn't grade single answers, so they can't be compared in pairs")
