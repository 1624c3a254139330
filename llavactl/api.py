"""The Python API: the commands as functions, for notebooks, scripts and plugins. ``llavactl`` exports it lazily.

    recipe = llavactl.load_recipe("recipe.yaml", {"stage2.epochs": 2})
    llavactl.extract(recipe)
    llavactl.train(recipe, stage=1)
    chat = llavactl.Chat(llavactl.load_model(recipe))
    print(chat.ask("What is this?", images=["cat.jpg"]))

Functions return the reports that the commands print with ``--json`` and raise ``LlavactlError``, with ``message``
and ``hint``. ``progress`` is called with a ``Progress`` while the function runs.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llavactl.core.progress import Progress, reporting_to

if TYPE_CHECKING:
    import PIL.Image

    from llavactl.chat.assistant import Assistant
    from llavactl.core.errors import Problem
    from llavactl.core.schema import ImageRef, Turn
    from llavactl.evaluation.results import EvalReport
    from llavactl.recipe.frame import Outline, Recipe, VisionRecipe
    from llavactl.training.report import TrainReport
    from llavactl.verbs.export import ExportReport
    from llavactl.verbs.extract import ExtractReport
    from llavactl.verbs.generate import GenerateReport
    from llavactl.verbs.run import RunReport

Overrides = Mapping[str, Any] | Sequence[str]
"""Recipe keys to set: ``{"stage1.epochs": 2}``, or as on the command line ``["stage1.epochs=2"]``."""

OnProgress = Callable[[Progress], object]


def load_recipe(source: str | Path | None = None, overrides: Overrides = ()) -> Recipe:
    """The complete recipe ``source``: a name, a file, or by default ``./recipe.yaml``.

    Raises:
        RecipeError: with all its problems (``problems``).
    """
    from llavactl.recipe.load import load_recipe as load

    return load(source, _overrides(overrides))


def check(source: str | Path | None = None, overrides: Overrides = ()) -> list[Problem]:
    """Every problem of the recipe ``source``; empty if it can be run. No weights are read."""
    from llavactl.verbs.preflight import problems

    return problems(source, _overrides(overrides))


def generate(recipe: Outline, *, dry_run: bool = False, progress: OnProgress | None = None) -> GenerateReport:
    """Makes instruction data with the recipe's teacher; with ``dry_run`` estimates requests, tokens and cost."""
    from llavactl.verbs.generate import generate as work

    with reporting_to(progress):
        return work(recipe, dry_run=dry_run)


def extract(
    recipe: VisionRecipe,
    *,
    dry_run: bool = False,
    max_skipped: int | None = None,
    progress: OnProgress | None = None,
) -> ExtractReport:
    """Extracts the features that ``recipe`` needs and the store lacks; with ``dry_run`` estimates bytes and time.

    Raises:
        DataError: more than ``max_skipped`` images can't be read.
    """
    from llavactl.verbs.extract import extract as work

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
    """Trains ``stage`` of ``recipe``, or resumes it; a finished stage is not trained again.

    Raises:
        DataError: more than ``max_skipped`` images can't be read.
    """
    from llavactl.verbs.train import train as work

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

    ``options`` are the task's, over those in the recipe.
    """
    from llavactl.verbs.evaluate import evaluate as work

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
    progress: OnProgress | None = None,
) -> ExportReport:
    """Exports ``model`` (default: the recipe's last finished stage) to the folder ``to`` and verifies the export.

    ``options`` are the format's. ``verify=False`` skips verification.

    Raises:
        ModelError: the format can't hold the model, or the export differs from it.
    """
    from llavactl.verbs.export import export as work

    chosen = {"name": format, **(options or {})}
    with reporting_to(progress):
        return work(recipe, chosen, Path(to), model=None if model is None else str(model), check=verify)


def run(recipe: Recipe, *, progress: OnProgress | None = None) -> RunReport:
    """Runs the recipe's pipeline, from generate to export; finished steps are skipped, an interrupted one resumes."""
    from llavactl.verbs.run import run as work

    with reporting_to(progress):
        return work(recipe)


def load_model(
    model: Recipe | str | Path, *, template: str | None = None, device: str | None = None, recipe: Recipe | None = None
) -> Assistant:
    """A model for ``Chat``: the last finished stage of a recipe, a folder in any format, or a hub id.

    ``template`` replaces the model's conversation template, ``device`` is by default the best available. ``recipe``
    supplies what a checkpoint lacks: see docs/export.md.

    Raises:
        ModelError: the model can't be read.
    """
    from llavactl.chat.loading import load_assistant
    from llavactl.model.folder import latest_model
    from llavactl.model.imported import resolve

    folder = resolve(str(model), recipe) if isinstance(model, str | Path) else latest_model(model.run_dir)
    return load_assistant(folder, device, template=template)


class Chat:
    """A conversation with a model about images; keys and values of earlier turns are kept."""

    def __init__(self, model: Assistant, *, system: str | None = None) -> None:
        """``model`` is from ``load_model``; ``system`` replaces the template's system prompt."""
        from llavactl.chat.conversation import Conversation

        self._conversation = Conversation(model, system)

    @property
    def turns(self) -> Sequence[Turn]:
        """The turns so far."""
        return tuple(self._conversation.turns)

    def ask(self, prompt: str, images: Sequence[str | Path | PIL.Image.Image] = (), **sampling: Any) -> str:
        """The answer to ``prompt``; see ``stream``."""
        return "".join(self.stream(prompt, images, **sampling)).strip()

    def stream(
        self,
        prompt: str,
        images: Sequence[str | Path | PIL.Image.Image] = (),
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """The answer to ``prompt`` in pieces as it is generated.

        ``images`` are files, URLs, base64 or PIL images, and come before the prompt. ``temperature`` 0 is greedy
        decoding. If generation fails, the turn is removed.

        Raises:
            DataError: an image can't be read.
        """
        from llavactl.chat.inputs import user_content
        from llavactl.model.generate import Sampling

        sampling = Sampling(max_new_tokens, temperature, top_p, seed)
        shown = [str(each) if isinstance(each, str | Path) else _in_memory(each) for each in images]
        yield from self._conversation.ask(*user_content(prompt, shown), sampling=sampling)


def _in_memory(image: PIL.Image.Image) -> ImageRef:
    """``image`` as PNG, which is lossless."""
    from llavactl.images.references import ImageBytes

    file = io.BytesIO()
    image.save(file, "PNG")
    digest = hashlib.sha256(file.getvalue()).hexdigest()
    return ImageBytes(f"image {digest[:12]}", digest, file.getvalue())


def _overrides(overrides: Overrides) -> Sequence[str]:
    """``overrides`` as for ``-o``; values are written as JSON, which is YAML."""
    if not isinstance(overrides, Mapping):
        return overrides
    return [f"{key}={json.dumps(value, default=str)}" for key, value in overrides.items()]
