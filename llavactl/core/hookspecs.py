"""Every hook of llavactl. A plugin implements any of them in one module:

    from llavactl import hookimpl

    @hookimpl
    def register_sources(register):
        register("birds", "llavactl_birds.source:birds", options="llavactl_birds.source:Options", summary="Bird photos")

and names that module in its pyproject, in the entry-point group ``llavactl``. ``register`` takes
``module:attr`` strings, so nothing is imported before it is used and ``--help`` stays quick.
A target is called with one argument, its validated options; what it must give is the kind's Protocol
in ``llavactl.core.protocols``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pluggy

if TYPE_CHECKING:
    from llavactl.core.errors import Problem

hookspec = pluggy.HookspecMarker("llavactl")
hookimpl = pluggy.HookimplMarker("llavactl")


class Register(Protocol):
    """``register(name, "module:attr", options="module:Options", summary="…")``."""

    def __call__(self, name: str, target: str, *, options: str | None = None, summary: str = "") -> None:
        """Registers ``target`` as ``name``. ``options`` is a pydantic model; without one there are no options."""


@hookspec
def register_sources(register: Register) -> None:
    """Add data sources: a target gives an iterable of ``Sample``."""


@hookspec
def register_vision(register: Register) -> None:
    """Add vision backbones: a target gives a ``Vision``, whose ``load`` gives an ``Encoder``."""


@hookspec
def register_connectors(register: Register) -> None:
    """Add connectors: a target gives a ``Connector``, whose ``build`` gives a torch module."""


@hookspec
def register_languages(register: Register) -> None:
    """Add language models: a target gives a ``Language``."""


@hookspec
def register_templates(register: Register) -> None:
    """Add conversation templates: a target gives a ``Template``."""


@hookspec
def register_teachers(register: Register) -> None:
    """Add teachers, which write instruction data: a target gives a ``Teacher``."""


@hookspec
def register_tasks(register: Register) -> None:
    """Add benchmarks: a target gives a ``Task``."""


@hookspec
def register_formats(register: Register) -> None:
    """Add layouts of a finished model on disk: a target gives a ``Format``."""


@hookspec
def register_commands(register: Register) -> None:
    """Add commands: the target is a click command, shown in ``llavactl --help`` with its ``summary``."""


@hookspec
def register_recipes(register: Register) -> None:
    """Add recipes: the target is ``package:path/inside/it.yaml``."""


@hookspec
def check_recipe(recipe: Mapping[str, Any]) -> Sequence[Problem] | None:
    """Say what is wrong with a resolved ``recipe`` beyond the types of its keys; all problems at once."""


@hookspec
def extract_finished(report: Mapping[str, Any]) -> None:
    """Features are in the store; ``report`` is the command's ``--json`` document."""


@hookspec
def train_started(stage: int, folder: Path, steps: int) -> None:
    """A stage begins (or resumes) in ``folder`` and will end after optimiser step ``steps``."""


@hookspec
def train_logged(stage: int, line: Mapping[str, Any]) -> None:
    """One line went to metrics.jsonl."""


@hookspec
def checkpoint_saved(stage: int, folder: Path, step: int) -> None:
    """A checkpoint is whole on disk in ``folder``."""


@hookspec
def train_finished(report: Mapping[str, Any]) -> None:
    """A stage is done; ``report`` is the command's ``--json`` document."""


@hookspec
def eval_finished(report: Mapping[str, Any]) -> None:
    """A task is scored; ``report`` is the command's ``--json`` document."""
