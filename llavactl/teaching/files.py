"""The editable files of this package: YAML that is checked as a whole, its problems named with their lines."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from llavactl.core.errors import Problem, RecipeError
from llavactl.core.validation import explain
from llavactl.recipe.document import read

HERE = Path(__file__).parent


class Checked(BaseModel):
    """Base of what such a file holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")


C = TypeVar("C", bound=Checked)


def load(file: Path, model: type[C]) -> C:
    """The ``file`` as a ``model``.

    Raises:
        RecipeError: with all its problems at once.
    """
    problems: list[Problem] = []
    root = read(file, file.parent, problems)
    try:
        found = model.model_validate(root.plain())
    except ValidationError as error:
        wrong = explain(error, model, root.plain())
        problems += [Problem(root.origin(path), ".".join(map(str, path)), why) for path, why in wrong]
        found = None
    if found is None or problems:
        raise RecipeError.from_problems(problems)
    return found
