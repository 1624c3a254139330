"""``llavactl eval``: scores a model's answers, stored answers, or a judge's stored verdicts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.core import plugins
from llavactl.core.errors import DataError
from llavactl.core.paths import json_text, write_atomic
from llavactl.core.protocols import AnswerChecker, Judged, TeacherScored
from llavactl.core.registry import registry
from llavactl.evaluation.answers import check_not_questions, read_answers
from llavactl.evaluation.identity import answer_digests, result_digest
from llavactl.evaluation.models import BLIND_BASELINE, EvaluationTarget, evaluation_target, with_baselines
from llavactl.evaluation.processes import launched_processes
from llavactl.evaluation.results import EvalReport, stored_result, write_result
from llavactl.evaluation.runner import answer_questions, copy_answers
from llavactl.evaluation.scoring import Benchmark, choose_protocol, task_spec
from llavactl.recipe.sections import Eval
from llavactl.report.answer_maps import add_maps
from llavactl.report.cases import write_cases
from llavactl.report.examples import example
from llavactl.report.optional import optional_output
from llavactl.report.page import report_page, write_report
from llavactl.teaching.budgeted import ask_function, teacher_name

if TYPE_CHECKING:
    from llavactl.core.protocols import Ask, Scores
    from llavactl.core.schema import Answer, Question
    from llavactl.recipe.frame import Outline

log = logging.getLogger(__name__)

EXAMPLES = 12
"""Number of answered questions that are stored for the run's report page."""

Answers = Mapping[str, "Answer"]


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
    shared_with: Sequence[Path] = (),
) -> EvalReport:
    """Scores the answers to the first ``limit`` questions of ``task`` under ``protocol``.

    ``options`` override those of the recipe for this task. The answers are those in ``answers``, if given. Otherwise
    they are generated with ``model``, by default the recipe's last finished stage. A judged task with stored verdicts
    needs neither. ``cases`` is the folder for a page of the worst answers (default: in the model's run folder).
    ``settings`` are those of ``eval`` if there is no recipe. Answers of an equal model to the same questions in a run
    folder of ``shared_with`` are not generated again.
    """
    spec = task_spec(recipe, task, options or {})
    component = registry().create("tasks", spec, flag="-t ")
    protocol = choose_protocol(component.protocols, protocol)
    if isinstance(component, Judged) and (report := _score_stored_verdicts(component, task, protocol)):
        if answers is not None and isinstance(component, AnswerChecker):
            component.check_answers(read_answers(answers, component))
        return report
    benchmark = Benchmark(component, spec, list(component.questions()), limit, protocol)
    if answers is not None:
        return _score_answer_file(benchmark, answers, cases)
    settings = recipe.eval if recipe is not None else settings or Eval()
    return _evaluate_model(benchmark, evaluation_target(recipe, model), recipe, settings, cases, shared_with)


def _score_stored_verdicts(task: Judged, name: str, protocol: str) -> EvalReport | None:
    """The scores of stored verdicts; None if the task asks a judge.

    Raises:
        DataError: neither verdicts nor a judge.
    """
    if reviews := task.reviews():
        scores = task.judge(reviews, protocol)
        return EvalReport(name, protocol, "stored reviews", len(reviews[0]), scores.scores, scores.failed)
    if isinstance(task, TeacherScored) and task.teacher is not None:
        return None
    raise DataError(
        f"{name} requires a judge or stored verdicts",
        hint="-t reviews=FILE (JSONL of question_id, category and content), or -t judge.name=openai "
        "-t judge.model=MODEL",
    )


def _score_answer_file(benchmark: Benchmark, file: Path, cases: Path | None) -> EvalReport:
    answers = read_answers(file, benchmark.task)
    check_not_questions(file, benchmark.questions, answers)
    ask_judge, judge = _judge(benchmark, file.with_name(f"{file.name}.{benchmark.name}.replies.sqlite"))
    scores = benchmark.score(answers, file, ask_judge)
    report = benchmark.report(scores, answers, file, str(file), judge)
    if report.ignored and benchmark.limit is None:
        log.info("ignored answers to questions that are not in this task: %d", report.ignored)
    if cases is not None:
        write_cases(cases, asdict(report), benchmark.questions, answers, scores)
    return report


def _evaluate_model(
    benchmark: Benchmark,
    target: EvaluationTarget,
    recipe: Outline | None,
    settings: Eval,
    cases: Path | None,
    shared_with: Sequence[Path],
) -> EvalReport:
    """Answers the questions with the model and its baselines and scores them, unless a stored result is up to date."""
    processes = launched_processes()
    # A limited result never replaces the complete one.
    folder = target.results_dir if benchmark.limit is None else target.results_dir / "limited"
    file = folder / f"{benchmark.name}.json"
    models = with_baselines(target, recipe, settings, benchmark.all_questions)
    digests = answer_digests(models, benchmark.all_questions, settings)
    digest = result_digest(digests, benchmark.scoring_identity)
    if cases is None and (report := stored_result(file, digest, benchmark.protocol)) is not None:
        log.debug("eval %s: %s is up to date (digest %s)", benchmark.name, file, digest)
        if processes.is_main:
            _explain(benchmark, target, recipe, folder, settings.explain)
        return report
    answers: dict[str, Answers] = {}
    copied: dict[str, Path | None] = {}
    for model in models:
        stored = _answer_file(benchmark, target, digests[model.name])
        if processes.is_main:
            copied[model.name] = copy_answers(stored, [run_dir / "eval" / "answers" for run_dir in shared_with])
        answers[model.name] = answer_questions(
            model,
            benchmark.all_questions,
            benchmark.limit,
            settings,
            stored,
            processes,
        )
    report = None
    if processes.is_main:
        answer_file = _answer_file(benchmark, target, digests[target.model.name])
        report, scores = _scored(benchmark, target, answers, answer_file)
        source = copied[target.model.name]
        report = replace(report, file=str(file), copied_from=str(source) if source else None)
        own_answers, blind_answers = answers[target.model.name], answers.get(BLIND_BASELINE)
        # Before the result, which says that all is done.
        with optional_output(folder / "examples"):
            _write_examples(folder / "examples", benchmark, own_answers, blind_answers, scores)
        write_result(file, report, digest)
        with nullcontext() if cases else optional_output(folder / "cases"):
            write_cases(cases or folder / "cases", asdict(report), benchmark.questions, own_answers, scores)
        _explain(benchmark, target, None, folder, settings.explain)
        if recipe is not None and benchmark.limit is None and not target.model.from_transformers:
            with optional_output(report_page(recipe.run_dir)):
                write_report(recipe.run_dir)
        document = None if recipe is None else recipe.model_dump(mode="json")
        plugins.notify("eval_finished", recipe=document, report=asdict(report))
    processes.barrier()
    report = report or stored_result(file, digest, benchmark.protocol)
    assert report is not None
    return report


def _answer_file(benchmark: Benchmark, target: EvaluationTarget, digest: str) -> Path:
    """Named after task and digest: answers belong to one model and one set of questions."""
    return target.results_dir / "answers" / f"{benchmark.name}-{digest[:12]}.jsonl"


def _scored(
    benchmark: Benchmark, target: EvaluationTarget, answers: Mapping[str, Answers], file: Path
) -> tuple[EvalReport, Scores]:
    """The result with the scores of the baselines, and the model's scores."""
    ask_judge, judge = _judge(benchmark, target.results_dir / "judge" / f"{benchmark.name}.replies.sqlite")
    scores = {name: benchmark.score(answers_of_model, file, ask_judge) for name, answers_of_model in answers.items()}
    model_scores = scores.pop(target.model.name)
    report = benchmark.report(model_scores, answers[target.model.name], file, target.name, judge)
    baselines = {name: dict(baseline.scores) for name, baseline in scores.items()}
    # Answers of earlier runs with a higher limit are not "ignored" ones.
    return replace(report, baselines=baselines, ignored=0, prompt=target.model.prompt_format), model_scores


def _judge(benchmark: Benchmark, replies: Path) -> tuple[Ask | None, str | None]:
    """A function that asks the task's judge and stores its replies in ``replies`` (SQLite), and the judge's name.

    (None, None) if the task has no judge.
    """
    judge = benchmark.judge
    return (None, None) if judge is None else (ask_function(judge, replies), teacher_name(judge))


def _explain(benchmark: Benchmark, target: EvaluationTarget, recipe: Outline | None, folder: Path, count: int) -> None:
    """Adds maps to ``count`` of the stored examples, unless they have some, and updates the report of ``recipe``."""
    file = folder / "examples" / f"{benchmark.name}.json"
    if count and not target.model.from_transformers:
        with optional_output(file):
            changed = add_maps(file, _examples(benchmark.questions), target.model.folder, count)
            if changed and recipe is not None and benchmark.limit is None:
                write_report(recipe.run_dir)


def _examples(questions: Sequence[Question]) -> Sequence[Question]:
    """EXAMPLES of ``questions``, spread evenly over the task."""
    return questions[:: max(1, len(questions) // EXAMPLES)][:EXAMPLES]


def _write_examples(
    folder: Path, benchmark: Benchmark, answers: Answers, blind_answers: Answers | None, scores: Scores
) -> None:
    """Stores EXAMPLES questions, spread evenly over the task, with image and answers for the report page."""
    questions, name = benchmark.questions, benchmark.name
    rows: list[dict[str, Any]] = []
    for question in _examples(questions):
        answer = answers[question.id].text
        row: dict[str, Any] = dict(example(folder / name, question.turns, question.reference, answer))
        if question.id in scores.right:
            row["right"] = scores.right[question.id]
        if blind_answers is not None:
            row["blind"] = blind_answers[question.id].text
        rows.append(row)
    write_atomic(folder / f"{name}.json", json_text(rows, indent=2))
