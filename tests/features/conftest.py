"""A recipe with tiny real models, and its images."""

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
    """On a busy machine, tiny models spend most of their time in thread synchronization."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def recipe(toy: Path) -> Callable[..., Recipe]:
    """A function that loads the toy recipe with overrides: ``recipe("features.mode=live", …)``."""
    return lambda *overrides: load_recipe(toy / "recipe.yaml", overrides)


@pytest.fixture
def images(toy: Path) -> list[ImageFile]:
    """The images of the toy recipe, in the order of the records."""
    return [ImageFile(str(toy / "images"), path.name) for path in sorted((toy / "images").iterdir())]
