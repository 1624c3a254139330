"""The tabs take turns: one question is answered at a time, and one that waits can be stopped or closed."""

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("gradio")

from llavactl_web.handlers import Handlers
from llavactl_web.sessions import Sessions

SETTINGS = ("", 0.0, 1.0, 0, 8)


@pytest.fixture
def handlers(setup: Any, script: dict[str, str]) -> Handlers:
    script |= {"slow": "word " * 20}
    return Handlers(Sessions(setup()), None)


def asked(handlers: Handlers, tab: str, text: str) -> Iterator[dict[str, Any]]:
    return handlers.ask(request(tab), {"text": text, "files": []}, *SETTINGS)


def request(tab: str) -> Any:
    return SimpleNamespace(session_hash=tab, query_params={})


def updated(answer: Iterator[dict[str, Any]], text: str) -> dict[str, Any]:
    """The first update with ``text`` in the answer so far."""
    return next(update for update in answer if text in update.get("live0", ""))


@pytest.mark.parametrize("ended", ["waiting first", "running first"])
def test_closed_questions_leave_the_model_to_others(handlers: Handlers, ended: str) -> None:
    running, waiting = asked(handlers, "a", "slow"), asked(handlers, "b", "Question?")
    updated(running, "word")
    updated(waiting, "Waiting")
    for answer in (waiting, running) if ended == "waiting first" else (running, waiting):
        answer.close()  # type: ignore[attr-defined]
    for tab in "abc":
        *_, last = asked(handlers, tab, "free?")
        assert "free?" in last["history0"]


def test_a_stopped_question_that_waits_is_put_back(handlers: Handlers) -> None:
    running, waiting = asked(handlers, "a", "slow"), asked(handlers, "b", "Question?")
    updated(running, "word")
    updated(waiting, "Waiting")
    handlers.stop(request("b"))
    *_, last = waiting
    assert last["message"]["text"] == "Question?"
    assert last["history0"] == ""
    *_, last = running
    assert last["history0"].count("word") == 20


def test_more_events_than_threads_in_one_tab(handlers: Handlers) -> None:
    """gradio runs them in threads; the running answer goes on although the others wait for it."""
    running, others = asked(handlers, "a", "slow"), [asked(handlers, "a", f"{number}?") for number in range(3)]
    updated(running, "word")
    for other in others:
        assert next(other) == {}, "it returns to its caller while it waits"
    threads = [threading.Thread(target=list, args=(answer,), daemon=True) for answer in (running, *others)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    turns = handlers.sessions.of("a").chats[0].turns
    assert sorted(turn.text for turn in turns if turn.role == "user") == ["0?", "1?", "2?", "slow"]
