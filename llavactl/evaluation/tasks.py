"""From what a recipe and a command say about a task to the task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llavactl.core.registry import registry

if TYPE_CHECKING:
    from llavactl.recipe.frame import Outline


def describe(recipe: Outline | None, task: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """``{"name": task, …}``: what the recipe says of ``task``, and ``options`` over it."""
    own = [spec.spec() for spec in recipe.eval.tasks if spec.name == task] if recipe is not None else []
    registry().get("tasks", task)
    return {**(own[0] if own else {"name": task}), **options}
