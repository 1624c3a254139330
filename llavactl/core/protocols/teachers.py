"""Teachers, which generate instruction data and judge answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import Protocol, runtime_checkable

from llavactl.core.schema import Json, Sample
from llavactl.core.typed import Typed


@dataclass(frozen=True)
class Request(Typed):
    """A request to a teacher: chat ``messages`` ({"role", "content"}) and the ``sample`` they are about.

    ``kind`` is ``conversation``, ``detail`` or ``reasoning`` for instruction data, otherwise that of the task.
    """

    id: str
    kind: str
    messages: tuple[Mapping[str, str], ...]
    sample: Sample
    seed: int = 0


@dataclass(frozen=True)
class Reply(Typed):
    """A teacher's reply; ``tokens_in`` and ``tokens_out`` are prompt and completion tokens (None: unknown).

    ``finish`` is ``stop``, or ``length`` if the reply was truncated at the token limit.
    """

    text: str
    tokens_in: int | None = None
    tokens_out: int | None = None
    finish: str = "stop"


@dataclass(frozen=True)
class Limits(Typed):
    """Limits of a language teacher: concurrent requests, requests and tokens per minute (None: unlimited).

    A failed request is retried up to ``retries`` times. ``model`` is the name in the price list; ``max_tokens`` limits
    the length of a reply, which a budget requires.
    """

    concurrency: int = 8
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    retries: int = 5
    model: str = ""
    max_tokens: int | None = None


@runtime_checkable
class Teacher(Protocol):
    """Generates instruction data or judges answers.

    Implement ``LanguageTeacher`` as well if replies are slow or cost money, and ``ExactTeacher`` if they are correct by
    construction.
    """

    def reply(self, request: Request) -> str | Reply:
        """The reply to ``request``. A LanguageTeacher is called from several threads.

        For ``detail`` it is a description; for ``conversation`` and ``reasoning`` blocks that begin with ``Question:``
        and ``Answer:`` in turn, separated by lines of ``===``. For other kinds the messages state the form.

        Raises:
            DataError: this teacher can't answer the request; the request is refused, and others follow.
        """


@runtime_checkable
class LanguageTeacher(Teacher, Protocol):
    """A language model as a teacher: replies are stored before they are parsed, and no request is paid for twice.

    ``reply`` raises TeacherError. Implement ``ClosableTeacher`` as well if requests can be canceled, and
    ``BatchTeacher`` for a batch API.
    """

    limits: Limits

    def content(self, request: Request) -> Mapping[str, Json]:
        """Everything that determines the reply, and nothing else; stored replies are looked up by its hash."""


@runtime_checkable
class ExactTeacher(Protocol):
    """A program as a teacher, whose replies are correct by construction if it says so."""

    exact: bool
    """Whether its replies skip the cleanup and the recipe's ``gates``."""


@runtime_checkable
class ClosableTeacher(Protocol):
    """A language teacher that can cancel requests."""

    def close(self) -> None:
        """Cancels the requests in flight; called once, after the last request."""


@runtime_checkable
class BatchTeacher(LanguageTeacher, Protocol):
    """A language teacher with a batch API: ``content`` is the body of a request to ``batch_url``."""

    batch_url: str

    def read(self, status: int, body: bytes) -> Reply:
        """The reply in the ``body`` of a response with HTTP ``status``; raises TeacherError."""


Ask = Callable[[Sequence[Request]], Mapping[str, str]]
"""Sends requests to a teacher and returns its replies by request id; "" for a request that is never answered."""


@dataclass(frozen=True)
class BudgetedTeacher(Typed):
    """A teacher ``spec`` ({"name": …, options}) with the maximum total cost of its requests and a price list."""

    spec: Mapping[str, Any]
    max_cost: float | None = None
    prices: Path | None = None
