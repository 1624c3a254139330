"""Parsing of a teacher's reply into turns."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from random import Random
from typing import Literal

from llavactl.core.errors import DataError
from llavactl.teaching.cleanup import reject_chatter, without_thinking, without_wrapping

Kind = Literal["conversation", "detail", "reasoning"]

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffd]")
_MARK = re.compile(
    r"\A(?:[>\s-]|\d{1,3}[.)]\s)*(?P<head>#{1,6} *)?(?:\d{1,3}[.)] *)?(?P<bold>\*{1,3}|_{1,2})?(?:\d{1,3}[.)] *)?"
    r"(?P<role>question|answer|q|a)(?: ?#?\d{1,3})?"
    r"(?: ?:(?P=bold)|(?P=bold) ?:| ?:(?P<open>)|(?P=bold)(?=[ \t]*\n)|(?(head)(?=[ \t]*\n)|(?!)))",
    re.IGNORECASE,
)
"""``Question:`` or ``Answer:``, plain or in Markdown: ``**Question:**``, ``### Answer 2:``, ``1. Q:``."""

_FENCED = re.compile(r"^[ \t]*(?:```|~~~)", re.MULTILINE)


def parse_turns(
    kind: Kind, reply: str, seed: str, questions: Sequence[str], *, exact: bool = False
) -> list[tuple[str, str]]:
    """The (question, answer) pairs of a ``reply``.

    Conversation and reasoning are blocks ``Question:`` and ``Answer:`` separated by lines of ``===``. The question of a
    detail is drawn from ``questions`` with ``seed``. Thinking before the reply and remarks to the user around it are
    removed; the reply of an ``exact`` teacher is not changed.

    Raises:
        ChatterError: the reply contains remarks to the user.
        DataError: the reply is empty or does not have this form.
    """
    if not exact:
        reply = without_wrapping(without_thinking(reply), label=kind == "detail")
    if (control := _CONTROL.search(reply)) is not None:
        raise DataError(f"the reply contains a control character: {control[0]!r}")
    if "<image>" in reply:
        raise DataError("the reply contains <image>, the placeholder of an image")
    if not exact and _FENCED.search(reply):
        raise DataError("the reply contains a code fence")
    if kind == "detail":
        if not reply.strip():
            raise DataError("the reply is empty")
        if not exact:
            reject_chatter(reply.strip(), talk=False)
        return [(Random(seed).choice(questions), reply.strip())]
    blocks = [_parse_block(block) for block in _blocks(reply)]
    roles = [role for role, _ in blocks]
    if not blocks or roles != ["question", "answer"] * (len(roles) // 2):
        raise DataError(f"the reply does not consist of Question and Answer blocks: {reply[:60]!r}")
    texts = [text for _, text in blocks]
    if not exact:
        reject_chatter(texts[-1], talk=True)
    if not all(texts):
        raise DataError("a question or an answer is empty")
    return list(zip(texts[::2], texts[1::2], strict=True))


def _blocks(reply: str) -> Iterator[str]:
    """The text between lines of ``===``, split by lines: a regex could take hours on a malicious reply."""
    block: list[str] = []
    for line in [*reply.split("\n"), "==="]:
        stripped = line.strip()
        if len(stripped) < 3 or stripped.strip("="):
            block.append(line)
        elif text := "\n".join(block).strip():
            yield text
            block = []
        else:
            block = []


def _parse_block(text: str) -> tuple[str, str]:
    """(role in lower case, text); ("", "") without a marker."""
    marker = _MARK.match(text)
    if marker is None:
        return "", ""
    content = text[marker.end() :].strip()
    if marker["bold"] and marker["open"] is not None:  # **Question: the entire line in bold**
        first, newline, rest = content.partition("\n")
        content = first.strip().removesuffix(marker["bold"]) + newline + rest
    return {"q": "question", "a": "answer"}.get(role := marker["role"].lower(), role), content.strip()
