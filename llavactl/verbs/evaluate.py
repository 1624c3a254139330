"""``llavactl eval``: a task's questions to a model, or stored answers to scores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from llavactl.core import plugins
from llavactl.core.errors import RecipeError
from llavactl.core.paths import write_atomic, write_json
from llavactl.core.registry import registry
from llavactl.evaluation import runner
from llavactl.evaluation.statistics import intervals
from llavactl.evaluation.views import BLIND, STAGE1, View
from llavactl.model.folder import describe, of_run
from llavactl.model.foreign import resolve
from llavactl.recipe.frame import Eval
from llavactl.report.examples import example
from llavactl.report.page import write_report

if TYPE_CHECKING:
    from llavactl.core.protocols import Task
    from llavactl.core.schema import Answer, Question
    from llavactl.recipe.frame import Recipe

EXAMPLES = 12

Answers = Mapping[str, "Answer"]


@dataclass(frozen=True)
class EvalReport:
    """A scored task; ``failed`` answers could not be read as one and count as wrong.

    ``interval``: the 95 % interval of a score, where there is one. ``beside``: the scores of those that
    this one must be held against (``blind twin``, ``stage 1``). ``file``: this report as JSON.
    """

    task: str
    protocol: str
    model: str
    n: int
    scores: Mapping[str, Any]
    failed: int
    interval: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    beside: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
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
        return _scored(made, spec, list(made.questions()), runner.read_answers(answers), protocol, str(answers))
    if model is not None:
        return _asked(recipe, made, spec, resolve(model), protocol)
    assert recipe is not None
    return _asked(recipe, made, spec, of_run(recipe.run_dir), protocol)


def _asked(
    recipe: Recipe | None, task: Task, spec: Mapping[str, Any], folder: Path, protocol: str | None
) -> EvalReport:
    """Asks the model and those beside it, unless that was done before."""
    settings = recipe.eval if recipe is not None else Eval()
    runs = (recipe.run_dir if recipe is not None else folder.parent) / "eval"
    views = _views(recipe, folder, settings)
    digests = {view.name: _digest(view, spec, settings) for view in views}
    digest, file = _hash(digests), runs / f"{spec['name']}.json"
    if (done := _finished(file, digest, protocol or task.protocols[0])) is not None:
        return done
    questions = list(task.questions())
    said: dict[str, Answers] = {}
    for view in views:
        # Answers belong to one model and one set of questions: their file carries both in its name.
        kept = runs / "answers" / f"{spec['name']}-{digests[view.name][:12]}.jsonl"
        said[view.name] = runner.ask(view, questions, settings.batch_size, settings.max_new_tokens, kept)
    report = _scored(task, spec, questions, said[""], protocol, str(folder))
    others = {name: dict(runner.score(task, questions, said[name], protocol)[1].scores) for name in said if name}
    report = replace(report, beside=others, file=str(file))
    _examples(runs / "examples", spec["name"], questions, said)
    write_json(file, {**asdict(report), "digest": digest})
    if recipe is not None:
        write_report(recipe.run_dir)
    plugins.notify("eval_finished", report=asdict(report))
    return report


def _views(recipe: Recipe | None, folder: Path, settings: Eval) -> list[View]:
    """The model itself (without a name), and those that the recipe wants beside it."""
    views = [View("", folder)]
    if settings.blind_twin:
        views.append(View(BLIND, folder, blind=True))
    first = None if recipe is None else recipe.run_dir / "stage1" / "model"
    if settings.stage1 and first is not None and first.is_dir() and first != folder:
        views.append(View(STAGE1, first))
    return views


def _scored(
    task: Task,
    spec: Mapping[str, Any],
    questions: Sequence[Question],
    answers: Answers,
    protocol: str | None,
    model: str,
) -> EvalReport:
    chosen, scored = runner.score(task, questions, answers, protocol)
    ranges = intervals(questions, scored.right)
    return EvalReport(spec["name"], chosen, model, len(questions), scored.scores, scored.failed, ranges)


def _digest(view: View, spec: Mapping[str, Any], settings: Eval) -> str:
    return _hash([describe(view.folder)["digest"], view.blind, spec, settings.max_new_tokens])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _examples(folder: Path, task: str, questions: Sequence[Question], said: Mapping[str, Answers]) -> None:
    """Keeps EXAMPLES questions, spread evenly over the task, with their pictures and what each view said."""
    shown = questions[:: max(1, len(questions) // EXAMPLES)][:EXAMPLES]
    rows = []
    for each in shown:
        row = example(folder / task, each.turns, each.reference, said[""][each.id].text)
        rows.append(row | {"blind": said[BLIND][each.id].text} if BLIND in said else row)
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
