"""From a teacher's reply to the turns of a sample."""

from __future__ import annotations

import re
from random import Random
from typing import Literal

from llavactl.core.errors import DataError

Kind = Literal["conversation", "detail", "reasoning"]

DETAIL_QUESTIONS = (
    "Describe this image in detail.",
    "What can be seen here? Tell me everything.",
    "Please give a thorough description of the picture.",
    "Walk me through what this image shows.",
    "Explain what is in the picture, as exactly as you can.",
    "Could you describe the contents of this image at length?",
    "What does the image show, and where?",
    "Write a detailed account of what you see.",
    "Tell me about this picture, leaving nothing out.",
    "How would you describe the image to somebody who can't see it?",
    "Take a close look at the image and describe it.",
    "Give a full description of the scene.",
    "What is there to be seen in this image? Be specific.",
    "Describe everything in the picture and its place.",
    "I would like a rich description of this image.",
    "Analyze the picture and say in detail what it contains.",
)
"""The question of a detailed description is drawn from these; the teacher writes the answer alone (LLaVA, table 13)."""

_BLOCK = re.compile(r"\s*(Question|Answer):\s*(.*?)\s*\Z", re.DOTALL)


def turns(kind: Kind, reply: str, seed: str) -> list[tuple[str, str]]:
    """The (question, answer) pairs of a ``reply``.

    Conversation and reasoning come as blocks ``Question:`` and ``Answer:`` with lines of ``===`` between.

    Raises:
        DataError: the reply is not of that form, or holds nothing.
    """
    if kind == "detail":
        if not reply.strip():
            raise DataError("the reply is empty")
        return [(Random(seed).choice(DETAIL_QUESTIONS), reply.strip())]
    blocks = [block for block in re.split(r"^\s*={3,}\s*$", reply, flags=re.MULTILINE) if block.strip()]
    found = [match.groups() for block in blocks if (match := _BLOCK.match(block))]
    roles = [role for role, _ in found]
    if not found or len(found) != len(blocks) or roles != ["Question", "Answer"] * (len(roles) // 2):
        raise DataError(f"the reply is not in blocks of Question and Answer: {reply[:60]!r}")
    if not all(text for _, text in found):
        raise DataError("a question or an answer is empty")
    said = [text for _, text in found]
    return list(zip(said[::2], said[1::2], strict=True))
