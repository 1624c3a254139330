"""The conversation of one tab, with one model or with two side by side."""

from __future__ import annotations

import functools
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl import Assistant, Chat, DataError, ImageRef, LlavactlError, Progress, Turn

from .store import MAX_TITLE, Conversations, Outcome, Vote, Votes, new_id

if TYPE_CHECKING:
    from llavactl import Explanation

INTERVAL_S = 0.1
"""Between two updates of the page while an answer is generated."""

MAX_SESSIONS = 64


@dataclass(frozen=True, eq=False)
class Model:
    """A loaded model and the name that the page shows."""

    name: str
    assistant: Assistant


@dataclass(frozen=True)
class Setup:
    """What all tabs share: one or two models, and whether their names are hidden until a vote."""

    models: Sequence[Model]
    conversations: Conversations
    votes: Votes
    blind: bool = False
    allow_urls: bool = False
    allow_files: bool = False


class _StoppedError(Exception):
    """Ends an explanation."""


@dataclass
class Session:
    """Not thread-safe, except ``stop``: ``lock`` is held while it answers and while it is changed."""

    setup: Setup
    models: list[Model] = field(default_factory=list)
    """In the order of the columns of the page."""
    chats: list[Chat] = field(default_factory=list)
    id: str = ""
    title: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)
    stop: threading.Event = field(default_factory=threading.Event)
    voted: bool = True
    """Whether the last answers were voted on, or there are none."""
    revealed: bool = False
    _stored: int = 0
    _seed: int = -1
    """As it was set for the last answer; ``_with_this_seed`` is the number of answers since it was changed."""
    _with_this_seed: int = 0

    def __post_init__(self) -> None:
        self.start()

    def start(self, turns: Sequence[Sequence[Turn]] = ()) -> None:
        """A new conversation, or one that continues ``turns`` of each model; missing ones are the first model's."""
        models = [*self.setup.models]
        if self.setup.blind and secrets.randbits(1):
            models.reverse()
            turns = [*reversed(turns)] if len(turns) == len(models) else turns
        self.models = models
        self.chats = [
            Chat(model.assistant, turns=turns[min(side, len(turns) - 1)] if turns else ())
            for side, model in enumerate(models)
        ]
        self.id, self.title, self._stored = "", "", 0
        self.voted, self.revealed = True, False

    @property
    def names(self) -> list[str]:
        """The names of the columns."""
        hidden = self.setup.blind and not self.revealed
        return [f"Model {letter}" for letter in "AB"] if hidden else [model.name for model in self.models]

    @property
    def system(self) -> str:
        turns = self.chats[0].turns
        return turns[0].text if turns and turns[0].role == "system" else ""

    def set_system(self, text: str) -> None:
        """Replaces the system prompt; "": use the template's."""
        if text != self.system:
            self.chats = [
                Chat(chat_model.assistant, system=text or None, turns=_without_system(chat.turns))
                for chat_model, chat in zip(self.models, self.chats, strict=True)
            ]

    @property
    def last_question(self) -> Turn | None:
        """None in an empty conversation."""
        return next((turn for turn in reversed(self.chats[0].turns) if turn.role == "user"), None)

    def ask(self, prompt: str, images: Sequence[str], sampling: Mapping[str, Any]) -> Generator[list[str]]:
        """Asks all models; yields the answers so far. Close the iterator to end them."""
        self.title = self.title or " ".join(prompt.split())[:MAX_TITLE] or "Image"
        seeded = self._seeded(sampling)
        return self._answers(lambda chat: chat.ask(prompt, images=images, **seeded))

    def retry(self, sampling: Mapping[str, Any]) -> Generator[list[str]]:
        """Answers the last question again, like ``ask``."""
        seeded = self._seeded(sampling)
        return self._answers(lambda chat: chat.retry(**seeded))

    def _seeded(self, sampling: Mapping[str, Any]) -> dict[str, Any]:
        """``sampling`` for the next answer: the seed increases by 1 with each, as in the terminal."""
        seed = sampling.get("seed", 0)
        self._with_this_seed = self._with_this_seed + 1 if seed == self._seed else 0
        self._seed = seed
        return {**sampling, "seed": (seed + self._with_this_seed) % 2**63}

    def _answers(self, start: Callable[[Chat], Any]) -> Generator[list[str]]:
        streams: list[Any] = []
        texts = [""] * len(self.chats)
        try:
            streams = [start(chat) for chat in self.chats]
            running, last = [*range(len(streams))], 0.0
            while running and not self.stop.is_set():
                for side in [*running]:
                    piece = next(streams[side], None)
                    if piece is None:
                        running.remove(side)
                    else:
                        texts[side] += piece
                if time.monotonic() - last > INTERVAL_S:
                    last = time.monotonic()
                    yield [*texts]
        finally:
            for stream in streams:
                stream.close()
            self._same_length()
            self.voted = self.last_question is None

    def _same_length(self) -> None:
        """Removes a question that only one model has begun to answer."""
        lengths = [len(_without_system(chat.turns)) for chat in self.chats]
        for chat, length in zip(self.chats, lengths, strict=True):
            if length > min(lengths):
                chat.undo()

    def undo(self) -> tuple[str, tuple[ImageRef, ...]]:
        """Removes the last question and its answers; returns its text and its images."""
        question = self.last_question
        for chat in self.chats:
            chat.undo()
        self.voted = True
        return ("", ()) if question is None else (question.text.strip(), question.images)

    @property
    def is_explainable(self) -> bool:
        """Whether the last question has an answer, and the conversation an image."""
        turns = self.chats[0].turns
        return bool(turns) and turns[-1].role == "assistant" and any(turn.images for turn in turns)

    def explain(self, progress: Callable[[float], object]) -> list[Explanation]:
        """The maps of each model's last answer; none if they were stopped.

        ``progress`` is called with the share that is done.

        Raises:
            LlavactlError: there is no image, or no answer; or a language model has no attention weights.
        """

        def report(side: int, done: Progress) -> None:
            if self.stop.is_set():
                raise _StoppedError
            progress((side + done.done / done.total) / len(self.chats))

        try:
            return [chat.explain(progress=functools.partial(report, side)) for side, chat in enumerate(self.chats)]
        except _StoppedError:
            return []

    def save(self) -> None:
        """Stores the conversation; if another tab has changed or deleted it, under a new name.

        Raises:
            OSError: it can't be written.
        """
        if self.last_question is None and not self._stored:
            return
        store = self.setup.conversations
        if not self.id or store.changed(self.id) != self._stored:
            self.title += " (2)" if self.id else ""
            self.id = new_id()
        in_order = sorted(zip(self.models, self.chats, strict=True), key=lambda pair: self.setup.models.index(pair[0]))
        store.save(self.id, self.title, [chat for _, chat in in_order])
        self._stored = store.changed(self.id)

    def switch_to(self, id: str) -> None:  # noqa: A002
        """Continues a stored conversation.

        Raises:
            DataError: it doesn't exist, or can't be read.
        """
        store = self.setup.conversations
        turns = [load_turns(self.setup, store.file(id, "a"))]
        if len(self.setup.models) > 1:
            with suppress(DataError):  # it was held with one model
                turns.append(load_turns(self.setup, store.file(id, "b")))
        self.start(turns)
        self.id, self.title, self._stored = id, store.title(id), store.changed(id)

    def rename(self, title: str) -> None:
        self.title = " ".join(title.split())[:MAX_TITLE] or self.title
        if self.id:
            self.setup.conversations.rename(self.id, self.title)

    def vote(self, outcome: Outcome) -> None:
        """Stores a vote on the last answers and reveals the names.

        Raises:
            LlavactlError: they were voted on, or there are none.
            OSError: it can't be written.
        """
        if self.voted or len(self.models) < 2:
            raise LlavactlError("ask a question first: each pair of answers has one vote")
        blind = self.setup.blind and not self.revealed
        self.setup.votes.add(Vote(self.models[0].name, self.models[1].name, outcome, blind))
        self.voted = self.revealed = True


def load_turns(setup: Setup, file: Path) -> Sequence[Turn]:
    """The turns in ``file``, which ``Chat.save`` wrote."""
    return Chat.load(setup.models[0].assistant, file).turns


def _without_system(turns: Sequence[Turn]) -> Sequence[Turn]:
    return turns[1:] if turns and turns[0].role == "system" else turns


class Sessions:
    """The sessions of the open tabs; of the oldest ones, only the stored conversations are kept."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, tab: str) -> Session:
        """The session of the browser tab with this id."""
        with self._lock:
            if tab not in self._sessions:
                self._sessions[tab] = Session(self.setup)
            session = self._sessions[tab]
            self._sessions.move_to_end(tab)
            while len(self._sessions) > MAX_SESSIONS:
                self._sessions.popitem(last=False)[1].stop.set()
            return session

    def end(self, tab: str) -> None:
        """Ends the answer of a tab that was closed."""
        with self._lock:
            if session := self._sessions.get(tab):
                session.stop.set()

    def end_all(self) -> None:
        with self._lock:
            for session in self._sessions.values():
                session.stop.set()
