"""Templates that render every turn with a fixed pattern.

Text between « and » becomes target tokens; ``{content}`` stands for the text and images of a turn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

from llavactl.core.errors import ModelError
from llavactl.core.schema import Content, ImageSlot, Segment, Text, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKERS = re.compile(r"([«»]|\{content\})")


@dataclass(frozen=True)
class Style:
    """The patterns of a template.

    ``system`` is the default system prompt. ``opening`` is rendered first (``opening_without_system`` if the system
    prompt is empty), ``between`` before every question but the first, ``closing`` at the end of a conversation or
    ``generation_prompt`` before the answer to generate. ``stop`` ends an answer. ``required_tokens`` must be in the
    tokenizer: rendered as ordinary tokens, they could occur in any message.
    """

    system: str
    opening: str
    user: str
    assistant: str
    between: str = ""
    closing: str = ""
    generation_prompt: str = ""
    stop: str = "{eos}"
    opening_without_system: str | None = None
    required_tokens: tuple[str, ...] = ()


_CHAT = (
    "A chat between a curious {who} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {who}'s questions."
)

STYLES: Mapping[str, Style] = {
    "vicuna-v1": Style(
        system=_CHAT.format(who="user"),
        opening="{system} ",
        user="USER: {content} ASSISTANT:",
        assistant="« {content}{eos}»",
    ),
    "llava-v1": Style(
        system=_CHAT.format(who="human"),
        opening="{system} ",
        user="USER: {content} ASSISTANT:",
        assistant="« {content}{eos}»",
    ),
    # There is no end token: the model is trained to begin the next turn, and "###" stops generation.
    "vicuna-v0": Style(
        system=_CHAT.format(who="human"),
        opening="{system}\n\n",
        user="«###» Human: {content}\n",
        assistant="«### Assistant: {content}\n»",
        closing="«### »",
        generation_prompt="### Assistant:",
        stop="###",
    ),
    "llama-2": Style(
        system=(
            "You are a helpful language and vision assistant. "
            "You are able to understand the visual content that the user provides, "
            "and assist the user with a variety of tasks using natural language."
        ),
        opening="[INST] <<SYS>>\n{system}\n<</SYS>>\n\n",
        opening_without_system="[INST] ",
        between="{bos}[INST] ",
        user="{content} [/INST]",
        assistant="« {content} {eos}»",
    ),
    "chatml": Style(
        system="You are a helpful assistant.",
        opening="<|im_start|>system\n{system}<|im_end|>\n",
        user="<|im_start|>user\n{content}<|im_end|>\n",
        assistant="<|im_start|>assistant\n«{content}<|im_end|>»\n",
        generation_prompt="<|im_start|>assistant\n",
        stop="<|im_end|>",
        required_tokens=("<|im_start|>", "<|im_end|>"),
    ),
}


@dataclass(frozen=True)
class StyledTemplate:
    """The template of ``style``. A conversation's system turn replaces the default system prompt."""

    style: Style

    def render(
        self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, *, generate: bool = False
    ) -> list[Segment]:
        style = self.style
        self._check_tokens(tokenizer)
        system = next((turn.text for turn in turns if turn.role == "system"), style.system)
        values = _Values(system, *_special_tokens(tokenizer))
        opening = style.opening
        if not system and style.opening_without_system is not None:
            opening = style.opening_without_system
        segments = [*_segments(opening, values)]
        questions = 0
        for turn in turns:
            if turn.role == "user":
                segments += _segments(style.between if questions else "", values)
                segments += _segments(style.user, values, turn.content)
                questions += 1
            elif turn.role == "assistant":
                segments += _segments(style.assistant, values, turn.content)
        return [*segments, *_segments(style.generation_prompt if generate else style.closing, values)]

    def stop(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
        return (self.style.stop.format(**_Values("", *_special_tokens(tokenizer))._asdict()),)

    def _check_tokens(self, tokenizer: PreTrainedTokenizerBase) -> None:
        unknown = (None, tokenizer.unk_token_id)
        required = self.style.required_tokens
        if missing := [token for token in required if tokenizer.convert_tokens_to_ids(token) in unknown]:
            raise ModelError(
                f"the tokenizer has no token {' or '.join(missing)}, which the template requires",
                hint="use a template without special tokens, such as `language.template: vicuna-v1`",
            )


class _Values(NamedTuple):
    """The values of the names in patterns."""

    system: str
    bos: str
    eos: str


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    return str(tokenizer.bos_token or ""), str(tokenizer.eos_token)


def _segments(pattern: str, values: _Values, content: Sequence[Content] = ()) -> Iterator[Segment]:
    """``pattern`` with ``values`` and ``content`` as segments."""
    for part in _filled(pattern, values):
        if isinstance(part, Text):
            yield part
        else:
            yield from (Text(item, part) if isinstance(item, str) else ImageSlot() for item in content)


@lru_cache(maxsize=64)
def _filled(pattern: str, values: _Values) -> Sequence[Text | bool]:
    """The texts of ``pattern``; in place of the content, whether it is a target.

    The pattern is split before ``values`` are inserted, so markers in them are plain text.
    """
    filled: list[Text | bool] = []
    trained = False
    for part in _MARKERS.split(pattern):
        if part in ("«", "»"):
            trained = part == "«"
        elif part == "{content}":
            filled.append(trained)
        elif part:
            filled.append(Text(part.format(**values._asdict()), trained))
    return filled


def _template(name: str, options: Any) -> StyledTemplate:
    return StyledTemplate(STYLES[name])


vicuna_v1: Callable[[Any], StyledTemplate] = partial(_template, "vicuna-v1")
llava_v1: Callable[[Any], StyledTemplate] = partial(_template, "llava-v1")
vicuna_v0: Callable[[Any], StyledTemplate] = partial(_template, "vicuna-v0")
llama_2: Callable[[Any], StyledTemplate] = partial(_template, "llama-2")
chatml: Callable[[Any], StyledTemplate] = partial(_template, "chatml")
