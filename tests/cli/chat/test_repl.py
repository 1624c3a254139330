"""Commands of a conversation, over a pipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llavactl.cli.chat import repl as module
from llavactl.cli.chat.slash_commands import COMMANDS
from llavactl.testing import Result, run_cli

from .fakes import ASSISTANT, FakeConversation


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, toys: Path) -> Any:
    """Runs a conversation of lines in a folder with ``a.jpg``; its answers are ``N images, question T/SEED``."""
    monkeypatch.setattr("llavactl.chat.conversation.Conversation", FakeConversation)
    monkeypatch.setattr("llavactl.verbs.chat.open_chat", lambda *_, **__: FakeConversation(ASSISTANT))
    for name in ("a.jpg", "b c.jpg", "-d'.jpg"):
        (tmp_path / name).write_bytes((toys / "images/photo-000.jpg").read_bytes())

    def run(*lines: str, options: tuple[str, ...] = ()) -> Result:
        result = run_cli("chat", "--model", "m", *options, cwd=tmp_path, stdin="\n".join(lines))
        assert result.exit_code == 0, result.stderr
        return result

    return run


def answers(result: Result) -> list[str]:
    return result.stdout.splitlines()


def test_lines_are_questions(chat: Any) -> None:
    assert answers(chat("one", "", "two\r", " /three", "/etc/passwd four", "/quit", "five")) == [
        "0 images, one 0.0/0", "0 images, two 0.0/1", "0 images, /three 0.0/2", "0 images, /etc/passwd four 0.0/3"
    ]  # fmt: skip


def test_images_are_of_the_next_question(chat: Any, tmp_path: Path) -> None:
    result = chat(
        "/image a.jpg 'b c.jpg'", "x", f"{tmp_path}/a.jpg", "/image b c.jpg", f"file://{tmp_path}/b%20c.jpg", "y",
        "b c.jpg", "b\\ c.jpg", "\"-d'.jpg\"", "/image -d\\'.jpg", "/image none.jpg", "/nope.png", "z", "end",
    )  # fmt: skip
    assert [line.split(" images")[0] for line in answers(result)] == ["2", "3", "4", "0"]
    assert result.stderr.count("error: ") == 2


def test_images_stay_pending_until_they_are_answered(chat: Any) -> None:
    result = chat("/image a.jpg", "interrupt", "x", "/image a.jpg", "interrupt late", "y")
    assert answers(result) == ["", "1 images, x 0.0/1", "half", "0 images, y 0.0/3"]


def test_undo_and_edit_keep_the_images_of_the_question(chat: Any) -> None:
    result = chat("/image a.jpg", "x", "/undo", "/image a.jpg", "y", "/edit z", "/edit interrupt", "/retry")
    assert [line[:11] for line in answers(result)] == ["1 images, x", "2 images, y", "2 images, z", "", "2 images, z"]
    assert chat("/undo", "/edit x", "/retry", "/edit").stderr.count("error: ") == 4


def test_retry_needs_sampling(chat: Any) -> None:
    result = chat("x", "/retry", "/set temperature 1", "/retry", "/retry", "/set temperature 0", "/retry", "/retry")
    assert [line.split()[-1] for line in answers(result)] == ["0.0/0", "1/1", "1/2", "0/3"]
    assert result.stderr.count("error: ") == 2


def test_a_sampled_session_is_reproducible(chat: Any) -> None:
    options = ("--temperature", "0.5", "--seed", str(2**63 - 1))
    assert [line.split()[-1] for line in answers(chat("x", "y", options=options))] == [f"0.5/{2**63 - 1}", "0.5/0"]


def test_set_seed_sets_the_seed_of_the_next_answer(chat: Any) -> None:
    result = chat("x", "/set seed 7", "x", "x", "/set seed 7", "x", options=("--temperature", "1"))
    assert [line.split("/")[-1] for line in answers(result)] == ["0", "7", "8", "7"]


def test_saved_conversations_are_loaded_and_not_replaced(chat: Any, tmp_path: Path) -> None:
    result = chat("/save x.json", "/image a.jpg", "x", "/save my chat.json", "/save 'my chat.json'", "/save .")
    assert result.stderr.count("error: ") == 3
    messages = json.loads((tmp_path / "my chat.json").read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    result = chat(
        "y", "/save! my chat.json", "/load 'my chat.json'", "/undo", "/load none.json", "/load a.jpg", "/load"
    )
    assert result.stderr.count("error: ") == 3
    assert "y" in (tmp_path / "my chat.json").read_text()


def test_the_system_prompt_is_kept_by_new(chat: Any, tmp_path: Path) -> None:
    chat("/system Be brief.", "x", "/new", "y", "/save x.json", "/system", "/save y.json")
    for name, expected in (("x.json", ["system", "user", "assistant"]), ("y.json", ["user", "assistant"])):
        messages = json.loads((tmp_path / name).read_text())["messages"]
        assert [message["role"] for message in messages] == expected


@pytest.mark.parametrize(
    "line",
    [
        "/set nosuch 1", "/set seed x", "/set temperature nan", "/set top_p 0", "/imag a.jpg", "/image", "/image 'a",
        "/image a\0b", "/load '", "/load ''", "/image .", "/QUIT", "/quit now", "/undo 2", "/new x",
    ],
)  # fmt: skip
def test_errors_do_not_end_the_conversation(chat: Any, line: str) -> None:
    result = chat(line, "x")
    assert result.stderr.count("error: ") == 1
    assert answers(result)[-1].startswith("0 images, x")


def test_an_unknown_command_is_named_with_the_nearest_one(chat: Any) -> None:
    assert "'/image'" in chat("/imag x").stderr


def test_help_lists_every_command(chat: Any) -> None:
    shown = chat("/help").stderr
    assert all(name in shown for name in COMMANDS)


def test_code_of_each_answer_is_saved(chat: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeConversation, "answer", ["```html\n<p>\n", "```"])
    chat("x", "y", options=("--save-code", "pages"))
    assert sorted(file.name for file in (tmp_path / "pages").iterdir()) == ["index-2.html", "index.html"]


def test_an_interrupted_explanation_keeps_the_code(chat: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_conversation: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "print_maps", interrupted)
    monkeypatch.setattr(FakeConversation, "answer", ["```html\n<p>\n```"])
    result = chat("/image a.jpg", "x", "y", options=("--save-code", "pages", "--explain"))
    assert len(answers(result)) == 6
    assert sorted(file.name for file in (tmp_path / "pages").iterdir()) == ["index-2.html", "index.html"]


def test_a_bug_ends_the_conversation(chat: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(module.Repl, "ask", broken)
    result = run_cli("chat", "--model", "m", cwd=tmp_path, stdin="x")
    assert result.exit_code == 1
    assert "ZeroDivisionError" in result.stderr
