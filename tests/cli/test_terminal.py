"""Output is formatted on terminals and plain everywhere else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llavactl.core.registry import registry

pty = pytest.importorskip("pty", reason="Windows has no pseudo-terminals")

ESCAPE = "\x1b["
COLOR = re.compile(r"\x1b\[(\d+;)*(3[0-8]|9[0-7])(;\d+)*m")
BOX = "│─┃━╭╰┌└"
PROGRAM = [sys.executable, "-m", "llavactl.cli"]


def environment(**variables: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    return {**inherited, "TERM": "xterm-256color", "COLUMNS": "60", "LINES": "40", **variables}


def on_terminal(*arguments: str, cwd: Path, **variables: str) -> tuple[int, str]:
    """The exit code, and the output to a pseudo-terminal that is stdout and stderr."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*PROGRAM, *arguments], stdin=slave, stdout=slave, stderr=slave, cwd=cwd, env=environment(**variables)
    )
    os.close(slave)
    chunks = []
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # Linux: the process has closed the terminal
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(master)
    return process.wait(), b"".join(chunks).decode()


def piped(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=cwd,
        env=environment(),
        check=False,
    )


def test_tables_on_a_terminal_have_color_and_fit_its_width(tmp_path: Path) -> None:
    code, shown = on_terminal("recipes", "list", cwd=tmp_path)
    assert code == 0
    assert COLOR.search(shown)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert all(name in plain for name in registry().names("recipes"))
    assert all(len(line.rstrip()) <= 60 for line in plain.splitlines())


@pytest.mark.parametrize(
    "arguments", [("recipes", "list"), ("components",), ("components", "tasks"), ("plugins", "list")]
)
def test_piped_tables_are_plain_and_not_wrapped(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = piped(*arguments, cwd=tmp_path)
    assert done.returncode == 0
    assert ESCAPE not in done.stdout
    assert not set(BOX) & set(done.stdout)
    if arguments[0] == "recipes":
        recipes = {name: registry().get("recipes", name).summary for name in registry().names("recipes")}
        assert [line.split(maxsplit=1) for line in done.stdout.splitlines()] == [list(row) for row in recipes.items()]
    assert any(len(line) > 80 for line in done.stdout.splitlines()) or arguments == ("plugins", "list")


def test_json_on_a_terminal_is_plain(tmp_path: Path) -> None:
    _, shown = on_terminal("recipes", "list", "--json", cwd=tmp_path)
    assert ESCAPE not in shown
    assert shown.replace("\r\n", "\n") == piped("recipes", "list", "--json", cwd=tmp_path).stdout


def test_errors_are_colored_on_a_terminal_only(tmp_path: Path) -> None:
    code, shown = on_terminal("train", "--stage", "1", cwd=tmp_path)
    assert code == 1
    assert COLOR.search(shown)
    done = piped("train", "--stage", "1", cwd=tmp_path)
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    assert ESCAPE not in done.stderr
    assert re.sub(r"\x1b\[[0-9;]*m", "", shown).split() == done.stderr.split()


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_color_can_be_disabled(variables: dict[str, str], tmp_path: Path) -> None:
    for arguments in (("recipes", "list"), ("train", "--stage", "1")):
        _, shown = on_terminal(*arguments, cwd=tmp_path, **variables)
        assert not COLOR.search(shown)
        assert "llava-v1-7b" in shown
