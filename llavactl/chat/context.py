"""Fits a conversation into the model's context: the oldest turns are left out, their images are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llavactl.core.errors import DataError
from llavactl.core.schema import Content, Turn

if TYPE_CHECKING:
    from llavactl.chat.assistant import Assistant
    from llavactl.core.schema import Encoded

FREE_SHARE = 4
"""When turns are left out, at least 1 / ``FREE_SHARE`` of the context becomes free.

Otherwise each further question would leave out more turns, and its whole prompt would be processed again.
"""


def context_length(language: Any) -> int | None:
    """The maximum number of tokens of prompt and answer together; None without a limit."""
    limit = getattr(language.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def fit(assistant: Assistant, turns: Sequence[Turn], left_out: int, max_new_tokens: int) -> tuple[Encoded, int]:
    """The prompt of ``turns`` that fits into the context, and how many of its oldest turns are left out.

    ``left_out`` is the number that is left out already. The system prompt and the last question are always kept; only
    whole exchanges (a question and its answer) are left out.

    Raises:
        DataError: the last question and the images alone don't fit.
    """
    limit = context_length(assistant.model.language)
    if limit is None:
        return assistant.prompt(without_oldest(turns, left_out)), left_out
    questions = [index for index, turn in enumerate(after_system(turns)) if turn.role == "user"]
    starts = [left_out, *(index for index in questions if index > left_out)]
    free, tokens = min(max_new_tokens, limit // FREE_SHARE), 0
    for start in starts:
        kept = without_oldest(turns, start)
        tokens = assistant.min_tokens(kept)
        if tokens < limit:
            prompt = assistant.prompt(kept)
            tokens = len(prompt)
            if tokens + free <= limit or (start == starts[-1] and tokens < limit):
                return prompt, start
        free = limit // FREE_SHARE
    raise DataError(
        f"the question and its images have at least {tokens:,} tokens, but the model's context is {limit:,}",
        hint="ask a shorter question, or about fewer images, in a new conversation",
    )


def check_fits(assistant: Assistant, turns: Sequence[Turn], what: str) -> None:
    """Raises a DataError that names ``what`` unless the prompt of ``turns`` leaves context for an answer."""
    limit = context_length(assistant.model.language)
    if limit is None:
        return
    tokens = assistant.min_tokens(turns)
    if tokens < limit:
        tokens = len(assistant.prompt(turns))
    if tokens >= limit:
        raise DataError(
            f"{what} and its images have at least {tokens:,} tokens, but the model's context is {limit:,}",
            hint="shorten it, or use a model with a longer context",
        )


def without_oldest(turns: Sequence[Turn], count: int) -> tuple[Turn, ...]:
    """``turns`` without the first ``count`` after the system prompt; their images move to the next question."""
    rest = after_system(turns)
    system, dropped, kept = turns[: len(turns) - len(rest)], rest[:count], rest[count:]
    images: tuple[Content, ...] = tuple(part for turn in dropped for image in turn.images for part in (image, "\n"))
    if images:
        kept = [Turn("user", (*images, *kept[0].content)), *kept[1:]]
    return (*system, *kept)


def after_system(turns: Sequence[Turn]) -> Sequence[Turn]:
    """``turns`` without the system prompt, if they begin with one."""
    return turns[1:] if turns and turns[0].role == "system" else turns
