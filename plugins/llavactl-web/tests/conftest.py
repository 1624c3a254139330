"""A toy model whose answers a test writes, a server with it in a thread, and a real browser."""

import json
import os
import shutil
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
    """The model's answers by question, through its real tokenizer and conversation.

    ``SEED`` in an answer is its seed; ``slow`` in a question delays tokens.
    """
    answers: Script = {}

    def tokens(self: Any, sampling: Any) -> Iterator[int]:
        question = self.turns[-1].text.strip()
        self.assistant.encode(self.turns)  # what the real one may refuse
        text = answers.get(question, question).replace("SEED", str(sampling.seed))
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
def run_dir(tmp_path: Path, photos: Sequence[Path]) -> Path:
    """A run with an evaluation of POPE: one right and one wrong answer."""
    labels = {1: "yes", 2: "no"}
    rows = [
        {"question_id": n, "image": photos[n].name, "text": f"Question {n}?", "category": "random", "label": label}
        for n, label in labels.items()
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    answers = tmp_path / "run" / "eval" / "answers" / "pope-1.jsonl"
    answers.parent.mkdir(parents=True)
    answers.write_text("".join(json.dumps({"id": f"{n}", "text": "Yes <b>!</b>"}) + "\n" for n in labels))
    result = {"task": "pope", "protocol": "llava", "answers": str(answers)}
    (answers.parent.parent / "pope.json").write_text(json.dumps(result))
    return tmp_path / "run"


@pytest.fixture
def gallery(run_dir: Path, photos: Sequence[Path]) -> Any:
    from llavactl_web.gallery import Gallery

    spec = {"questions": str(run_dir.parent / "questions.jsonl"), "images": str(photos[0].parent)}
    return Gallery(run_dir, [{"name": "pope", **spec}, {"name": "scienceqa"}])


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


ARGUMENTS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync
--disable-component-update --use-fake-device-for-media-stream --use-fake-ui-for-media-stream"""


@pytest.fixture
def open_tab(tmp_path: Path) -> Iterator[Callable[[str], "Tab"]]:
    """Opens pages in a headless Chromium with an empty profile, which records every attempt to connect."""
    chromium = os.environ.get("LLAVACTL_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium: install it, or set LLAVACTL_CHROMIUM to its path")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        context = started.chromium.launch_persistent_context(
            str(tmp_path / "profile"),
            executable_path=chromium,
            headless=True,
            args=[*ARGUMENTS.split(), f"--log-net-log={tmp_path / 'net.json'}"],
            viewport={"width": 1180, "height": 800},
        )
        context.set_default_timeout(20_000)
        yield lambda url: Tab(context, url)
        context.close()


class Tab:
    """A page of the server, by what a user does and sees."""

    def __init__(self, context: Any, url: str) -> None:
        self.page, self.origin = context.new_page(), "/".join(url.split("/")[:3])
        self.requests: list[str] = []
        self.console: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.console.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.console.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: (self.console.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.page.goto(url)
        self.ready()

    def ready(self) -> None:
        """Waits until the page can take a question."""
        self.page.wait_for_selector("#message textarea")
        self.page.wait_for_selector("#retry", state="attached")
        self.wait(
            "document.querySelector('#stop').disabled && "
            "document.querySelector('#retry').disabled == !document.querySelector('#history0 .question')"
        )

    def wait(self, condition: str) -> None:
        self.page.wait_for_function(condition)

    def wait_answers(self, number: int, side: int = 0) -> None:
        self.wait(f"document.querySelectorAll('#history{side} .answer').length == {number}")

    def ask(self, text: str, files: list[Path] = [], *, wait: bool = True) -> None:  # noqa: B006
        answers = self.page.locator("#history0 .answer").count()
        if files:
            self.page.set_input_files("#message input[type=file]", [str(file) for file in files])
            self.wait(f"document.querySelectorAll('#message img').length >= {len(files)}")
        self.page.fill("#message textarea", text)
        self.page.press("#message textarea", "Enter")
        if wait:
            self.wait(f"document.querySelectorAll('#history0 .answer').length > {answers}")
            self.ready()

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()

    def questions(self, side: int = 0) -> list[str]:
        return self.page.locator(f"#history{side} .question .text").all_inner_texts()

    def answers(self, side: int = 0) -> list[str]:
        texts = self.page.locator(f"#history{side} .answer").all_inner_texts()
        return [text.partition("\n")[2].strip() for text in texts]

    @property
    def left(self) -> list[str]:
        """Requests that left the page's server."""
        return [url for url in self.requests if not url.startswith((self.origin, "data:", "blob:", "about:"))]

    @property
    def errors(self) -> list[str]:
        """Errors of the page's scripts, refused connections, and dialogs that were opened."""
        return [line for line in self.console if line.startswith(("error", "dialog"))]
