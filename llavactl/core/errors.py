"""The one tree of errors, by who can act on them.

    LlavactlError
    ├── RecipeError     the user, in the recipe or on the command line
    ├── DataError       the user, in records, images or answers
    ├── StoreError      the user, in the feature store: extract again, free disk, another fingerprint
    ├── ModelError      the user, in weights or a tokenizer: wrong folder, missing file, non-finite numbers
    │   └── ConversationError   a conversation that the template can't render: its record is left out
    ├── TeacherError    whoever runs the teacher: busy, cut off, a wrong key, a request too long for it
    └── PluginError     the author of a plugin, named in the message

Every message says what is wrong and where; ``hint`` says what to do next. The command line prints both in one line
each and exits 1. Exceptions of libraries and the operating system about files, packages, memory, devices or the
network are converted where they are raised, naming the file (``core.faults``), or else at the command line's boundary
(``cli.boundary``). Anything else is a bug in llavactl or in a plugin, and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


class LlavactlError(Exception):
    """What went wrong and where (``message``), and the way out (``hint``)."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe: ``where`` is ``file:line`` or ``-o``, ``key`` the dotted path."""

    where: str
    key: str
    why: str

    def __str__(self) -> str:
        return f"{self.where}: {self.key}: {self.why}" if self.key else f"{self.where}: {self.why}"


class RecipeError(LlavactlError):
    """A recipe can't be read or doesn't fit; ``problems`` holds all of them at once."""

    def __init__(self, message: str, *, hint: str = "", problems: Sequence[Problem] = ()) -> None:
        super().__init__(message, hint=hint)
        self.problems = tuple(problems)

    @classmethod
    def from_problems(cls, problems: Sequence[Problem]) -> RecipeError:
        """One error for all ``problems``; the message has one line a problem."""
        return cls("\n".join(map(str, problems)), problems=problems)


class DataError(LlavactlError):
    """Records, images or answers that can't be used as they are."""


class StoreError(LlavactlError):
    """The feature store doesn't hold what is asked of it, or can't be written."""


class ModelError(LlavactlError):
    """Weights, a tokenizer or a model folder that can't be used."""


class ConversationError(ModelError):
    """The template can't render this conversation; it may be able to render others."""


class TeacherError(LlavactlError):
    """A teacher gave no reply to a request; ``then`` says what that means.

    ``again``: ask later, not before ``wait_s`` where the teacher named a time (busy, cut off, timed out). ``apart``:
    this request will never have a reply, the others may (too long, refused). ``stop``: none will (wrong key, no such
    model). ``paid``: it may have been charged for, so that a budget must count it.
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
    """A plugin that can't be loaded or breaks the rules of a hook."""
