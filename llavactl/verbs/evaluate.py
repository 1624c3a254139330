"""``llavactl eval``: a task's questions to a model, or stored answers or verdicts to scores."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.chat import transformers_model
from llavactl.core import plugins
from llavactl.core.errors import DataError
from llavactl.core.hashes import hash_json
from llavactl.core.identity import component_identity
from llavactl.core.paths import json_text, write_atomic, write_json
from llavactl.core.protocols import AnswerChecker, Judged, TeacherScored
from llavactl.core.registry import registry
from llavactl.evaluation import runner, tasks
from llavactl.evaluation.answers import read_answers, refuse_echoes
from llavactl.evaluation.processes import processes
from llavactl.evaluation.significance import intervals
from llavactl.evaluation.views import BLIND, STAGE1, View, other_pictures
from llavactl.features import ContentKeys
from llavactl.model.folder import of_run
from llavactl.model.foreign import resolve
from llavactl.recipe.sections import Eval
from llavactl.report.cases import write_cases
from llavactl.report.examples import example
from llavactl.report.page import write_report
from llavactl.teaching.consulting import asker, name_of

if TYPE_CHECKING:
    from llavactl.core.protocols import Scores, Task
    from llavactl.core.schema import Answer, Content, Question
    from llavactl.recipe.frame import Outline

log = logging.getLogger(__name__)

EXAMPLES = 12

Answers = Mapping[str, "Answer"]


@dataclass(frozen=True)
class EvalReport:
    """A scored task; ``failed`` answers could not be read as one and count as the protocol says.

    ``interval``: the 95 % interval of a score, where there is one. ``beside``: the scores of those that
    this one must be held against (``blind twin``, ``stage 1``). ``ignored``: answers beyond the questions.
    ``judge``: the teacher that had a say in the scores. ``prompt``: how a model of another program was asked.
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
    judge: str | None = None
    prompt: str | None = None
    answers: str | None = None
    file: str | None = None
    finished_before: bool = False


@dataclass(frozen=True)
class _Asked:
    """A task, all of its questions, how many of them are asked (None: all), and how answers are scored."""

    task: Task | Judged
    spec: Mapping[str, Any]
    everything: Sequence[Question]
    limit: int | None
    protocol: str

    @property
    def questions(self) -> Sequence[Question]:
        """Those that are asked."""
        return self.everything[: self.limit]

    @property
    def identity(self) -> list[Any]:
        """Everything that determines how answers are scored."""
        right = [[each.id, each.reference, each.category] for each in self.questions]
        return [component_identity("tasks", self.spec), right]

    def scored(self, answers: Answers, file: Path, replies: Path) -> Scores:
        """The scores of the answers in ``file``; what a teacher says to them is kept in ``replies``."""
        if isinstance(self.task, TeacherScored) and self.task.teacher is not None:
            given = runner.chosen(self.questions, answers, file)
            return self.task.score_with_teacher(given, asker(self.task.teacher, replies), self.protocol)
        assert not isinstance(self.task, Judged)
        return runner.score(self.task, self.questions, answers, self.protocol, file)

    def report(self, answers: Answers, model: str, file: Path, replies: Path) -> tuple[EvalReport, Scores]:
        scored = self.scored(answers, file, replies)
        ranges, name = intervals(self.questions, scored), self.spec["name"]
        beyond = len(answers) - len(self.questions)
        made = EvalReport(name, self.protocol, model, len(self.questions), scored.scores, scored.failed, ranges)
        asks = self.task.teacher if isinstance(self.task, TeacherScored) else None
        return replace(made, ignored=beyond, answers=str(file), judge=name_of(asks) if asks else None), scored


@dataclass(frozen=True)
class _Model:
    """Who is asked, where its run keeps what it said, and whether that is the recipe's own."""

    view: View
    runs: Path
    name: str
    own: bool = True


def evaluate(
    recipe: Outline | None,
    task: str,
    options: Mapping[str, Any] | None = None,
    *,
    answers: Path | None = None,
    protocol: str | None = None,
    model: str | None = None,
    limit: int | None = None,
    cases: Path | None = None,
    settings: Eval | None = None,
) -> EvalReport:
    """Asks ``task``'s questions, the first ``limit`` of them, and scores the answers under ``protocol``.

    Options are the recipe's for this task, with ``options`` over them. The model is ``model``, else the recipe's
    last finished stage; with ``answers``, or where the task has stored verdicts, none is asked. ``cases`` is the
    folder of a page with the worst answers and some of all; a model's is in its run. ``settings`` are those of a
    recipe that isn't there.
    """
    spec = tasks.describe(recipe, task, options or {})
    made: Task | Judged = registry().create("tasks", spec, flag="-t ")
    chosen = runner.choose(made.protocols, protocol)
    if isinstance(made, Judged) and (stored := _stored(made, task, chosen)):
        if answers is not None and isinstance(made, AnswerChecker):
            made.check_answers(read_answers(answers, made))
        return stored
    asked = _Asked(made, spec, list(made.questions()), limit, chosen)
    if answers is not None:
        given = read_answers(answers, made)
        refuse_echoes(answers, asked.questions, given)
        replies = answers.with_name(f"{answers.name}.{task}.replies.sqlite")
        report, scored = asked.report(given, str(answers), answers, replies)
        if report.ignored and limit is None:
            log.info("%d answers are to no question of this task and are left out", report.ignored)
        if cases is not None:
            write_cases(cases, asdict(report), asked.questions, given, scored)
        return report
    settings = recipe.eval if recipe is not None else settings or Eval()
    return _ask(recipe, settings, asked, _model(recipe, model), cases)


def _model(recipe: Outline | None, model: str | None) -> _Model:
    """The model that is asked: ``model``, of ours or of another program (``hf:``), else the recipe's."""
    if model is not None and model.startswith(transformers_model.PREFIX):
        name = re.sub(r"[^\w.-]+", "--", model.removeprefix(transformers_model.PREFIX)).strip("-.") or "model"
        runs = Path("runs", name, "eval").absolute() if recipe is None else recipe.run_dir / "eval" / "others" / name
        return _Model(View("", transformers_model.resolve_folder(model), foreign=True), runs, model, own=False)
    if model is None:
        assert recipe is not None
        folder = of_run(recipe.run_dir)
    else:
        folder = resolve(model, recipe)
    # What stands for another program's checkpoint has no run around it: its scores go into that folder itself.
    own = folder.parent if folder.name == "model" else folder
    return _Model(View("", folder), (own if recipe is None else recipe.run_dir) / "eval", str(folder))


def _stored(task: Judged, name: str, protocol: str) -> EvalReport | None:
    """The scores of stored verdicts; None where a judge is to be asked."""
    if reviews := task.reviews():
        scored = task.judge(reviews, protocol)
        return EvalReport(name, protocol, "stored reviews", len(reviews[0]), scored.scores, scored.failed)
    if isinstance(task, TeacherScored) and task.teacher is not None:
        return None
    raise DataError(
        f"{name} is scored by a judge, who compares each answer with a reference answer; no verdicts are given",
        hint="-t reviews=FILE for stored ones, JSONL of question_id, category and content; or a judge to ask: "
        "-t judge.name=openai -t judge.model=MODEL",
    )


def _ask(recipe: Outline | None, settings: Eval, asked: _Asked, model: _Model, cases: Path | None) -> EvalReport:
    """Asks the model and those beside it, unless that was done before; of several processes each asks its share."""
    runs, name, among = model.runs, asked.spec["name"], processes()
    # Some questions are another result than all of them, and take no page or file of it.
    into = runs if asked.limit is None else runs / "limited"
    views = _views(recipe, model, settings, asked)
    questions = _content(asked.everything)
    digests = {view.name: hash_json([view.identity, view.blind, questions, settings.max_new_tokens]) for view in views}
    digest, file = hash_json([digests, asked.identity]), into / f"{name}.json"
    if cases is None and (done := _finished(file, digest, asked.protocol)) is not None:
        return done
    said: dict[str, Answers] = {}
    # Answers belong to one model and one set of questions: their file carries both in its name.
    kept = {view.name: runs / "answers" / f"{name}-{digests[view.name][:12]}.jsonl" for view in views}
    for view in views:
        said[view.name] = runner.ask(
            view, asked.everything, settings.batch_size, settings.max_new_tokens, kept[view.name], asked.limit, among
        )
    report = _write(recipe, asked, model, said, kept[""], into, digest, cases) if among.first else None
    among.meet()
    report = report or _finished(file, digest, asked.protocol)
    assert report is not None
    return report


def _write(
    recipe: Outline | None,
    asked: _Asked,
    model: _Model,
    said: Mapping[str, Answers],
    kept: Path,
    into: Path,
    digest: str,
    cases: Path | None,
) -> EvalReport:
    """Scores what was said, writes the result and its pages, and tells the plugins."""
    name = asked.spec["name"]
    replies = model.runs / "judge" / f"{name}.replies.sqlite"
    report, scored = asked.report(said[""], model.name, kept, replies)
    others = {other: dict(asked.scored(said[other], kept, replies).scores) for other in said if other}
    file, prompt = (
        into / f"{name}.json",
        transformers_model.prompt_format_of(model.view.folder) if model.view.foreign else None,
    )
    report = replace(report, beside=others, file=str(file), ignored=0, prompt=prompt)
    _examples(into / "examples", name, asked.questions, said, scored)
    write_json(file, {**asdict(report), "digest": digest})
    write_cases(cases or into / "cases", asdict(report), asked.questions, said[""], scored)
    if recipe is not None and asked.limit is None and model.own:
        write_report(recipe.run_dir)
    plugins.notify("eval_finished", report=asdict(report))
    return report


def _views(recipe: Outline | None, model: _Model, settings: Eval, asked: _Asked) -> list[View]:
    """The model itself (without a name), and those that the recipe wants beside it."""
    views = [model.view]
    # Who is asked without pictures, or about a single one, has no other picture to be shown.
    if settings.blind_baseline and len(other_pictures(asked.everything)) > 1:
        views.append(replace(model.view, name=BLIND, blind=True))
    first = None if recipe is None else recipe.run_dir / "stage1" / "model"
    if settings.stage1_baseline and model.own and first is not None and first.is_dir() and first != model.view.folder:
        views.append(View(STAGE1, first))
    return views


def _content(questions: Sequence[Question]) -> list[Any]:
    """The content of ``questions``: text, and images by content hash, or by name if they can't be read."""
    images = list(dict.fromkeys(image for each in questions for turn in each.turns for image in turn.images))
    keys = dict(zip(images, ContentKeys().many(images), strict=True))

    def part(said: Content) -> Any:
        if isinstance(said, str):
            return said
        key = keys[said]
        return [key] if isinstance(key, str) else [said.name]

    return [
        [each.id, [[turn.role, [part(said) for said in turn.content]] for turn in each.turns]] for each in questions
    ]


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
    write_atomic(folder / f"{task}.json", json_text(rows, indent=2))


def _finished(file: Path, digest: str, protocol: str) -> EvalReport | None:
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        if report["digest"] != digest or report["protocol"] != protocol:
            return None
        names = EvalReport.__dataclass_fields__
        return EvalReport(**{key: value for key, value in report.items() if key in names} | {"finished_before": True})
    except (OSError, ValueError, KeyError, TypeError):
        return None
