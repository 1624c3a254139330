"""The exception tree, grouped by who can fix the error.

    LlavactlError
    ├── RecipeError     the user: the recipe or the command line
    ├── DataError       the user: records, images or answers
    ├── StoreError      the user: the feature store (extract again, free disk space, another fingerprint)
    ├── ModelError      the user: weights or a tokenizer (wrong folder, missing file, non-finite values)
    │   ├── ConversationError   the template can't render a conversation; its record is skipped
    │   ├── PredictionError     the memory of a stage can't be predicted; it may be trained without a prediction
    │   └── ProgramMissingError the program to verify an export with isn't installed; the export is kept
    ├── TeacherError    the operator of the teacher: busy, connection lost, wrong key, request too long
    └── PluginError     the author of the plugin named in the message

``message`` states what is wrong and where, ``hint`` what to do next. The command line prints both, one line each, and
exits with status 1. Exceptions of libraries and of the operating system about files, packages, memory, devices or the
network are converted where they are raised (``core.library_errors``), with the name of the file, or else in
``cli.boundary``. Any other exception that a plugin's code raised or passed on becomes a PluginError with its component
and line (``core.plugin_faults``); what remains is a bug in llavactl and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from llavactl.core.typed import Typed


class LlavactlError(Exception):
    """An error that the user can fix: ``message`` states what is wrong and where, ``hint`` what to do next.

    Raises:
        TypeError: one of them is not a string.
        ValueError: the message is blank.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        name = type(self).__name__
        for what, text in (("message", message), ("hint", hint)):
            if not isinstance(text, str):
                raise TypeError(f"{name}.{what}: expected a string, got {text!r:.80}")
        if not message.strip():
            raise ValueError(f"{name} without a message")
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __new__(cls, *arguments: object, **_: object) -> Self:
        """A subclass, such as a plugin's, may not call ``__init__``: its message is then that of any exception."""
        error = super().__new__(cls, *arguments)
        error.message, error.hint = str(error) or cls.__name__, ""
        return error

    def with_hint(self) -> str:
        """The message and the hint in one text, such as for a list of problems."""
        return f"{self.message}; {self.hint}" if self.hint else self.message


@dataclass(frozen=True)
class Problem(Typed):
    """One problem of a recipe: ``where`` is ``file:line`` or ``-o …``, ``key`` the dotted path, ``why`` the reason."""

    where: str
    key: str
    why: str

    def __str__(self) -> str:
        return f"{self.where}: {self.key}: {self.why}" if self.key else f"{self.where}: {self.why}"


class RecipeError(LlavactlError):
    """An invalid recipe, option or argument; ``problems`` lists all problems of a recipe."""

    problems: tuple[Problem, ...] = ()

    def __init__(self, message: str, *, hint: str = "", problems: Sequence[Problem] = ()) -> None:
        super().__init__(message, hint=hint)
        self.problems = tuple(problems)

    @classmethod
    def from_problems(cls, problems: Sequence[Problem], *, hint: str = "") -> RecipeError:
        """One error for all ``problems``; its message has one line per problem."""
        return cls("\n".join(map(str, problems)), hint=hint, problems=problems)


def unexpected(argument: str, expected: str, value: object) -> RecipeError:
    """The error that ``argument`` of a function has the ``value``, instead of what is ``expected``."""
    shown = value if isinstance(value, str | Path | int | float | None) else type(value)
    return RecipeError(f"{argument}: expected {expected}, got {shown!r:.80}")


class DataError(LlavactlError):
    """Invalid records, images or answers."""


class StoreError(LlavactlError):
    """Features that are missing from the feature store or don't match, or a store that can't be written."""


class ModelError(LlavactlError):
    """Weights, a tokenizer or a model folder that can't be used."""


class ConversationError(ModelError):
    """A conversation that the template can't render; other conversations may work."""


class PredictionError(ModelError):
    """A model whose training step can't be predicted without its weights; training may work."""


class ProgramMissingError(ModelError):
    """An export that can't be verified because its program isn't installed; the message states how to install it."""


class TeacherError(LlavactlError):
    """A request without a reply from the teacher; ``then`` states how to proceed.

    - ``again``: retry later (busy, connection lost, timeout), after ``wait_s`` seconds if the teacher set a time.
    - ``apart``: skip this request (too long, refused); others may succeed.
    - ``stop``: no request will succeed (wrong key, unknown model).

    ``paid``: the request may have been charged, so it counts against the budget.
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        then: Literal["again", "apart", "stop"] = "apart",
        wait_s: float | None = None,
        paid: bool = False,
    ) -> None:
        super().__init__(message, hint=hint)
        self.then, self.wait_s, self.paid = then, wait_s, paid


class PluginError(LlavactlError):
    """A plugin that can't be loaded or violates the rules of a hook."""
