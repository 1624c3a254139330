"""The HTML in a model's answer, and the kinds of elements that are compared."""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_ANSWER = 100_000
"""Characters; a longer answer counts as having no HTML. Pages of the task have a few hundred."""

MAX_ELEMENTS = 1000
"""The most elements of an answer that are compared; all are counted."""

MAX_TEXT = 200
"""The most characters of an element's text that are compared."""

KINDS = {
    **dict.fromkeys(("h1", "h2", "h3", "h4", "h5", "h6"), "heading"),
    **dict.fromkeys(("input", "textarea", "select"), "input"),
    **{tag: tag for tag in ("nav", "p", "button", "label", "li", "img")},
}
"""The kind of each compared element by its tag; other elements only affect the layout."""

BUTTON_TYPES = frozenset({"button", "reset", "submit"})
"""Types of ``input`` that are buttons."""

TEXT_KINDS = frozenset({"heading", "nav", "button", "label", "li"})
"""The kinds with words on the sketch."""

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})([^\n]*)\n(.*?)(?:^[ \t]*\1|\Z)", re.DOTALL | re.MULTILINE)
_TAG = re.compile("<[a-zA-Z!]")


@dataclass(frozen=True)
class Found:
    """An element of an answer's page: its ``kind``, ``text`` and visible box (left, top, right, bottom) in pixels."""

    kind: str
    text: str
    box: tuple[float, float, float, float]


def html_in(answer: str) -> str | None:
    """The HTML in ``answer``: its first code block with a tag, or the text from the first tag on; None if absent."""
    if len(answer) > MAX_ANSWER:
        return None
    blocks = [match[3] for match in _FENCE.finditer(answer) if _TAG.search(match[3])]
    if blocks:
        return blocks[0]
    tag = _TAG.search(answer)
    return answer[tag.start() :] if tag else None
