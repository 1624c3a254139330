"""The boxes of elements on a page, rendered by a headless Chromium.

The HTML comes from a model and is untrusted. It is shown in a sandboxed frame: scripts, forms, refreshes and links are
disabled, and the content security policy allows only inline styles. Host names don't resolve, the profile is temporary,
and the browser is killed with its child processes after the time limit.
"""

from __future__ import annotations

import contextlib
import html
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llavactl import LlavactlError
from llavactl_sketches.answers import BUTTON_TYPES, KINDS, MAX_ELEMENTS, MAX_TEXT, Found
from llavactl_sketches.layout import PAGE, STYLESHEET

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
"""Programs that ``browser: auto`` looks for."""

PAGES_PER_START = 12
"""Pages per start of the browser, each in a frame; if one fails, the two halves are started separately."""

_FLAGS = (
    "--headless",
    "--disable-background-networking",
    "--disable-breakpad",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-gpu",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--no-first-run",
    "--no-proxy-server",
    "--use-mock-keychain",
    "--dump-dom",
)

_RESULT = re.compile(r'<pre id="result">(.*?)</pre>', re.DOTALL)

# Methods are taken from prototypes: in an answer, <form name="querySelectorAll"> would replace the document's.
_SCRIPT = """
const {pages, kinds, buttons, size, limit, length} = JSON.parse(document.getElementById("input").textContent);
const select = (root, query) => [...Document.prototype.querySelectorAll.call(root, query)];
const measured = pages.map(() => null);
function measure(frame) {
  const root = frame.contentDocument, found = [];
  let count = 0;
  for (const element of select(root, Object.keys(kinds).join())) {
    const {left, top, right, bottom} = Element.prototype.getBoundingClientRect.call(element);
    const box = [Math.max(left, 0), Math.max(top, 0), Math.min(right, size), Math.min(bottom, size)];
    const shown = Element.prototype.checkVisibility.call(element, {opacityProperty: true, visibilityProperty: true});
    if (!shown || box[2] - box[0] < 1 || box[3] - box[1] < 1 || ++count > limit) continue;
    const attribute = (name) => Element.prototype.getAttribute.call(element, name) || "";
    const tag = element.localName, button = tag === "input" && buttons.includes(attribute("type").toLowerCase());
    const text = button ? attribute("value") : tag === "select" || tag === "textarea" ? "" : element.textContent || "";
    found.push([button ? "button" : kinds[tag], text.slice(0, length), box]);
  }
  return {found, count};
}
pages.forEach((page, index) => {
  const frame = document.createElement("iframe");
  frame.sandbox = "allow-same-origin";
  frame.width = frame.height = size;
  frame.style.border = 0;
  frame.onload = () => { measured[index] = measure(frame); };
  frame.srcdoc = page;
  document.body.append(frame);
});
addEventListener("load", () => {
  const result = document.createElement("pre");
  result.id = "result";
  result.textContent = JSON.stringify(measured);
  document.body.replaceChildren(result);
});
"""


@dataclass(frozen=True)
class Measured:
    """The first MAX_ELEMENTS visible elements of a page in document order, and the ``count`` of all."""

    found: tuple[Found, ...]
    count: int


def find_browser() -> str | None:
    """The first of NAMES that is installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@dataclass(frozen=True)
class Browser:
    """The Chromium ``program``, with a time limit of ``timeout_s`` seconds per start."""

    program: str
    timeout_s: float

    def measure(self, pages: Sequence[str]) -> list[Measured | None]:
        """The elements of each of ``pages``, the HTML of bodies; None if the browser can't show a page in time.

        Raises:
            LlavactlError: the browser can't show any page.
        """
        measured: list[Measured | None] = []
        for start in range(0, len(pages), PAGES_PER_START):
            measured += self._measure_some(pages[start : start + PAGES_PER_START])
        return measured

    def _measure_some(self, pages: Sequence[str]) -> list[Measured | None]:
        result, problem = self._start(pages)
        if result is not None:
            return list(result)
        if len(pages) > 1:
            half = len(pages) // 2
            return self._measure_some(pages[:half]) + self._measure_some(pages[half:])
        if self._start(["<p></p>"])[0] is None:
            raise LlavactlError(
                f"{self.program} can't show a page: {problem}",
                hint="try it by hand; `browser: none` compares without a browser",
            )
        return [None]

    def _start(self, pages: Sequence[str]) -> tuple[list[Measured] | None, str]:
        """The elements of ``pages`` from one start of the browser, or None and the reason."""
        with TemporaryDirectory(prefix="llavactl-browser-", ignore_cleanup_errors=True) as folder:
            file = Path(folder, "pages.html")
            file.write_text(_document(pages), encoding="utf-8", errors="replace")
            output, problem = self._run(file, Path(folder))
        match = _RESULT.search(output)
        if match is None:
            return None, problem
        results = json.loads(html.unescape(match[1]))
        if len(results) != len(pages) or None in results:
            return None, "a page did not load"
        return [_measured(result) for result in results], ""

    def _run(self, file: Path, folder: Path) -> tuple[str, str]:
        """The document that the browser prints, and the last line of its messages."""
        # Chromium's process sandbox doesn't run as root, the usual user of containers.
        root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        command = [self.program, *_FLAGS, *root, f"--user-data-dir={folder / 'profile'}", file.as_uri()]
        environment = {
            "PATH": os.environ.get("PATH", ""),
            "HOME": str(folder),
            "TMPDIR": str(folder),
            "LANG": "C.UTF-8",
        }
        if os.name == "nt":
            environment = {**os.environ, **environment}
        with subprocess.Popen(  # noqa: S603 - the user's browser
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        ) as process:
            try:
                output, messages = process.communicate(timeout=self.timeout_s)
            except subprocess.TimeoutExpired:
                return "", f"no result within {self.timeout_s:g} s"
            finally:
                _kill(process)
        lines = messages.decode("utf-8", "replace").strip().split("\n")
        return output.decode("utf-8", "replace"), lines[-1] or f"exit status {process.returncode}"


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills the browser and its children, which are in its process group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def page_document(body: str) -> str:
    """``body`` as a complete document with the stylesheet."""
    return f'<!doctype html><meta charset="utf-8"><style>{STYLESHEET}</style><body>{body}'


def _document(pages: Sequence[str]) -> str:
    """The page with one frame for each of ``pages``; frames inherit its content policy."""
    nonce = secrets.token_urlsafe(16)
    values = {
        "pages": [page_document(page) for page in pages],
        "kinds": KINDS,
        "buttons": sorted(BUTTON_TYPES),
        "size": PAGE,
        "limit": MAX_ELEMENTS,
        "length": MAX_TEXT,
    }
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'nonce-{nonce}'; form-action 'none'"
    data = json.dumps(values).replace("<", "\\u003c")
    return (
        f'<!doctype html><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<body><script type="application/json" id="input" nonce="{nonce}">{data}</script>'
        f'<script nonce="{nonce}">{_SCRIPT}</script>'
    )


def _measured(result: Mapping[str, Any]) -> Measured:
    found = tuple(Found(kind, text, tuple(box)) for kind, text, box in result["found"])
    return Measured(found, result["count"])
