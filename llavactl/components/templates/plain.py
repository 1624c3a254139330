"""Stage 1's template: the image and its caption."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llavactl.core.schema import ImageSlot, Segment, Text, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PlainTemplate:
    """BOS, image, caption, newline. Caption and newline are target tokens; user text is left out; there is no EOS."""

    def __init__(self, options: Any) -> None:
        pass

    def render(
        self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, *, generate: bool = False
    ) -> list[Segment]:
        segments: list[Segment] = []
        for turn in turns:
            segments += [ImageSlot() for _ in turn.images]
            if turn.role == "assistant":
                segments.append(Text(turn.text + "\n", trained=True))
        return segments

    def stop(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
        return ("\n",)
