"""``llavactl run``: a recipe's whole pipeline. What is finished is skipped, what was cut goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llavactl.report.page import write_report
from llavactl.verbs.evaluate import EvalReport, evaluate
from llavactl.verbs.extract import ExtractReport, extract
from llavactl.verbs.generate import GenerateReport, generate
from llavactl.verbs.train import TrainReport, train

if TYPE_CHECKING:
    from llavactl.recipe.frame import Recipe


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
    report: str
    example: Mapping[str, str] | None


def run(recipe: Recipe) -> RunReport:
    """Generate, extract, stage 1, stage 2, every task: each step decides by content whether it has work to do."""
    generated = generate(recipe) if recipe.generate is not None else None
    cached = recipe.features.mode == "cached"
    extracted = extract(recipe) if cached and (recipe.data.stage1 or recipe.data.stage2) else None
    stage1 = train(recipe, 1) if recipe.data.stage1 else None
    stage2 = train(recipe, 2) if recipe.data.stage2 else None
    scored = [evaluate(recipe, task.name, task.spec()) for task in recipe.eval.tasks]
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
        report=str(page),
        example=_example(recipe),
    )


def _example(recipe: Recipe) -> Mapping[str, str] | None:
    """The first example of the last task, else of the last stage, without its inline picture."""
    files = [recipe.run_dir / "eval" / "examples" / f"{task.name}.json" for task in recipe.eval.tasks][::-1]
    for file in (*files, recipe.run_dir / "stage2" / "samples.json", recipe.run_dir / "stage1" / "samples.json"):
        if file.is_file() and (rows := json.loads(file.read_text())):
            return {key: value for key, value in rows[0].items() if key != "thumbnail"}
    return None
