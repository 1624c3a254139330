"""A real, headless Chromium that reaches this machine only, and records every request and every attempt to connect."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ARGUMENTS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync
--disable-component-update --use-fake-device-for-media-stream --use-fake-ui-for-media-stream"""


@contextmanager
def browser(folder: Path) -> Iterator[Any]:
    """A browser context with an empty profile in ``folder``."""
    chromium = os.environ.get("LLAVACTL_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium: install it, or set LLAVACTL_CHROMIUM to its path")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        context = started.chromium.launch_persistent_context(
            str(folder),
            executable_path=chromium,
            headless=True,
            args=[*ARGUMENTS.split(), f"--log-net-log={folder.parent / 'net.json'}"],
            viewport={"width": 1180, "height": 800},
        )
        context.set_default_timeout(20_000)
        yield context
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
        self.wait("document.querySelector('#stop')?.disabled && !document.querySelector('#retry')?.disabled")

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
