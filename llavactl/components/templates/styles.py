"""The templates that write every turn in one fixed way, as a table.

What stands between « and » is trained; ``{said}`` is what the turn says, its images in their places.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from llavactl.core.errors import ModelError
from llavactl.core.schema import Content, ImageSlot, Segment, Text, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKS = re.compile(r"([«»]|\{said\})")


@dataclass(frozen=True)
class Style:
    """How a conversation is written.

    ``system`` is said where the conversation has no system turn of its own. ``opening`` comes first (``bare`` in
    its place where the system turn is empty), ``between`` before every question but the first, ``closing``
    at the end; ``cue`` is what an answer is asked for with. ``stop`` ends an answer. ``tokens`` are those that
    the tokenizer must have: spelled out, anyone could write them.
    """

    system: str
    opening: str
    user: str
    assistant: str
    between: str = ""
    closing: str = ""
    cue: str = ""
    stop: str = "{eos}"
    bare: str | None = None
    tokens: tuple[str, ...] = ()


_CHAT = (
    "A chat between a curious {who} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {who}'s questions."
)

STYLES: Mapping[str, Style] = {
    "vicuna-v1": Style(
        system=_CHAT.format(who="user"),
        opening="{system} ",
        user="USER: {said} ASSISTANT:",
        assistant="« {said}{eos}»",
    ),
    "llava-v1": Style(
        system=_CHAT.format(who="human"),
        opening="{system} ",
        user="USER: {said} ASSISTANT:",
        assistant="« {said}{eos}»",
    ),
    # Without an end token: the model learns to begin the next turn, and "###" stops it.
    "vicuna-v0": Style(
        system=_CHAT.format(who="human"),
        opening="{system}\n\n",
        user="«###» Human: {said}\n",
        assistant="«### Assistant: {said}\n»",
        closing="«### »",
        cue="### Assistant:",
        stop="###",
    ),
    "llama-2": Style(
        system=(
            "You are a helpful language and vision assistant. "
            "You are able to understand the visual content that the user provides, "
            "and assist the user with a variety of tasks using natural language."
        ),
        opening="[INST] <<SYS>>\n{system}\n<</SYS>>\n\n",
        bare="[INST] ",
        between="{bos}[INST] ",
        user="{said} [/INST]",
        assistant="« {said} {eos}»",
    ),
    "chatml": Style(
        system="You are a helpful assistant.",
        opening="<|im_start|>system\n{system}<|im_end|>\n",
        user="<|im_start|>user\n{said}<|im_end|>\n",
        assistant="<|im_start|>assistant\n«{said}<|im_end|>»\n",
        cue="<|im_start|>assistant\n",
        stop="<|im_end|>",
        tokens=("<|im_start|>", "<|im_end|>"),
    ),
}


@dataclass(frozen=True)
class StyledTemplate:
    """The template of ``style``. A system turn of the conversation's own takes the default's place."""

    style: Style

    def render(
        self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, *, generate: bool = False
    ) -> list[Segment]:
        style = self.style
        self._check(tokenizer)
        system = next((turn.text for turn in turns if turn.role == "system"), style.system)
        words = {"system": system, **_ends(tokenizer)}
        opening = style.opening if system or style.bare is None else style.bare
        segments = [*_written(opening, words)]
        asked = 0
        for turn in turns:
            if turn.role == "user":
                segments += _written(style.between if asked else "", words)
                segments += _written(style.user, words, turn.content)
                asked += 1
            elif turn.role == "assistant":
                segments += _written(style.assistant, words, turn.content)
        return [*segments, *_written(style.cue if generate else style.closing, words)]

    def stop(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
        return (self.style.stop.format(**_ends(tokenizer)),)

    def _check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        unknown = (None, tokenizer.unk_token_id)
        if missing := [each for each in self.style.tokens if tokenizer.convert_tokens_to_ids(each) in unknown]:
            raise ModelError(
                f"this tokenizer has no token {' or '.join(missing)}, which the template is made of",
                hint="a template of words will do, such as `language.template: vicuna-v1`",
            )


def _ends(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    return {"bos": str(tokenizer.bos_token or ""), "eos": str(tokenizer.eos_token)}


def _written(pattern: str, words: Mapping[str, str], said: Sequence[Content] = ()) -> Iterator[Segment]:
    """``pattern`` as segments. It is taken apart before anything is put in, so that no word can be a mark."""
    trained = False
    for part in _parts(pattern):
        if part in ("«", "»"):
            trained = part == "«"
        elif part == "{said}":
            yield from (Text(each, trained) if isinstance(each, str) else ImageSlot() for each in said)
        elif part:
            yield Text(part.format(**words), trained)


@cache
def _parts(pattern: str) -> Sequence[str]:
    return _MARKS.split(pattern)


def _template(name: str, options: Any) -> StyledTemplate:
    return StyledTemplate(STYLES[name])


vicuna_v1: Callable[[Any], StyledTemplate] = partial(_template, "vicuna-v1")
llava_v1: Callable[[Any], StyledTemplate] = partial(_template, "llava-v1")
vicuna_v0: Callable[[Any], StyledTemplate] = partial(_template, "vicuna-v0")
llama_2: Callable[[Any], StyledTemplate] = partial(_template, "llama-2")
chatml: Callable[[Any], StyledTemplate] = partial(_template, "chatml")
