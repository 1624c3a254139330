"""``llavactl chat``: answers one prompt, a batch of prompts, or the turns of a conversation."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llavactl.chat.context import check_fits
from llavactl.chat.conversation import Conversation
from llavactl.chat.inputs import BatchRecord, user_content
from llavactl.chat.loading import Dtype, load_assistant
from llavactl.core.schema import ImageRef, Turn
from llavactl.model.folder import latest_model, newest_preview
from llavactl.model.generate import Sampling
from llavactl.model.imported import resolve

if TYPE_CHECKING:
    from llavactl.chat.assistant import Assistant
    from llavactl.model.quantized import Bits
    from llavactl.recipe.frame import Outline

log = logging.getLogger(__name__)

BATCH_SIZE = 8
"""Prompts per forward pass with ``--batch``."""


@dataclass(frozen=True)
class ChatReport:
    """One answer."""

    answer: str
    prompt: str
    images: tuple[str, ...]
    model: str


def open_chat(
    recipe: Outline | None,
    model: str | None = None,
    template: str | None = None,
    *,
    dtype: Dtype | None = None,
    quantize: Bits | None = None,
    compiled: bool = False,
) -> Conversation:
    """A conversation with ``model`` (in any supported format), by default the newest of the recipe's run.

    This is the newest preview of a stage in training, otherwise the model of the last finished stage. The other
    arguments are those of ``load_assistant``.
    """
    if model is None:
        assert recipe is not None
        preview = newest_preview(recipe.run_dir)
        if preview is not None:
            log.info("%s: weights of a stage that is in training or was interrupted", preview)
        folder = preview or latest_model(recipe.run_dir)
    else:
        folder = resolve(model, recipe)
    return Conversation(load_assistant(folder, template=template, dtype=dtype, quantize=quantize, compiled=compiled))


def explanation(conversation: Conversation) -> dict[str, Any]:
    """The maps of the last answer, for JSON.

    Raises:
        DataError: there is no image.
    """
    from llavactl.chat.explain import explain_last

    return explain_last(conversation).document()


def answer_prompt(
    conversation: Conversation, prompt: str, images: Sequence[ImageRef], sampling: Sampling
) -> ChatReport:
    """Asks one question and returns the complete answer."""
    answer = "".join(conversation.ask(*user_content(prompt, images), sampling=sampling)).strip()
    return ChatReport(answer, prompt, tuple(image.name for image in images), conversation.assistant.name)


def answer_batch(
    assistant: Assistant, records: Sequence[BatchRecord], sampling: Sampling, *, system: str = ""
) -> list[dict[str, Any]]:
    """``records`` in order, each with its ``answer``; ``system`` replaces the template's system prompt.

    Raises:
        DataError: a prompt exceeds the model's context; raised before any is answered.
    """
    answers: list[str] = []
    first = (Turn("system", (system,)),) * bool(system)
    for number, (_, content) in enumerate(records, 1):
        check_fits(assistant, (*first, Turn("user", content)), f"prompt {number} of the batch")
    for start in range(0, len(records), BATCH_SIZE):
        conversations = [(*first, Turn("user", content)) for _, content in records[start : start + BATCH_SIZE]]
        answers += assistant.answer(conversations, sampling)
    return [{**record, "answer": answer} for (record, _), answer in zip(records, answers, strict=True)]
