"""The shell blocks of tutorials and how-to guides run, or the line above them says what they need.

A block below ``*Needs: a GPU.*`` is not run. All others of a page run in order in one folder, that of a finished run of
a toy recipe (``recipe.yaml``), with its models, records, images and feature store.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("tutorials/*.md"), *DOCS.glob("how-to/*.md")])
TIMEOUT_S = 600

NEEDS = {
    "a checkout",  # an installation, or a run that takes too long for a test
    "a cluster",
    "a GPU",
    "a second terminal",  # runs until it is stopped
    "an account",
    "data of a benchmark",
    "several GPUs",
    "the model hub",
    "Windows",
}
"""What a test doesn't have. A new entry should name something that a reader may lack as well."""

ELSEWHERE = {
    "how-to/plugin.md": "test_plugin_page.py",
    "how-to/plugin-examples.md": "test_plugin_tutorials.py",
    "how-to/publish-plugin.md": "test_plugin_tutorials.py",
    "tutorials/own-data.md": "test_own_data.py",
    **{f"tutorials/{page.name}": "test_plugin_tutorials.py" for page in DOCS.glob("tutorials/plugin-*.md")},
}
"""Pages whose blocks are run by a test of their own."""

SHELL = re.compile(
    r"(?:^\*Needs: (?P<needs>[^*\n]+)\.\*\n\n)?^```(?:sh|bash|console|powershell)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    line: int
    text: str
    needs: tuple[str, ...]


def blocks(page: str) -> list[Block]:
    """The shell blocks of the text ``page``."""
    return [
        Block(
            page.count("\n", 0, match.start("text")),
            match["text"],
            tuple(filter(None, (match["needs"] or "").split(", "))),
        )
        for match in SHELL.finditer(page)
    ]


def pages_to_run() -> list[str]:
    names = (page.relative_to(DOCS).as_posix() for page in PAGES)
    return [
        name
        for name in names
        if name not in ELSEWHERE and any(not block.needs for block in blocks((DOCS / name).read_text(encoding="utf-8")))
    ]


def test_a_mark_belongs_to_the_block_below() -> None:
    page = "# A\n\n*Needs: a GPU, the model hub.*\n\n```sh\na\n```\n\nText.\n\n```sh\nb\n```\n\n```text\nc\n```\n"
    assert blocks(page) == [Block(5, "a\n", ("a GPU", "the model hub")), Block(11, "b\n", ())]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_marks_are_known_and_above_a_block(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    marked = [block.needs for block in blocks(text) if block.needs]
    assert {need for needs in marked for need in needs} <= NEEDS
    assert len(marked) == text.count("*Needs:"), "a mark isn't above a shell block"


@pytest.mark.parametrize(("page", "test"), ELSEWHERE.items())
def test_pages_run_elsewhere_are_read_there(page: str, test: str) -> None:
    if (DOCS / page).exists():
        text = (Path(__file__).parent / test).read_text(encoding="utf-8")
        assert page in text or "tutorials/plugin-*.md" in text


def run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs ``script`` in ``folder``, with this environment's programs and the folder's feature store."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env={**os.environ, "PATH": path, "LLAVACTL_HOME": str(folder / "home")},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


@pytest.fixture(scope="module")
def finished(toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of the toy recipe; don't write into it."""
    folder = tmp_path_factory.mktemp("finished") / "project"
    shutil.copytree(toys, folder)
    done = run("llavactl run", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_to_run())
def test_commands_run(page: str, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "project"
    shutil.copytree(finished, folder)
    for block in blocks((DOCS / page).read_text(encoding="utf-8")):
        if not block.needs:
            done = run(block.text, folder)
            assert done.returncode == 0, f"{page}:{block.line}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
