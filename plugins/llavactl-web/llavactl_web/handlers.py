"""The event handlers of the page; each returns updates by component name."""

from __future__ import annotations

import contextlib
import hashlib
import html
import logging
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from llavactl import LlavactlError

from . import images, rendering
from .gallery import PER_PAGE, Gallery
from .sessions import Session, Sessions, load_turns
from .store import Outcome

log = logging.getLogger(__name__)

Updates = dict[str, Any]
EMPTY_MESSAGE = {"text": "", "files": []}
SETTINGS = ("system", "temperature", "top_p", "seed", "max_new_tokens")

_POLL_S = 0.3
"""The longest that an event which waits keeps a thread: gradio has 40, and the running answer needs one to go on."""

_STOPPING_S = 20
"""The longest that a change of a conversation waits for the end of its running answer."""


class Handlers:
    """The handlers of all tabs; each finds its session by the id of the tab."""

    def __init__(self, sessions: Sessions, gallery: Gallery | None) -> None:
        self.sessions, self.setup, self.gallery = sessions, sessions.setup, gallery
        self._model = threading.Lock()
        """Held by the tab that uses the model."""

    # Answers

    def ask(self, request: gr.Request, message: Mapping[str, Any], *settings: Any) -> Iterator[Updates]:
        session, text = self._session(request), (message["text"] or "").strip()
        files = [str(file) for file in message["files"] or ()]
        if not text and not files:
            return
        try:
            encoded = _encoded(files)
        except LlavactlError as error:
            _warn(error)
            return
        asked = rendering.question(text, map(images.thumbnail_of, encoded))
        yield from self._answered(
            session, settings, lambda sampling: session.ask(text, encoded, sampling), asked, {"message": message}
        )

    def retry(self, request: gr.Request, *settings: Any) -> Iterator[Updates]:
        session = self._session(request)
        if session.last_question is not None:
            yield from self._answered(session, settings, session.retry, "", {})

    def _answered(
        self,
        session: Session,
        settings: Sequence[Any],
        start: Callable[[Mapping[str, Any]], Generator[list[str]]],
        asked: str,
        if_unanswered: Updates,
    ) -> Iterator[Updates]:
        """Streams the answers that ``start`` begins.

        ``asked`` is the new question as HTML, ``if_unanswered`` are updates after an error or a stop while waiting.
        """

        def stream() -> Iterator[Updates]:
            with contextlib.closing(start(_sampling(options))) as answers:
                for texts in answers:
                    yield _live(session, texts)

        yield from _acquired(session.lock)
        try:
            session.stop.clear()
            options = dict(zip(SETTINGS, settings, strict=True))
            session.set_system(str(options.pop("system") or "").strip())
            cleared: Updates = {"message": EMPTY_MESSAGE} if asked else {}
            yield self._view(session, asked=asked, busy=True) | cleared
            try:
                is_answered = yield from self._with_model(session, stream)
            finally:  # also if the tab was closed
                _saved(session)
            result = self._view(session) | ({} if is_answered else if_unanswered)
        finally:
            session.lock.release()
        yield result

    def explain(self, request: gr.Request) -> Iterator[Updates]:
        """Shows which parts of the images the words of the last answers depend on."""
        session, maps = self._session(request), {}

        def explained() -> Iterator[Updates]:
            yield _live(session, ["Explaining…"] * len(session.names))
            # gradio finds the event that this progress belongs to by the context.
            explanations = session.explain(lambda share: gr.Progress()(share, desc="Explaining"))
            maps.update({f"maps{side}": rendering.maps(each) for side, each in enumerate(explanations)})

        yield from _acquired(session.lock)
        try:
            session.stop.clear()
            yield _buttons(session, busy=True)
            yield from self._with_model(session, explained)
            result = self._view(session) | maps
        finally:
            session.lock.release()
        yield result

    def _with_model(self, session: Session, work: Callable[[], Iterator[Updates]]) -> Generator[Updates, None, bool]:
        """Yields the updates of ``work``, which starts when no other tab uses the model.

        Returns False if it was stopped before, or failed; the error is shown.
        """
        while not self._model.acquire(timeout=_POLL_S):
            if session.stop.is_set():
                return False
            yield _live(session, ["Waiting for the answer of another tab…"] * len(session.names))
        try:
            yield from work()
        except Exception as error:  # noqa: BLE001 - out of memory, for example: the page must take the next question
            _warn(_reported(error))
            return False
        finally:
            self._model.release()
        return True

    def stop(self, request: gr.Request) -> None:
        self._session(request).stop.set()

    def closed(self, request: gr.Request) -> None:
        self.sessions.end(str(request.session_hash))

    # Conversations

    def load(self, request: gr.Request) -> Updates:
        """Opens the conversation that the address names, for a new tab or a reload."""
        session = self._session(request)
        if stored := request.query_params.get("c"):
            with session.lock, contextlib.suppress(LlavactlError):
                session.switch_to(stored)
        return self._view(session)

    def new(self, request: gr.Request) -> Updates:
        with self._changing(request) as session:
            session.start()
            return self._view(session) | {"message": EMPTY_MESSAGE}

    def open(self, request: gr.Request, id: str) -> Updates:  # noqa: A002
        with self._changing(request) as session:
            session.switch_to(id)
            return self._view(session)

    def undo(self, request: gr.Request) -> Updates:
        with self._changing(request) as session:
            session.undo()
            _saved(session)
            return self._view(session)

    def edit(self, request: gr.Request) -> Updates:
        """Removes the last question and puts it back into the input."""
        with self._changing(request) as session:
            text, refs = session.undo()
            _saved(session)
            return self._view(session) | {"message": {"text": text, "files": [_file(ref.read()) for ref in refs]}}

    def rename(self, request: gr.Request, title: str) -> Updates:
        with self._changing(request) as session:
            session.rename(title or "")
            return self._view(session)

    def delete(self, request: gr.Request) -> Updates:
        with self._changing(request) as session:
            if session.id:
                self.setup.conversations.delete(session.id)
            session.start()
            return self._view(session)

    def upload(self, request: gr.Request, file: str) -> Updates:
        """A conversation file of this page or of ``/save`` in the terminal."""
        with (
            self._changing(request) as session,
            tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".json") as checked,
        ):
            text = Path(file).read_text(encoding="utf-8", errors="replace")
            setup = self.setup
            checked.write(images.with_images_embedded(text, allow_urls=setup.allow_urls, allow_files=setup.allow_files))
            checked.flush()
            try:
                session.start([load_turns(setup, Path(checked.name))])
            except LlavactlError as error:
                message = error.message.replace(checked.name, Path(file).name)
                raise LlavactlError(message, hint=error.hint) from error
            question = session.last_question
            session.title = " ".join(question.text.split()) if question else "Loaded"
            _saved(session)
            return self._view(session)

    # Input

    def add_image(self, _request: gr.Request, file: str | None, message: Mapping[str, Any] | None) -> Updates:
        """Adds an image of the camera to the question."""
        return {} if file is None else {"message": _with_file(message, file), "webcam": None}

    def add_url(self, _request: gr.Request, url: str, message: Mapping[str, Any] | None) -> Updates:
        try:
            data = images.image_at(url, allow_urls=self.setup.allow_urls)
            images.checked(data)
        except LlavactlError as error:
            _warn(error)
            return {}
        return {"message": _with_file(message, _file(data)), "url": ""}

    # Comparison and gallery

    def vote(self, outcome: Outcome, request: gr.Request) -> Updates:
        with self._changing(request) as session:
            session.vote(outcome)
            return self._view(session)

    def gallery_page(self, task: str | None, show: str | None, page: float | None) -> Updates:
        if self.gallery is None or not task:
            return {"cases": "<p>No evaluation has finished.</p>"}
        try:
            rows = self.gallery.rows(task, show if show in ("right", "wrong") else "all")  # type: ignore[arg-type]
        except LlavactlError as error:
            _warn(error)
            return {"cases": ""}
        pages = max(1, -(-len(rows) // PER_PAGE))
        number = min(max(1, int(page or 1)), pages)
        shown = rows[(number - 1) * PER_PAGE : number * PER_PAGE]
        summary = f"<p>{len(rows)} questions, page {number} of {pages}</p>"
        return {"cases": summary + rendering.cases(shown), "page": number}

    # State

    def _session(self, request: gr.Request) -> Session:
        return self.sessions.of(str(request.session_hash))

    @contextlib.contextmanager
    def _changing(self, request: gr.Request) -> Iterator[Session]:
        """The session, after its running answer has ended; errors are shown, and nothing is updated."""
        session = self._session(request)
        session.stop.set()
        if not session.lock.acquire(timeout=_STOPPING_S):
            raise gr.Error("The answer is still being stopped. Try again.", print_exception=False)
        try:
            yield session
        except (LlavactlError, OSError) as error:
            raise gr.Error(_text(error), print_exception=False) from error
        finally:
            session.lock.release()

    def _view(self, session: Session, *, asked: str = "", busy: bool = False) -> Updates:
        """Everything that depends on the conversation."""
        updates: Updates = {}
        for side, (chat, name) in enumerate(zip(session.chats, session.names, strict=True)):
            live = f'<div class="answer"><div class="name">{html.escape(name)}</div>…</div>' if busy else ""
            turns = [*chat.turns]
            if busy and not asked and turns[-1:] and turns[-1].role == "assistant":
                turns.pop()
            history = rendering.conversation(turns, name) + asked
            updates |= {f"history{side}": history, f"live{side}": live, f"maps{side}": ""}
        updates |= _buttons(session, busy=busy)
        updates["current"] = session.id
        updates["title"] = session.title
        updates["export"] = _export_links(session)
        updates["list"] = gr.update(choices=self._choices(), value=session.id or None)
        if not busy:
            updates["system"] = session.system
        if len(session.chats) > 1:
            updates["votes"] = gr.update(visible=not busy and not session.voted)
            updates["wins"] = rendering.wins_table(self.setup.votes.wins())
        return updates

    def _choices(self) -> list[tuple[str, str]]:
        return [(entry.title, entry.id) for entry in self.setup.conversations.entries()]


def _acquired(lock: threading.Lock) -> Iterator[Updates]:
    """Acquires ``lock``; yields while it waits."""
    while not lock.acquire(timeout=_POLL_S):
        yield {}


def _buttons(session: Session, *, busy: bool) -> Updates:
    has_question = session.last_question is not None
    enabled = {"stop": busy, "explain": not busy and session.is_explainable}
    enabled |= dict.fromkeys(("retry", "edit", "undo"), not busy and has_question)
    return {name: gr.update(interactive=value) for name, value in enabled.items()}


def _live(session: Session, texts: Sequence[str]) -> Updates:
    """The answers so far."""
    sides = zip(texts, session.names, strict=True)
    return {f"live{side}": rendering.answer(text, name, finished=False) for side, (text, name) in enumerate(sides)}


def _export_links(session: Session) -> str:
    if not session.id:
        return ""
    sides = zip("ab", ("Export", "Export of B"), strict=False) if len(session.chats) > 1 else [("a", "Export")]
    links = (f'<a href="conversations/{session.id}/{side}.json" download>{label}</a>' for side, label in sides)
    return " · ".join(links)


def _sampling(options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the page as those of ``Chat.ask``; empty fields have the model's values."""
    given = {name: value for name, value in options.items() if value is not None}
    for name in {"seed", "max_new_tokens"} & given.keys():
        given[name] = int(given[name])
    return given


def _encoded(files: Sequence[str]) -> list[str]:
    if len(files) > images.MAX_IMAGES:
        raise LlavactlError(f"{len(files)} images, more than {images.MAX_IMAGES} per question")
    return [_checked(Path(file)) for file in files]


def _checked(file: Path) -> str:
    """The uploaded ``file`` for ``Chat.ask``; errors name it."""
    try:
        encoded = images.checked(file.read_bytes())
        if not images.thumbnail_of(encoded):
            raise LlavactlError("the image is damaged")
    except LlavactlError as error:
        raise LlavactlError(f"{file.name}: {error.message}", hint=error.hint) from error
    return encoded


def _with_file(message: Mapping[str, Any] | None, file: str) -> dict[str, Any]:
    message = message or {}
    return {"text": message.get("text") or "", "files": [*(message.get("files") or ()), file]}


def _file(data: bytes) -> str:
    """A file with the image ``data`` among the uploaded ones."""
    folder = Path(tempfile.gettempdir()) / "images"
    folder.mkdir(exist_ok=True)
    file = folder / f"{hashlib.sha256(data).hexdigest()[:16]}.{images.suffix(data)}"
    file.write_bytes(data)
    return str(file)


def _saved(session: Session) -> None:
    try:
        session.save()
    except OSError as error:
        _warn(LlavactlError(f"the conversation was not stored: {error.strerror or error}"))


def _warn(error: LlavactlError) -> None:
    gr.Warning(_text(error))


def _reported(error: Exception) -> LlavactlError:
    """``error`` for the page; one that isn't a user's has its traceback in the log."""
    if isinstance(error, LlavactlError):
        return error
    log.error("an answer failed", exc_info=error)
    return LlavactlError(f"{type(error).__name__}: {error}")


def _text(error: LlavactlError | OSError) -> str:
    """``error`` for gradio's messages, which are HTML."""
    return html.escape(error.with_hint() if isinstance(error, LlavactlError) else str(error))
