"""The part of a recipe that a store records: its images can be found and its backbone loaded without the recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from llavactl.core.errors import StoreError
from llavactl.recipe.frame import VisionRecipe
from llavactl.recipe.stages import STAGES


def recorded(recipe: VisionRecipe) -> dict[str, Any]:
    """The keys of ``recipe`` that select and encode images, as plain JSON with absolute paths."""
    kept = {"name", "run_dir", "vision", "features", "data"}
    stages = {section: {"image": getattr(recipe, section).image} for section in STAGES.values()}
    return {**recipe.model_dump(mode="json", include=kept), **stages}


def recorded_recipe(record: Mapping[str, Any]) -> VisionRecipe:
    """The recipe of which ``record`` was made; it can only be used to find and encode images.

    Raises:
        StoreError: it was written by an incompatible version.
    """
    try:
        return VisionRecipe.model_validate(record)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise StoreError(
            f"the recipe that the store records can't be read: {reason}", hint="pass the recipe with -r"
        ) from error
