"""A conversation on a terminal: line editing, Ctrl-C, Ctrl-D, SIGTERM, Markdown, resizing."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from llavactl.testing import toy_photos

from ...preloaded import Interpreters
from ..test_terminal import Terminal

Start = Callable[..., Terminal]

SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import fakes
from llavactl.chat import conversation
from llavactl.verbs import chat

fakes.FakeConversation.answer = [piece + " " for piece in open("answer.md", encoding="utf-8").read().split(" ")]
fakes.FakeConversation.delay_s = 0.002
conversation.Conversation = fakes.FakeConversation
chat.open_chat = lambda *_, **__: fakes.FakeConversation(fakes.ASSISTANT)
from llavactl.cli import main
main(["chat", "--model", "m", *sys.argv[2:]])
"""

LINES = 120
CODE = "\n".join(f"line_{n} = {n}  # comment" for n in range(LINES))
ANSWER = f"""\
The **answer** is 日本語 \x1b]0;owned\x07 \x9b31m \u202e 👩\u200d👩\u200d👧.

| a | b |
|---|---|
| 1 | `c` |

```python
{CODE}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "answer.md").write_text(ANSWER, encoding="utf-8")
    return tmp_path


@pytest.fixture
def start(folder: Path, interpreters: Interpreters) -> Start:
    """Starts a chat with the given options and variables on a terminal of 60 columns."""

    def start(*options: str, **variables: str) -> Terminal:
        home = str(folder / "home")
        script = (SCRIPT, str(Path(__file__).parent), *options)
        terminal = Terminal(interpreters, folder, 60, *script, LLAVACTL_HOME=home, **variables)
        terminal.read_until("/help for commands" if "--prompt" not in options else "")
        return terminal

    return start


def after(terminal: Terminal, keys: bytes, pattern: str) -> str:
    """The output that follows ``keys``, up to ``pattern``."""
    before = len(terminal.raw)
    terminal.press(keys)
    while not re.search(pattern, terminal.raw[before:].decode(errors="replace")):
        assert terminal.read(), terminal.raw[before:]
    return terminal.raw[before:].decode(errors="replace")


PROMPT = r">(?:\x1b\[[0-9;?]*[a-zA-Z]|[\b\r ])*$"


def test_answers_are_rendered_and_nothing_is_executed_or_lost(start: Start) -> None:
    terminal = start()
    terminal.press(b"hello\r")
    terminal.read_until("line_30 ")
    terminal.resize(25)
    terminal.read_until("line_60 ")
    terminal.resize(80)
    terminal.read_until(f"line_{LINES - 1} ")
    terminal.press(b"/quit\r")
    assert terminal.exit_code() == 0
    shown = terminal.raw.decode()
    answer = shown[shown.index("The") :]
    plain = re.sub(r"\x1b\[[0-9;]*m", "", answer)
    assert "The answer is 日本語 \\x1b]0;owned\\x07 \\x9b31m" in plain.replace("\r\n", " ")
    assert "\x1b]" not in shown
    assert not re.search("[\x80-\x9f\u202e]", shown)
    assert re.search(r"a │ b\s", plain)
    assert [int(n) for n in re.findall(r"line_(\d+) = \1 ", plain)] == [*range(LINES)]
    assert re.search(r"\x1b\[\d+mcomment|\x1b\[\d+m# comment", answer), "highlighted"


def test_ctrl_c_stops_an_answer_and_ctrl_d_exits(start: Start) -> None:
    terminal = start()
    terminal.press(b"hello\r")
    terminal.read_until("line_3 ")
    after(terminal, b"typed\x03\x03\x03", f"interrupted[^>]*{PROMPT}")
    assert not any("typed" in line or "^C" in line for line in terminal.lines())
    assert not any(f"line_{LINES - 1} " in line for line in terminal.lines())
    after(terminal, b"abc\x03", PROMPT)
    after(terminal, b"/undo\r", f"removed[^>]*{PROMPT}")
    after(terminal, b"/undo\r", f"no question[^>]*{PROMPT}")
    terminal.press(b"\x04")
    assert terminal.exit_code() == 0
    assert terminal.screen.cursor.hidden is False


@pytest.mark.parametrize("answering", [False, True])
def test_sigterm_ends_the_conversation(start: Start, answering: bool) -> None:
    terminal = start()
    if answering:
        terminal.press(b"hello\r")
        terminal.read_until("line_3 ")
    else:
        after(terminal, b"abc", "abc")
    terminal.process.send_signal(signal.SIGTERM)
    assert terminal.exit_code() == 143


def test_earlier_questions_are_searched(folder: Path, start: Start) -> None:
    (folder / "answer.md").write_text("done", encoding="utf-8")
    answered = f"done[^>]*{PROMPT}"
    terminal = start()
    after(terminal, b"first question\r", answered)
    after(terminal, b"second\r", answered)
    terminal.press(b"\x12fir")
    terminal.read_until("search.*fir$")
    after(terminal, b"\r\r", answered)
    after(terminal, b"/save x.json\r", "saved")
    terminal.press(b"/quit\r")
    assert terminal.exit_code() == 0
    saved = json.loads((folder / "x.json").read_text(encoding="utf-8"))
    asked = [message["content"] for message in saved["messages"] if message["role"] == "user"]
    assert asked == ["first question", "second", "first question"]


def test_lines_are_edited(folder: Path, start: Start) -> None:
    (folder / "answer.md").write_text("done", encoding="utf-8")
    toy_photos(folder / "my photos", 1)
    terminal = start()
    after(terminal, b"/im\tmy\tph\t\r", "image 1: photo-000.jpg")
    after(terminal, b"first\\\rsecond\x1b\rthird\r", "done")
    after(terminal, b"\x1b[200~pasted\nlines\n\x1b[201~\r", "done")
    after(terminal, b"/edit\r", "pasted")
    after(terminal, b"!\r", "done")
    after(terminal, b"/save x.json\r", "saved")
    terminal.press(b"/quit\r")
    assert terminal.exit_code() == 0
    saved = (folder / "x.json").read_text(encoding="utf-8")
    assert "first\\nsecond\\nthird" in saved
    assert "pasted\\nlines!" in saved
    assert "my photos/photo-000.jpg" in saved
    history = folder / "home/data/chat-history"
    assert history.stat().st_mode & 0o777 == 0o600
    terminal = start()
    after(terminal, b"\x1b[A\x1b[A", "ave x.json")
    terminal.press(b"\x03\x04")
    assert terminal.exit_code() == 0


def test_an_unwritable_home_has_no_history(folder: Path, start: Start) -> None:
    (folder / "home").write_text("a file")
    terminal = start()
    after(terminal, b"hello\r", f"line_{LINES - 1} ")
    terminal.press(b"/quit\r")
    assert terminal.exit_code() == 0


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_answers_are_plain_without_color(start: Start, variables: dict[str, str]) -> None:
    terminal = start("--prompt", "x", **variables)
    assert terminal.exit_code() == 0
    shown = terminal.raw.decode().replace("\r\n", "\n")
    assert "**answer**" in shown
    assert "| 1 | `c` |" in shown
    assert "\x1b" not in shown


def test_a_dumb_terminal_reads_lines(folder: Path, start: Start) -> None:
    (folder / "answer.md").write_text("done", encoding="utf-8")
    terminal = start(TERM="dumb")
    after(terminal, b"hello\n", r"done\s+> $")
    after(terminal, b"\x03", r"> $")
    after(terminal, b"again\n", r"done\s+> $")
    terminal.press(b"\x04")
    assert terminal.exit_code() == 0
    assert "\x1b" not in terminal.raw.decode()
