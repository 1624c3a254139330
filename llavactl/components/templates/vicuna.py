"""Vicuna's conversation (FastChat's v1.1), as LLaVA v1.5 trains it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llavactl.core.schema import ImageSlot, Segment, Text, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


class VicunaV1:
    """``SYSTEM USER: question ASSISTANT: answer</s>USER: …``; a conversation's own system turn takes SYSTEM's place."""

    def __init__(self, options: Any) -> None:
        pass

    def render(
        self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, *, generate: bool = False
    ) -> list[Segment]:
        system = [turn.text for turn in turns if turn.role == "system"]
        segments: list[Segment] = [Text((system[0] if system else SYSTEM) + " ")]
        for turn in turns:
            if turn.role == "user":
                segments.append(Text("USER: "))
                segments += [Text(part) if isinstance(part, str) else ImageSlot() for part in turn.content]
                segments.append(Text(" ASSISTANT:"))
            elif turn.role == "assistant":
                segments.append(Text(f" {turn.text}{tokenizer.eos_token}", trained=True))
        return segments

    def stop(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
        return (str(tokenizer.eos_token),)
