"""A recipe with real, tiny models, and its images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llavactl import ImageFile
from llavactl.recipe.frame import Recipe
from llavactl.recipe.load import load_recipe


@pytest.fixture
def recipe(toy: Path) -> Callable[..., Recipe]:
    """``recipe("features.mode=live", …)``: the toy recipe with overrides."""
    return lambda *overrides: load_recipe(toy / "recipe.yaml", overrides)


@pytest.fixture
def images(toy: Path) -> list[ImageFile]:
    """The images of the toy recipe, in the records' order."""
    return [ImageFile(str(toy / "images"), path.name) for path in sorted((toy / "images").iterdir())]
