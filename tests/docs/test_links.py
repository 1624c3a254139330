"""Links between the pages, and names of pages in code, recipes and messages, lead to files and headings that exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("benchmarks/*.md")),
    *sorted(ROOT.glob("plugins/*/README.md")),
]
CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
NAMED = re.compile(r"(?<![\w/])(?<!LLaVA's )(docs/[\w./-]+\.md)(?:#([\w-]+))?")


def headings(page: Path) -> set[str]:
    """The anchors of ``page``, as GitHub makes them from headings."""
    titles = re.findall(r"^#+ +(.+)$", CODE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    broken = []
    for link in LINK.findall(CODE.sub("", page.read_text(encoding="utf-8"))):
        if "://" in link or link.startswith("mailto:"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in headings(target)):
            broken.append(link)
    assert not broken


def sources() -> list[Path]:
    """Files that users or contributors read, but for the changelog, which names pages as they were."""
    suffixes = [f"*.{suffix}" for suffix in ("py", "md", "yaml", "toml", "html", "txt")]
    listed = subprocess.run(["git", "ls-files", "Makefile", *suffixes], cwd=ROOT, capture_output=True, text=True)
    return [
        ROOT / name for name in listed.stdout.splitlines() if name not in ("CHANGELOG.md", "tests/docs/test_links.py")
    ]


def missing(text: str) -> list[str]:
    """The pages and anchors that ``text`` names and that don't exist."""
    return [
        match[0]
        for match in NAMED.finditer(text)
        if not (ROOT / match[1]).exists() or (match[2] and match[2] not in headings(ROOT / match[1]))
    ]


def test_named_pages_exist() -> None:
    broken = {}
    for file in sources():
        if file.exists() and (names := missing(file.read_text(encoding="utf-8"))):
            broken[file.relative_to(ROOT).as_posix()] = names
    assert broken == {}


def test_a_missing_page_or_anchor_is_found() -> None:
    known = "docs/reference/training.md"
    assert missing(f"see {known}#sequence-packing ({known}) and https://github.com/x/docs/nothing.md") == []
    assert missing(f"see {known}#nothing, docs/nothing.md") == [f"{known}#nothing", "docs/nothing.md"]
