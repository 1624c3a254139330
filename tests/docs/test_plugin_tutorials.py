"""The tutorials about plugins, followed word for word in an environment of their own, and the examples, in ours.

Blocks run in the order of the page in an empty folder: a block whose first line is a comment with a path is written to
that file, shell blocks run, and every line of a ``text`` block is in the output of the shell block above it, with
``…`` for any text. pip installs offline: the environment has everything that the tests' own environment has.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import pytest

from llavactl.core import hookspecs
from llavactl.testing import run_cli

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted([*DOCS.glob("tutorials/plugin-*.md"), DOCS / "how-to" / "publish-plugin.md"])
EXAMPLES = DOCS / "how-to" / "plugin-examples.md"
PROGRAMS = ("llavactl", "pip")
TIMEOUT_S = 600
BLOCK = re.compile(r"(\*Needs: [^\n]+\*\n\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (\S+\.\w+)\n")


class Block(NamedTuple):
    """A code block: what to do with it, its text, and for a file the path."""

    line: int
    action: Literal["write", "run", "compare"]
    text: str
    path: str = ""


def blocks(page: str) -> Iterator[Block]:
    """The blocks of the text ``page`` that are followed; those that need something else are left out."""
    compared = False
    for needs, language, text in ((match[1], match[2], match) for match in BLOCK.finditer(page)):
        line = page.count("\n", 0, text.start(3))
        if language == "sh":
            compared = not needs
            if not needs:
                yield Block(line, "run", text[3])
        elif file := FILE.match(text[3]):
            yield Block(line, "write", text[3], file[1])
        elif language == "text" and compared:
            yield Block(line, "compare", text[3])


def environment(folder: Path) -> dict[str, str]:
    """Variables of a new environment in ``folder`` that has the packages of this one; pip installs from disk only."""
    venv.create(folder, symlinks=os.name != "nt")
    site, ours = (sysconfig.get_path("purelib", vars={"base": str(base)}) for base in (folder, sys.prefix))
    Path(site, "parent.pth").write_text(f"import site; site.addsitedir({ours!r})\n", encoding="utf-8")
    for program in PROGRAMS:
        script = folder / "bin" / program
        script.write_text(f'#!/bin/sh\nexec python -m {program} "$@"\n', encoding="utf-8")
        script.chmod(0o755)
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(folder / "bin"), os.environ["PATH"]]),
        "LLAVACTL_HOME": str(folder / "home"),
        "LLAVACTL_STRICT_PLUGINS": "1",
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # the value of `build_isolation`, not of the option
    }


def follow(page: str, folder: Path, variables: dict[str, str]) -> None:
    """Follows the text ``page`` in ``folder``."""
    output: list[str] = []
    for block in blocks(page):
        if block.action == "write":
            path = folder / block.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
        elif block.action == "compare":
            compare(block, output)
        else:
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", block.text],
                cwd=folder,
                env=variables,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                check=False,
            )
            printed = done.stdout + done.stderr
            assert done.returncode == 0, f"line {block.line}: {block.text}\n{printed[-5000:]}"
            output = printed.splitlines()


def compare(block: Block, output: list[str]) -> None:
    """Every line of ``block`` must be in ``output``."""
    for line in map(pattern, block.text.splitlines()):
        assert any(map(line.fullmatch, output)), f"line {block.line}: {line.pattern} in\n" + "\n".join(output)


def pattern(line: str) -> re.Pattern[str]:
    """A pattern for ``line`` with any number of spaces, as widths of columns may differ."""
    words = (".*".join(map(re.escape, word.split("…"))) for word in line.split())
    return re.compile(r"\s*" + r"\s+".join(words) + r"\s*")


@pytest.mark.parametrize("hook", [name for name, each in vars(hookspecs).items() if hasattr(each, "llavactl_spec")])
def test_every_hook_is_in_a_page_that_is_followed(hook: str) -> None:
    """Of the observers, which return nothing, one is enough."""
    observer = inspect.signature(getattr(hookspecs, hook)).return_annotation == "None" and "register" not in hook
    used = f"def {'train_logged' if observer else hook}("
    assert any(used in page.read_text(encoding="utf-8") for page in [*PAGES, EXAMPLES])


def test_pages_are_followed_in_order(tmp_path: Path) -> None:
    page = (
        "```python\n# a/b.py\nprint('a  b')\n```\n\n*Needs: a GPU.*\n\n```sh\nexit 1\n```\n\n"
        "```text\nnot compared\n```\n\n```sh\npython a/b.py\n```\n\n```text\na b\n```\n"
    )
    assert [block.action for block in blocks(page)] == ["write", "run", "compare"]
    follow(page, tmp_path, dict(os.environ))
    follow(page.replace("\na b\n", "\n… b\n"), tmp_path, dict(os.environ))
    for other in ("a c", "a", "b …"):
        with pytest.raises(AssertionError):
            follow(page.replace("\na b\n", f"\n{other}\n"), tmp_path, dict(os.environ))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs_its_tests_and_the_check(page: Path) -> None:
    """Otherwise the slow test below would follow something else."""
    commands = "".join(block.text for block in blocks(page.read_text(encoding="utf-8")) if block.action == "run")
    for command in ("llavactl plugins new", "pip install", "python -m pytest", "llavactl plugins check"):
        assert command in commands


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_works_as_written(page: Path, tmp_path: Path) -> None:
    follow(page.read_text(encoding="utf-8"), tmp_path, environment(tmp_path.parent / f"{tmp_path.name}-environment"))


SETUP, *SECTIONS = re.findall(
    r"^(## [^\n]+\n.*?)(?=^## |\Z)", EXAMPLES.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)
"""The sections of the examples: how to try one, and one for each plugin."""


def run(command: str, folder: Path) -> tuple[int, list[str]]:
    """Exit status and output of ``command`` in ``folder``; llavactl and Python code run in this process."""
    match shlex.split(command):
        case ["llavactl", *arguments]:
            done = run_cli(*arguments, cwd=folder)
            return done.exit_code, (done.stdout + done.stderr).splitlines()
        case ["python", "-c", code]:
            output = io.StringIO()
            with contextlib.chdir(folder), contextlib.redirect_stdout(output):
                exec(code, {})
            return 0, output.getvalue().splitlines()
    shell = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, check=False)
    return shell.returncode, (shell.stdout + shell.stderr).splitlines()


def plugin_of(section: str) -> Block:
    """The file of the plugin in ``section``."""
    (plugin,) = (block for block in blocks(section) if block.path.endswith(".py"))
    return plugin


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.splitlines()[0].removeprefix("## "))
def test_an_example_works_as_printed(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command fails if the output below it has a line ``error: …``, as the page says."""
    monkeypatch.setenv("LLAVACTL_STRICT_PLUGINS", "1")
    found = [*blocks(SETUP), *blocks(section)]
    plugin = plugin_of(section)
    monkeypatch.delitem(sys.modules, Path(plugin.path).stem, raising=False)
    output: list[str] = []
    for index, block in enumerate(found):
        if block.action == "write":
            (tmp_path / block.path).write_text(block.text, encoding="utf-8")
        elif block.action == "compare":
            compare(block, output)
        else:
            shown = found[index + 1].text if found[index + 1 :] and found[index + 1].action == "compare" else ""
            *before, last = [run(line, tmp_path) for line in block.text.splitlines()]
            output = [line for _, lines in (*before, last) for line in lines]
            statuses = [status for status, _ in (*before, last)]
            assert statuses == [*(0 for _ in before), int("error: " in shown)], "\n".join([block.text, *output])
    checked = run_cli("plugins", "check", plugin.path, cwd=tmp_path)
    assert checked.exit_code == 0, checked.stdout


MISTAKES = (
    ("radam.py", '("exp_avg", "exp_avg_sq")', '("exp_avg",)'),
    ("inverse_sqrt.py", "(1 + step / self.timescale) ** -0.5", "1 - step"),
    ("alpaca.py", ", trained=True", ""),
    ("counting.py", '"\\n===\\n".join(blocks)', "blocks"),
    ("number.py", "Scores({", "dict({"),
)
"""What is replaced in an example, in the order of the page's table of mistakes."""


@pytest.mark.parametrize(
    ("mistake", "message"),
    list(zip(MISTAKES, re.findall(r"^\| an? .* \| `(.+)` \|$", SETUP, re.MULTILINE), strict=True)),
)
def test_a_mistake_is_found(
    mistake: tuple[str, str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, old, new = mistake
    (code,) = (plugin_of(section).text for section in SECTIONS if plugin_of(section).path == file)
    assert code.count(old) == 1
    (tmp_path / file).write_text(code.replace(old, new), encoding="utf-8")
    monkeypatch.delitem(sys.modules, Path(file).stem, raising=False)
    checked = run_cli("plugins", "check", file, cwd=tmp_path)
    assert checked.exit_code == 1
    assert pattern(f"… {message} …").fullmatch(" ".join(checked.stdout.split()) + " "), checked.stdout
