"""The hooks of llavactl. A plugin implements any of them in one module:

    from llavactl import hookimpl

    @hookimpl
    def register_sources(register):
        register("birds", "llavactl_birds.source:birds", options="llavactl_birds.source:Options", summary="Bird photos")

and declares the module in its pyproject, in the entry-point group ``llavactl``. ``register`` takes ``module:attr``
strings, so components are imported on first use and ``llavactl --help`` stays fast. A target is called with its
validated options and returns an object of the kind's Protocol (``llavactl.core.protocols``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import pluggy

if TYPE_CHECKING:
    from llavactl.core.errors import Problem
    from llavactl.core.registry import Options

hookspec = pluggy.HookspecMarker("llavactl")
hookimpl = pluggy.HookimplMarker("llavactl")
"""The decorator of a plugin's hook implementations."""


class Register(Protocol):
    """The function ``register(name, "module:attr", options="module:Options", summary="…")`` that hooks are given."""

    def __call__(self, name: str, target: str, *, options: str | None = None, summary: str = "") -> None:
        """Registers ``target`` as ``name``: lower-case letters, digits, ``.``, ``_`` and ``-``.

        ``options`` is a subclass of ``llavactl.Options``. None: the class ``Options`` nested in the target, which is
        imported when the options are needed, not before; a target without one takes no options.
        """


@hookspec
def register_sources(register: Register) -> None:
    """Register data sources. The target returns a ``Source``, an iterable of ``Sample``.

    Recipes use a source by name in ``data.stage1``, ``data.stage2`` or ``generate.source``.
    """


@hookspec
def register_vision(register: Register) -> None:
    """Register vision backbones. The target returns a ``Vision``, whose ``load`` returns an ``Encoder``.

    For a vision transformer that transformers supports, return a ``TransformersVision``.
    """


@hookspec
def register_connectors(register: Register) -> None:
    """Register connectors. The target returns a ``Connector``, whose ``build`` returns a torch module."""


@hookspec
def register_languages(register: Register) -> None:
    """Register language models. The target returns a ``Language``: a tokenizer and a causal language model."""


@hookspec
def register_templates(register: Register) -> None:
    """Register conversation templates. The target returns a ``Template``."""


@hookspec
def register_teachers(register: Register) -> None:
    """Register teachers, which generate instruction data and judge answers. The target returns a ``Teacher``.

    Return a ``LanguageTeacher`` if replies are slow or cost money: its replies are stored and its requests are limited,
    retried and counted against a budget.
    """


@hookspec
def register_tasks(register: Register) -> None:
    """Register benchmarks. The target returns a ``Task``, or a ``Judged`` if a judge reviews the answers."""


@hookspec
def register_formats(register: Register) -> None:
    """Register formats of a model on disk. The target returns a ``Format``.

    A format writes exports (``llavactl export --format NAME``), and reads checkpoints that it recognizes wherever a
    model is expected (``--model``).
    """


@hookspec
def register_optimizers(register: Register) -> None:
    """Register optimizers. The target returns an ``UpdateRule``; recipes name it in ``optimizer`` of a stage."""


@hookspec
def register_schedules(register: Register) -> None:
    """Register learning-rate schedules. The target returns a ``Schedule``; a stage names it in ``schedule``."""


@hookspec
def register_commands(register: Register) -> None:
    """Register commands. The target is a click command; ``llavactl --help`` lists it with its ``summary``."""


@hookspec
def register_recipes(register: Register) -> None:
    """Register recipes. The target is a file in a package, ``package:path/in/package.yaml``."""


@hookspec
def plugin_options() -> str | None:
    """Return the options model of the plugin, ``module:Options``, for the recipe's section ``plugins``.

    A recipe sets the options with ``plugins: {NAME: {…}}``, where NAME is the plugin's name. The model is an
    ``Options`` subclass in which every field has a default. Observers receive the options as the argument ``options``,
    with all defaults if the recipe has no section for the plugin. If a field has no default then, one line names the
    section to write, and these observers aren't called.
    """


@hookspec
def check_examples(folder: Path) -> Mapping[str, Mapping[str, Mapping[str, Any]]] | None:
    """Return options with which ``llavactl plugins check`` creates components, by kind and name.

    Needed for components with required options: ``{"sources": {"birds": {"path": str(folder / "birds.csv")}}}``. Files
    that they need are written to ``folder``, which is empty and temporary.
    """


@hookspec
def check_recipe(recipe: Mapping[str, Any]) -> Sequence[Problem] | None:
    """Check a resolved recipe beyond the types of its keys; return all problems at once.

    Called whenever a recipe is loaded; in one without them, ``vision``, ``connector`` and ``language`` are None. Leave
    ``Problem.where`` empty: llavactl fills in the file and line of ``Problem.key``.
    """


@hookspec
def extract_finished(report: Mapping[str, Any], recipe: Mapping[str, Any], options: Options | None) -> None:
    """Called when all features are stored. ``report`` is the document that ``llavactl extract --json`` prints.

    All observers may take ``recipe``, the resolved recipe as JSON, and ``options``, those of the plugin in the recipe's
    section ``plugins`` (None: the plugin declares none, see ``plugin_options``).
    """


@hookspec
def train_started(stage: int, folder: Path, steps: int, recipe: Mapping[str, Any], options: Options | None) -> None:
    """Called when a stage starts or resumes in ``folder``; it ends after optimizer step ``steps``."""


@hookspec
def train_logged(stage: int, line: Mapping[str, Any], recipe: Mapping[str, Any], options: Options | None) -> None:
    """Called after each line written to metrics.jsonl, with the line: ``step``, and ``loss``, ``val_loss`` or more."""


TrainingRequest = Literal["evaluate", "checkpoint", "stop"]
"""A request of ``control_training``."""


@hookspec
def control_training(
    stage: int, lines: Sequence[Mapping[str, Any]], recipe: Mapping[str, Any], options: Options | None
) -> TrainingRequest | Sequence[TrainingRequest] | None:
    """Called after each line written to metrics.jsonl; may request something after the current step.

    ``evaluate``: the validation loss, and the tasks of ``evaluate_every`` if the stage has any; ``checkpoint``; or
    ``stop``: the stage ends after this step as after its last one. ``lines`` are all lines so far, the newest last;
    decide from these alone, so that a resumed run ends after the same step.
    """


@hookspec
def checkpoint_saved(stage: int, folder: Path, step: int, recipe: Mapping[str, Any], options: Options | None) -> None:
    """Called when the checkpoint of ``step`` is complete in ``folder``."""


@hookspec
def train_failed(
    stage: int, folder: Path, error: str, interrupted: bool, recipe: Mapping[str, Any], options: Options | None
) -> None:
    """Called when a stage that has started ends with an error, or is interrupted by Ctrl-C or SIGTERM."""


@hookspec
def train_finished(report: Mapping[str, Any], recipe: Mapping[str, Any], options: Options | None) -> None:
    """Called when a stage is complete. ``report`` is the document that ``llavactl train --json`` prints."""


@hookspec
def eval_finished(report: Mapping[str, Any], recipe: Mapping[str, Any] | None, options: Options | None) -> None:
    """Called when a task is scored. ``report`` is the document that ``llavactl eval --json`` prints.

    ``recipe`` is None if the model was evaluated without one.
    """
