"""``llavactl eval``: a task's questions to a model, or stored answers to scores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from llavactl.core import plugins
from llavactl.core.errors import RecipeError
from llavactl.core.paths import write_atomic, write_json
from llavactl.core.registry import registry
from llavactl.evaluation import runner
from llavactl.model.folder import describe, of_run
from llavactl.recipe.frame import Eval
from llavactl.report.examples import example
from llavactl.report.page import write_report

if TYPE_CHECKING:
    from llavactl.core.protocols import Task
    from llavactl.core.schema import Answer, Question
    from llavactl.recipe.frame import Recipe

EXAMPLES = 12


@dataclass(frozen=True)
class EvalReport:
    """A scored task; ``failed`` answers could not be read as one and count as wrong. ``file``: this report as JSON."""

    task: str
    protocol: str
    model: str
    n: int
    scores: Mapping[str, Any]
    failed: int
    file: str | None = None
    finished_before: bool = False


def evaluate(
    recipe: Recipe | None,
    task: str,
    options: Mapping[str, Any] | None = None,
    *,
    answers: Path | None = None,
    protocol: str | None = None,
    model: str | None = None,
) -> EvalReport:
    """Asks ``task``'s questions (or takes ``answers``) and scores them under ``protocol``.

    Options are the recipe's for this task, with ``options`` over them. The model is ``model``, else
    the recipe's last finished stage.
    """
    spec = _spec(recipe, task, options or {})
    made: Task = _create(spec)
    if answers is not None:
        chosen, n, scored = runner.score(made, made.questions(), runner.read_answers(answers), protocol)
        return EvalReport(task, chosen, str(answers), n, scored.scores, scored.failed)
    if model is None:
        assert recipe is not None
        return _ask(recipe, made, spec, of_run(recipe.run_dir), protocol)
    return _ask(recipe, made, spec, Path(model).absolute(), protocol)


def _ask(recipe: Recipe | None, task: Task, spec: Mapping[str, Any], folder: Path, protocol: str | None) -> EvalReport:
    settings = recipe.eval if recipe is not None else Eval()
    runs = (recipe.run_dir if recipe is not None else folder.parent) / "eval"
    asked = {"model": describe(folder)["digest"], "task": spec, "max_new_tokens": settings.max_new_tokens}
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()
    file = runs / f"{spec['name']}.json"
    if (done := _finished(file, digest, protocol or task.protocols[0])) is not None:
        return done
    questions = list(task.questions())
    # Answers belong to one model and one set of questions: their file carries both in its name.
    kept = runs / "answers" / f"{spec['name']}-{digest[:12]}.jsonl"
    answers = runner.read_answers(kept, cut=True) if kept.is_file() else {}
    if any(question.id not in answers for question in questions):
        from llavactl.chat.opening import open_assistant

        assistant = open_assistant(folder)
        answers = runner.ask(
            assistant,
            questions,
            answers,
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
            file=kept,
        )
    chosen, n, scored = runner.score(task, questions, answers, protocol)
    report = EvalReport(spec["name"], chosen, str(folder), n, scored.scores, scored.failed, str(file))
    _examples(runs / "examples", spec["name"], questions, answers)
    write_json(file, {**asdict(report), "digest": digest, "answers": str(kept)})
    if recipe is not None:
        write_report(recipe.run_dir)
    plugins.notify("eval_finished", report=asdict(report))
    return report


def _examples(folder: Path, task: str, questions: Sequence[Question], answers: Mapping[str, Answer]) -> None:
    """Keeps EXAMPLES questions, spread evenly over the task, with their pictures."""
    shown = questions[:: max(1, len(questions) // EXAMPLES)][:EXAMPLES]
    rows = [example(folder / task, each.turns, each.reference, answers[each.id].text) for each in shown]
    write_atomic(folder / f"{task}.json", json.dumps(rows, indent=2, ensure_ascii=False))


def _spec(recipe: Recipe | None, task: str, options: Mapping[str, Any]) -> dict[str, Any]:
    own = [spec.spec() for spec in recipe.eval.tasks if spec.name == task] if recipe is not None else []
    registry().get("tasks", task)
    return {**(own[0] if own else {"name": task}), **options}


def _create(spec: Mapping[str, Any]) -> Any:
    try:
        return registry().create("tasks", spec)
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(
            f"task {spec['name']}: -t {'.'.join(map(str, first['loc']))}: {first['msg']}",
            hint=f"`llavactl components tasks` lists what {spec['name']} takes",
        ) from error


def _finished(file: Path, digest: str, protocol: str) -> EvalReport | None:
    try:
        report = json.loads(file.read_text())
        if report["digest"] != digest or report["protocol"] != protocol:
            return None
        names = EvalReport.__dataclass_fields__
        return EvalReport(**{key: value for key, value in report.items() if key in names} | {"finished_before": True})
    except (OSError, ValueError, KeyError, TypeError):
        return None
