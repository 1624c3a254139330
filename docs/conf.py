"""Builds the documentation site from the Markdown files of the repository: ``make site``.

The pages are those that GitHub shows, with the same links. The source folder is the repository, so that pages outside
of docs/, such as the plugins' README files, are pages of the site too.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDERS = ("docs", "plugins", "benchmarks")
FILES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
LISTED = re.compile(r"^- \[[^\]]+\]\(([^):#\s]+)\.md\)", re.MULTILINE)

project = "llavactl"
release = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
extensions = ["myst_parser"]
root_doc = "docs/index"
source_suffix = {".md": "markdown"}
include_patterns = ["docs/**", "plugins/*/README.md", "benchmarks/README.md", *FILES]
# Sphinx enters every folder that isn't excluded: environments, runs and data of a checkout are large.
exclude_patterns = [each.name for each in ROOT.iterdir() if each.name not in (*FOLDERS, *FILES)]
myst_heading_anchors = 4

html_theme = "furo"
html_title = f"llavactl {release}"
html_copy_source = False
html_show_copyright = False
html_static_path: list[str] = []


def with_contents(index: str, folder: Path) -> str:
    """The text ``index`` with a table of contents, which is not in the file because GitHub would show it as code.

    The contents are the pages that the index lists, in this order, and then all others in ``folder``.
    """
    listed = LISTED.findall(index)
    others = sorted({page.stem for page in folder.glob("*.md")} - {"index", *listed})
    entries = "\n".join([*listed, *others])
    return f"{index}\n```{{toctree}}\n:hidden:\n\n{entries}\n```\n"


def _add_contents(app: Any, page: str, source: list[str]) -> None:
    if page.endswith("/index"):
        source[0] = with_contents(source[0], Path(app.srcdir, page).parent)


def _write_start(app: Any, failure: Exception | None) -> None:
    """The address of the site leads to its first page."""
    if failure is None:
        target = app.builder.get_target_uri(root_doc)
        redirect = f'<meta http-equiv="refresh" content="0; url={target}">\n<a href="{target}">{project}</a>'
        (Path(app.outdir) / "index.html").write_text(f"<!doctype html>\n{redirect}\n", encoding="utf-8")


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _add_contents)
    app.connect("build-finished", _write_start)
