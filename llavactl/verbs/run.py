"""``llavactl run``: a recipe's whole pipeline. What is finished is skipped, what was cut goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from llavactl.core.errors import TeacherError
from llavactl.core.paths import write_json
from llavactl.core.processes import check_launch, on_cpu
from llavactl.core.registry import registry
from llavactl.report.inputs import read_document, read_list
from llavactl.report.page import TIMES, write_report
from llavactl.training.memory import release_memory
from llavactl.verbs import preflight
from llavactl.verbs.evaluate import EvalReport, evaluate
from llavactl.verbs.export import ExportReport, export
from llavactl.verbs.extract import ExtractReport, extract
from llavactl.verbs.generate import GenerateReport, generate
from llavactl.verbs.train import OWN_INITS, train
from llavactl.verbs.train_report import TrainReport

if TYPE_CHECKING:
    from llavactl.recipe.frame import Export, Recipe, TaskSpec

R = TypeVar("R")


@dataclass(frozen=True)
class RunReport:
    """What every step did, None where the recipe has no such step; ``example`` is a question with its answer."""

    name: str
    run_dir: str
    model: str | None
    generate: GenerateReport | None
    extract: ExtractReport | None
    stage1: TrainReport | None
    stage2: TrainReport | None
    eval: tuple[EvalReport, ...]
    export: tuple[ExportReport, ...]
    report: str
    example: Mapping[str, str] | None


def run(recipe: Recipe) -> RunReport:
    """From generate to export, one step after the other: each decides by content whether it has work to do."""
    _refuse(recipe)
    cached = recipe.features.mode == "cached" and bool(recipe.data.stage1 or recipe.data.stage2)
    generated = _timed(recipe, "generate", lambda: _generated(recipe)) if recipe.generate is not None else None
    extracted = _timed(recipe, "extract", lambda: extract(recipe)) if cached else None
    if extracted is not None and extracted.parts > 1:
        _meet()
    stage1 = _timed(recipe, "stage 1", lambda: train(recipe, 1)) if recipe.data.stage1 else None
    stage2 = _timed(recipe, "stage 2", lambda: train(recipe, 2)) if recipe.data.stage2 else None
    scored = [_scored(recipe, task) for task in recipe.eval.tasks]
    exported = [_exported(recipe, each) for each in recipe.export]
    last: Any = stage2 or stage1
    page = write_report(recipe.run_dir)
    return RunReport(
        name=recipe.name,
        run_dir=str(recipe.run_dir),
        model=last.model if last else None,
        generate=generated,
        extract=extracted,
        stage1=stage1,
        stage2=stage2,
        eval=tuple(scored),
        export=tuple(exported),
        report=str(page),
        example=_example(recipe),
    )


def _refuse(recipe: Recipe) -> None:
    """Checks before the first step what would stop a later one, such as a broken model after hours of extraction.

    Raises:
        LlavactlError: a model can't be loaded, or accelerate's configuration is not supported.
    """
    for stage, sources in ((recipe.stage1, recipe.data.stage1), (recipe.stage2, recipe.data.stage2)):
        if sources:
            check_launch(stage.precision)
    if recipe.data.stage1 or recipe.data.stage2:
        _check("vision", recipe.vision.spec())
    if recipe.data.stage1 or (recipe.data.stage2 and recipe.stage2.init in OWN_INITS):
        _check("languages", recipe.language.spec())
        preflight.refuse(recipe)


def _check(kind: str, spec: Mapping[str, Any]) -> None:
    component = registry().create(kind, spec)
    if hasattr(component, "check"):  # optional for plugins
        component.check()


def _generated(recipe: Recipe) -> GenerateReport:
    """The recipe's instruction data; nothing is trained on the part that a budget allowed.

    Raises:
        TeacherError: not all was asked.
    """
    report = generate(recipe)
    if report.requests is not None and report.requests.stopped:
        raise TeacherError(
            f"{report.requests.unanswered} requests to the teacher are left: {report.requests.stopped}",
            hint="raise the limit or wait, then run this again; or train on what available: -o generate=null",
        )
    return report


def _meet() -> None:
    """Waits for the other processes: a stage needs the features that all of them have made."""
    from accelerate import PartialState

    PartialState(cpu=on_cpu()).wait_for_everyone()


def _scored(recipe: Recipe, task: TaskSpec) -> EvalReport:
    return _timed(recipe, f"eval {task.name}", lambda: evaluate(recipe, task.name, task.spec()))


def _exported(recipe: Recipe, wanted: Export) -> ExportReport:
    check = None if wanted.verify else False
    return _timed(recipe, f"export {wanted.format}", lambda: export(recipe, wanted.spec(), wanted.to, check=check))


def _timed(recipe: Recipe, step: str, work: Callable[[], R]) -> R:
    """The report of ``work``; the seconds it took go to ``times.json``, unless it was finished before.

    A step that was cut and went on counts from where it went on.
    """
    began = time.perf_counter()
    report = work()
    release_memory()
    if not (getattr(report, "finished_before", False) or getattr(report, "encoded", None) == 0):
        file = recipe.run_dir / TIMES
        write_json(file, {**read_document(file), step: round(time.perf_counter() - began, 1)})
    return report


def _example(recipe: Recipe) -> Mapping[str, str] | None:
    """The first example of the last task, else of the last stage, without its inline picture."""
    files = [recipe.run_dir / "eval" / "examples" / f"{task.name}.json" for task in recipe.eval.tasks][::-1]
    for file in (*files, recipe.run_dir / "stage2" / "samples.json", recipe.run_dir / "stage1" / "samples.json"):
        if rows := read_list(file):
            return {key: value for key, value in rows[0].items() if key != "thumbnail"}
    return None
