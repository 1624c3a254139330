"""The Python API: the commands as functions, for notebooks, scripts and plugins; exported lazily by ``llavactl``.

    recipe = llavactl.load_recipe("recipe.yaml", {"stage2.epochs": 2})
    llavactl.extract(recipe)
    llavactl.train(recipe, stage=1)
    chat = llavactl.Chat(llavactl.load_model(recipe))
    for piece in chat.ask("What is this?", "cat.jpg"):
        print(piece, end="")

Functions return the reports that the commands print with ``--json`` and raise ``LlavactlError``, with ``message``
and ``hint``. ``progress`` is called with a ``Progress`` while the function runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llavactl.core.errors import unexpected
from llavactl.core.progress import Progress, reporting_to

if TYPE_CHECKING:
    from llavactl.chat.assistant import Assistant
    from llavactl.chat.loading import Dtype
    from llavactl.core.errors import Problem
    from llavactl.evaluation.results import EvalReport
    from llavactl.model.quantized import Bits
    from llavactl.recipe.frame import Outline, Recipe, VisionRecipe
    from llavactl.training.report import TrainReport
    from llavactl.verbs.export import ExportReport
    from llavactl.verbs.extract import ExtractReport
    from llavactl.verbs.generate import GenerateReport
    from llavactl.verbs.run import RunReport

Overrides = Mapping[str, Any] | Sequence[str]
"""Recipe keys to override: ``{"stage1.epochs": 2}``, or ``["stage1.epochs=2"]`` as with ``-o``."""

OnProgress = Callable[[Progress], object]


def load_recipe(source: str | Path | None = None, overrides: Overrides = ()) -> Recipe:
    """Loads the complete recipe ``source``: a name or a file, by default ``./recipe.yaml``.

    Raises:
        RecipeError: lists all problems of the recipe (``problems``).
    """
    from llavactl.recipe.load import load_recipe as load

    return load(_source(source), _overrides(overrides))


def check(source: str | Path | None = None, overrides: Overrides = ()) -> list[Problem]:
    """Lists all problems of the recipe ``source``, without reading weights or data (see ``llavactl data check``)."""
    from llavactl.verbs.preflight import problems

    return problems(_source(source), _overrides(overrides))


def generate(recipe: Outline, *, dry_run: bool = False, progress: OnProgress | None = None) -> GenerateReport:
    """Generates instruction data with the recipe's teacher; with ``dry_run``, estimates requests, tokens and cost."""
    from llavactl.verbs.generate import generate as work

    _require_recipe(recipe, "Outline")
    with reporting_to(progress):
        return work(recipe, dry_run=dry_run)


def extract(
    recipe: VisionRecipe,
    *,
    dry_run: bool = False,
    max_skipped: int | None = None,
    progress: OnProgress | None = None,
) -> ExtractReport:
    """Extracts the features of ``recipe`` that are not in the store; with ``dry_run``, estimates bytes and time.

    Raises:
        DataError: more than ``max_skipped`` images can't be read.
    """
    from llavactl.verbs.extract import extract as work

    _require_recipe(recipe, "VisionRecipe")
    with reporting_to(progress):
        return work(recipe, dry_run=dry_run, max_skipped=max_skipped)


def train(
    recipe: Recipe,
    stage: Literal[1, 2],
    *,
    resume: Literal["auto", "never"] = "auto",
    max_skipped: int | None = None,
    progress: OnProgress | None = None,
) -> TrainReport:
    """Trains or resumes ``stage`` of ``recipe``; a finished stage is not trained again.

    Raises:
        DataError: more than ``max_skipped`` images can't be read.
    """
    from llavactl.verbs.train import train as work

    _require_recipe(recipe)
    _require_choice("stage", stage, (1, 2))
    _require_choice("resume", resume, ("auto", "never"))
    with reporting_to(progress):
        return work(recipe, stage, resume, max_skipped=max_skipped)


def evaluate(
    recipe: Recipe | None,
    task: str,
    options: Mapping[str, Any] | None = None,
    *,
    model: str | Path | None = None,
    answers: str | Path | None = None,
    protocol: str | None = None,
    limit: int | None = None,
    progress: OnProgress | None = None,
) -> EvalReport:
    """Scores ``model`` (default: the recipe's last finished stage) on ``task``, or stored ``answers`` without a model.

    ``options`` are the task's options, which override the recipe's.
    """
    from llavactl.verbs.evaluate import evaluate as work

    if recipe is not None:
        _require_recipe(recipe)
    file = None if answers is None else Path(answers)
    name = None if model is None else str(model)
    with reporting_to(progress):
        return work(recipe, task, options, model=name, answers=file, protocol=protocol, limit=limit)


def export(
    recipe: Recipe | None,
    format: str,  # noqa: A002 - the option's name
    to: str | Path,
    options: Mapping[str, Any] | None = None,
    *,
    model: str | Path | None = None,
    verify: bool | None = None,
    allow_different: bool = False,
    progress: OnProgress | None = None,
) -> ExportReport:
    """Exports ``model`` (default: the recipe's last finished stage) to the folder ``to`` and verifies the export.

    ``options`` are the format's options. ``verify=False`` skips verification. An export that differs from
    the model is an error, unless ``allow_different`` is set.

    Raises:
        ProgramMissingError: ``verify=True``, and the program that loads the export isn't installed.
        ModelError: the format can't represent the model, or the export differs from it.
    """
    from llavactl.verbs.export import export as work

    if recipe is not None:
        _require_recipe(recipe)
    spec = {"name": format, **(options or {})}
    with reporting_to(progress):
        return work(
            recipe,
            spec,
            Path(to),
            model=None if model is None else str(model),
            check=verify,
            allow_different=allow_different,
        )


def run(recipe: Recipe, *, progress: OnProgress | None = None) -> RunReport:
    """Runs the recipe's pipeline, from generate to export; finished steps are skipped, an interrupted one resumes."""
    from llavactl.verbs.run import run as work

    _require_recipe(recipe)
    with reporting_to(progress):
        return work(recipe)


def load_model(
    model: Recipe | str | Path,
    *,
    template: str | None = None,
    device: str | None = None,
    dtype: Dtype | None = None,
    quantize: Bits | None = None,
    recipe: Recipe | None = None,
) -> Assistant:
    """Loads a model for ``Chat``: the last finished stage of a recipe, a folder in any format, or a hub id.

    Its methods ``answer`` and ``log_likelihoods`` process several conversations in one batch.

    ``template`` replaces the model's conversation template. ``device`` defaults to the best available one, ``dtype``
    (``float32``, ``bfloat16`` or ``float16``) to that of training. ``quantize``: 4 or 8 bits for the linear layers of
    the language model, with bitsandbytes. ``recipe`` provides components that a checkpoint lacks (see
    docs/reference/export.md#import).

    Raises:
        ModelError: the model can't be read.
        RecipeError: the language model can't be quantized, or an argument has an invalid value.
    """
    from llavactl.chat.loading import DTYPES, load_assistant
    from llavactl.model.folder import latest_model
    from llavactl.model.imported import resolve

    _require_choice("dtype", dtype, (None, *DTYPES))
    _require_choice("quantize", quantize, (None, 4, 8))
    if isinstance(model, str | Path):
        folder = resolve(str(model), recipe)
    else:
        _require_recipe(model)
        folder = latest_model(model.run_dir)
    return load_assistant(folder, device, template=template, dtype=dtype, quantize=quantize)


def load_chat_model(
    source: str | Path | None = None,
    overrides: Overrides = (),
    *,
    model: str | Path | None = None,
    template: str | None = None,
    dtype: Dtype | None = None,
    quantize: Bits | None = None,
) -> Assistant:
    """Loads the model that ``llavactl chat`` loads with the same ``-r``, ``-o`` and ``--model``.

    Without ``model``, this is the newest one of the recipe ``source`` (default: ``./recipe.yaml``): that of a stage in
    training, if it has previews, or else that of the last finished stage. The other arguments are as in ``load_model``.

    Raises:
        RecipeError: lists all problems of the recipe (``problems``), or as in ``load_model``.
        ModelError: the model can't be read.
    """
    from llavactl.chat.loading import DTYPES
    from llavactl.recipe.frame import Outline
    from llavactl.recipe.load import load_frame
    from llavactl.verbs.chat import open_chat

    _require_choice("dtype", dtype, (None, *DTYPES))
    _require_choice("quantize", quantize, (None, 4, 8))
    given = model is None or source is not None or bool(overrides)
    recipe = load_frame(Outline, _source(source), _overrides(overrides)) if given else None
    name = None if model is None else str(model)
    return open_chat(recipe, name, template, dtype=dtype, quantize=quantize).assistant


def _source(source: str | Path | None) -> str | Path | None:
    if source is not None and not isinstance(source, str | Path):
        raise unexpected("source", "the name or file of a recipe", source)
    return source


def _overrides(overrides: Overrides) -> Sequence[str]:
    """``overrides`` as ``key=value`` strings; values are JSON, which is valid YAML."""
    if isinstance(overrides, str):
        raise unexpected("overrides", "a mapping of keys, or a list of `key.path=value` strings", overrides)
    if not isinstance(overrides, Mapping):
        return overrides
    return [f"{key}={json.dumps(value, default=str)}" for key, value in overrides.items()]


def _require_recipe(recipe: object, sections: Literal["Outline", "VisionRecipe", "Recipe"] = "Recipe") -> None:
    from llavactl.recipe import frame

    if not isinstance(recipe, getattr(frame, sections)):
        raise unexpected("recipe", "the return value of load_recipe", recipe)


def _require_choice(argument: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        raise unexpected(argument, " or ".join(map(repr, choices)), value)
