"""``llavactl sweep``: runs all variants of a recipe. Equal steps are carried out once, and a report compares them."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from llavactl.core.errors import LlavactlError, RecipeError
from llavactl.core.hashes import hash_json
from llavactl.core.locations import shown_path
from llavactl.core.paths import exclusive_lock, write_atomic, write_json
from llavactl.core.plugin_code import located_fault
from llavactl.core.plugin_faults import plugin_error
from llavactl.core.processes import join_process_group
from llavactl.recipe.load import dump
from llavactl.recipe.sections import Data, Eval
from llavactl.recipe.stages import STAGES
from llavactl.report.inputs import read_document
from llavactl.report.optional import optional_output
from llavactl.report.sweep_page import sweep_page
from llavactl.training.collective import on_main, process_count, together
from llavactl.training.digest import stage_inputs
from llavactl.training.memory import release_memory
from llavactl.verbs import preflight
from llavactl.verbs.run import run
from llavactl.verbs.sweep.report import SweepReport, sweep_report
from llavactl.verbs.sweep.results import EXTRACTIONS, FinishedRun, Outcome, TaskGrades, finished_run

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from llavactl.recipe.axes import SweepRecipes, Variant
    from llavactl.recipe.frame import Recipe

log = logging.getLogger(__name__)

PAGE = "report.html"
ERROR = "error.txt"
"""A file of a failed run with the traceback."""


def sweep(recipes: SweepRecipes, *, dry_run: bool = False) -> SweepReport:
    """Runs every variant and compares them; finished runs are skipped, an interrupted one resumes.

    A variant that fails doesn't stop the others: its error is in the report. If several processes train together, it
    does, since another process may not have failed. A dry run checks the components of all variants and computes which
    steps they share.

    Raises:
        LlavactlError: the generated data can't be written, or another process runs this sweep.
    """
    if dry_run:
        return _planned(recipes)
    outcomes, grades = dict[str, Outcome](), TaskGrades()
    join_process_group()
    with ExitStack() as stack:
        on_main(lambda: stack.enter_context(_exclusive_access(recipes.folder)))
        _generate(recipes)
        for index, variant in enumerate(recipes.variants, 1):
            log.info("variant %d of %d: %s, seed %d", index, len(recipes.variants), variant.name, variant.seed)
            outcomes[variant.slug] = _outcome(recipes, variant, grades)
            report = on_main(partial(_reported, recipes, outcomes, compare=index == len(recipes.variants)))
    return report


def _reported(recipes: SweepRecipes, outcomes: Mapping[str, Outcome], *, compare: bool) -> SweepReport:
    """The report so far, also written as a page."""
    page = recipes.folder / PAGE
    report = sweep_report(recipes, outcomes, page, compare=compare)
    with optional_output(page):
        write_atomic(page, sweep_page(asdict(report)))
    return report


def _exclusive_access(folder: Path) -> AbstractContextManager[None]:
    busy = LlavactlError(f"another process runs the sweep in {folder}", hint="wait until it has finished")
    return exclusive_lock(folder / ".lock", busy)


def _generate(recipes: SweepRecipes) -> None:
    """Generates the data of all variants, as the recipe itself does."""
    if recipes.base.generate is not None:
        run(recipes.base.model_copy(update={"data": Data(), "eval": Eval(), "export": ()}))


def _outcome(recipes: SweepRecipes, variant: Variant, grades: TaskGrades) -> Outcome:
    """The finished run of ``variant``, or why it failed."""
    run_dir = variant.recipe.run_dir
    try:
        on_main(lambda: write_atomic(run_dir / "recipe.yaml", dump(variant.recipe)))
        report = run(variant.recipe, shared_with=_others(recipes, variant))
        extracted = [each for each in together(lambda: report.extract) if each is not None]
        finished = on_main(lambda: finished_run(variant, report, extracted, recipes.folder, grades))
        on_main(lambda: _record(recipes.folder, finished))
        (run_dir / ERROR).unlink(missing_ok=True)
        return finished
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a plugin may raise anything
        if process_count() > 1:
            raise
        why = _explained(error, run_dir / ERROR)
        with optional_output(run_dir / ERROR):
            write_atomic(run_dir / ERROR, "".join(traceback.format_exception(error)))
    finally:
        release_memory()
    log.warning("%s failed: %s", variant.slug, why)
    return why


def _others(recipes: SweepRecipes, variant: Variant) -> list[Path]:
    """The run folders with which ``variant`` may share steps: other variants, and the recipe's own run."""
    folders = sorted(path for path in recipes.folder.iterdir() if path.is_dir() and path != variant.recipe.run_dir)
    return [*folders, recipes.base.run_dir]


def _record(folder: Path, finished: FinishedRun) -> None:
    """Records the seconds of the extraction: the next variants find its features in the store."""
    if (seconds := finished.run.seconds.get("extract")) is not None:
        known = read_document(folder / EXTRACTIONS)
        write_json(folder / EXTRACTIONS, {**known, finished.extraction: seconds})


def _explained(error: BaseException, file: Path) -> str:
    """The reason and the hint of ``error`` in one line; the traceback is in ``file``."""
    if isinstance(error, RecipeError) and error.problems:
        text = "; ".join(map(str, error.problems))
    elif isinstance(error, LlavactlError):
        text = error.with_hint()
    else:
        fault = plugin_error(error)
        text = f"{fault.message if fault else located_fault(error, ['llavactl'])} (traceback in {shown_path(file)})"
    return " ".join(text.split())


def _feature_inputs(recipe: Recipe) -> str:
    """A hash of the vision encoder and its settings in all stages; equal hashes mean that features are shared."""
    vision = [recipe.stage(number).vision for number in recipe.stages_with_data()]
    return hash_json([vision, recipe.features.dtype, recipe.features.compute])


def _planned(recipes: SweepRecipes) -> SweepReport:
    """The report of a dry run: faults of the variants, and the steps that they share."""
    outcomes: dict[str, Outcome] = {}
    owners: dict[tuple[str, str], str] = {}
    shared: dict[str, dict[str, str]] = {}
    for variant in recipes.variants:
        recipe = variant.recipe
        if found := preflight.faults(recipe):
            outcomes[variant.slug] = "; ".join(f"{key}: {why}" for key, why in found)
            continue
        keys = {STAGES[number]: stage_inputs(recipe, number) for number in recipe.stages_with_data()}
        if keys and recipe.features.mode == "cached":
            keys = {"extract": _feature_inputs(recipe), **keys}
        first = {step: owners.setdefault((step, key), variant.slug) for step, key in keys.items()}
        shared[variant.slug] = {step: owner for step, owner in first.items() if owner != variant.slug}
    report = sweep_report(recipes, outcomes, recipes.folder / PAGE)
    variants = [
        replace(each, runs=tuple(replace(run, shared=shared.get(Path(run.run_dir).name, {})) for run in each.runs))
        for each in report.variants
    ]
    steps = dict.fromkeys(step for step, _ in owners)
    computed = {step: sum(step == other for other, _ in owners) for step in steps}
    return replace(report, variants=tuple(variants), computed=computed, dry_run=True)
