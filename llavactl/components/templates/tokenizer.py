"""The chat template that the tokenizer itself carries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llavactl.core.errors import ModelError
from llavactl.core.schema import ImageSlot, Segment, Text, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "\ufdd2"
_SLOT = "\ufdd0"  # a Unicode noncharacter: never in a text, so it marks where an image goes while the template runs


class TokenizerTemplate:
    """Answers are found by writing the conversation up to each of them: no text is tokenised twice."""

    def __init__(self, options: Any) -> None:
        pass

    def render(
        self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, *, generate: bool = False
    ) -> list[Segment]:
        tag = None if _takes_text(tokenizer) else _tag(tokenizer)
        messages = [{"role": turn.role, "content": _items(turn, tag) if tag else _content(turn)} for turn in turns]
        segments: list[Segment] = []
        written = ""
        for index, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            asked = _write(tokenizer, messages[:index], True)
            said = _write(tokenizer, messages[: index + 1], False)
            answer = _after(said, asked)
            end = _end(answer, tokenizer)
            segments += [*_segments(_after(asked, written)), Text(answer[:end], trained=True), Text(answer[end:])]
            written = said
        if generate:
            segments += _segments(_after(_write(tokenizer, messages, True), written))
        return segments

    def stop(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
        """What the template writes after an answer, where that is a special token."""
        segments = self.render([Turn("user", ("a",)), Turn("assistant", ("b",))], tokenizer)
        answer = next(s.text for s in segments if isinstance(s, Text) and s.trained)
        specials = [token for token in tokenizer.all_special_tokens if answer.endswith(token)]
        return tuple(specials) or (str(tokenizer.eos_token),)


def _content(turn: Turn) -> str:
    return "".join(part.replace(_SLOT, "") if isinstance(part, str) else _SLOT for part in turn.content)


def _tag(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template of a vision-language model writes for an image."""
    return str(getattr(tokenizer, "image_token", None) or "<image>")


def _items(turn: Turn, tag: str) -> list[dict[str, str]]:
    """The turn as the templates of vision-language models want it; where an image goes is theirs to say."""
    said = turn.text.replace(_SLOT, "").replace(tag, tag[0] + _MARK + tag[1:]).strip()
    return [*({"type": "image"} for _ in turn.images), {"type": "text", "text": said}]


def _takes_text(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template writes a plain text; those of vision-language models may only write lists of items."""
    return _MARK in _write(tokenizer, [{"role": "user", "content": _MARK}], False)


def _write(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], generate: bool) -> str:
    if not tokenizer.chat_template:
        raise ModelError("this tokenizer has no chat template", hint="name one, such as `language.template: vicuna-v1`")
    from jinja2 import TemplateError

    try:
        written = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate))
    except TemplateError as error:
        raise ModelError(f"the tokenizer's chat template refuses this conversation: {error}") from error
    if messages and not isinstance(messages[-1]["content"], str):
        # Only the template's own tag is an image; one that somebody wrote was marked as text.
        written = written.replace(_tag(tokenizer), _SLOT).replace(_MARK, "")
    return written


def _after(text: str, start: str) -> str:
    if not text.startswith(start):
        raise ModelError(
            "the tokenizer's chat template writes earlier turns differently once later ones follow",
            hint="choose a named template: with this one, what is trained is not what is asked",
        )
    return text[len(start) :]


def _end(answer: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Where the trained part of ``answer`` ends: behind its last special token, which tells the model to stop."""
    ends = [answer.rfind(token) + len(token) for token in tokenizer.all_special_tokens if token in answer]
    return max(ends, default=len(answer))


def _segments(text: str) -> list[Segment]:
    first, *rest = text.split(_SLOT)
    segments: list[Segment] = [Text(first)]
    for piece in rest:
        segments += [ImageSlot(), Text(piece)]
    return segments
