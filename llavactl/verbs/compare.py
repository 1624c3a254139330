"""``llavactl eval TASK --compare``: compares runs or answer files pairwise, with significance tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.core.errors import DataError
from llavactl.core.protocols import Judged
from llavactl.core.registry import registry
from llavactl.evaluation.answers import check_not_questions, read_answers
from llavactl.evaluation.scoring import choose_protocol, select_answers, task_spec
from llavactl.evaluation.significance import Difference, paired
from llavactl.files.eval_result import read_eval_result

if TYPE_CHECKING:
    from llavactl.recipe.frame import Outline


@dataclass(frozen=True)
class Candidate:
    """A run folder or answer file, with its scores."""

    name: str
    scores: Mapping[str, Any]
    failed: int


@dataclass(frozen=True)
class CompareReport:
    """Candidates scored on the same ``n`` questions, and all pairs of them."""

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
    """Scores ``paths`` (run folders in which ``task`` was evaluated, or answer files) and compares them pairwise.

    Raises:
        DataError: fewer than two different candidates, unusable answers, or a task whose answers can't be paired.
    """
    if len(paths) < 2 or len(set(paths)) < len(paths):
        raise DataError(
            "--compare requires at least two different runs or answer files",
            hint="repeat the option: --compare A --compare B",
        )
    component = registry().create("tasks", task_spec(recipe, task, options), flag="-t ")
    if isinstance(component, Judged):
        raise DataError(f"{task} can't be compared pairwise: its answers are judged, not right or wrong")
    protocol = choose_protocol(component.protocols, protocol)
    questions = list(component.questions())[:limit]
    candidates, grades = [], {}
    for path in paths:
        file = _answer_file(path, task)
        answers = read_answers(file, component)
        if not path.is_dir():
            check_not_questions(file, questions, answers)
        scores = component.score(select_answers(questions, answers, file), protocol)
        candidates.append(Candidate(str(path), scores.scores, scores.failed))
        grades[str(path)] = scores.by_question
        if not grades[str(path)]:
            raise DataError(f"{task} can't be compared pairwise: it has no score per answer")
    pairs = tuple(paired(a, b, grades[a], grades[b]) for a, b in combinations(grades, 2))
    return CompareReport(task, protocol, len(questions), tuple(candidates), pairs)


def _answer_file(path: Path, task: str) -> Path:
    """``path`` itself if it is an answer file or MME's folder, else the answer file of the run in ``path``."""
    if not path.is_dir() or (not (path / "eval").is_dir() and any(path.glob("*.txt"))):
        return path
    file = read_eval_result(path / "eval" / f"{task}.json").get("answers")
    if not isinstance(file, str):
        raise DataError(
            f"{path}: {task} was not evaluated in this run", hint=f"llavactl eval {task} -r {path}/recipe.yaml"
        )
    # The path in the result is outdated if the run was moved.
    return path / "eval" / "answers" / Path(file).name
