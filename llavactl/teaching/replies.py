"""From a teacher's reply to the turns of a sample."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from random import Random
from typing import Literal

from llavactl.core.errors import DataError

Kind = Literal["conversation", "detail", "reasoning"]

_THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_UNWRITABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffd]")


def turns(kind: Kind, reply: str, seed: str, questions: Sequence[str]) -> list[tuple[str, str]]:
    """The (question, answer) pairs of a ``reply``.

    Conversation and reasoning come as blocks ``Question:`` and ``Answer:`` with lines of ``===`` between; a detail's
    question is drawn from ``questions`` by ``seed``. What a model thinks aloud first is no part of its reply.

    Raises:
        DataError: the reply is not of that form, or holds nothing.
    """
    reply = _THOUGHT.sub("", reply)
    if (binary := _UNWRITABLE.search(reply)) is not None:
        raise DataError(f"the reply holds what is no text: {binary[0]!r}")
    if "<image>" in reply:
        raise DataError("the reply holds the tag <image>, which stands for a picture in a record")
    if kind == "detail":
        if not reply.strip():
            raise DataError("the reply is empty")
        return [(Random(seed).choice(questions), reply.strip())]
    found = [_block(block) for block in _blocks(reply)]
    roles = [role for role, _ in found]
    if not found or roles != ["Question", "Answer"] * (len(roles) // 2):
        raise DataError(f"the reply is not in blocks of Question and Answer: {reply[:60]!r}")
    if not all(text for _, text in found):
        raise DataError("a question or an answer is empty")
    said = [text for _, text in found]
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
    role, colon, said = text.partition(":")
    return (role, said.strip()) if colon and role in ("Question", "Answer") else ("", "")
