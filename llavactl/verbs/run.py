"""``llavactl run``: all steps of a recipe. Finished steps are skipped; an interrupted step resumes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from llavactl.core.errors import TeacherError
from llavactl.core.paths import write_json
from llavactl.core.processes import check_launch, join_process_group
from llavactl.core.protocols import check_component
from llavactl.core.quantities import duration
from llavactl.core.registry import registry
from llavactl.evaluation.results import EvalReport
from llavactl.recipe.stages import STAGES
from llavactl.report.inputs import read_document, read_objects
from llavactl.report.optional import optional_output
from llavactl.report.page import TIMES, refreshed, report_page, write_report
from llavactl.training.collective import on_main
from llavactl.training.initial_model import starts_from_recipe_language
from llavactl.training.memory import release_memory
from llavactl.training.report import TrainReport
from llavactl.verbs import preflight
from llavactl.verbs.evaluate import evaluate
from llavactl.verbs.export import ExportReport, export
from llavactl.verbs.extract import ExtractReport, extract
from llavactl.verbs.generate import GenerateReport, generate
from llavactl.verbs.train import train

if TYPE_CHECKING:
    from llavactl.recipe.frame import Recipe
    from llavactl.recipe.specs import Export, TaskSpec
    from llavactl.recipe.stages import StageNumber

log = logging.getLogger(__name__)

R = TypeVar("R")


@dataclass(frozen=True)
class RunReport:
    """The report of every step, None for steps that the recipe doesn't have; ``example``: a question and its answer."""

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


def run(recipe: Recipe, *, shared_with: Sequence[Path] = ()) -> RunReport:
    """Runs all steps of ``recipe``, from generate to export.

    Stages and answers that a run folder in ``shared_with`` has for the same inputs are not computed again.

    Raises:
        LlavactlError: from any step; problems that can be detected before the first step are raised before it.
    """
    _check(recipe)
    with refreshed(recipe.run_dir):
        generated = _generate(recipe)
        extracted = _extract(recipe)
        trained = {number: _train(recipe, number, shared_with) for number in recipe.stages_with_data()}
        scored = [_evaluate(recipe, task, shared_with) for task in recipe.eval.tasks]
        exported = [_export(recipe, settings) for settings in recipe.export]
    last = trained[max(trained)] if trained else None
    page = report_page(recipe.run_dir)
    with optional_output(page):
        _on_main(lambda: write_report(recipe.run_dir))
    return RunReport(
        name=recipe.name,
        run_dir=str(recipe.run_dir),
        model=last.model if last else None,
        generate=generated,
        extract=extracted,
        stage1=trained.get(1),
        stage2=trained.get(2),
        eval=tuple(scored),
        export=tuple(exported),
        report=str(page),
        example=_example(recipe),
    )


def _check(recipe: Recipe) -> None:
    """Checks before the first step for problems of later ones, such as a broken model after hours of extraction.

    Raises:
        LlavactlError: a model can't be loaded, or accelerate's configuration is not supported.
    """
    stages = [recipe.stage(number) for number in recipe.stages_with_data()]
    for stage in stages:
        check_launch(stage.settings.precision)
    if stages:
        check_component(registry().create("vision", recipe.vision.spec()))
    if any(starts_from_recipe_language(recipe, stage.number) for stage in stages):
        check_component(registry().create("languages", recipe.language.spec()))
        preflight.refuse(recipe)


def _generate(recipe: Recipe) -> GenerateReport | None:
    if recipe.generate is None:
        return None
    return _on_main(lambda: _timed(recipe, "generate", partial(_generate_all, recipe)))


def _generate_all(recipe: Recipe) -> GenerateReport:
    """The recipe's instruction data.

    Raises:
        TeacherError: requests are left, because of a budget for example. No model is trained on a part of the data.
    """
    report = generate(recipe)
    if report.requests is not None and report.requests.stopped:
        raise TeacherError(
            f"{report.requests.unanswered} requests to the teacher are left: {report.requests.stopped}",
            hint="raise the limit or wait, then run the command again; or train on the data in `generate.out`: "
            "`-o generate=null`",
        )
    return report


def _extract(recipe: Recipe) -> ExtractReport | None:
    if recipe.features.mode != "cached" or not recipe.stages_with_data():
        return None
    report = _timed(recipe, "extract", partial(extract, recipe))
    if report.parts > 1:  # a stage needs the features of all processes
        join_process_group()
        on_main(lambda: None)
    return report


def _train(recipe: Recipe, number: StageNumber, shared_with: Sequence[Path]) -> TrainReport:
    return _timed(recipe, f"stage {number}", partial(train, recipe, number, shared_with=shared_with))


def _evaluate(recipe: Recipe, task: TaskSpec, shared_with: Sequence[Path]) -> EvalReport:
    step = partial(evaluate, recipe, task.name, task.spec(), shared_with=shared_with)
    return _timed(recipe, f"eval {task.name}", step)


def _export(recipe: Recipe, settings: Export) -> ExportReport:
    check = None if settings.verify else False
    step = partial(export, recipe, settings.spec(), settings.to, check=check, allow_different=settings.allow_different)
    return _on_main(lambda: _timed(recipe, f"export {settings.format}", step))


def _on_main(step: Callable[[], R]) -> R:
    """The report of ``step``, which the main process carries out while the others wait.

    Raises:
        LlavactlError: the step failed; in all processes.
    """
    join_process_group()
    return on_main(step)


def _timed(recipe: Recipe, name: str, step: Callable[[], R]) -> R:
    """The report of ``step``; its duration in seconds is written to ``times.json``, unless it was finished before.

    The duration of a resumed step is the time since it resumed.
    """
    log.debug("%s: starting", name)
    start = time.perf_counter()
    report = step()
    log.debug("%s: finished in %s", name, duration(time.perf_counter() - start))
    release_memory()
    if not (getattr(report, "finished_before", False) or getattr(report, "encoded", None) == 0):
        file = recipe.run_dir / TIMES
        with optional_output(file):
            write_json(file, {**read_document(file), name: round(time.perf_counter() - start, 1)})
    return report


def _example(recipe: Recipe) -> Mapping[str, str] | None:
    """The first example of the last task, otherwise of the last stage, without its thumbnail."""
    files = [recipe.run_dir / "eval" / "examples" / f"{task.name}.json" for task in reversed(recipe.eval.tasks)]
    files += [recipe.run_dir / section / "samples.json" for section in reversed(STAGES.values())]
    for file in files:
        if examples := read_objects(file):
            return {key: value for key, value in examples[0].items() if key != "thumbnail"}
    return None
