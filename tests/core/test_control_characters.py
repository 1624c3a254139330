"""Control characters of data are shown on stdout and stderr, never executed."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavactl.cli import boundary, output, run_command
from llavactl.core import progress
from llavactl.core.control_characters import visible
from llavactl.core.errors import LlavactlError
from llavactl.core.paths import json_text

EXECUTED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
HOSTILE = "a\x1b]0;owned\x07b\x9b31mc\u202ed\u2028e\x7f\rf\x85"
SGR = re.compile(r"\x1b\[[0-9;]*m")


@given(st.text(st.characters(codec=None, categories=None)) | st.text())
def test_nothing_is_executed_and_nothing_else_changes(text: str) -> None:
    shown = visible(text)
    written = shown.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    assert not EXECUTED.search(written)
    if not EXECUTED.search(text) and not re.search("[\ud800-\udfff]", text):
        assert shown == text


def test_bytes_of_file_names_are_written_unchanged_unless_executed() -> None:
    assert visible("caf\udce9\n\t") == "caf\udce9\n\t"
    assert visible("\udcc2\udc9b") == "\udcc2\\x9b"
    assert visible("\x1b\u202e\ud800") == "\\x1b\\u202e\\ud800"


@given(st.text(st.characters(exclude_categories=["Cs"])) | st.just(HOSTILE))
def test_json_is_exact_and_executes_nothing(text: str) -> None:
    written = json_text({text: [text]})
    assert json.loads(written) == {text: [text]}
    assert not EXECUTED.search(written)
    assert len(written.splitlines()) == 1


def _raise_hostile() -> None:
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        logging.getLogger("llavactl.test").exception(HOSTILE)


def _bar() -> None:
    with progress.bar(3, HOSTILE, "step") as bar:
        bar.advance(3, loss=HOSTILE)


PRINTERS: dict[str, Callable[[], Any]] = {
    "line": lambda: output.line(HOSTILE),
    "lines": lambda: output.lines([HOSTILE]),
    "text": lambda: output.text(HOSTILE),
    "paragraph": lambda: output.paragraph(HOSTILE),
    "labeled": lambda: output.labeled([(HOSTILE, HOSTILE)]),
    "table": lambda: output.table([[HOSTILE, "x"], ["y", HOSTILE]], [HOSTILE, HOSTILE]),
    "report": lambda: output.report({HOSTILE: HOSTILE}, False),
    "document": lambda: output.document({HOSTILE: HOSTILE}),
    "message": lambda: boundary.message("error:", HOSTILE, "red"),
    "error": lambda: boundary.report(LlavactlError(HOSTILE, hint=HOSTILE)),
    "bug": lambda: boundary.report(ValueError(HOSTILE)),
    "log": _raise_hostile,
    "bar": _bar,
}


@pytest.mark.parametrize("force_color", ["", "1"])
@pytest.mark.parametrize("printer", PRINTERS)
def test_every_way_to_print(
    printer: str, force_color: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "FIRST_LINE_S", 0)
    monkeypatch.setenv("FORCE_COLOR", force_color)
    run_command(["--version"])  # the log handler
    capsys.readouterr()
    PRINTERS[printer]()
    captured = capsys.readouterr()
    shown = SGR.sub("", captured.out + captured.err)
    assert "owned" in shown
    assert not EXECUTED.search(shown.replace("\r\n", "\n"))


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class FakeTerminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = FakeTerminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", stream)
    _bar()
    assert "owned" in stream.getvalue()
    assert not EXECUTED.search(SGR.sub("", stream.getvalue()).replace("\x1b[A", "").replace("\r", ""))
