"""``llavactl eval TASK --compare``: which of several candidates is better, from answers that are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.core.errors import DataError
from llavactl.core.protocols import Judged
from llavactl.core.registry import registry
from llavactl.evaluation import runner, tasks
from llavactl.evaluation.answers import read_answers, refuse_echoes
from llavactl.evaluation.significance import Difference, paired
from llavactl.report.inputs import read_document

if TYPE_CHECKING:
    from llavactl.recipe.frame import Outline


@dataclass(frozen=True)
class Candidate:
    """One of those compared: a run folder or a file of answers."""

    name: str
    scores: Mapping[str, Any]
    failed: int


@dataclass(frozen=True)
class CompareReport:
    """Candidates on the same ``n`` questions, and every pair of them."""

    task: str
    protocol: str
    n: int
    candidates: tuple[Candidate, ...]
    pairs: tuple[Difference, ...]


def compare(
    recipe: Outline | None,
    task: str,
    options: Mapping[str, Any],
    given: Sequence[Path],
    *,
    protocol: str | None = None,
    limit: int | None = None,
) -> CompareReport:
    """Scores each of ``given``, run folders that evaluated ``task`` or files of answers, and compares them in pairs."""
    if len(given) < 2 or len(set(given)) < len(given):
        raise DataError(
            "two or more different runs or files of answers can be compared", hint="--compare A --compare B"
        )
    made = registry().create("tasks", tasks.describe(recipe, task, options), flag="-t ")
    if isinstance(made, Judged):
        raise DataError(f"{task} has no answers that are right or wrong, so there is nothing to pair")
    chosen = runner.choose(made.protocols, protocol)
    questions = list(made.questions())[:limit]
    candidates, grades = [], {}
    for path in given:
        file = _answers(path, task)
        answers = read_answers(file, made)
        if not path.is_dir():
            refuse_echoes(file, questions, answers)
        scored = runner.score(made, questions, answers, chosen, file)
        candidates.append(Candidate(str(path), scored.scores, scored.failed))
        grades[str(path)] = scored.grades or {name: float(right) for name, right in scored.right.items()}
        if not grades[str(path)]:
            raise DataError(f"{task} does not say which answers are right, so there is nothing to pair")
    pairs = tuple(paired(a, b, grades[a], grades[b]) for a, b in combinations(grades, 2))
    return CompareReport(task, chosen, len(questions), tuple(candidates), pairs)


def _answers(path: Path, task: str) -> Path:
    """The answers: ``path`` itself, a file or MME's folder of them, or where the run in ``path`` has kept them."""
    if not path.is_dir() or (not (path / "eval").is_dir() and any(path.glob("*.txt"))):
        return path
    kept = read_document(path / "eval" / f"{task}.json").get("answers")
    if not isinstance(kept, str):
        raise DataError(
            f"{path}: {task} was not evaluated in this run", hint=f"llavactl eval {task} -r {path}/recipe.yaml"
        )
    # A run that was moved has its answers with it.
    return path / "eval" / "answers" / Path(kept).name
