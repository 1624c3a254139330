"""The fenced code blocks of an answer, and saving each to its own file.

File names come from the untrusted answer: only the last part of a path is used, and only if it is a portable name. So
all files are directly in the folder. Existing files are replaced only with ``overwrite``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llavactl.core.paths import write_atomic

_NAME_OPTION = re.compile(r"""\b(?:title|file|filename|name|path)=(?:"([^"]*)"|'([^']*)'|([^\s"'}]+))""")
_FILE_WORD = re.compile(r"(?:[^\s:={}]*[/\\])?[^\s:={}/\\]+\.[A-Za-z]\w*")
_SAFE_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9_-])?", re.ASCII)
_WINDOWS_DEVICE = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?", re.ASCII | re.IGNORECASE)
_STEMS = {"html": "index", "css": "style", "js": "script"}


@dataclass(frozen=True)
class CodeBlock:
    """A fenced code block: its ``language`` in lower case and the file ``name`` of its info string, or "" for each."""

    language: str
    name: str
    code: str


def code_blocks(answer: str) -> list[CodeBlock]:
    """The fenced code blocks of ``answer`` that aren't blank, by the rules of CommonMark.

    A block that isn't closed, as in a truncated answer, ends with the answer. HTML blocks are not
    recognized: a fence directly after a tag (``</think>``) would be part of one.
    """
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark").disable(["html_block", "inline", "reference"])
    fences = (token for token in parser.parse(answer) if token.type == "fence" and token.content.strip())
    return [CodeBlock(*_language_and_name(fence.info.strip()), fence.content) for fence in fences]


def _language_and_name(info: str) -> tuple[str, str]:
    """From ``html title="index.html"``, ``python app.py``, ``html:index.html``, ``index.html`` or ``{.html}``."""
    first, _, rest = info.partition(" ")
    if option := _NAME_OPTION.search(info):
        name = next(filter(None, option.groups()), "")
    else:
        words = (first, first.partition(":")[2], rest.strip().partition(" ")[0])
        name = next((word for word in words if _FILE_WORD.fullmatch(word)), "")
    language = "" if name == first else first.lstrip("{.").partition(":")[0].rstrip("},")
    return ("" if "=" in language else language.lower()), name


def save_code(blocks: Iterable[CodeBlock], folder: Path, *, overwrite: bool = False) -> list[Path]:
    """Writes each block to its own file directly in ``folder``, which is created; returns the paths.

    A file is named by its block (only the last part of a path, if it is a portable name) or by the language:
    ``index.html``, ``style.css``, ``script.js``, otherwise ``answer`` with the suffix of the language. A name that
    exists gets a number (``index-2.html``); with ``overwrite``, only if it was written by the same call.
    """
    folder.mkdir(parents=True, exist_ok=True)
    saved: list[Path] = []
    for block in blocks:
        used = {path.name.casefold() for path in saved}
        free = (folder / name for name in _numbered(_file_name(block)) if name.casefold() not in used)
        saved.append(next(path for path in free if _write(path, block.code, overwrite=overwrite)))
    return saved


def _write(path: Path, code: str, *, overwrite: bool) -> bool:
    """Whether ``path`` was written; without ``overwrite``, existing files, folders and links are left unchanged."""
    if overwrite and path.is_dir() and not path.is_symlink():
        return False
    if not overwrite:
        try:
            path.open("xb").close()  # reserves the name: no other process can create it
        except FileExistsError:
            return False
    try:
        write_atomic(path, code.encode("utf-8", "replace"))  # replaces a link, not the file it points to
    except BaseException:
        if not overwrite:
            path.unlink(missing_ok=True)
        raise
    return True


def _file_name(block: CodeBlock) -> str:
    """A portable file name, without folders, for ``block``."""
    name = re.split(r"[/\\]", block.name)[-1]
    if _SAFE_NAME.fullmatch(name) and not _WINDOWS_DEVICE.fullmatch(name):
        return name
    suffix = _suffix(block.language)
    return f"{_STEMS.get(suffix, 'answer')}.{suffix}"


def _suffix(language: str) -> str:
    """The usual suffix of files in ``language``; a short unknown language is its own suffix (``svg``)."""
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    try:
        patterns = get_lexer_by_name(language).filenames
    except ClassNotFound:
        return language if re.fullmatch("[a-z0-9]{1,6}", language, re.ASCII) else "txt"
    suffixes = [pattern[2:] for pattern in patterns if re.fullmatch(r"\*\.\w+", pattern, re.ASCII)]
    return next((suffix for suffix in suffixes if suffix.lower() == language), (suffixes or ["txt"])[0])


def _numbered(name: str) -> Iterator[str]:
    """``index.html``, ``index-2.html``, ``index-3.html``, …"""
    yield name
    stem, dot, suffix = name.partition(".")
    yield from (f"{stem}-{number}{dot}{suffix}" for number in itertools.count(2))
