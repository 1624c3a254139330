"""From a teacher's reply to the turns of a sample."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from random import Random
from typing import Literal

from llavactl.core.errors import DataError
from llavactl.teaching.spoken import refuse_chatter, without_thoughts, without_wrapping

Kind = Literal["conversation", "detail", "reasoning"]

_UNWRITABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffd]")
_MARK = re.compile(
    r"\A(?:[>\s-]|\d{1,3}[.)]\s)*(?P<head>#{1,6} *)?(?:\d{1,3}[.)] *)?(?P<bold>\*{1,3}|_{1,2})?(?:\d{1,3}[.)] *)?"
    r"(?P<role>question|answer|q|a)(?: ?#?\d{1,3})?"
    r"(?: ?:(?P=bold)|(?P=bold) ?:| ?:(?P<open>)|(?P=bold)(?=[ \t]*\n)|(?(head)(?=[ \t]*\n)|(?!)))",
    re.IGNORECASE,
)
"""``Question:`` or ``Answer:``, plain or in Markdown: ``**Question:**``, ``### Answer 2:``, ``1. Q:``."""

_FENCED = re.compile(r"^[ \t]*(?:```|~~~)", re.MULTILINE)


def turns(kind: Kind, reply: str, seed: str, questions: Sequence[str], *, exact: bool = False) -> list[tuple[str, str]]:
    """The (question, answer) pairs of a ``reply``.

    Conversation and reasoning are blocks ``Question:`` and ``Answer:`` separated by lines of ``===``; a detail's
    question is drawn from ``questions`` by ``seed``. Thinking before the reply and remarks to the user around it are
    removed; the reply of an ``exact`` teacher is taken unchanged.

    Raises:
        ChatterError: there are remarks to the user within the reply.
        DataError: the reply doesn't have this form, or is empty.
    """
    if not exact:
        reply = without_wrapping(without_thoughts(reply), label=kind == "detail")
    if (binary := _UNWRITABLE.search(reply)) is not None:
        raise DataError(f"the reply holds what is no text: {binary[0]!r}")
    if "<image>" in reply:
        raise DataError("the reply holds the tag <image>, which stands for a picture in a record")
    if not exact and _FENCED.search(reply):
        raise DataError("the reply has a code fence")
    if kind == "detail":
        if not reply.strip():
            raise DataError("the reply is empty")
        if not exact:
            refuse_chatter(reply.strip(), talk=False)
        return [(Random(seed).choice(questions), reply.strip())]
    found = [_block(block) for block in _blocks(reply)]
    roles = [role for role, _ in found]
    if not found or roles != ["question", "answer"] * (len(roles) // 2):
        raise DataError(f"the reply is not in blocks of Question and Answer: {reply[:60]!r}")
    said = [text for _, text in found]
    if not exact:
        refuse_chatter(said[-1], talk=True)
    if not all(said):
        raise DataError("a question or an answer is empty")
    return list(zip(said[::2], said[1::2], strict=True))


def _blocks(reply: str) -> Iterator[str]:
    """What stands between lines of ``===``; by lines, for a regex could be led to take hours over a hostile reply."""
    block: list[str] = []
    for line in [*reply.split("\n"), "==="]:
        bare = line.strip()
        if len(bare) < 3 or bare.strip("="):
            block.append(line)
        elif text := "\n".join(block).strip():
            yield text
            block = []
        else:
            block = []


def _block(text: str) -> tuple[str, str]:
    """The role in lower case, and the text; ("", "") if there is no marker."""
    found = _MARK.match(text)
    if found is None:
        return "", ""
    said = text[found.end() :].strip()
    if found["bold"] and found["open"] is not None:  # **Question: the whole line in bold**
        first, newline, rest = said.partition("\n")
        said = first.strip().removesuffix(found["bold"]) + newline + rest
    return {"q": "question", "a": "answer"}.get(role := found["role"].lower(), role), said.strip()
