"""The documentation site: pages, links and search work without a network, and a broken link fails the build."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
WITH_CONTENTS = runpy.run_path(str(ROOT / "docs" / "conf.py"))["with_contents"]
LOADED = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("source", "src")}


class Links(HTMLParser):
    """The addresses and the anchors of a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        for name in ("href", "src"):
            if name in values:
                (self.loaded if (tag, name) in LOADED else self.links).append(values[name])


def build(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """Builds the site as `make site` does."""
    command = re.search(r"^SITE := \$\(BIN\)/python (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert command
    words = command[1].replace("build/site.read", str(out / "read")).replace("build/site", str(out / "site")).split()
    return subprocess.run([sys.executable, *words], cwd=source, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    built = build(ROOT, out)
    assert built.returncode == 0, built.stderr
    return out / "site"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Links]:
    return {page.resolve(): Links(page) for page in site.rglob("*.html")}


@pytest.mark.slow
def test_every_page_is_in_the_site(site: Path) -> None:
    for page in ROOT.glob("docs/**/*.md"):
        assert (site / page.relative_to(ROOT)).with_suffix(".html").is_file()


@pytest.mark.slow
def test_links_lead_to_files_and_anchors(pages: dict[Path, Links]) -> None:
    broken = []
    for page, links in pages.items():
        for link in [*links.links, *links.loaded]:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            anchors = pages[target].anchors if target in pages else {unquote(parts.fragment)}
            if not target.is_file() or (parts.fragment and unquote(parts.fragment) not in anchors):
                broken.append(f"{page.name}: {link}")
    assert broken == []


@pytest.mark.slow
def test_nothing_is_loaded_from_a_network(site: Path, pages: dict[Path, Links]) -> None:
    assert [link for links in pages.values() for link in links.loaded if urlsplit(link).netloc] == []
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", style.read_text(encoding="utf-8")), style


@pytest.mark.slow
def test_the_start_leads_to_the_first_page(site: Path) -> None:
    target = re.search(r"url=(\S+?)\"", (site / "index.html").read_text())
    assert target
    assert (site / target[1]).is_file()


@pytest.mark.slow
def test_search_is_a_script(site: Path) -> None:
    """A page opened as a file may load scripts, but not data."""
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    assert index.startswith("Search.setIndex(")
    assert '"docs/reference/training"' in index


@pytest.mark.parametrize(
    "text",
    [
        "[a](missing.md)",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("[a](index.md#missing)", "![a](missing.png)")),
    ],
)
def test_a_broken_link_fails_the_build(tmp_path: Path, text: str) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1"\n')
    (tmp_path / "docs/conf.py").write_text((ROOT / "docs/conf.py").read_text())
    index = tmp_path / "docs/index.md"
    index.write_text("# A\n")
    assert build(tmp_path, tmp_path / "out").returncode == 0
    index.write_text(f"# A\n\n{text}\n")
    assert build(tmp_path, tmp_path / "out").returncode != 0


def test_contents_are_the_listed_pages_and_then_the_others(tmp_path: Path) -> None:
    for name in ("index", "a", "b", "c"):
        (tmp_path / f"{name}.md").touch()
    index = "# Pages\n\nSee [b](b.md).\n\n- [c](c.md): first\n- [d](../d.md)\n- [site](https://example.org/x.md)\n"
    text = WITH_CONTENTS(index, tmp_path)
    assert text.startswith(index)
    assert text.removeprefix(index).split() == ["```{toctree}", ":hidden:", "c", "../d", "a", "b", "```"]
