"""The comparison without a browser: elements and containers of two pages as sequences."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import unescape

from llavactl_sketches.answers import BUTTON_TYPES, KINDS, MAX_ELEMENTS, Found
from llavactl_sketches.matching import Grade, similarity, text_grade
from llavactl_sketches.pages import VOID_TAGS

CONTAINERS = frozenset({"section", "div", "aside", "article", "form"})
"""Elements that lay out others: their start and end tags are part of the sequence."""

_NOWHERE = (0.0, 0.0, 0.0, 0.0)


_TOKEN = re.compile(
    r"<!--.*?(?:-->|\Z)|<(?P<raw>script|style|title)\b.*?(?:</(?P=raw)\s*>|\Z)"
    r"|<(?P<end>/?)(?P<tag>[a-z][a-z0-9]*)(?P<attributes>[^<>]*)>",
    re.DOTALL | re.IGNORECASE,
)
"""A comment, a script, or a tag. ``html.parser`` takes minutes for 20 kB of unclosed tags; this is linear."""

_ATTRIBUTE = re.compile(r"""\b(type|value)\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'>]+))""", re.IGNORECASE)


def read_dom(html: str) -> list[Found]:
    """The elements of ``html`` in document order; a container is two, ``<div>`` and ``</div>``. Boxes are empty.

    Any string is valid. Quoted attributes with ``<`` or ``>`` aren't recognized.
    """
    kinds: list[str] = []
    texts: list[str] = []
    opened: list[tuple[str, int]] = []  # tags and indexes of the elements around a text, innermost last
    end = 0
    for token in _TOKEN.finditer(html):
        if opened:
            texts[opened[-1][1]] += html[end : token.start()]
        end = token.end()
        tag = (token["tag"] or "").lower()
        if tag in CONTAINERS:
            opened.clear()
            kinds.append(f"<{token['end']}{tag}>")
            texts.append("")
        elif token["end"] and (tag in KINDS or tag == "ul"):
            while opened and opened.pop()[0] != tag:
                pass
        elif tag in KINDS:
            attributes = {name.lower(): "".join(values) for name, *values in _ATTRIBUTE.findall(token["attributes"])}
            is_button = tag == "input" and attributes.get("type", "").lower() in BUTTON_TYPES
            kinds.append("button" if is_button else KINDS[tag])
            texts.append(attributes.get("value", "") if is_button else "")
            if tag not in VOID_TAGS:
                opened.append((tag, len(kinds) - 1))
    if opened:
        texts[opened[-1][1]] += html[end:]
    return [Found(kind, unescape(text), _NOWHERE) for kind, text in zip(kinds, texts, strict=True)]


def compare_sequences(reference: Sequence[Found], answer: Sequence[Found]) -> Grade:
    """The longest common subsequence of kinds and container tags; among equals, the one with the most similar texts.

    ``layout`` is twice its length over the sum of both lengths.
    """
    pairs = _aligned(reference, answer[:MAX_ELEMENTS])
    total = len(reference) + len(answer)
    return Grade(2 * len(pairs) / total if total else 1.0, text_grade(reference, answer, pairs))


def _aligned(reference: Sequence[Found], answer: Sequence[Found]) -> list[tuple[Found, Found]]:
    """The pairs of the alignment, last first."""
    tie = 1 / (2 * len(reference) + 2)  # all texts together count less than one element
    best = [[0.0] * (len(answer) + 1) for _ in range(len(reference) + 1)]
    for i, wanted in enumerate(reference, 1):
        for j, given in enumerate(answer, 1):
            both = 1 + tie * similarity(wanted.text, given.text) if wanted.kind == given.kind else 0.0
            best[i][j] = max(best[i - 1][j], best[i][j - 1], best[i - 1][j - 1] + both if both else 0.0)
    pairs: list[tuple[Found, Found]] = []
    i, j = len(reference), len(answer)
    while i and j:
        if best[i][j] == best[i - 1][j]:
            i -= 1
        elif best[i][j] == best[i][j - 1]:
            j -= 1
        else:
            i, j = i - 1, j - 1
            pairs.append((reference[i], answer[j]))
    return pairs
