"""Loading of the editable YAML files of this package; all problems are reported at once, with line numbers."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from llavactl.core.errors import Problem, RecipeError
from llavactl.core.validation import explain
from llavactl.recipe.document import read

PACKAGE = Path(__file__).parent


class FileModel(BaseModel):
    """Base class of the models of such files."""

    model_config = ConfigDict(frozen=True, extra="forbid")


M = TypeVar("M", bound=FileModel)


def load(file: Path, model: type[M]) -> M:
    """``file`` validated as ``model``.

    Raises:
        RecipeError: the file is invalid; has all problems.
    """
    problems: list[Problem] = []
    root = read(file, file.parent, problems)
    try:
        content = model.model_validate(root.plain())
    except ValidationError as error:
        invalid = explain(error, model, root.plain())
        problems += [Problem(root.origin(path), ".".join(map(str, path)), reason) for path, reason in invalid]
        content = None
    if content is None or problems:
        raise RecipeError.from_problems(problems)
    return content
