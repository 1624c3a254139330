"""A toy model whose answers a test writes, and a server with it in a thread."""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import llavactl
from llavactl import Assistant
from llavactl.testing import toy_model, toy_photos

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

Script = dict[str, str]
"""Answers by question; a question without one is repeated."""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVACTL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a toy model with random weights."""
    return toy_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def model(folder: Path) -> Assistant:
    return llavactl.load_model(folder, device="cpu")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Sequence[Path]:
    return toy_photos(tmp_path_factory.mktemp("photos"), 4)


@pytest.fixture
def script(model: Assistant, monkeypatch: pytest.MonkeyPatch) -> Script:
    """What the model answers, through its real tokenizer and conversation; ``slow`` in a question delays tokens."""
    answers: Script = {}

    def tokens(self: Any, _sampling: Any) -> Iterator[int]:
        question = self.turns[-1].text.strip()
        self.assistant.encode(self.turns)  # what the real one may refuse
        text = answers.get(question, question)
        for token in self.assistant.encoding.tokenizer(text, add_special_tokens=False).input_ids:
            time.sleep(0.05 if "slow" in question else 0)
            yield token

    monkeypatch.setattr(type(llavactl.Chat(model)._conversation), "_tokens", tokens)
    return answers


@pytest.fixture
def setup(model: Assistant, tmp_path: Path) -> Callable[..., Any]:
    """Makes a ``Setup`` with the named models, all of them the toy model."""
    from llavactl_web.sessions import Model, Setup
    from llavactl_web.store import Conversations, Votes

    def make(*names: str, **options: Any) -> Setup:
        models = [Model(name, model) for name in names or ("toy",)]
        store = Conversations(tmp_path / "web" / "conversations")
        return Setup(models, store, Votes(tmp_path / "web" / "votes.jsonl"), **options)

    return make


@pytest.fixture
def serve() -> Iterator[Callable[..., Any]]:
    """Starts servers; returns the URL and the sessions of each."""
    pytest.importorskip("gradio")
    import uvicorn
    from llavactl_web import server
    from llavactl_web.sessions import Sessions

    running: list[tuple[uvicorn.Server, threading.Thread, Sessions]] = []

    def start(setup: Any, gallery: Any = None, token: str | None = None) -> tuple[str, Sessions]:
        listening, sessions = server.listen("127.0.0.1", 0), Sessions(setup)
        app = server.application(sessions, gallery, server.access_for("127.0.0.1", token, ()))
        running_server = uvicorn.Server(server.configuration(app))
        thread = threading.Thread(target=running_server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        running.append((running_server, thread, sessions))
        while not running_server.started:
            time.sleep(0.02)
        return server.url(listening, "127.0.0.1", token or ""), sessions

    with server.gradio_settings():
        yield start
        for running_server, thread, sessions in running:
            sessions.end_all()
            running_server.should_exit = True
            thread.join(10)
