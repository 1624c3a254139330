"""``llavactl eval``: a task's questions to a model, or stored answers or verdicts to scores."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.core import plugins
from llavactl.core.errors import DataError
from llavactl.core.paths import write_atomic, write_json
from llavactl.core.protocols import Judged
from llavactl.evaluation import runner, tasks
from llavactl.evaluation.answers import read_answers
from llavactl.evaluation.statistics import intervals
from llavactl.evaluation.views import BLIND, STAGE1, View
from llavactl.model.folder import describe, of_run
from llavactl.model.foreign import resolve
from llavactl.recipe.frame import Eval
from llavactl.report.cases import write_cases
from llavactl.report.examples import example
from llavactl.report.page import write_report

if TYPE_CHECKING:
    from llavactl.core.protocols import Scores, Task
    from llavactl.core.schema import Answer, Question
    from llavactl.recipe.frame import Recipe

log = logging.getLogger(__name__)

EXAMPLES = 12

Answers = Mapping[str, "Answer"]


@dataclass(frozen=True)
class EvalReport:
    """A scored task; ``failed`` answers could not be read as one and count as the protocol says.

    ``interval``: the 95 % interval of a score, where there is one. ``beside``: the scores of those that
    this one must be held against (``blind twin``, ``stage 1``). ``ignored``: answers beyond the questions.
    ``answers``: the file they are kept in. ``file``: this report as JSON.
    """

    task: str
    protocol: str
    model: str
    n: int
    scores: Mapping[str, Any]
    failed: int
    interval: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    beside: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    ignored: int = 0
    answers: str | None = None
    file: str | None = None
    finished_before: bool = False


@dataclass(frozen=True)
class _Asked:
    """A task, all of its questions, how many of them are asked (None: all), and how answers are scored."""

    task: Task
    spec: Mapping[str, Any]
    everything: Sequence[Question]
    limit: int | None
    protocol: str

    @property
    def questions(self) -> Sequence[Question]:
        """Those that are asked."""
        return self.everything[: self.limit]

    def report(self, answers: Answers, model: str, file: Path) -> tuple[EvalReport, Scores]:
        scored = runner.score(self.task, self.questions, answers, self.protocol)
        ranges, name = intervals(self.questions, scored), self.spec["name"]
        beyond = len(answers) - len(self.questions)
        made = EvalReport(name, self.protocol, model, len(self.questions), scored.scores, scored.failed, ranges)
        return replace(made, ignored=beyond, answers=str(file)), scored


def evaluate(
    recipe: Recipe | None,
    task: str,
    options: Mapping[str, Any] | None = None,
    *,
    answers: Path | None = None,
    protocol: str | None = None,
    model: str | None = None,
    limit: int | None = None,
    cases: Path | None = None,
) -> EvalReport:
    """Asks ``task``'s questions, the first ``limit`` of them, and scores the answers under ``protocol``.

    Options are the recipe's for this task, with ``options`` over them. The model is ``model``, else the recipe's
    last finished stage; with ``answers``, or where the task has stored verdicts, none is asked. ``cases`` is the
    folder of a page with the worst answers and some of all; a model's is in its run.
    """
    spec = tasks.describe(recipe, task, options or {})
    made: Task | Judged = tasks.create(spec)
    chosen = runner.choose(made.protocols, protocol)
    if isinstance(made, Judged):
        return _judged(made, task, chosen)
    asked = _Asked(made, spec, list(made.questions()), limit, chosen)
    if answers is not None:
        given = read_answers(answers, made)
        report, scored = asked.report(given, str(answers), answers)
        if report.ignored and limit is None:
            log.info("%d answers are to no question of this task and are left out", report.ignored)
        if cases is not None:
            write_cases(cases, asdict(report), asked.questions, given, scored)
        return report
    if model is not None:
        folder = resolve(model)
    else:
        assert recipe is not None
        folder = of_run(recipe.run_dir)
    return _ask(recipe, asked, folder, cases)


def _judged(task: Judged, name: str, protocol: str) -> EvalReport:
    """The scores of stored verdicts."""
    reviews = task.reviews()
    if not reviews:
        raise DataError(
            f"{name} is scored by a judge, who compares each answer with a reference answer; no verdicts are given",
            hint="-t reviews=FILE, repeated for several runs of the judge: JSONL of question_id, category and content",
        )
    scored = task.judge(reviews, protocol)
    return EvalReport(name, protocol, "stored reviews", len(reviews[0]), scored.scores, scored.failed)


def _ask(recipe: Recipe | None, asked: _Asked, folder: Path, cases: Path | None) -> EvalReport:
    """Asks the model and those beside it, unless that was done before."""
    settings = recipe.eval if recipe is not None else Eval()
    runs, name = (recipe.run_dir if recipe is not None else folder.parent) / "eval", asked.spec["name"]
    # Some questions are another result than all of them, and take no page or file of it.
    into = runs if asked.limit is None else runs / "limited"
    views = _views(recipe, folder, settings)
    digests = {view.name: _digest(view, asked.spec, settings) for view in views}
    digest, file = _hash([digests, len(asked.questions)]), into / f"{name}.json"
    if cases is None and (done := _finished(file, digest, asked.protocol)) is not None:
        return done
    said: dict[str, Answers] = {}
    # Answers belong to one model and one set of questions: their file carries both in its name.
    kept = {view.name: runs / "answers" / f"{name}-{digests[view.name][:12]}.jsonl" for view in views}
    for view in views:
        said[view.name] = runner.ask(
            view, asked.everything, settings.batch_size, settings.max_new_tokens, kept[view.name], asked.limit
        )
    report, scored = asked.report(said[""], str(folder), kept[""])
    others = {
        other: dict(runner.score(asked.task, asked.questions, said[other], asked.protocol).scores)
        for other in said
        if other
    }
    report = replace(report, beside=others, file=str(file), ignored=0)
    _examples(into / "examples", name, asked.questions, said, scored)
    write_json(file, {**asdict(report), "digest": digest})
    write_cases(cases or into / "cases", asdict(report), asked.questions, said[""], scored)
    if recipe is not None and asked.limit is None:
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


def _digest(view: View, spec: Mapping[str, Any], settings: Eval) -> str:
    return _hash([describe(view.folder)["digest"], view.blind, spec, settings.max_new_tokens])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _examples(
    folder: Path, task: str, questions: Sequence[Question], said: Mapping[str, Answers], scored: Scores
) -> None:
    """Keeps EXAMPLES questions, spread evenly over the task, with their pictures and what each view said."""
    shown = questions[:: max(1, len(questions) // EXAMPLES)][:EXAMPLES]
    rows: list[dict[str, Any]] = []
    for each in shown:
        row: dict[str, Any] = dict(example(folder / task, each.turns, each.reference, said[""][each.id].text))
        if each.id in scored.right:
            row["right"] = scored.right[each.id]
        if BLIND in said:
            row["blind"] = said[BLIND][each.id].text
        rows.append(row)
    write_atomic(folder / f"{task}.json", json.dumps(rows, indent=2, ensure_ascii=False))


def _finished(file: Path, digest: str, protocol: str) -> EvalReport | None:
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        if report["digest"] != digest or report["protocol"] != protocol:
            return None
        names = EvalReport.__dataclass_fields__
        return EvalReport(**{key: value for key, value in report.items() if key in names} | {"finished_before": True})
    except (OSError, ValueError, KeyError, TypeError):
        return None
