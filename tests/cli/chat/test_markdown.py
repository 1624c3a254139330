"""Markdown on a terminal while it is generated: nothing is lost, whatever the pieces, and nothing is overwritten."""

from __future__ import annotations

import io
import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from llavactl.cli.chat.markdown import MarkdownPrinter
from llavactl.core.control_characters import visible

SGR = re.compile(r"\x1b\[[0-9;]*m")
SNIPPETS = [
    "**", "*", "***", "`", "``", "```", "```python\n", "~~~\n", "\n", "\n\n", " ", "  ", "word", "two words",
    "| a | b |\n", "|---|:-:|\n", "|", "- ", "* ", "1. ", "# ", ">", "\t", "中文字", "👩\u200d👩\u200d👧", "é", "\\",
    "\\*", "x" * 50, "$a_1*b$", "<br>", "---", "\x1b[2J", "\r", "2**3**4", "'''", "\u202e", "[a](b)", "f(x): y",
]  # fmt: skip


def printed(pieces: list[str], width: int = 30) -> str:
    file = io.StringIO()
    printer = MarkdownPrinter(Console(file=file, force_terminal=True, width=width, color_system="standard"))
    for piece in pieces:
        printer.write(piece)
    printer.finish()
    return file.getvalue()


def plain(text: str, width: int = 30) -> str:
    return SGR.sub("", printed([text], width))


def without_markers(text: str) -> str:
    return re.sub(r"[\s*`#>│•\-+|─┼:]", "", text)


@settings(max_examples=60)
@given(st.lists(st.sampled_from(SNIPPETS), max_size=25).map("".join), st.integers(1, 40), st.lists(st.integers(0, 99)))
def test_nothing_is_lost_and_pieces_make_no_difference(text: str, width: int, cuts: list[int]) -> None:
    whole = plain(text, width)
    assert without_markers(whole) == without_markers(visible(text))
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", whole), "the cursor is never moved"
    ends = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    pieces = [text[start:end] for start, end in pairwise(ends)]
    for split in (pieces, list(text)):
        assert SGR.sub("", printed(split, width)) == whole
    assert not whole or whole.endswith("\n")


@pytest.mark.parametrize(
    ("text", "shown", "style"),
    [
        ("a **b c** d", "a b c d", "1"), ("*b*.", "b.", "3"), ("`x**y**`", "x**y**", "36"), ("# Title", "Title", "1;4"),
        ("是**重点**的", "是重点的", "1"), ("***b***", "b", "1;3"),
    ],
)  # fmt: skip
def test_markers_become_styles(text: str, shown: str, style: str) -> None:
    assert plain(text) == f"{shown}\n"
    assert f"\x1b[{style}m" in printed([text])


@pytest.mark.parametrize(
    "text",
    [
        "2**3 + 4**5",
        "a * b * c",
        "__init__",
        "snake_case",
        r"\(a_1 \* b\)",
        "<b>x</b>",
        "[a](http://b)",
        "**open",
        "a`b",
    ],
)
def test_other_text_is_unchanged(text: str) -> None:
    assert plain(text) == f"{text}\n"


def test_a_line_is_wrapped_between_words_with_a_hanging_indent() -> None:
    assert plain("- one two three four", 12) == "• one two\n  three four\n"


def test_text_is_printed_as_soon_as_its_style_is_known() -> None:
    file = io.StringIO()
    printer = MarkdownPrinter(Console(file=file, force_terminal=True, width=80))
    for piece, expected in (
        ("some wor", "some"), ("ds and **bo", "some words and"), ("ld** x y", "some words and bold x"),
        ("\n```js\nlet a", "some words and bold x y\n```js\n"), ("\nlet", "some words and bold x y\n```js\nlet a\n"),
    ):  # fmt: skip
        printer.write(piece)
        assert SGR.sub("", file.getvalue()).rstrip(" ") == expected


TABLE = "| a | b |\n|---|--:|\n| **x** | 1 |\n| long cell | 20 |\n"


def test_a_table_is_aligned_if_it_fits() -> None:
    assert plain(TABLE, 40).splitlines() == ["a         │  b", "──────────┼───", "x         │  1", "long cell │ 20"]
    assert [line.rstrip() for line in plain(TABLE, 12).splitlines()][:3] == ["| a | b |", "|---|--:|", "| x | 1 |"]


def test_code_is_highlighted_and_complete() -> None:
    code = '```python\ndef f():\n    """doc\n    more"""\n' + "x = 1\n" * 100
    assert plain(code) == code
    assert "\x1b[94mdef" in printed([code])
    assert plain("```nosuch\n<x>\n```\nafter") == "```nosuch\n<x>\n```\nafter\n"
