"""A recipe with real, tiny models, and its images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from llavactl import ImageFile
from llavactl.recipe.frame import Recipe
from llavactl.recipe.load import load_recipe


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other cost tiny models all their time on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def recipe(toy: Path) -> Callable[..., Recipe]:
    """``recipe("features.mode=live", …)``: the toy recipe with overrides."""
    return lambda *overrides: load_recipe(toy / "recipe.yaml", overrides)


@pytest.fixture
def images(toy: Path) -> list[ImageFile]:
    """The images of the toy recipe, in the records' order."""
    return [ImageFile(str(toy / "images"), path.name) for path in sorted((toy / "images").iterdir())]
