"""Output is formatted on terminals and plain everywhere else; progress bars keep a terminal tidy."""

from __future__ import annotations

import itertools
import os
import re
import select
import struct
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyte
import pytest

from llavactl.core.registry import registry

from ..preloaded import Interpreters

pty = pytest.importorskip("pty", reason="Windows has no pseudo-terminals")
fcntl = pytest.importorskip("fcntl")
termios = pytest.importorskip("termios")

ESCAPE = "\x1b["
COLOR = re.compile(r"\x1b\[(\d+;)*(3[0-8]|9[0-7])(;\d+)*m")
BOX = "│─┃━╭╰┌└"
PROGRAM = "from llavactl.cli import main; main()"
INHERITED = ("NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "COLUMNS", "LINES")
BAR_VARIABLES = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS")
"""Set by commands that ran in this process."""

LINES = 40
SILENCE_S = 120
"""A test fails, instead of waiting forever, if its program prints nothing for so long."""

BARS = """
import logging, sys, time
from llavactl.cli import _log_to_stderr
from llavactl.cli.output import line
from llavactl.core import progress

_log_to_stderr()
log = logging.getLogger("llavactl.test")
kind = sys.argv[1]
with progress.bar(40, "stage1", "step", memory=True) as bar:
    for step in range(40):
        time.sleep(0.04)
        bar.advance(loss=f"{2 - step / 40:.4f}", tokens_per_s="12,345")
        if kind == "logs" and step % 10 == 9:
            log.info("message %d, which is longer than a narrow terminal is wide", step)
            line(f"result {step}")
        if kind == "nested" and step == 20:
            with progress.bar(10, "eval scenes", "question") as inner:
                for _ in range(10):
                    time.sleep(0.1)
                    inner.advance()
print("the end", file=sys.stderr)
"""


def environment(**variables: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in INHERITED + BAR_VARIABLES}
    return {**inherited, "TERM": "xterm-256color", **variables}


class Terminal:
    """A pseudo-terminal that runs ``python -c PROGRAM ARGUMENTS`` with it as stdin, stdout and stderr.

    ``raw`` is all output; ``screen`` what a user sees, by a terminal emulator.
    """

    def __init__(
        self, interpreters: Interpreters, cwd: Path, columns: int, program: str, *arguments: str, **variables: str
    ) -> None:
        self.master, slave = pty.openpty()
        self.screen = pyte.HistoryScreen(columns, LINES, history=10_000)
        self.stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self.resize(columns)
        self.process = interpreters.start_on([slave] * 3, program, *arguments, cwd=cwd, env=environment(**variables))
        os.close(slave)

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, columns, 0, 0))
        self.screen.resize(LINES, columns)

    def press(self, key: bytes) -> None:
        os.write(self.master, key)

    def read_until(self, pattern: str) -> None:
        """Reads until ``pattern`` matches one of the lines."""
        while not any(re.search(pattern, line) for line in self.lines()):
            assert self.read(), f"{pattern!r} was not shown: {self.lines()}"

    def read(self) -> bool:
        """Reads some output; false if the process has exited."""
        ready, _, _ = select.select([self.master], [], [], SILENCE_S)
        assert ready, f"no output for {SILENCE_S} s: {self.lines()}"
        try:
            chunk = os.read(self.master, 65536)
        except OSError:  # Linux: the process has closed the terminal
            return False
        self.raw += chunk
        self.stream.feed(chunk)
        return bool(chunk)

    def exit_code(self) -> int:
        while self.read():
            pass
        os.close(self.master)
        return self.process.wait()

    def lines(self) -> list[str]:
        """The lines that have been shown, including those scrolled off, without trailing spaces and empty lines."""
        scrolled = [
            "".join(row[column].data for column in range(self.screen.columns)) for row in self.screen.history.top
        ]
        return [line.rstrip() for line in (*scrolled, *self.screen.display) if line.strip()]


@dataclass(frozen=True)
class CommandLine:
    """Runs ``llavactl ARGUMENTS``, on a terminal or piped; ``bars`` shows progress bars without a command."""

    interpreters: Interpreters
    cwd: Path

    def terminal(self, *arguments: str, columns: int = 60, **variables: str) -> Terminal:
        return Terminal(self.interpreters, self.cwd, columns, PROGRAM, *arguments, **variables)

    def on_terminal(self, *arguments: str, columns: int = 60, **variables: str) -> tuple[int, str]:
        """The exit code, and the output to a pseudo-terminal that is stdout and stderr."""
        terminal = self.terminal(*arguments, columns=columns, **variables)
        return terminal.exit_code(), terminal.raw.decode()

    def piped(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return self.interpreters.run(PROGRAM, *arguments, cwd=self.cwd, env=environment(**variables))

    def bars(self, kind: str, columns: int, script: str = BARS, **variables: str) -> Terminal:
        return Terminal(self.interpreters, self.cwd, columns, script, kind, **variables)


@pytest.fixture
def command_line(interpreters: Interpreters, tmp_path: Path) -> CommandLine:
    return CommandLine(interpreters, tmp_path)


def test_tables_on_a_terminal_have_color_and_fit_its_width(command_line: CommandLine) -> None:
    code, shown = command_line.on_terminal("recipes", "list")
    assert code == 0
    assert COLOR.search(shown)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert all(name in plain for name in registry().names("recipes"))
    assert all(len(line.rstrip()) <= 60 for line in plain.splitlines())


@pytest.mark.parametrize(
    "arguments", [("recipes", "list"), ("components",), ("components", "tasks"), ("plugins", "list")]
)
def test_piped_tables_are_plain_and_not_wrapped(arguments: tuple[str, ...], command_line: CommandLine) -> None:
    done = command_line.piped(*arguments)
    assert done.returncode == 0
    assert ESCAPE not in done.stdout
    assert not set(BOX) & set(done.stdout)
    if arguments[0] == "recipes":
        recipes = {name: registry().get("recipes", name).summary for name in registry().names("recipes")}
        assert [line.split(maxsplit=1) for line in done.stdout.splitlines()] == [list(row) for row in recipes.items()]
    assert any(len(line) > 80 for line in done.stdout.splitlines()) or arguments == ("plugins", "list")


def test_json_on_a_terminal_is_plain(command_line: CommandLine) -> None:
    _, shown = command_line.on_terminal("recipes", "list", "--json")
    assert ESCAPE not in shown
    assert shown.replace("\r\n", "\n") == command_line.piped("recipes", "list", "--json").stdout


def test_errors_are_colored_on_a_terminal_only(command_line: CommandLine) -> None:
    code, shown = command_line.on_terminal("train", "--stage", "1")
    assert code == 1
    assert COLOR.search(shown)
    done = command_line.piped("train", "--stage", "1")
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    assert ESCAPE not in done.stderr
    assert re.sub(r"\x1b\[[0-9;]*m", "", shown).split() == done.stderr.split()


def test_messages_are_wrapped_between_words_but_commands_are_not(command_line: CommandLine) -> None:
    terminal = command_line.terminal("recipes", "show", "nosuch", columns=40)
    assert terminal.exit_code() == 1
    error, hint, *names = terminal.lines()
    assert error.startswith("error: ")
    assert hint.startswith("hint: available: ")
    assert names
    assert all(line.startswith("      ") for line in names)
    shown = " ".join([hint, *names]).replace(",", "").split()
    assert shown[2:] == registry().names("recipes")
    terminal = command_line.terminal("recipes", "check", "-r", "x.yaml", "--nope", columns=40)
    assert terminal.exit_code() == 2
    assert "hint: `llavactl recipes check --help` sh" in terminal.lines()


@pytest.mark.parametrize(
    ("variables", "formatted"), [({"NO_COLOR": "1"}, True), ({"CLICOLOR": "0"}, True), ({"TERM": "dumb"}, False)]
)
def test_color_can_be_disabled(variables: dict[str, str], formatted: bool, command_line: CommandLine) -> None:
    for arguments in (("recipes", "list"), ("train", "--stage", "1")):
        _, shown = command_line.on_terminal(*arguments, FORCE_COLOR="1", **variables)
        assert not COLOR.search(shown)
        assert "llava-v1-7b" in shown
        assert (ESCAPE in shown) == formatted


@pytest.mark.parametrize("variables", [{"FORCE_COLOR": "1"}, {"CLICOLOR_FORCE": "1"}])
def test_color_can_be_forced(variables: dict[str, str], command_line: CommandLine) -> None:
    listed = command_line.piped("recipes", "list", **variables).stdout
    assert COLOR.search(listed)
    assert any(len(line) > 80 for line in listed.splitlines()), "not wrapped"
    assert COLOR.search(command_line.piped("train", "--stage", "1", **variables).stderr)
    assert ESCAPE not in command_line.piped("recipes", "list", "--json", **variables).stdout


@pytest.mark.parametrize(
    ("arguments", "columns"),
    [
        *itertools.product([("recipes", "list"), ("components",), ("components", "tasks")], [40, 80]),
        (("plugins", "list"), 40),
        pytest.param(("plugins", "list"), 80, marks=pytest.mark.slow),  # imports each plugin in a process of its own
    ],
)
def test_nothing_of_a_table_is_cut_off(arguments: tuple[str, ...], columns: int, command_line: CommandLine) -> None:
    code, shown = command_line.on_terminal(*arguments, columns=columns)
    assert code == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert all(len(line.rstrip()) <= columns for line in plain.splitlines()), "wrapped by the terminal"
    import_time = re.compile(r"\d+\.\d+ s")  # differs between calls
    complete = Counter(import_time.sub("", command_line.piped(*arguments).stdout))
    complete[" "] = complete["\n"] = 0
    assert not complete - Counter(plain)


def test_doctor_is_wrapped_on_a_terminal_and_nowhere_else(command_line: CommandLine) -> None:
    code, shown = command_line.on_terminal("doctor", columns=40)
    assert code == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert all(len(line.rstrip()) <= 40 or "/" in line for line in plain.splitlines()), "only paths are too long"
    assert re.search(r"^ *LoRA: ", plain, re.MULTILINE), "the method of each peak"
    lines = command_line.piped("doctor").stdout.splitlines()
    assert any(line.endswith("S: sharded") and line.startswith("C:") for line in lines)
    assert not any(line.startswith(" ") for line in lines if "pip install" not in line)


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_progress_bar_is_one_line(columns: int, command_line: CommandLine) -> None:
    terminal = command_line.bars("plain", columns)
    terminal.read_until("2./40")
    (line,) = terminal.lines()
    assert line.startswith("stage1 ")
    assert " left" in line
    assert columns == 40 or all(part in line for part in ("loss 1.", "memory ", "steps/s"))
    assert terminal.exit_code() == 0
    last, end = terminal.lines()
    assert "40/40" in last
    assert re.search(r" in \d\.\d s", last)
    assert end == "the end"


@pytest.mark.parametrize("columns", [40, 80])
def test_messages_are_above_the_progress_bar(columns: int, command_line: CommandLine) -> None:
    terminal = command_line.bars("logs", columns)
    assert terminal.exit_code() == 0
    shown = " ".join("".join(line.ljust(columns) for line in terminal.lines()).split())
    for step in (9, 19, 29, 39):
        assert f"llavactl: message {step}, which is longer than a narrow terminal is wide" in shown.replace("  ", " ")
        assert f"result {step}" in terminal.lines()
    assert sum(line.startswith("stage1") for line in terminal.lines()) == 1
    assert terminal.lines()[-1] == "the end"


def test_a_nested_bar_is_below_and_disappears(command_line: CommandLine) -> None:
    terminal = command_line.bars("nested", 80)
    terminal.read_until("eval scenes")
    terminal.read_until("[2-8]/10")
    outer, inner = terminal.lines()
    assert outer.startswith("stage1 ")
    assert inner.startswith("eval scenes ")
    assert terminal.exit_code() == 0
    outer, end = terminal.lines()
    assert outer.startswith("stage1 ")
    assert "40/40" in outer
    assert end == "the end"


def test_a_progress_bar_follows_the_width_of_the_terminal(command_line: CommandLine) -> None:
    terminal = command_line.bars("plain", 100)
    terminal.read_until("1./40")
    assert "|" in terminal.lines()[0]
    terminal.resize(40)
    terminal.read_until("2./40")
    (line,) = terminal.lines()
    assert line.startswith("stage1 ")
    terminal.resize(100)
    terminal.read_until("3./40")
    assert "|" in terminal.lines()[0]
    assert terminal.exit_code() == 0
    last, end = terminal.lines()
    assert "40/40" in last
    assert end == "the end"


def test_a_short_operation_leaves_no_bar(command_line: CommandLine) -> None:
    script = BARS.replace("time.sleep(0.04)", "time.sleep(0.001)")
    terminal = command_line.bars("plain", 80, script)
    assert terminal.exit_code() == 0
    assert "stage1" in terminal.raw.decode()
    assert terminal.lines() == ["the end"]


def test_ctrl_c_leaves_a_clean_terminal(command_line: CommandLine) -> None:
    terminal = command_line.bars("plain", 80)
    terminal.read_until("1./40")
    terminal.press(b"\x03")
    assert terminal.exit_code() != 0
    first, *traceback = terminal.lines()
    assert first.startswith("stage1 ")
    assert traceback[0].startswith("Traceback")
    assert not any("stage1" in line for line in traceback)
    assert (terminal.screen.cursor.x, terminal.screen.cursor.hidden) == (0, False)


@pytest.mark.parametrize("how", ["pipe", "dumb terminal"])
def test_without_a_terminal_progress_is_complete_lines(how: str, command_line: CommandLine) -> None:
    script = BARS.replace("_log_to_stderr()\nlog", "_log_to_stderr()\nprogress.FIRST_LINE_S = 0.3\nlog")
    if how == "pipe":
        done = command_line.interpreters.run(script, "plain", cwd=command_line.cwd, env=environment())
        assert done.returncode == 0
        assert done.stdout == ""
        shown = done.stderr
    else:
        terminal = command_line.bars("plain", 200, script, TERM="dumb")
        assert terminal.exit_code() == 0
        shown = terminal.raw.decode().replace("\r\n", "\n")
    assert "\r" not in shown
    assert ESCAPE not in shown
    first, last, end = shown.splitlines()
    assert first.startswith("llavactl: stage1: ")
    assert " of 40 steps, " in first
    assert " left" in first
    assert last.startswith("llavactl: stage1: 40 of 40 steps, ")
    assert all(", loss 1." in line and ", memory " in line for line in (first, last))
    assert end == "the end"


BARS_PLUGIN = """
import click
from llavactl import hookimpl

@click.command()
def bars():
    \"\"\"Show the progress bars of libraries.\"\"\"
    import huggingface_hub.utils, tqdm, tqdm.auto, transformers.utils.logging
    for module in (tqdm, tqdm.auto, transformers.utils.logging, huggingface_hub.utils):
        list(module.tqdm(range(3), desc="A " + module.__name__))

@hookimpl
def register_commands(register):
    register("bars", "bars_plugin:bars", summary="Show the progress bars of libraries.")
"""


@pytest.fixture
def bars_plugin(tmp_path: Path) -> dict[str, str]:
    """Variables that install a plugin whose command shows progress bars as libraries do."""
    info = tmp_path / "bars_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bars-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[llavactl]\nbars = bars_plugin\n")
    (tmp_path / "bars_plugin.py").write_text(BARS_PLUGIN)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    return {"PYTHONPATH": path, "LLAVACTL_PLUGINS": "bars"}


def test_bars_of_libraries_are_shown_on_terminals_only_and_not_with_quiet(
    bars_plugin: dict[str, str], tmp_path: Path
) -> None:
    """In processes that haven't imported the libraries: they read variables when they are imported."""
    interpreters = Interpreters(libraries=())
    command_line = CommandLine(interpreters, tmp_path)
    code, shown = command_line.on_terminal("bars", **bars_plugin)
    assert code == 0, shown
    assert "A tqdm" in shown
    done = command_line.piped("bars", **bars_plugin)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    code, shown = command_line.on_terminal("-q", "bars", **bars_plugin)
    assert (code, shown) == (0, "")
    interpreters.close()
